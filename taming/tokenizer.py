"""The tokenizer for people: pictures of any kind and size to codes, and back.

Axis letters: B pictures, C channels, H W picture, h w grid, T turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from taming.decoding import Colour, rgb_of
from taming.models.vqgan import VQModel
from taming.pictures import Picture, is_single, to_picture, to_tensor
from taming.util import usable_device


@dataclass(frozen=True, repr=False)
class Codes:
    """The codes of one picture.

    Attributes:
        indices: (h, w, T) int64: 0..K-1 for a codebook vector, K for the dummy D, -1 after the end
            of a site's loop. A VQ-VAE-2 has one such tensor for each level, the top first.
        size: (H, W) of the picture in pixels.
    """

    indices: Tensor | tuple[Tensor, ...]
    size: tuple[int, int]

    @property
    def levels(self) -> tuple[Tensor, ...]:
        """Indices (h, w, T) of each level; of most tokenizers, there is one."""
        return self.indices if isinstance(self.indices, tuple) else (self.indices,)

    @property
    def lengths(self) -> Tensor:
        """Number of codes of each site of the finest level, (h, w) int64 in [1, T]."""
        return (self.levels[-1] >= 0).sum(dim=-1)

    def __len__(self) -> int:
        return sum(int((level >= 0).sum()) for level in self.levels)

    def __repr__(self) -> str:
        grids = ", ".join(f"{level.shape[0]}x{level.shape[1]}" for level in self.levels)
        return f"Codes(size={self.size}, sites {grids}, {len(self)} codes)"


class Tokenizer:
    """Turns pictures into codes and codes into pictures, with a trained `VQModel`.

    A picture is a path, a PIL image, a NumPy array (H, W), (H, W, C) or a tensor (C, H, W); arrays
    of integers are scaled from their whole range, arrays of floats lie in [-1, 1]. Files and PIL
    images are converted to the model's channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA. The sides
    need not fit the grid: a picture is extended by reflection to whole sites and cut back when it
    is decoded.

    Args:
        model: The model, in any mode; it is switched to evaluation.
        batch_size: Largest number of pictures of one size that go through the model together.
        background: Colour under what is transparent, as for `taming.decoding.decode_image`.
        max_pixels: Refuse larger files, as `taming.decoding.decode_image` does.
        tile: Pictures of more pixels than a square of this side go through the networks in tiles
            that overlap. Tiles share the statistics of norms and 1,024 sites to attend to, from a
            sample of the picture, and show no seams; some codes in a hundred may differ from those
            of the whole. None sends every picture whole, in time quadratic in its sites.

    Raises:
        ValueError: The model is not a tokenizer, or one of label maps; or the tile is not positive.

    Example:
        >>> import numpy as np, torch
        >>> from taming.models.vqgan import VQModel
        >>> sizes = dict(double_z=False, z_channels=4, resolution=16, in_channels=3, out_ch=3)
        >>> sizes |= dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[])
        >>> loss = {"target": "taming.modules.losses.DummyLoss"}
        >>> tokenizer = Tokenizer(VQModel(sizes, loss, n_embed=8, embed_dim=4))
        >>> codes = tokenizer.encode(np.zeros((20, 15, 3), np.uint8))
        >>> codes.indices.shape, codes.size, len(codes)
        (torch.Size([10, 8, 1]), (20, 15), 80)
        >>> tokenizer.decode(codes).size
        (15, 20)
    """

    def __init__(
        self,
        model: VQModel,
        batch_size: int = 16,
        background: Colour = "white",
        max_pixels: int | None = None,
        tile: int | None = 768,
    ) -> None:
        if getattr(model, "value_range", None) != (-1.0, 1.0):
            raise ValueError(
                "a Tokenizer takes a tokenizer of pictures with values in [-1, 1], got a "
                f"{type(model).__name__}"
            )
        self.model = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.background, self.max_pixels = rgb_of(background), max_pixels
        self.tile = tile

    @property
    def tile(self) -> int | None:
        """Side of a tile in pixels, or None; it can be set, for all users of the model."""
        return self.model.encoder.tile

    @tile.setter
    def tile(self, tile: int | None) -> None:
        if tile is not None and tile < 1:
            raise ValueError(f"tile must be a positive number of pixels or None, got {tile}")
        parts: Iterator[Any] = self.model.modules()
        for part in parts:
            if "tile" in vars(part):
                part.tile = tile

    def to(self, device: torch.device | str) -> Tokenizer:
        """Move the model to a device; return the tokenizer."""
        self.model.to(usable_device(device))
        return self

    @property
    def channels(self) -> int:
        """C, channels of a picture."""
        return self.model.channels

    def to_tensor(self, picture: Picture) -> Tensor:
        """Turn a picture into an image (C, H, W) float32 in [-1, 1] of the model's channels.

        Raises:
            ValueError: It is not a picture, or has other channels.
        """
        return to_tensor(picture, self.channels, self.background, self.max_pixels)

    @overload
    def encode(
        self,
        pictures: Picture,
        *,
        max_codes: int | None = None,
        target_psnr: float | None = None,
        threshold: float | None = None,
    ) -> Codes: ...
    @overload
    def encode(
        self,
        pictures: Sequence[Picture],
        *,
        max_codes: int | None = None,
        target_psnr: float | None = None,
        threshold: float | None = None,
    ) -> list[Codes]: ...

    @torch.no_grad()
    def encode(
        self,
        pictures: Any,
        *,
        max_codes: int | None = None,
        target_psnr: float | None = None,
        threshold: float | None = None,
    ) -> Any:
        """Encode pictures; a tokenizer of variable rate takes at most one rate.

        Args:
            pictures: One picture; or several of any sizes, or as an array of four axes.
            max_codes: Largest number of codes of a picture, at least one for each site.
            target_psnr: PSNR in dB to reach with as few codes as possible.
            threshold: Distance at which a loop ends, in the space of the latents.

        Returns:
            The `Codes` of each picture: one for one picture, a list for several.

        Raises:
            ValueError: Something is not a picture or has other channels than the model's, the rate
                cannot be met, or the tokenizer has a fixed rate.
        """
        rate = {"max_codes": max_codes, "target_psnr": target_psnr, "threshold": threshold}
        if is_single(pictures):
            return self.encode([pictures], **rate)[0]
        images = [self.to_tensor(picture) for picture in pictures]
        return encode_images(self.model, images, self.batch_size, **rate)

    @overload
    def decode(self, codes: Codes) -> Image.Image: ...
    @overload
    def decode(self, codes: Sequence[Codes]) -> list[Image.Image]: ...

    @torch.no_grad()
    def decode(self, codes: Any) -> Any:
        """Decode codes to pictures.

        Args:
            codes: The `Codes` of one picture, or of several.

        Returns:
            PIL images: one for one, a list for several. Those of 2 and 4 channels have alpha; of
            more channels, the model's ``to_rgb`` shows some.

        Raises:
            ValueError: They are not codes of this tokenizer.
        """
        if isinstance(codes, Codes):
            return self.decode([codes])[0]
        pictures: list[Image.Image | None] = [None] * len(codes)
        for numbers in _by_shape([own.levels[-1] for own in codes], self.batch_size):
            device = next(self.model.parameters()).device
            levels: Any = [
                torch.stack(level).to(device)
                for level in zip(*(codes[number].levels for number in numbers), strict=True)
            ]
            single = isinstance(codes[numbers[0]].indices, Tensor)
            images = self.model.decode_code(levels[0] if single else levels)
            if not images.isfinite().all():  # where a GPU did not refuse them
                raise ValueError("the codes are not those of this tokenizer: their picture is NaN")
            shown = images if images.shape[1] in (2, 3, 4) else self.model.to_rgb(images)
            for number, image in zip(numbers, shown, strict=True):
                height, width = codes[number].size
                pictures[number] = to_picture(image).crop((0, 0, width, height))
        return pictures


@torch.no_grad()
def encode_images(
    model: VQModel, images: Sequence[Tensor], batch_size: int, **rate: float | None
) -> list[Codes]:
    """Encode images of any sizes, those of one size together, extended to whole sites.

    Args:
        model: The model, in evaluation mode.
        images: (C, H, W) each, in the model's range.
        batch_size: Largest number of images that go through the model together.
        **rate: At most one argument of the model's ``encode`` that sets a rate.

    Raises:
        ValueError: The rate cannot be met, or the model has a fixed rate.
    """
    padded = [_pad(image, model.factor) for image in images]
    codes: list[Codes | None] = [None] * len(images)
    for numbers in _by_shape(padded, batch_size):
        x = torch.stack([padded[number] for number in numbers])
        found = model.encode_to_codes(x.to(next(model.parameters())), **rate)
        levels = [level.cpu() for level in (found if isinstance(found, tuple) else [found])]
        for number, *own in zip(numbers, *levels, strict=True):
            size = images[number].shape[1], images[number].shape[2]
            codes[number] = Codes(tuple(own) if isinstance(found, tuple) else own[0], size)
    return codes  # type: ignore[return-value]


def _pad(image: Tensor, site: int) -> Tensor:
    """Extend an image (C, H, W) by reflection to multiples of the side of a site."""
    height, width = image.shape[1:]
    right, below = -width % site, -height % site
    if right >= width or below >= height:  # too small to be reflected so far
        return F.pad(image[None], (0, right, 0, below), mode="replicate")[0]
    return F.pad(image[None], (0, right, 0, below), mode="reflect")[0]


def _by_shape(tensors: Sequence[Tensor], most: int) -> list[list[int]]:
    """Group the numbers of tensors of one shape, at most so many in a group."""
    groups: dict[torch.Size, list[int]] = {}
    for number, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(number)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]
