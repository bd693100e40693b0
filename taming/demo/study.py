"""A picture as a tokenizer sees it: its reconstruction, map of lengths and file at any rate.

Axis letters: D channels of a latent, H W picture, h w grid, T turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from taming.codec.files import Codec
from taming.codes import Codes
from taming.pictures import Picture, pad, psnr_of, resize, to_picture
from taming.tokenizer import Tokenizer

OWN = "own"  # the rate of the tokenizer itself
RATES = (OWN, "codes", "bits", "lambda")
LAMBDAS = (-16.0, 4.0)  # log2, beyond which pictures hardly change, of a training without any
WIDER = 2.0  # log2, by which the range of lambda goes beyond that of the training
CHEAPEST = 2.0**40  # a lambda by which distances no longer count
MARK = (0, 210, 255)  # colour of the frame round a chosen site, which no length has


class Turn(NamedTuple):
    """A turn of a site's loop.

    Attributes:
        turn: Its number, from 1.
        code: What it writes: an index, ``D`` for the dummy; empty after the end of the loop.
        distance: From the transformed latent to its code; None where it was not searched.
    """

    turn: int
    code: str
    distance: float | None


@dataclass(frozen=True)
class View:
    """A picture at one rate.

    Attributes:
        rate: Arguments of the quantizer that set it.
        codes: Codes of the picture.
        picture: Reconstruction.
        lengths: Number of turns at each site, from dark for one to bright for all; None if fixed.
        numbers: Name -> value: ``psnr`` in dB, ``bytes`` of the file and ``bpp`` of it in bits per
            pixel (of a VQ-VAE-2, the bits of its codes), ``codes``, and ``mean`` codes of a site.
    """

    rate: Mapping[str, float]
    codes: Codes
    picture: Image.Image
    lengths: Image.Image | None
    numbers: dict[str, float]


def kinds_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the kinds of rate, of `RATES`, that a tokenizer has."""
    quantize: Any = tokenizer.model.quantize
    if not quantize.variable_rate:
        return RATES[:1]
    return RATES[:2] if quantize.sequence.dummies else RATES  # bits: turns must bring it nearer


class Study:
    """A picture as a tokenizer sees it; latents are computed once, a rate only cuts their loops.

    Args:
        tokenizer: The tokenizer.
        picture: The picture.
        side: Longest side in pixels; larger pictures are scaled down. None keeps all.

    Attributes:
        image: (C, H, W) in [-1, 1], scaled.
        grid: (h, w) of the finest level.
        site: Side of one of its sites in pixels.

    Raises:
        ValueError: It is not a picture, or has other channels than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, picture: Picture, side: int | None = None) -> None:
        self.tokenizer, self.model = tokenizer, tokenizer.model
        image = tokenizer.to_tensor(picture)
        if side is not None and (longest := max(image.shape[1:])) > side:
            rows, columns = (max(round(s * side / longest), 1) for s in image.shape[1:])
            image = resize(image, rows, columns).clamp(-1, 1)
        self.image = image
        padded = pad(image, self.model.factor)[None]  # (1, C, H', W')
        self._padded = padded.shape[2], padded.shape[3]
        with torch.no_grad():
            self.z: Any = self.model.encode_to_prequant(padded.to(next(self.model.parameters())))
        _, rows, columns, _ = self._levels(self._quantize({}))[-1].shape
        self.grid, self.site = (rows, columns), self._padded[0] // rows
        self._last: View | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the scaled picture in pixels."""
        return self.image.shape[1], self.image.shape[2]

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Kinds of rate that the tokenizer has -> smallest and largest value of each.

        ``codes`` are those of a site, ``bits`` those of a pixel by the quantizer's tables, and
        ``lambda`` is its log2, about those of the training; `OWN` has no value.
        """
        known = dict.fromkeys(kinds_of(self.tokenizer), (0.0, 0.0))
        if "codes" in known:
            known["codes"] = (1.0, float(self.model.quantize.sequence.max_loops))
        if "bits" in known:
            quantize: Any = self.model.quantize
            trained = [r for r in (quantize.rate, *(quantize.rate_range or ())) if r]
            spent = [self._bits(self._levels(self._quantize({"rate": r}))) for r in (CHEAPEST, 0)]
            known["bits"] = (spent[0] / self._pixels, max(spent) / self._pixels)
            known["lambda"] = LAMBDAS
            if trained:
                least, most = math.log2(min(trained)), math.log2(max(trained))
                known["lambda"] = least - WIDER, most + WIDER
        return known

    def start_of(self, kind: str) -> float:
        """Return where a kind of rate starts: lambda at the tokenizer's own, if it has one."""
        least, most = self.ranges[kind]
        own: Any = self.model.quantize.rate if kind == "lambda" else None
        return math.log2(own) if own else least + (most - least) / 3

    @property
    def _pixels(self) -> int:
        return self.size[0] * self.size[1]

    def rate_of(self, kind: str, value: float) -> dict[str, float]:
        """Turn a kind of rate, and its value in the unit of `ranges`, into what a quantizer takes.

        Values beyond the range are moved to its end.

        Raises:
            ValueError: The tokenizer has no such rate.
        """
        if kind not in self.ranges:
            raise ValueError(f"this tokenizer has no rate by {kind}, only {', '.join(self.ranges)}")
        least, most = self.ranges[kind]
        value = min(max(value, least), most)
        if kind == "codes":
            return {"max_codes": int(value * self.grid[0] * self.grid[1])}
        if kind == "bits":  # rounding must not refuse the cheapest codes
            return {"target_bits": value * self._pixels * (1 + 1e-9) + 1e-6}
        return {"rate": 2.0**value} if kind == "lambda" else {}

    @torch.no_grad()
    def _quantize(self, rate: Mapping[str, float]) -> Any:
        return self.model.quantize(self.z, **rate)

    def _levels(self, output: Any) -> list[Tensor]:
        """Return the codes (1, h, w, T) of each level, the top first."""
        return [level.cpu() for level in self.model.codes_by_level(output).values()]

    def _bits(self, levels: Sequence[Tensor]) -> float:
        return float(self.model.bits_of(levels[0] if len(levels) == 1 else tuple(levels)))

    def at(self, rate: Mapping[str, float]) -> View:
        """Show the picture at a rate, as `rate_of` gives it; {} is the tokenizer's own.

        Raises:
            ValueError: The rate cannot be met.
        """
        if self._last is not None and self._last.rate == rate:
            return self._last
        output = self._quantize(rate)
        levels = self._levels(output)
        own = tuple(level[0] for level in levels)
        indices = own if len(own) > 1 else levels[0][0]
        codes = Codes(indices, self.size, self._bits(levels))
        x_rec = self.tokenizer.decode_image(codes)
        picture = self.tokenizer.to_picture(x_rec)
        maps = self.model.code_pictures(output, self._padded)
        found = next((maps[name] for name in reversed(maps) if name.endswith("lengths")), None)
        box = (0, 0, self.size[1], self.size[0])
        lengths = None if found is None else to_picture(found[0]).crop(box)
        self._last = View(rate, codes, picture, lengths, self._numbers(codes, x_rec))
        return self._last

    def _numbers(self, codes: Codes, x_rec: Tensor) -> dict[str, float]:
        """Return the numbers of a `View`."""
        size = self._file_size(codes)
        return {
            "psnr": psnr_of(self.image, x_rec),
            "bytes": size,
            "bpp": 8 * size / self._pixels,
            "codes": len(codes),
            "mean": float(codes.lengths.float().mean()),
        }

    @cached_property
    def _codec(self) -> Codec:
        return Codec(self.model, self.tokenizer.context)

    def _file_size(self, codes: Codes) -> int:
        """Bytes of the file of `Tokenizer.compress`."""
        return len(self._codec.pack(codes.indices, codes.size, self._codec.entropy_model()))

    def site_at(self, x: float, y: float) -> tuple[int, int]:
        """Return row and column of the site of a pixel, or of the nearest site."""
        row, column = (
            min(max(int(place // self.site), 0), most - 1)
            for place, most in zip((y, x), self.grid, strict=True)
        )
        return row, column

    def path(self, view: View, site: tuple[int, int]) -> list[Turn]:
        """Follow the loop of a site: its turns and, where they were searched, those after its end.

        Args:
            view: Of this picture, at the rate to look at.
            site: Row and column.
        """
        codes = view.codes.levels[-1][site].tolist()  # T
        distances: list[float | None] = [None] * len(codes)
        quantize: Any = self.model.quantize
        if quantize.variable_rate:
            path = quantize.walk(self.z, **view.rate).path
            own = path.distances[site[0] * self.grid[1] + site[1]].tolist()  # T
            distances = [distance if math.isfinite(distance) else None for distance in own]
        dummy = [*self.model.levels.values()][-1].n_e
        names = ["" if c < 0 else "D" if c == dummy else str(c) for c in codes]
        turns = zip(names, distances, strict=True)
        return [Turn(n, code, d) for n, (code, d) in enumerate(turns, 1) if code or d is not None]

    def marked(self, picture: Image.Image, site: tuple[int, int]) -> Image.Image:
        """Return a picture of this size with a frame round a site."""
        marked, line = picture.convert("RGB"), max(2, max(self.size) // 128)
        left, top = site[1] * self.site, site[0] * self.site
        right, bottom = left + self.site - 1, top + self.site - 1
        box = (left - line, top - line, right + line, bottom + line)
        ImageDraw.Draw(marked).rectangle(box, outline=MARK, width=line)
        return marked
