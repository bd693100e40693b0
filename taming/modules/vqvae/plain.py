"""What the quantizers that give each latent one code share: decoding, and counting used codes only.

Axis letters: B images, D channels, h w grid, N latents, K codes.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.vqvae.base import Quantizer, channels_second
from taming.modules.vqvae.sequence import RasterSequence


class PlainQuantizer(Quantizer):
    """A quantizer with one code per latent.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        remap: Path of an ``.npy`` file of used codes: indices then count only those.
        unknown_index: What an unused code becomes under ``remap``: ``"random"``, ``"extra"`` (one
            more index) or an index.

    Attributes:
        re_embed: Number of different indices.

    Raises:
        ValueError: ``unknown_index`` is none of these, or ``remap`` names codes that do not exist.
    """

    used: Tensor

    def __init__(
        self, n_e: int, e_dim: int, remap: str | None = None, unknown_index: str | int = "random"
    ) -> None:
        super().__init__(n_e, e_dim)
        if isinstance(unknown_index, str) and unknown_index not in ("random", "extra"):
            raise ValueError(
                f"unknown_index must be 'random', 'extra' or an index, got {unknown_index!r}"
            )
        self.remap = remap
        self.re_embed = n_e
        self.unknown_index = unknown_index
        if remap is not None:
            used = torch.from_numpy(np.load(remap)).long()
            if len(used) == 0 or used.min() < 0 or used.max() >= n_e:
                raise ValueError(f"remap: {remap} must name codes 0..{n_e - 1}, and at least one")
            if isinstance(unknown_index, int) and not 0 <= unknown_index < len(used):
                raise ValueError(
                    f"unknown_index {unknown_index} is none of the {len(used)} used codes' numbers"
                )
            self.register_buffer("used", used)
            self.re_embed = len(self.used) + (unknown_index == "extra")
            if unknown_index == "extra":
                self.unknown_index = len(self.used)
        self.sequence = RasterSequence(self.re_embed)

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The codes (K, D)."""

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Count codes among the used ones; unused ones become ``unknown_index``. Any shape."""
        table = self.used.new_full((self.n_e,), -1)
        table[self.used] = torch.arange(len(self.used), device=table.device)
        new = table[indices]
        if self.unknown_index == "random":
            other = torch.randint_like(new, self.re_embed)
        else:
            other = torch.full_like(new, int(self.unknown_index))
        return torch.where(new < 0, other, new)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Turn indices among the used codes back into codes; the extra index becomes the first."""
        return self.used[torch.where(indices >= len(self.used), 0, indices)]

    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Look indices up.

        Args:
            indices: int64, any shape of as many indices as latents.
            shape: (B, h, w, D) of the wanted grid; None gives (N, D).

        Returns:
            z_q (B, D, h, w), or (N, D) without a shape.

        Raises:
            ValueError: There is no such index.
        """
        codes = indices.reshape(-1)
        if len(wrong := codes[(codes < 0) | (codes >= self.re_embed)]):
            raise ValueError(f"index {int(wrong[0])} is none of 0..{self.re_embed - 1}")
        if self.remap is not None:
            codes = self.unmap_to_all(codes)
        z_q = F.embedding(codes, self.codebook)
        return z_q if shape is None else channels_second(z_q.view(shape))
