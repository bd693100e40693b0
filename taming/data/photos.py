"""The bundled default: colour photographs that ship with the scikit-image package.

They need no network. Whole photographs are held out for validation. ``color.png``, the package's
other colour picture, is a synthetic colour wheel and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from itertools import zip_longest
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.crops import SquareCrop
from taming.data.preprocessing import View, scale_short_side, to_unit_range
from taming.data.utils import refuse_text
from taming.decoding import decode_image
from taming.extras import naming_extras

# The two motorcycle pictures are a stereo pair of one scene and must be in the same split.
TRAIN_PHOTOS = (
    "astronaut.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "ihc.png",
    "hubble_deep_field.jpg",
    "motorcycle_right.png",
    "retina.jpg",
)
VALIDATION_PHOTOS = ("chelsea.png", "coffee.png")


def load_photos(names: Sequence[str], size: int) -> list[Tensor]:
    """Decode photographs of the scikit-image package.

    Args:
        names: File names of the photographs.
        size: Side in pixels of the crops that each must be large enough for.

    Returns:
        One (3, H, W) uint8 per name.

    Raises:
        FileNotFoundError: The installed scikit-image lacks a photograph.
        ValueError: A photograph is smaller than ``size``.
    """
    photos = []
    for name in names:
        with naming_extras():
            path = files("skimage") / "data" / name
        if not path.is_file():
            raise FileNotFoundError(f"the installed scikit-image lacks the photograph {path}")
        with path.open("rb") as file:
            photos.append(decode_image(file))
        side = min(photos[-1].shape[-2:])
        if not 1 <= size <= side:
            raise ValueError(f"size must be 1 to {side}, the short side of {name}, got {size}")
    return photos


class PhotosTrain(Dataset[dict[str, Any]]):
    """Random crops of the training photographs, from torch's global generator.

    Items have ``image``, (size, size, 3) float32 in [-1, 1], and ``file_path_``, the file name.

    Args:
        size: Side of the square crops in pixels.
        length: Number of items; item i shows photograph i modulo their number.
        scale: (lo, hi): sample the photograph's short side from [lo * size, hi * size], but never
            above its own resolution.
        flip: Mirror crops with probability 1/2.
        hue: Largest rotation of the colour circle, in [0, 0.5] of it: seven photographs contain
            few colours.

    Raises:
        ValueError: ``hue`` or ``scale`` is out of range.
    """

    def __init__(
        self,
        size: int = 128,
        length: int = 1024,
        scale: Sequence[float] = (1.0, 3.0),
        flip: bool = True,
        hue: float = 0.0,
    ) -> None:
        refuse_text("scale", scale)
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {hue}")
        self.hue = hue
        self.photos = load_photos(TRAIN_PHOTOS, size)
        self.length = length
        self.crop = SquareCrop(
            size, random_crop=True, random_flip=flip, random_scale=scale, allow_upscale=False
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = range(self.length)[index] % len(self.photos)
        photo = self.photos[number]
        view = self.crop.view(*photo.shape[-2:])
        crop = view.apply(photo, antialias=True)
        if self.hue:
            from torchvision.transforms.v2.functional import adjust_hue  # slow; hue alone needs it

            crop = adjust_hue(crop, float(torch.empty(()).uniform_(-self.hue, self.hue)))
        return {"image": to_unit_range(crop), "file_path_": TRAIN_PHOTOS[number]}


def cover(height: int, width: int, size: int, scale: float) -> list[View]:
    """Cover a photograph with a grid of evenly spaced square views.

    Args:
        height: Rows of the photograph.
        width: Columns of the photograph.
        size: Side of the views in pixels.
        scale: Rescale the short side to scale * size, at most its own length.

    Returns:
        The fewest views that cover the photograph, row by row.
    """
    scaled = scale_short_side(height, width, min(scale * size, height, width))
    tops, lefts = (_spread(side, size) for side in scaled)
    return [View(scaled, top, left, size, size) for top in tops for left in lefts]


def _spread(side: int, size: int) -> list[int]:
    count = ceil(side / size)
    return [round(i * (side - size) / max(count - 1, 1)) for i in range(count)]


class PhotosValidation(Dataset[dict[str, Any]]):
    """Fixed grid of crops of the held-out photographs, coarsest scale first.

    Items are as in `PhotosTrain`; neighbouring items show different photographs.

    Args:
        size: Side of the square crops in pixels.
        length: Number of items; None keeps the whole grid (18 crops of 128 pixels).
        scales: Lay a grid over each photograph rescaled to a short side of scale * size.

    Raises:
        ValueError: A photograph is smaller than ``size``, a scale is below 1, or the grid has
            fewer than ``length`` crops.
    """

    def __init__(
        self, size: int = 128, length: int | None = None, scales: Sequence[float] = (1.0, 2.0)
    ) -> None:
        refuse_text("scales", scales)
        self.photos = load_photos(VALIDATION_PHOTOS, size)
        if not all(scale >= 1 for scale in scales):
            raise ValueError(f"scales must be at least 1, got {list(scales)}")
        views = self._grid(size, scales)
        if length is not None and length > len(views):
            raise ValueError(
                f"length is {length}, but the held-out photographs have only {len(views)} crops of "
                f"{size} pixels at the scales {list(scales)}; lower length or add a scale"
            )
        self.views = views[:length]

    def _grid(self, size: int, scales: Sequence[float]) -> list[tuple[int, View]]:
        per_photo = []
        for number, photo in enumerate(self.photos):
            height, width = photo.shape[-2:]
            views = [(number, v) for scale in scales for v in cover(height, width, size, scale)]
            per_photo.append(dict.fromkeys(views))  # scales above the resolution coincide
        return [item for group in zip_longest(*per_photo) for item in group if item is not None]

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, view = self.views[index]
        image = to_unit_range(view.apply(self.photos[number], antialias=True))
        return {"image": image, "file_path_": VALIDATION_PHOTOS[number]}
