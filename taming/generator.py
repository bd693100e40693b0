"""The generator for people: new pictures from a trained prior, completions, and bits of pictures.

Axis letters: B pictures, C channels, H W picture, h w grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

from taming.models.prior import Prior
from taming.models.sampling import Grid, SamplingParams, generators_of, paste
from taming.pictures import Picture, to_tensor
from taming.tokenizer import Tokenizer, decoded_pictures


def load(run: str | Path, device: torch.device | str = "cpu") -> Tokenizer | Generator:
    """Load a trained model.

    Args:
        run: Folder of a run, ``logs/<run>``, or one of its checkpoints.
        device: Device for the model.

    Returns:
        A `Generator` for the run of a prior, a `Tokenizer` for that of a tokenizer.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: It is not a run, or its model is neither.
    """
    from taming.run.folder import model_from_run

    model = model_from_run(run)
    face = Generator if hasattr(model, "sample_codes") else Tokenizer
    return face(model).to(device)


class Generator:
    """Samples pictures from a trained prior, completes given ones, and measures their bits.

    Keyword arguments ``**params`` are the fields of `SamplingParams`: ``temperature`` above 0,
    ``top_k``, ``top_p`` in (0, 1], ``min_p`` in [0, 1], ``guidance`` and ``greedy``.

    Args:
        model: The prior, unconditional or class-conditional; it is switched to evaluation mode.
        batch_size: Largest number of pictures that go through the model together.

    Attributes:
        tokenizer: The prior's `Tokenizer`.

    Raises:
        ValueError: The prior takes another condition than a class.

    Example:
        >>> from taming.models.cond_transformer import Net2NetTransformer
        >>> sizes = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
        >>> sizes |= {"resolution": 8, "z_channels": 8, "in_channels": 3, "out_ch": 3}
        >>> loss = {"target": "taming.modules.losses.reconstruction.ReconstructionLoss"}
        >>> params = {"ddconfig": sizes | {"double_z": False}, "lossconfig": loss}
        >>> params |= {"n_embed": 16, "embed_dim": 4}
        >>> tokenizer = {"target": "taming.models.vqgan.VQModel", "params": params}
        >>> gpt = {"target": "taming.modules.transformer.gpt.GPT", "params": {"n_embd": 8}}
        >>> generator = Generator(Net2NetTransformer(gpt, tokenizer, "__is_unconditional__"))
        >>> pictures = generator.sample(2, seed=1, top_k=5)
        >>> [picture.size for picture in pictures]
        [(8, 8), (8, 8)]
        >>> len(generator.tokenizer.encode(pictures[0]))
        16
    """

    def __init__(self, model: Prior, batch_size: int = 16) -> None:
        if not model.be_unconditional and model.n_classes is None:
            raise ValueError(
                "a Generator takes an unconditional or class-conditional prior, got one whose "
                f"condition is a {type(model.cond_stage_model).__name__}"
            )
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
        grid: Grid | None = None,
        **params: Any,
    ) -> list[Image.Image]:
        """Sample new pictures.

        Args:
            n: Number of pictures.
            label: Class of a class-conditional prior.
            seed: Seed. The i-th picture of a seed is the same whatever ``n`` and the batch size,
                up to rounding.
            grid: (h, w) sites; None for the size trained on. A larger grid is sampled through a
                sliding window.
            **params: Fields of `SamplingParams`.

        Returns:
            PIL images.

        Raises:
            ValueError: A value is out of range, or the label is missing or unexpected.
        """
        images = [
            self.model.decode_codes(
                self.model.sample_codes(self._condition(label, len(part)), own, grid=grid)
            )
            for part, own in self._batches(n, seed, params)
        ]
        return decoded_pictures(self.tokenizer.model, torch.cat(images))

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
            picture: The picture; it is scaled and cut to the size that the prior was trained on.
            mask: A picture, scaled and cut likewise, that is bright where ``picture`` is known; or
                (h, w) bool sites. A site is known if all its pixels are.
            n: Number of completions.
            label: Class of a class-conditional prior.
            seed: Seed, as in `sample`.
            **params: Fields of `SamplingParams`.

        Returns:
            PIL images. Known sites show the reconstruction of the picture.

        Raises:
            ValueError: Something is not a picture, or as in `sample`.
        """
        codes = self.model.encode_codes(self._fitted([picture]))
        reconstruction = self.model.decode_codes(codes)
        known = self._known(mask)
        images = [
            self.model.decode_codes(
                self.model.sample_codes(
                    self._condition(label, len(part)),
                    own,
                    codes=codes.expand(len(part), -1, -1, -1),
                    known=known,
                )
            )
            for part, own in self._batches(n, seed, params)
        ]
        completed = paste(torch.cat(images), reconstruction, known)
        return decoded_pictures(self.tokenizer.model, completed)

    @torch.no_grad()
    def bits(self, pictures: Picture | Sequence[Picture], label: int | None = None) -> list[float]:
        """Measure -log2 of the probability of pictures' codes, their lengths included.

        Args:
            pictures: Pictures, scaled and cut to the size that the prior was trained on.
            label: Their class, for a class-conditional prior.

        Returns:
            Bits of each picture.

        Raises:
            ValueError: Something is not a picture, or the label is missing or unexpected.
        """
        several: Any = pictures if isinstance(pictures, (list, tuple)) else [pictures]
        bits: list[float] = []
        for start in range(0, len(several), self.batch_size):
            x = self._fitted(several[start : start + self.batch_size])
            labels = self._condition(label, len(x))[:, 0]
            batch = {self.model.cond_stage_key: labels}
            batch[self.model.first_stage_key] = rearrange(x, "b c h w -> b h w c")
            nats, _ = self.model.likelihood(self.model.tokenize_batch(batch))
            bits += (nats / math.log(2)).tolist()
        return bits

    def _batches(self, n: int, seed: int, params: dict[str, Any]) -> list[Any]:
        """Split n pictures into batches: their numbers, and parameters with their generators."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        parts = [range(i, min(i + self.batch_size, n)) for i in range(0, n, self.batch_size)]
        return [(p, SamplingParams(**params, generators=generators_of(seed, p))) for p in parts]

    def _condition(self, label: int | None, n: int) -> Tensor:
        """Return the condition's tokens (n, 1) int64."""
        classes = self.model.n_classes or 0
        if self.model.be_unconditional and label is not None:
            raise ValueError(f"this prior is unconditional and takes no label, got {label}")
        if self.model.be_unconditional:
            label = self.model.sos_token
        elif label is None or not 0 <= label < classes:
            raise ValueError(f"this prior needs a label from 0 to {classes - 1}, got {label}")
        return torch.full((n, 1), label, device=self.model.device)

    def _fitted(self, pictures: Sequence[Picture]) -> Tensor:
        """Scale and cut pictures to the size trained on: (B, C, H, W) in [-1, 1]."""
        return torch.stack([self._fit(to_tensor(p, self.tokenizer.channels)) for p in pictures])

    def _fit(self, image: Tensor) -> Tensor:
        """Scale an image (C, H, W) until it covers the size trained on, and cut its middle."""
        factor = self.model.first_stage_model.factor
        height, width = (side * factor for side in self.model.grid)
        scale = max(height / image.shape[1], width / image.shape[2])
        size = [
            max(height, round(image.shape[1] * scale)),
            max(width, round(image.shape[2] * scale)),
        ]
        image = center_crop(resize(image, size, antialias=True), [height, width])
        return image.clamp(-1, 1).to(self.model.device)

    def _known(self, mask: Any) -> Tensor:
        """Return the known sites (h, w) bool of a mask."""
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == self.model.grid:
            return mask.to(self.model.device)
        bright = self._fit(to_tensor(mask, 1))[0] > 0  # (H, W)
        factor = self.model.first_stage_model.factor
        sites = rearrange(bright, "(h f) (w g) -> h w (f g)", f=factor, g=factor)
        return sites.all(dim=-1)
