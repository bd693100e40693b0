"""Images of any sizes to codes and back, those of one size together.

Axis letters: C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from taming.codes import Codes
from taming.models.vqgan import VQModel
from taming.pictures import from_levels, pad, to_levels


@torch.no_grad()
def encode_images(
    model: VQModel, images: Sequence[Tensor], batch_size: int, **rate: float | None
) -> list[Codes]:
    """Encode images, extended to whole sites.

    Args:
        model: The model, in evaluation mode.
        images: (C, H, W) each, in the model's range.
        batch_size: Largest number of images that go through the model together.
        **rate: At most one argument of the model's ``encode`` that sets a rate.

    Raises:
        ValueError: The rate cannot be met, or the model has a fixed rate.
    """
    padded = [pad(image, model.factor) for image in images]
    codes: list[Codes | None] = [None] * len(images)
    for numbers in _of_one_shape([image.shape for image in padded], batch_size):
        x = torch.stack([padded[number] for number in numbers])
        size = torch.tensor([images[number].shape[1:] for number in numbers])  # (B, 2)
        found = model.encode_to_codes(x.to(next(model.parameters())), **rate, size=size)
        bits = model.bits_of(found).tolist()
        levels = [level.cpu() for level in (found if isinstance(found, tuple) else [found])]
        for number, cost, *own in zip(numbers, bits, *levels, strict=True):
            size = images[number].shape[1], images[number].shape[2]
            codes[number] = Codes(tuple(own) if len(own) > 1 else own[0], size, cost)
    return codes  # type: ignore[return-value]


@torch.no_grad()
def decode_codes(
    model: VQModel, codes: Sequence[Codes], batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Decode codes, cut to the sizes of their images.

    Args:
        model: The model, in evaluation mode.
        codes: The codes of each image.
        batch_size: Largest number of images that go through the model together.

    Yields:
        Number of an image, and it: (C, H, W) float32 on the CPU, clamped to [-1, 1] and rounded to
        the 256 levels of a file.

    Raises:
        ValueError: They are not codes of this model.
    """
    if strange := [type(own).__name__ for own in codes if not isinstance(own, Codes)]:
        raise ValueError(f"expected Codes, from encode or Codes.load, got a {strange[0]}")
    shapes = [tuple(level.shape for level in own.levels) for own in codes]
    for numbers in _of_one_shape(shapes, batch_size):
        device = next(model.parameters()).device
        levels: Any = [
            torch.stack(level).to(device)
            for level in zip(*(codes[number].levels for number in numbers), strict=True)
        ]
        single = isinstance(codes[numbers[0]].indices, Tensor)
        images = model.decode_code(levels[0] if single else levels)
        if not images.isfinite().all():  # where a GPU did not refuse them
            raise ValueError("the codes are not those of this tokenizer: their picture is NaN")
        for number, image in zip(numbers, from_levels(to_levels(images).cpu()), strict=True):
            height, width = codes[number].size
            if height > image.shape[1] or width > image.shape[2]:
                raise ValueError(
                    f"the codes of a picture of {height}x{width} pixels decode to "
                    f"{image.shape[1]}x{image.shape[2]}: they have too few sites for its size"
                )
            yield number, image[:, :height, :width]


def _of_one_shape(shapes: Sequence[tuple[Any, ...]], most: int) -> list[list[int]]:
    """Group the numbers of equal shapes, at most so many in a group."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(number)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]
