"""The generator for people: new pictures from a trained prior, completions, and bits of pictures.

Axis letters: B pictures, C channels, H W picture, h w grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from taming.models.level_prior import check_priors, sample_levels
from taming.models.prior import Prior
from taming.models.sampling import Grid, SamplingParams, generators_of, paste, sample_images
from taming.pictures import Picture, is_single, resize, to_picture, to_tensor
from taming.sharing import Shared, count_parameters
from taming.signatures import naming_nearest
from taming.tokenizer import Tokenizer
from taming.util import at_least

Labels = int | Sequence[int] | None


class Generator(Shared):
    """Samples pictures from a trained prior, completes given ones, and measures their bits.

    Keyword arguments ``**params`` are the fields of `SamplingParams`: ``temperature`` above 0,
    ``top_k``, ``top_p`` in (0, 1], ``min_p`` in [0, 1], ``guidance`` and ``greedy``.

    Args:
        model: The prior, unconditional or class-conditional, or a list of the priors of all levels
            of a VQ-VAE-2, the top's first. They are switched to evaluation mode.
        batch_size: Largest number of pictures that go through the model together.

    Attributes:
        model: The prior; of several, the top level's.

    Raises:
        ValueError: The prior's condition is not a class, several do not belong together, or the
            batch size is not positive.

    Example:
        >>> from taming.models.cond_transformer import Net2NetTransformer
        >>> sizes = dict(double_z=False, z_channels=4, resolution=8, in_channels=3, out_ch=3)
        >>> sizes |= dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[])
        >>> parts = dict(ddconfig=sizes, lossconfig={"target": "taming.modules.losses.DummyLoss"})
        >>> tokenizer = {"target": "taming.models.vqgan.VQModel", "params": parts}
        >>> parts |= dict(n_embed=8, embed_dim=4)
        >>> gpt = {"target": "taming.modules.transformer.gpt.GPT", "params": dict(n_embd=32)}
        >>> gpt["params"] |= dict(n_layer=1, n_head=2)
        >>> generator = Generator(Net2NetTransformer(gpt, tokenizer, "__is_unconditional__"))
        >>> [picture.size for picture in generator.sample(2, top_k=4)]
        [(8, 8), (8, 8)]
    """

    def __init__(self, model: Prior | Sequence[Prior], batch_size: int = 16) -> None:
        at_least(1, batch_size=batch_size)
        several = isinstance(model, (list, tuple))
        self.priors: list[Any] = [*model] if several else [model]
        if several:
            check_priors(self.priors)
        for prior in self.priors:
            prior.eval()
        self.model: Prior = self.priors[0]
        self.batch_size = batch_size
        stage = self.model.cond_stage_model
        if stage is self.model.first_stage_model:
            raise ValueError(
                "this prior is of one level of a VQ-VAE-2: use scripts/sample_hierarchy.py, or "
                "load the runs of all levels together"
            )
        if not self.model.be_unconditional and self.model.n_classes is None:
            raise ValueError(
                "a Generator takes an unconditional or class-conditional prior, got one whose "
                f"condition is what a {type(stage).__name__} takes: use scripts/make_samples.py"
            )

    @classmethod
    def of_modules(cls, modules: Mapping[str, Any]) -> Generator:
        """Return the generator of one loaded prior, or of those of all levels."""
        priors = [modules[name] for name in sorted(modules)]
        for prior in priors:
            if not hasattr(prior, "sample_codes"):
                raise ValueError(f"expected a prior, got a {type(prior).__name__}: use a Tokenizer")
        return cls(priors if len(priors) > 1 else priors[0])

    def shared_modules(self) -> dict[str, Any]:
        """Return the prior as ``model``, or those of all levels; each has its tokenizer in it."""
        if len(self.priors) == 1:
            return {"model": self.model}
        return {f"level_{number}": prior for number, prior in enumerate(self.priors)}

    def facts(self) -> dict[str, Any]:
        """Return the facts of the model card that the configuration states: name -> value."""
        classes = self.model.n_classes
        about = {
            f"prior {name}": f"{type(prior).__name__} of {count_parameters(prior.network)} "
            "parameters"
            for name, prior in self.shared_modules().items()
        }
        condition = f"a class of {classes}" if classes else "none"
        return about | {"condition": condition} | self.tokenizer.facts()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The `Tokenizer` of the prior's codes, with all levels of a VQ-VAE-2."""
        return Tokenizer(self.model.first_stage_model.whole, self.batch_size)

    @naming_nearest(SamplingParams)
    def sample(
        self,
        n: int = 1,
        label: Labels = None,
        seed: int = 0,
        *,
        first: int = 0,
        grid: Grid | None = None,
        **params: Any,
    ) -> list[Image.Image]:
        """Sample new pictures.

        Args:
            n: Number of pictures, for each label if there are several.
            label: Class, or several, of a class-conditional prior.
            seed: Seed of a series of pictures, the same up to rounding for any batch size.
            first: Number of the first picture in that series.
            grid: (h, w) sites; None for those trained on. More take a sliding window.
            **params: Fields of `SamplingParams`.

        Returns:
            PIL images, those of a label after each other.

        Raises:
            ValueError: A value is out of range, or the label is missing or unexpected.
        """
        batches = self._sample(n, label, seed, first, params, grid=grid)
        return [to_picture(image) for images in batches for image in self.model.show(images)]

    @naming_nearest(SamplingParams)
    def complete(
        self,
        picture: Picture,
        mask: Any,
        n: int = 1,
        label: Labels = None,
        seed: int = 0,
        *,
        first: int = 0,
        grid: Grid | None = None,
        **params: Any,
    ) -> list[Image.Image]:
        """Sample the unknown part of a picture.

        Args:
            picture: The picture; it is scaled and cut to the size of the grid.
            mask: The part that is known, as for `known_sites`.
            n: Number of completions, for each label if there are several.
            label: Class, or several, of a class-conditional prior.
            seed: Seed of a series of completions.
            first: Number of the first completion in that series.
            grid: (h, w) sites; None for the size trained on.
            **params: Fields of `SamplingParams`.

        Returns:
            PIL images. Known sites show the reconstruction of the picture.

        Raises:
            ValueError: Something is not a picture, or as in `sample`.
        """
        codes = self.model.encode_codes(self._fitted([picture], grid))  # (1, h, w, T)
        reconstruction = self.model.decode_codes(codes)
        known = self.known_sites(mask, grid)
        batches = self._sample(n, label, seed, first, params, codes=codes, known=known)
        pasted = (self.model.show(paste(images, reconstruction, known)) for images in batches)
        return [to_picture(image) for images in pasted for image in images]

    def known_sites(self, mask: Any, grid: Grid | None = None) -> Tensor:
        """Return the known sites (h, w) bool of a mask.

        Args:
            mask: A picture, scaled and cut to the size of the grid, that is bright where a picture
                is known (what is transparent is not); or (h, w) bool sites. A site is known if all
                its pixels are.
            grid: (h, w) sites; None for the size trained on.

        Raises:
            ValueError: The mask is not a picture, or its brightest value is 1 of 255.
        """
        grid = grid or self.model.grid
        if getattr(mask, "shape", ()) == grid and str(mask.dtype).endswith("bool"):
            return torch.as_tensor(mask, device=self.model.device)
        image = to_tensor(mask, background="black")
        if -1 < image.max() < 1.5 / 127.5 - 1:
            raise ValueError(
                "a mask is bright where a picture is known, at least 128 of 255, but its brightest "
                "value is 1: use 0 and 255, or bool"
            )
        bright = self._fit(image, grid).mean(dim=0) > 0  # (H, W)
        factor = self.model.first_stage_model.factor
        sites = rearrange(bright, "(h f) (w g) -> h w (f g)", f=factor, g=factor)
        return sites.all(dim=-1)

    @torch.no_grad()
    def bits(self, pictures: Picture | Sequence[Picture], label: Labels = None) -> list[float]:
        """Measure -log2 of the probability of pictures' codes, their lengths included.

        Args:
            pictures: One picture, or several, scaled and cut to the size trained on.
            label: Their class, or that of each, for a class-conditional prior.

        Returns:
            Bits of each picture.

        Raises:
            ValueError: Something is not a picture, or a label is missing or unexpected.
        """
        several: Any = [pictures] if is_single(pictures) else pictures
        condition = self._condition(label)
        if len(condition) not in (1, len(several)):
            raise ValueError(f"got {len(condition)} labels for {len(several)} pictures")
        bits: list[float] = []
        labels = condition.expand(len(several))
        for start in range(0, len(several), self.batch_size):
            part = slice(start, start + self.batch_size)
            x = self._fitted(several[part])
            batch = {self.model.cond_stage_key: labels[part]}
            for prior in self.priors:
                batch[prior.first_stage_key] = rearrange(x, "b c h w -> b h w c")
            nats = [p.measure_nats(p.tokenize_batch(batch))[0] for p in self.priors]  # each (B,)
            bits += (torch.stack(nats).sum(dim=0) / math.log(2)).tolist()
        return bits

    @torch.no_grad()
    def _sample(
        self, n: int, label: Labels, seed: int, first: int, params: dict[str, Any], **start: Any
    ) -> Iterator[Tensor]:
        """Yield images (B, C, H, W) batch by batch; ``start`` is for `Prior.sample_codes`."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if len(self.priors) > 1 and start != {"grid": None}:
            raise ValueError("all levels of a VQ-VAE-2 together only sample the grid trained on")
        conditions = self._condition(label).repeat_interleave(n)[:, None]
        numbers = range(first, first + len(conditions))
        one = len(numbers) <= self.batch_size  # a caller's own bar counts these
        for i in tqdm(range(0, len(numbers), self.batch_size), "batches", leave=False, disable=one):
            part = slice(i, i + self.batch_size)
            condition = conditions[part]
            own = SamplingParams(**params, generators=generators_of(seed, numbers[part]))
            if len(self.priors) > 1:
                codes = sample_levels(self.priors, condition, own)
                yield self.priors[-1].first_stage_model.whole.decode_code(codes)
            else:
                if "codes" in start:  # the same ones in all completions
                    start["codes"] = start["codes"][:1].expand(len(condition), -1, -1, -1)
                yield sample_images(self.model, condition, own, **start)

    def _condition(self, label: Labels) -> Tensor:
        """Return the tokens of labels, (L,) int64; for an unconditional prior, the start token."""
        if self.model.be_unconditional and label is not None:
            raise ValueError(f"this prior is unconditional and takes no label, got {label}")
        if self.model.be_unconditional:
            return torch.tensor([self.model.sos_token], device=self.model.device)
        classes = self.model.n_classes or 0
        tokens = torch.as_tensor(-1 if label is None else label).reshape(-1)
        if tokens.dtype != torch.int64 or not ((tokens >= 0) & (tokens < classes)).all():
            raise ValueError(f"this prior needs a label from 0 to {classes - 1}, got {label}")
        return tokens.to(self.model.device)

    def _fitted(self, pictures: Sequence[Picture], grid: Grid | None = None) -> Tensor:
        """Scale and cut pictures to the size of a grid: (B, C, H, W) in [-1, 1]."""
        images = (self.tokenizer.to_tensor(picture) for picture in pictures)
        return torch.stack([self._fit(image, grid or self.model.grid) for image in images])

    def _fit(self, image: Tensor, grid: Grid) -> Tensor:
        """Scale an image (C, H, W) until it covers a grid (h, w), and cut its middle."""
        height, width = (side * self.model.first_stage_model.factor for side in grid)
        scale = max(height / image.shape[1], width / image.shape[2])
        rows, columns = round(image.shape[1] * scale), round(image.shape[2] * scale)
        rows, columns = max(height, rows), max(width, columns)
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        image = resize(image, rows, columns)[:, top : top + height, left : left + width]
        return image.clamp(-1, 1).to(next(self.model.parameters()))
