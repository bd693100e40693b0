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
import ipaddress
import json
import logging
import math
import socket
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from taming.run import cli

if TYPE_CHECKING:
    from torch import Tensor

    from taming.models.cond_transformer import Net2NetTransformer
    from taming.models.sampling import Progress

logger = logging.getLogger("taming.sample_conditional")

PAGE = Path(__file__).with_suffix(".html")
LONGEST = 2000  # characters of a request's path
MOST_SITES = 2**16  # of an image to sample
# Name of a field -> its smallest and largest value. Logits overflow at a smaller temperature.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("index", "label", "seed"), (0, 2**63 - 1)),
    **dict.fromkeys(("top_k", "every"), (1, 2**31 - 1)),
    **dict.fromkeys(("known", "greedy"), (0, 1)),
    "scale": (1 / 64, 8),
    "temperature": (1e-3, 1e3),
}


@dataclass(frozen=True)
class Wish:
    """A request of the page.

    Attributes:
        split: Data set of the example; empty without data.
        index: Number of the example.
        label: Class to sample, of a prior over classes.
        scale: Size of the image to sample; 1 is the example's own, or the one trained on.
        known: Share of the example's reconstruction, from above, that stays.
        temperature: Divides the logits.
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
        """Read a query string; the page also sends fields that do not apply, empty.

        Raises:
            ValueError: A value is not a number, or out of range.
        """
        given: dict[str, Any] = {}
        for name, text in parse_qsl(query):
            if name not in RANGES:
                given |= {"split": text} if name == "split" else {}
                continue
            kind, (least, most) = type(getattr(cls, name)), RANGES[name]
            try:
                given[name] = kind(text)
            except ValueError:
                given[name] = math.nan
            if not least <= given[name] <= most:
                what = f"{'an integer' if kind is int else 'a number'} from {least} to {most}"
                raise ValueError(f"{name} must be {what}, got {text[:40]!r}")
        return cls(**given)


@dataclass(frozen=True)
class Studio:
    """A prior and its data.

    Attributes:
        model: The prior, in eval mode.
        datasets: Data sets by name; may be empty unless the condition is an image.
        step: Steps that the prior was trained for.
        busy: Held while the model is used.
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
        import torch

        from taming.data.utils import custom_collate

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
        import torch.nn.functional as F

        if x.ndim != 4:
            return x
        factor = self.model.first_stage_model.factor
        rows, columns = scaled_grid((x.shape[2] / factor, x.shape[3] / factor), scale)
        size = [rows * factor, columns * factor]
        if x.shape[1] > 3:  # label maps have no values in between
            return F.interpolate(x, size, mode="nearest-exact")
        return F.interpolate(x, size, mode="bilinear", antialias=True)

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

    def sample(self, wish: Wish, send: Callable[[dict[str, Any]], None]) -> None:
        """Sample an image; send the number of finished sites, that of all, and the picture."""
        import torch

        from taming.models.sampling import condition_windows, paste, upper_part
        from taming.modules.transformer.generate import SamplingParams

        example, model = self.example(wish), self.model
        if example is None:
            codes, share = model.empty_codes(1, scaled_grid(model.grid, wish.scale)), 0.0
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


def scaled_grid(grid: tuple[float, float], scale: float) -> tuple[int, int]:
    """Scale a grid of sites.

    Raises:
        ValueError: There would be too many.
    """
    rows, columns = (max(round(side * scale), 1) for side in grid)
    if rows * columns > MOST_SITES:
        raise ValueError(f"scale {scale} makes {rows} x {columns} sites, more than {MOST_SITES}")
    return rows, columns


def data_url(image: Tensor) -> str:
    """Encode an image (3, H, W) in [-1, 1] for a page."""
    from taming.pictures import to_picture

    buffer = io.BytesIO()
    to_picture(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Server(ThreadingHTTPServer):
    """Serves the page: itself at ``/``, and what it asks for as JSON.

    Args:
        address: Host and port to listen at.
        studio: Answers the requests.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], studio: Studio) -> None:
        super().__init__(address, Handler)
        self.studio = studio
        self.names = {name.lower() for name in (address[0], "localhost", socket.gethostname())}

    def answers_to(self, host: str) -> bool:
        """Return True for a Host header with an address, or a name of this machine.

        A foreign page could lead its own name here, and then read the answers.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return (name != "" and name in self.names) or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    timeout = 60  # seconds that a request or an answer may stand still
    has_begun = False  # to answer

    def do_GET(self) -> None:  # noqa: N802
        """Answer by path: the page itself, or rows of JSON as they become available."""
        try:
            if len(self.path) > LONGEST:
                self.send_error(414, f"a request may have {LONGEST} characters")
            elif not self.server.answers_to(self.headers.get("Host", "")):
                self.send_error(403, "this page answers to its address, or a name of its machine")
            else:
                self._answer(urlsplit(self.path))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            logger.info("the page was closed")

    def _answer(self, url: SplitResult) -> None:
        """Send the page, or rows one after the other; a mistake ends them with its message."""
        studio = self.server.studio
        try:
            if url.path == "/":
                self._begin("text/html; charset=utf-8")
                self.wfile.write(PAGE.read_bytes())
            elif url.path == "/about":
                self._send(studio.describe())
            elif url.path in ("/example", "/sample"):
                wish = Wish.read(url.query)
                with studio.busy:
                    if url.path == "/example":
                        self._send(studio.show(wish))
                    else:
                        studio.sample(wish, self._send)
            else:
                self.send_error(404, f"there is no {url.path}")
        except ValueError as error:
            self.send_error(400, str(error))
        except RuntimeError as error:  # such as too little memory
            self.send_error(500, str(error))

    def _begin(self, kind: str, status: int = 200) -> None:
        self.has_begun = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def _send(self, row: dict[str, Any], status: int = 200) -> None:
        if not self.has_begun:
            self._begin("application/x-ndjson", status)
        self.wfile.write(json.dumps(row).encode() + b"\n")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send a row with the message; its status is that of the first row."""
        self._send({"error": message or self.responses[HTTPStatus(code)][0]}, code)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the console free of requests."""


def main() -> None:
    """Serve the page until interrupted."""
    parser = cli.run_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8501)
    parser.add_argument("--no_browser", action="store_true", help="do not open the page")
    options, saved = cli.parse_run(parser)
    from taming.models.cond_transformer import Net2NetTransformer

    device = cli.choose_device(options.device)
    datasets = saved.data().datasets if "data" in saved.config.values else {}
    model = cli.check_kind(saved.model(), Net2NetTransformer, options.resume, "a transformer prior")
    model.to(device).requires_grad_(False)
    with Server((options.host, options.port), Studio(model, datasets, saved.step())) as server:
        address = f"http://{options.host}:{server.server_port}"
        logger.info("open %s in a browser; Ctrl-C ends it", address)
        if not options.no_browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    cli.run(main)
