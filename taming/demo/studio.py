"""A prior at work: it samples given a class, image or nothing, and completes what is painted over.

Axis letters: C channels, H W picture, h w grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from taming.data.utils import custom_collate
from taming.demo.following import Send, followed
from taming.models.prior import Prior
from taming.models.sampling import (
    Condition,
    Grid,
    Progress,
    SamplingParams,
    condition_windows,
    generators_of,
    paste,
    upper_part,
)
from taming.pictures import Picture, resize, to_picture, to_tensor

MOST_SITES = 2**16  # of an image to sample
# Name of a wish -> its smallest and largest value. Logits overflow at a smaller temperature.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("label", "seed"), (0, 2**53)),
    **dict.fromkeys(("top_k", "every"), (1, 2**31 - 1)),
    **dict.fromkeys(("known", "greedy"), (0, 1)),
    "guidance": (0, 100),
    "scale": (1 / 64, 8),
    "temperature": (1e-3, 1e3),
}


@dataclass(frozen=True)
class Wish:
    """What to sample, and how.

    Attributes:
        label: Class, of a prior over classes.
        scale: Size of the image; 1 is the example's own, or the one trained on.
        known: Share of a picture, from above, that stays where it is not painted over.
        temperature: Divides the logits.
        top_k: Sample among the k likeliest tokens.
        guidance: Scale of classifier-free guidance.
        greedy: Take the likeliest token instead.
        every: Sites between two pictures.
        seed: Of the random numbers.

    Raises:
        ValueError: A value is not a number of its kind, or out of range.
    """

    label: int = 0
    scale: float = 1.0
    known: float = 1.0
    temperature: float = 1.0
    top_k: int = 100
    guidance: float = 1.0
    greedy: bool = False
    every: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for own in fields(self):
            value, (least, most) = getattr(self, own.name), RANGES[own.name]
            is_number = isinstance(value, int) or (own.type == "float" and isinstance(value, float))
            if not is_number or not least <= value <= most:
                what = f"{'a number' if own.type == 'float' else 'an integer'} from {least:g}"
                raise ValueError(f"{own.name} must be {what} to {most:g}, got {str(value)[:40]!r}")


class Example(NamedTuple):
    """An example of a data set: image and condition (1, C, H, W), or its label (1,)."""

    x: Tensor
    c: Tensor


class Start(NamedTuple):
    """What sampling starts from."""

    codes: Tensor  # (1, h, w, T) int64
    known: Tensor  # (h, w) bool, sites that stay
    condition: Condition


class Step(NamedTuple):
    """Sampling after some sites."""

    done: int
    of: int
    picture: Image.Image


@dataclass(frozen=True)
class Studio:
    """A prior and its data.

    Attributes:
        model: The prior, in eval mode.
        datasets: Data sets by name; may be empty unless the condition is an image.

    Raises:
        ValueError: The prior needs a data set, or its condition is a layout of objects.
    """

    model: Prior
    datasets: Mapping[str, Any] = field(default_factory=dict)

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

    @property
    def title(self) -> str:
        """Condition and grid of the prior, in words."""
        given = {"none": "without a condition", "image": f"given {self.model.cond_stage_key}"}
        given["class"] = f"given one of {self.model.n_classes} classes"
        height, width = self.model.grid
        return f"{given[self.kind]}, trained on {height} × {width} sites"

    def example(self, split: str, index: int, scale: float = 1.0) -> Example:
        """Return an example of a data set, the same each time.

        Raises:
            ValueError: There is no such example, or it would have too many sites.
        """
        if split not in self.datasets or not 0 <= index < len(self.datasets[split]):
            raise ValueError(f"there is no example {index} of {split!r}")
        torch.manual_seed(index)  # the same crop each time
        batch = custom_collate([self.datasets[split][index]])
        x, c = (part.to(self.model.device) for part in self.model.get_xc(batch))
        return Example(self._scaled(x, scale), self._scaled(c, scale))

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        """Scale an image (1, C, H, W) to whole sites; return a label (1,) unchanged."""
        if x.ndim != 4:
            return x
        factor = self.model.first_stage_model.factor
        rows, columns = scaled_grid((x.shape[2] / factor, x.shape[3] / factor), scale)
        size = [rows * factor, columns * factor]
        if x.shape[1] > 3:  # label maps have no values in between
            return F.interpolate(x, size, mode="nearest-exact")
        return F.interpolate(x, size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def show(self, example: Example) -> dict[str, Image.Image]:
        """Return pictures of an example by name: image, reconstruction, and condition if any."""
        x, c = example
        x_rec = self.model.decode_codes(self.model.encode_codes(x))
        pictures = {"image": self.model.show(x), "reconstruction": self.model.show(x_rec)}
        if self.kind == "image":
            pictures[self.model.cond_stage_key] = self._coloured(c)
        return {name: to_picture(picture[0]) for name, picture in pictures.items()}

    def _coloured(self, c: Tensor) -> Tensor:
        """Show a condition (1, C, H, W) in three channels."""
        low, high = c.amin(), c.amax()
        if c.shape[1] == 1:
            return (2 * (c - low) / (high - low).clamp(min=1e-8) - 1).expand(-1, 3, -1, -1)
        return c if c.shape[1] == 3 else self.model.cond_stage_model.to_rgb(c)

    def fitted(self, picture: Picture, scale: float) -> Tensor:
        """Scale a picture so that its short side covers the scaled grid: (1, C, H, W), whole sites.

        Raises:
            ValueError: It is not a picture, or would have too many sites.
        """
        stage = self.model.first_stage_model
        image = to_tensor(picture, stage.channels)
        height, width = (side / min(image.shape[1:]) for side in image.shape[1:])
        grid = self.model.grid[0] * height, self.model.grid[1] * width
        rows, columns = scaled_grid(grid, scale)
        image = resize(image, rows * stage.factor, columns * stage.factor).clamp(-1, 1)
        return image[None].to(next(self.model.parameters()))

    def sample(
        self,
        wish: Wish,
        picture: Picture | None = None,
        painted: Image.Image | None = None,
        example: tuple[str, int] | None = None,
    ) -> Iterator[Step]:
        """Sample an image; yield it every ``wish.every`` sites, and at the end.

        Without a picture, the result is that of `Generator.sample` for the same seed.

        Args:
            wish: What to sample.
            picture: A picture to complete; an example stands in for it.
            painted: L, of the picture's shape: bright where it is to be sampled anew.
            example: Data set and number of the example whose condition is given.

        Raises:
            ValueError: Something is out of range, or nothing is left to be sampled.
        """
        with torch.no_grad():
            start = self._start(wish, picture, painted, example)
            given = self.model.decode_codes(start.codes)
        sites = start.known.numel()

        def step(done: int, codes: Tensor) -> Step:
            images = paste(self.model.decode_codes(codes), given, start.known)
            return Step(done, sites, to_picture(self.model.show(images)[0]))

        @torch.no_grad()  # which holds for a thread
        def work(send: Send[Step]) -> None:
            sent: int | None = None

            def follow(progress: Progress) -> None:
                nonlocal sent
                send.check()
                done = progress.sites()
                sent = done if sent is None else sent  # known sites may come first
                if sent + wish.every <= done < sites:
                    sent = done
                    send(step(done, progress.codes()))

            own = {"generators": generators_of(wish.seed, [0]), "guidance": wish.guidance}
            params = SamplingParams(wish.temperature, wish.top_k, greedy=bool(wish.greedy), **own)
            more = {"codes": start.codes, "known": start.known, "callback": follow}
            send(step(sites, self.model.sample_codes(start.condition, params, **more)))

        return followed(work)

    def _start(
        self,
        wish: Wish,
        picture: Picture | None,
        painted: Image.Image | None,
        example: tuple[str, int] | None,
    ) -> Start:
        """Return what sampling starts from."""
        x = c = None
        if self.kind == "image":
            x, c = self.example(*(example or ("", 0)), wish.scale)
        elif picture is not None:
            x = self.fitted(picture, wish.scale)
        grid = scaled_grid(self.model.grid, wish.scale)
        codes = self.model.empty_codes(1, grid) if x is None else self.model.encode_codes(x)
        grid = codes.shape[1], codes.shape[2]
        known = torch.zeros(grid, dtype=torch.bool)
        if x is not None:
            known = upper_part(wish.known, grid) & ~painted_sites(painted, grid)
        if known.all():
            raise ValueError("nothing is to be sampled: paint over a part, or keep less")
        if c is not None:
            return Start(codes, known, condition_windows(self.model, c, grid))
        token = self.model.sos_token
        if self.kind == "class":
            token = wish.label
            if token >= (classes := self.model.n_classes or 0):
                known_labels = f"the labels of this prior are 0 to {classes - 1}"
                raise ValueError(f"there is no class {token}: {known_labels}")
        return Start(codes, known, torch.tensor([[token]], device=self.model.device))


def painted_sites(painted: Image.Image | None, grid: Grid) -> Tensor:
    """Return the sites (h, w) bool of which any pixel is painted, bright in an L picture."""
    if painted is None:
        return torch.zeros(grid, dtype=torch.bool)
    pixels = to_tensor(painted, 1)[None]  # (1, 1, H, W)
    return F.adaptive_max_pool2d(pixels, list(grid))[0, 0] > -1


def scaled_grid(grid: tuple[float, float], scale: float) -> Grid:
    """Scale a grid of sites.

    Raises:
        ValueError: There would be too many.
    """
    rows, columns = (max(math.floor(side * scale + 0.5), 1) for side in grid)
    if rows * columns > MOST_SITES:
        raise ValueError(f"scale {scale} makes {rows} x {columns} sites, more than {MOST_SITES}")
    return rows, columns
