"""The generator for people: new pictures from a trained prior, completions, and bits of pictures.

Axis letters: B pictures, H W picture, h w grid, T turns.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from taming.models.prior import Prior
from taming.pictures import Picture, to_picture
from taming.tokenizer import Tokenizer


class Generator:
    """Samples pictures from a trained prior, completes given ones, and measures their bits.

    Args:
        model: The prior, in any mode; it is switched to evaluation.
        batch_size: Largest number of pictures that are sampled together.

    Attributes:
        tokenizer: The prior's `Tokenizer`.
    """

    def __init__(self, model: Prior, batch_size: int = 16) -> None:
        self.model = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.tokenizer = Tokenizer(model.first_stage_model, batch_size)

    def to(self, device: torch.device | str) -> Generator:
        """Move the prior and its tokenizer to a device; return the generator."""
        self.model.to(device)
        return self

    def sample(
        self,
        n: int = 1,
        label: int | None = None,
        seed: int = 0,
        grid: tuple[int, int] | None = None,
        **params: Any,
    ) -> list[Image.Image]:
        """Sample new pictures.

        Args:
            n: Number of pictures.
            label: Class of a class-conditional prior.
            seed: Seed; the i-th picture of a seed is the same whatever ``n`` and the batch size.
            grid: (h, w) sites; None for the size that the prior was trained for. A larger grid is
                sampled through a sliding window.
            **params: Fields of `SamplingParams`: ``temperature`` above 0, ``top_k``, ``top_p`` in
                (0, 1], ``min_p`` in [0, 1], ``guidance`` scale, ``greedy``.

        Returns:
            PIL images.

        Raises:
            ValueError: A value is out of range, or the label is missing or unexpected.
        """
        return [to_picture(image) for image in self.sample_tensors(n, label, seed, grid, **params)]

    def complete(
        self,
        picture: Picture,
        mask: Any,
        n: int = 1,
        label: int | None = None,
        seed: int = 0,
        **params: Any,
    ) -> list[Image.Image]:
        """Sample the unknown part of a picture.

        Args:
            picture: A picture; it is scaled and cut to the size that the prior was trained for.
            mask: Bright (or True) where the picture is known: a picture, scaled and cut likewise. A
                site is known if all its pixels are.
            n: Number of completions.
            label: Class of a class-conditional prior.
            seed: Seed, as in `sample`.
            **params: Fields of `SamplingParams`, as in `sample`.

        Returns:
            PIL images. Known sites show the reconstruction of the picture.

        Raises:
            ValueError: Something is not a picture, or as in `sample`.
        """
