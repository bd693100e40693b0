"""The codes of a picture, and the file that keeps them.

Axis letters: H W picture, h w grid, T turns.
"""

from __future__ import annotations

import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from taming.util import replacing

# Names of the arrays in a file: one tensor of indices, or those of all levels, and the picture.
_SINGLE, _LEVEL, _SIZE, _BITS = "indices", "level{}", "size", "bits"


@dataclass(frozen=True, repr=False, eq=False)
class Codes:
    """The codes of one picture; equal to those of the same indices and size.

    Attributes:
        indices: (h, w, T) int64: 0..K-1 for a codebook vector, K for the dummy D, -1 after the end
            of a site's loop. A VQ-VAE-2 has one such tensor for each level, the top first.
        size: (H, W) of the picture in pixels.
        bits: Size of the codes in bits, as the tokenizer that made them measures it
            (`Quantizer.bits`); NaN for codes that were made by hand.

    Example:
        >>> codes = Codes(torch.tensor([[[5, 3, -1], [2, -1, -1]]]), size=(8, 16), bits=16.0)
        >>> codes, codes.lengths.tolist(), codes.bpp
        (Codes(size=(8, 16), sites 1x2, 3 codes), [[2, 1]], 0.125)
        >>> codes.save("photo.npz")  # doctest: +SKIP
        >>> Codes.load("photo.npz")  # doctest: +SKIP
        Codes(size=(8, 16), sites 1x2, 3 codes)
    """

    indices: Tensor | tuple[Tensor, ...]
    size: tuple[int, int]
    bits: float = math.nan

    @property
    def levels(self) -> tuple[Tensor, ...]:
        """Indices (h, w, T) of each level; of most tokenizers, there is one."""
        return self.indices if isinstance(self.indices, tuple) else (self.indices,)

    @property
    def lengths(self) -> Tensor:
        """Number of codes of each site of the finest level, (h, w) int64 in [1, T]."""
        return (self.levels[-1] >= 0).sum(dim=-1)

    @property
    def bpp(self) -> float:
        """Bits per pixel of the picture."""
        return self.bits / (self.size[0] * self.size[1])

    def __len__(self) -> int:
        return sum(int((level >= 0).sum()) for level in self.levels)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codes):
            return NotImplemented
        same = (self.size, len(self.levels)) == (other.size, len(other.levels))
        return same and all(map(torch.equal, self.levels, other.levels))

    def __repr__(self) -> str:
        grids = ", ".join(f"{level.shape[0]}x{level.shape[1]}" for level in self.levels)
        return f"Codes(size={self.size}, sites {grids}, {len(self)} codes)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the codes as they are, to one uncompressed ``.npz`` file of plain integers.

        Args:
            path: The file, of any name; an earlier one is replaced once the new one is whole.

        Raises:
            WriteError: The file cannot be saved.
        """
        single = not isinstance(self.indices, tuple)
        names = [_SINGLE] if single else [_LEVEL.format(n) for n in range(len(self.levels))]
        arrays = {
            name: level.cpu().numpy().astype(np.min_scalar_type(-1 - max(0, int(level.max()))))
            for name, level in zip(names, self.levels, strict=True)
        }
        about = {_SIZE: np.array(self.size, np.int64), _BITS: np.float64(self.bits)}
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, allow_pickle=False, **about, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codes:
        """Load codes from a file of `save`, which runs no code and takes no more than its bytes.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a whole file of codes; names it.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file of codes {path}")
        try:
            arrays = _load_arrays(path)
            height, width = map(int, arrays.pop(_SIZE))
            bits = float(arrays.pop(_BITS))
            names = [_LEVEL.format(n) for n in range(len(arrays))]
            if not names or {*arrays} not in ({_SINGLE}, {*names}) or min(height, width) < 1:
                raise ValueError(f"arrays {[*arrays]} of a picture of {height}x{width} pixels")
            levels = {name: _as_indices(name, array) for name, array in arrays.items()}
        except Exception as error:  # damaged bytes may raise anything in the reader
            raise ValueError(f"{path} is not a file of codes: {error}") from error
        one = levels.get(_SINGLE)
        indices = tuple(levels[name] for name in names) if one is None else one
        return cls(indices, (height, width), bits)


def _load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Load all arrays of an ``.npz`` file that is not compressed, so that none can be a bomb."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("it is compressed")
    with np.load(path, allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}


def _as_indices(name: str, array: np.ndarray) -> Tensor:
    """Return an array of codes (h, w, T) as int64."""
    if array.dtype.kind != "i" or array.ndim != 3 or not array.size or array.min() < -1:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected codes (h, w, T)")
    return torch.from_numpy(array.astype(np.int64))
