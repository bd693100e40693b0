"""A page in the browser to sample images from a prior, given an image's condition.

python scripts/sample_conditional.py -r logs/<run>
python scripts/sample_conditional.py -r logs/<run> --ignore_base_data \\
    data='{target: main.DataModuleFromConfig, params: {batch_size: 1, validation: {target: \\
    taming.data.ade20k.Examples}}}'

It samples given a class, segmentation, depth map or place, completes images from above, and slides
a window over large images. Without a condition, or with classes, --ignore_base_data alone will do.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.data.utils import custom_collate
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.sampling import Progress, condition_windows, paste, upper_part
from taming.modules.transformer.generate import SamplingParams
from taming.pictures import to_picture
from taming.run import cli

logger = logging.getLogger("taming.sample_conditional")

PAGE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Wish:
    """A request of the page.

    Attributes:
        split: Data set of the example; empty without data.
        index: Number of the example.
        label: Class to sample, of a prior over classes.
        scale: Size of the image to sample; 1 is the example's own, or the one trained on.
        known: Share of the example's reconstruction, from above, that stays.
        temperature: Divides the logits; above 0.
        top_k: Sample among the k likeliest tokens.
        greedy: 1 takes the likeliest token instead, 0 samples.
        every: Sites between two pictures.
        seed: Of the random numbers.
    """

    split: str = ""
    index: int = 0
    label: int = 0
    scale: float = 1.0
    known: float = 0.0
    temperature: float = 1.0
    top_k: int = 100
    greedy: int = 0
    every: int = 32
    seed: int = 0

    @classmethod
    def read(cls, query: str) -> Wish:
        """Read a query string.

        Raises:
            ValueError: A value is of the wrong type or out of range.
        """
        given = {k: v for k, v in parse_qsl(query) if k in cls.__dataclass_fields__}
        wish = cls(**{k: type(getattr(cls, k))(v) for k, v in given.items()})
        if not (0 < wish.scale <= 8 and 0 <= wish.known <= 1 and wish.every >= 1):
            raise ValueError("scale must be in (0, 8], known in [0, 1], every at least 1")
        return wish


@dataclass(frozen=True)
class Studio:
    """A prior and its data.

    Attributes:
        model: The prior, in eval mode.
        datasets: Data sets by name; may be empty unless the condition is an image.
        step: Steps that the prior was trained for.
        busy: Held while a request is answered.
    """

    model: Net2NetTransformer
    datasets: Mapping[str, Any]
    step: int
    busy: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.kind == "image" and not self.datasets:
            raise ValueError("this prior's condition is an image: name a data set with data=...")

    @property
    def kind(self) -> str:
        """Kind of the condition: ``none``, ``class`` or ``image``."""
        if self.model.be_unconditional:
            return "none"
        if self.model.n_classes is not None:
            return "class"
        if self.model.cond_stage_key.startswith("objects_"):
            raise ValueError("the condition is a layout of objects: use make_scene_samples.py")
        return "image"

    def describe(self) -> dict[str, Any]:
        """Return the facts that the page shows."""
        return {
            "kind": self.kind,
            "condition": "" if self.kind == "none" else self.model.cond_stage_key,
            "classes": self.model.n_classes or 0,
            "splits": {name: len(data) for name, data in sorted(self.datasets.items())},
            "grid": self.model.grid,
            "step": self.step,
        }

    def example(self, wish: Wish) -> tuple[Tensor, Tensor] | None:
        """Return image and condition, each (1, C, H, W), or a label (1,); None if not wished."""
        if not wish.split and self.kind != "image":
            return None
        if wish.split not in self.datasets or not 0 <= wish.index < len(self.datasets[wish.split]):
            raise ValueError(f"there is no example {wish.index} of {wish.split!r}")
        torch.manual_seed(wish.index)  # the same crop each time
        batch = custom_collate([self.datasets[wish.split][wish.index]])
        x, c = (part.to(self.model.device) for part in self.model.get_xc(batch))
        return self._scaled(x, wish.scale), self._scaled(c, wish.scale)

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        """Scale an image (1, C, H, W) to whole sites; return a label (1,) unchanged."""
        if x.ndim != 4:
            return x
        factor = self.model.first_stage_model.factor
        size = [max(round(side * scale / factor), 1) * factor for side in x.shape[2:]]
        if x.shape[1] > 3:  # label maps have no values in between
            return F.interpolate(x, size, mode="nearest-exact")
        return F.interpolate(x, size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def show(self, wish: Wish) -> dict[str, str]:
        """Return pictures of the example, as data URLs by name."""
        if (example := self.example(wish)) is None:
            return {}
        x, c = example
        x_rec = self.model.decode_codes(self.model.encode_codes(x))
        pictures = {"image": self.model.show(x), "reconstruction": self.model.show(x_rec)}
        if self.kind == "image":
            pictures[self.model.cond_stage_key] = self._coloured(c)
        return {name: data_url(picture[0]) for name, picture in pictures.items()}

    def _coloured(self, c: Tensor) -> Tensor:
        """Show a condition (1, C, H, W) in three channels."""
        low, high = c.amin(), c.amax()
        if c.shape[1] == 1:
            return (2 * (c - low) / (high - low).clamp(min=1e-8) - 1).expand(-1, 3, -1, -1)
        return c if c.shape[1] == 3 else self.model.cond_stage_model.to_rgb(c)

    @torch.no_grad()
    def sample(self, wish: Wish, send: Callable[[dict[str, Any]], None]) -> None:
        """Sample an image; send the number of finished sites, that of all, and the picture."""
        example, model = self.example(wish), self.model
        if example is None:
            rows, columns = (max(round(side * wish.scale), 1) for side in model.grid)
            codes, share = model.empty_codes(1, (rows, columns)), 0.0
        else:
            codes, share = model.encode_codes(example[0]), wish.known
        grid = codes.shape[1], codes.shape[2]
        given, known = model.decode_codes(codes), upper_part(share, grid)
        if example is not None and self.kind == "image":
            condition = condition_windows(model, example[1], grid)
        else:
            label = str(wish.label) if self.kind == "class" else None
            tokens = cli.labels_of(model, label) or [model.sos_token]
            condition = torch.tensor([tokens], device=model.device)  # (1, 1)
        sent, sites = int(known.sum()), grid[0] * grid[1]

        def send_picture(done: int, codes: Tensor) -> None:
            picture = model.show(paste(model.decode_codes(codes), given, known))
            send({"done": done, "of": sites, "picture": data_url(picture[0])})

        def follow(progress: Progress) -> None:
            nonlocal sent
            if sent + wish.every <= (done := progress.sites()) < sites:
                sent = done
                send_picture(sent, progress.codes())

        torch.manual_seed(wish.seed)
        params = SamplingParams(wish.temperature, wish.top_k, greedy=bool(wish.greedy))
        start = {"codes": codes, "known": known, "callback": follow}
        send_picture(sites, model.sample_codes(condition, params, **start))


def data_url(image: Tensor) -> str:
    """Encode an image (3, H, W) in [-1, 1] for a page."""
    buffer = io.BytesIO()
    to_picture(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Server(ThreadingHTTPServer):
    """Serves the page: itself at ``/``, and what it asks for as JSON."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], studio: Studio) -> None:
        super().__init__(address, Handler)
        self.studio = studio


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server

    def do_GET(self) -> None:  # noqa: N802
        """Answer by path: the page itself, or rows of JSON as they become available."""
        url = urlsplit(self.path)
        try:
            if url.path == "/":
                self._begin("text/html; charset=utf-8")
                self.wfile.write(PAGE.read_bytes())
            elif url.path in ("/about", "/example", "/sample"):
                self._begin("application/x-ndjson")
                self._answer(url.path, url.query)
            else:
                self.send_error(404)
        except (BrokenPipeError, ConnectionResetError):
            logger.info("the page was closed")

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def _send(self, row: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(row).encode() + b"\n")

    def _answer(self, path: str, query: str) -> None:
        """Send rows one after the other; a mistake ends them with its message."""
        studio = self.server.studio
        with studio.busy:
            try:
                if path == "/about":
                    self._send(studio.describe())
                elif path == "/example":
                    self._send(studio.show(Wish.read(query)))
                else:
                    studio.sample(Wish.read(query), self._send)
            except ValueError as error:
                self._send({"error": str(error)})

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the console free of requests."""


def main() -> None:
    """Serve the page until interrupted."""
    parser = cli.run_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8501)
    parser.add_argument("--no_browser", action="store_true", help="do not open the page")
    options, saved = cli.parse_run(parser)
    device = cli.choose_device(options.device)
    datasets = saved.data().datasets if "data" in saved.config.values else {}
    model = cli.check_kind(saved.model(), Net2NetTransformer, options.resume, "a transformer prior")
    model.to(device)
    with Server((options.host, options.port), Studio(model, datasets, saved.step())) as server:
        address = f"http://{options.host}:{server.server_port}"
        logger.info("open %s in a browser; Ctrl-C ends it", address)
        if not options.no_browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    cli.run(main)
