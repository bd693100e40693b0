"""Codes, sizes and pictures of a tokenizer, for priors and scripts.

Axis letters: B images, C channels, H W image, h w grid, T turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.diffusionmodules.model import Encoder
from taming.modules.vqvae.base import Quantizer

# Parts of a tokenizer that do not affect the codes of an image.
_AFTER = ("loss.", "decoder.", "post_quant_conv.", "colorize", "shortcut.latent_to_pixels.")
# Part of its quantizers that affects them only at a rate by bits, which is in no fingerprint too.
_TABLES = "entropy"
_GROUPS = 32  # of a norm, which no weight shows; other numbers are in the fingerprint by name


# Eleven colours of matplotlib's map "inferno", from dark to bright, at equal distances.
_INFERNO = "000004 160b39 420a68 6a176e 932667 bc3754 dd513a f37819 fca50a f6d746 fcffa4"


def _is_after(name: str) -> bool:
    """Return True for a part or weight, of a model or a level of one, that affects no codes."""
    return name.removeprefix("model.").startswith(_AFTER)


def length_heat_map(lengths: Tensor, max_loops: int, size: tuple[int, int]) -> Tensor:
    """Colour each site by its length: dark for one turn, bright for the most.

    Args:
        lengths: (B, h, w) int64 in [1, max_loops].
        max_loops: T, the length of the brightest colour.
        size: (H, W) of the picture.

    Returns:
        (B, 3, H, W) float32 in [-1, 1].
    """
    levels = [[*bytes.fromhex(colour)] for colour in _INFERNO.split()]
    table = torch.tensor(levels, device=lengths.device) / 127.5 - 1  # (11, 3)
    place = (lengths - 1).float() / max(max_loops - 1, 1) * (len(table) - 1)  # (B, h, w)
    below = place.long().clamp(max=len(table) - 2)
    colours = torch.lerp(table[below], table[below + 1], (place - below)[..., None])
    return F.interpolate(colours.permute(0, 3, 1, 2), size=size, mode="nearest")


class FirstStage:
    """Codes, sizes and pictures of a model that has an ``encoder`` and a quantizer.

    A prior takes such a model as its first stage, or as its condition stage if each image has the
    same number of tokens.

    Attributes:
        value_range: Smallest and largest value of an input.
        colorize: (3, C, 1, 1) projection to colours, or None.
        above: Number of levels above this one.
    """

    value_range = (-1.0, 1.0)
    encoder: Encoder
    quantize: Quantizer
    colorize: Tensor | None
    above: int = 0
    encode: Any
    decode: Any
    state_dict: Any
    named_modules: Any

    # --- codes -----------------------------------------------------------------------------------

    @property
    def levels(self) -> dict[str, Quantizer]:
        """Quantizers by the name of their level, the top first; "" names the only one."""
        return {"": self.quantize}

    @property
    def whole(self) -> Any:
        """The tokenizer with all its levels."""
        return self

    def codes_by_level(self, quantized: Any) -> dict[str, Tensor]:
        """Return the codes (B, h, w, T) int64 in what ``encode`` returned, by level name."""
        batch, _, h, w = quantized.z_q.shape
        turns = self.quantize.sequence.max_loops
        return {"": quantized.info.indices.reshape(batch, h, w, turns)}

    def encode_to_codes(self, x: Tensor, **rate: Any) -> Any:
        """Encode images as codes.

        Args:
            x: (B, C, H, W) in `value_range`.
            **rate: Of ``encode``: at most one argument that sets a rate, and the ``size``.

        Returns:
            (B, h, w, T) int64, or a tuple of the codes of all levels, the top first.
        """
        codes = tuple(self.codes_by_level(self.encode(x, **rate)).values())
        return codes[0] if len(codes) == 1 else codes

    def bits_of(self, codes: Any) -> Tensor:
        """Add up the bits of codes by the tables of the quantizer, or raw if it keeps none.

        Args:
            codes: As `encode_to_codes` gives them.

        Returns:
            (B,) float64 on the CPU.
        """
        return self.quantize.bits(codes)

    def fingerprint(self) -> str:
        """Return a hexadecimal number that two models share only if they give the same tokens.

        That is, at their own threshold, or at one stated. Tokens at a ``rate`` or ``target_bits``
        also depend on the quantizer's `EntropyTables`, which do not decide what a token means and
        are left out: counting them anew leaves caches of tokens valid, unless the quantizer's own
        rate is a ``rate``.
        """
        sequences = [quantizer.sequence for quantizer in self.levels.values()]
        about = [part for own in sequences for part in (type(own).__name__, vars(own))]
        about.append(self.quantize.identity())
        groups = {
            name: part.num_groups
            for name, part in self.named_modules()
            if getattr(part, "num_groups", _GROUPS) != _GROUPS and not _is_after(name)
        }
        about += [unseen for unseen in (groups, self.above) if unseen]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode())
        for name, value in sorted(self.state_dict().items()):
            if not _is_after(name) and _TABLES not in name.split("."):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # --- sizes -----------------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        """C, channels of an image."""
        return self.encoder.conv_in.in_channels

    @property
    def factor(self) -> int:
        """Side in pixels of a site, of the top level if there are several."""
        return self.encoder.factor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of sites (h, w) of a training image."""
        side = self.encoder.resolution // self.factor
        return side, side

    @property
    def condition_vocab_size(self) -> int:
        """Number of different tokens of a condition."""
        return self.quantize.sequence.vocab_size

    @property
    def condition_length(self) -> int:
        """Number of tokens of a condition that has the size of a training image.

        Raises:
            ValueError: Sites have several codes.
        """
        if self.quantize.sequence.max_loops > 1:
            raise ValueError(
                f"the condition's {type(self.quantize).__name__} has several codes for a site; a "
                "condition needs one code for each site, as from VectorQuantizer2"
            )
        return self.grid[0] * self.grid[1]

    # --- pictures --------------------------------------------------------------------------------

    def as_input(self, x_rec: Tensor) -> Tensor:
        """Bring decoded images (B, C, H, W) into the form of an input: unchanged by default."""
        return x_rec

    def code_pictures(self, quantized: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        """Show the lengths at each level whose sites take several turns.

        Args:
            quantized: Result of ``encode``.
            size: (H, W) in pixels.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1].
        """
        codes = self.codes_by_level(quantized)
        return {
            f"{name}_lengths" if name else "lengths": length_heat_map(trace.lengths, turns, size)
            for name, trace in self.quantize.traces(quantized).items()
            if (turns := codes[name].shape[-1]) > 1
        }

    def condition_pictures(
        self, c: Tensor, quant_c: Tensor, size: tuple[int, int], datasets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Show conditions and their reconstructions: name -> (B, 3, H, W).

        Args:
            c: (B, C, H, W) images that are conditions.
            quant_c: z_q that ``encode`` returned for them.
            size: (H, W) in pixels. Not used: the pictures have the size of the conditions.
            datasets: Not used.
        """
        images = {"conditioning": c, "conditioning_rec": self.as_input(self.decode(quant_c))}
        return {name: self.to_rgb(image) for name, image in images.items()}

    def to_rgb(self, x: Tensor) -> Tensor:
        """Colour images (B, C, H, W) by their number of channels: (B, 3, H, W).

        One is grey. Of other numbers than 1 and 3, ``colorize`` makes a fixed random projection.
        Without it, 2 and 4 are grey or RGB with alpha, shown on white, and of more, the first three
        are shown.
        """
        channels = x.shape[1]
        if self.colorize is None or channels in (1, 3):
            if channels in (2, 4):
                alpha = (x[:, -1:].clamp(-1, 1) + 1) / 2
                x = x[:, :-1] * alpha + (1 - alpha)
            return x[:, :3].expand(-1, 3, -1, -1)
        x = F.conv2d(x, self.colorize.to(x.dtype))
        return 2 * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) - 1
