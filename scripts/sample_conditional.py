"""A page in the browser to draw images from a prior, beginning with an image's condition.

python scripts/sample_conditional.py -r logs/<run>
python scripts/sample_conditional.py -r logs/<run> --ignore_base_data \\
    data='{target: main.DataModuleFromConfig, params: {batch_size: 1, validation: {target: \\
    taming.data.ade20k.Examples}}}'

It draws given a class, segmentation, depth map or place, completes images from above, and slides a
window over large images. Without a condition, or with classes, --ignore_base_data alone will do.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import logging
import threading
import webbrowser
from collections.abc import Iterator, Mapping
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
from taming.models.sampling import (
    SamplingParams,
    condition_windows,
    decode_codes,
    empty_codes,
    encode_codes,
    paste,
    trained_grid,
    upper_part,
    whole_condition,
    write_codes,
)
from taming.modules.util import Labelator
from taming.pictures import to_picture
from taming.run.cli import choose_device, parse_classes, parse_run, run, run_parser

logger = logging.getLogger("taming.sample_conditional")

PAGE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Wish:
    """What the page asks for.

    Attributes:
        split: Data set of the example; empty if there is no data.
        index: Number of the example.
        label: Class to draw, of a prior over classes.
        scale: Size of the image to draw; 1 is the example's own, or what was trained.
        known: Share of the example's reconstruction, from above, that stays.
        temperature: See `SamplingParams`, as top_k and greedy (0 or 1).
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
        datasets: Data sets by name; may be empty if the condition is no image.
        step: Steps that the prior was trained for.
        busy: Held while something is drawn.
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
        """What the condition is: ``none``, ``class`` or ``image``."""
        if self.model.be_unconditional:
            return "none"
        if isinstance(self.model.cond_stage_model, Labelator):
            return "class"
        if self.model.cond_stage_key.startswith("objects_"):
            raise ValueError("the condition is a layout of objects: use make_scene_samples.py")
        return "image"

    def describe(self) -> dict[str, Any]:
        """What the page needs to know."""
        stage = self.model.cond_stage_model
        return {
            "kind": self.kind,
            "condition": "" if self.kind == "none" else self.model.cond_stage_key,
            "classes": stage.n_classes if isinstance(stage, Labelator) else 0,
            "splits": {name: len(data) for name, data in sorted(self.datasets.items())},
            "grid": trained_grid(self.model),
            "step": self.step,
        }

    def example(self, wish: Wish) -> tuple[Tensor, Tensor] | None:
        """Image and condition, each (1, C, H, W) or the label (1,); None if not asked for."""
        if not wish.split and self.kind != "image":
            return None
        if wish.split not in self.datasets or not 0 <= wish.index < len(self.datasets[wish.split]):
            raise ValueError(f"there is no example {wish.index} of {wish.split!r}")
        torch.manual_seed(wish.index)  # the same crop each time
        batch = custom_collate([self.datasets[wish.split][wish.index]])
        x, c = (part.to(self.model.device) for part in self.model.get_xc(batch))
        return self._scaled(x, wish.scale), self._scaled(c, wish.scale)

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        """Scale an image (1, C, H, W) to whole sites; leave a label (1,) alone."""
        if x.ndim != 4:
            return x
        factor = self.model.first_stage_model.factor
        size = [max(round(side * scale / factor), 1) * factor for side in x.shape[2:]]
        if x.shape[1] > 3:  # classes have no values in between
            return F.interpolate(x, size, mode="nearest-exact")
        return F.interpolate(x, size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def show(self, wish: Wish) -> dict[str, str]:
        """Pictures of the example, as data URLs by name."""
        if (example := self.example(wish)) is None:
            return {}
        x, c = example
        x_rec = decode_codes(self.model, encode_codes(self.model, x))
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

    def _token(self, wish: Wish) -> int:
        """Token of the class, or of no condition."""
        if isinstance(stage := self.model.cond_stage_model, Labelator):
            return parse_classes(str(wish.label), stage.n_classes)[0]
        return self.model.sos_token

    @torch.no_grad()
    def sample(self, wish: Wish) -> Iterator[dict[str, Any]]:
        """Draw an image; yields the sites done, of how many, and the picture so far."""
        example, model = self.example(wish), self.model
        if example is None:
            rows, columns = (max(round(side * wish.scale), 1) for side in trained_grid(model))
            codes, share = empty_codes(model, 1, (rows, columns)), 0.0
        else:
            codes, share = encode_codes(model, example[0]), wish.known
        grid = codes.shape[1], codes.shape[2]
        given, known = decode_codes(model, codes), upper_part(share, grid)
        if example is not None and self.kind == "image":
            condition = condition_windows(model, example[1], grid)
        else:
            condition = whole_condition(torch.tensor([[self._token(wish)]], device=model.device))
        drawing = SamplingParams(wish.temperature, wish.top_k, greedy=bool(wish.greedy))
        codes[:, ~known] = empty_codes(model, 1, (1, 1))[0]  # shown until others are written
        torch.manual_seed(wish.seed)
        for done in write_codes(model, condition, codes, drawing, known, wish.every):
            picture = model.show(paste(decode_codes(model, codes), given, known))
            yield {"done": done, "of": grid[0] * grid[1], "picture": data_url(picture[0])}


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
        """Answer by path: the page itself, or rows of JSON as they come."""
        url = urlsplit(self.path)
        try:
            if url.path == "/":
                self._begin("text/html; charset=utf-8")
                self.wfile.write(PAGE.read_bytes())
            elif url.path in ("/about", "/example", "/sample"):
                self._begin("application/x-ndjson")
                self._send_rows(self._rows(url.path, url.query))
            else:
                self.send_error(404)
        except (BrokenPipeError, ConnectionResetError):
            logger.info("the page was left")

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def _rows(self, path: str, query: str) -> Iterator[dict[str, Any]]:
        studio = self.server.studio
        if path == "/about":
            yield studio.describe()
        elif path == "/example":
            yield studio.show(Wish.read(query))
        else:
            yield from studio.sample(Wish.read(query))

    def _send_rows(self, rows: Iterator[dict[str, Any]]) -> None:
        """Send one after the other; a mistake ends them with its message."""
        with self.server.studio.busy:
            try:
                for row in rows:
                    self.wfile.write(json.dumps(row).encode() + b"\n")
            except ValueError as error:
                self.wfile.write(json.dumps({"error": str(error)}).encode() + b"\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the console free of requests."""


def build_parser() -> argparse.ArgumentParser:
    """Declare the command line."""
    parser = run_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8501)
    parser.add_argument("--no_browser", action="store_true", help="do not open the page")
    return parser


def main() -> None:
    """Serve the page until interrupted."""
    options, saved = parse_run(build_parser())
    device = choose_device(options.device)
    datasets = saved.data().datasets if "data" in saved.config.values else {}
    model = saved.model().to(device)
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{options.resume} holds a {type(model).__name__}, no transformer prior")
    with Server((options.host, options.port), Studio(model, datasets, saved.step())) as server:
        address = f"http://{options.host}:{server.server_port}"
        logger.info("open %s in a browser; Ctrl-C ends it", address)
        if not options.no_browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    run(main)
