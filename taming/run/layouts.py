"""Layouts of other projects' VQ autoencoders: their keys, and the model that their weights make.

This project has the keys of taming-transformers, and so do the VQ models of latent-diffusion.
diffusers' ``VQModel`` and LlamaGen's tokenizers are the same network under other names; the table
is in ``docs/convert.md``. What fits no layout is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# Pairs of our name and theirs. <i> and <j> number levels and blocks; <r> is <i> counted from the
# other end.
Table = tuple[tuple[str, str], ...]
_DIFFUSERS: Table = (
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    (".down.<i>.block.<j>.", ".down_blocks.<i>.resnets.<j>."),
    (".down.<i>.attn.<j>.", ".down_blocks.<i>.attentions.<j>."),
    (".down.<i>.downsample.", ".down_blocks.<i>.downsamplers.0."),
    (".up.<r>.block.<j>.", ".up_blocks.<i>.resnets.<j>."),
    (".up.<r>.attn.<j>.", ".up_blocks.<i>.attentions.<j>."),
    (".up.<r>.upsample.", ".up_blocks.<i>.upsamplers.0."),
    (".norm_out.", ".conv_norm_out."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm.", ".group_norm."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".proj_out.", ".to_out.0."),
)
_LLAMAGEN: Table = (
    (".mid.block_1.", ".mid.0."),
    (".mid.attn_1.", ".mid.1."),
    (".mid.block_2.", ".mid.2."),
    ("encoder.down.<i>.block.<j>.", "encoder.conv_blocks.<i>.res.<j>."),
    ("encoder.down.<i>.attn.<j>.", "encoder.conv_blocks.<i>.attn.<j>."),
    ("encoder.down.<i>.downsample.", "encoder.conv_blocks.<i>.downsample."),
    ("decoder.up.<r>.block.<j>.", "decoder.conv_blocks.<i>.res.<j>."),
    ("decoder.up.<r>.attn.<j>.", "decoder.conv_blocks.<i>.attn.<j>."),
    ("decoder.up.<r>.upsample.", "decoder.conv_blocks.<i>.upsample."),
)


# What older versions of diffusers called the layers of an attention.
_BEFORE: Table = (
    (".to_q.", ".query."),
    (".to_k.", ".key."),
    (".to_v.", ".value."),
    (".to_out.0.", ".proj_attn."),
)


class _Layout(NamedTuple):
    """Start of the keys of the encoder's levels; table; old names; keys that no model needs."""

    levels: str
    table: Table = ()
    before: Table = ()
    unused: tuple[str, ...] = ()


LAYOUTS = {
    "taming": _Layout("encoder.down."),
    "diffusers": _Layout("encoder.down_blocks.", _DIFFUSERS, before=_BEFORE),
    "LlamaGen": _Layout("encoder.conv_blocks.", _LLAMAGEN, unused=("quantize.codebook_used",)),
}

# Parts of a whole model; the others of its checkpoint are of training, or of another model.
_PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv", "colorize")
_EMA = "model_ema."  # of latent-diffusion
_FIRST_STAGE = "first_stage_model."


def recognise(weights: Mapping[str, Tensor], ema: bool = False) -> tuple[str, dict[str, Tensor]]:
    """Find the layout of a checkpoint's weights.

    Args:
        weights: State dict of a tokenizer, or of a model with one as its ``first_stage_model``.
        ema: Take the moving averages that latent-diffusion keeps beside the weights.

    Returns:
        Name of the layout, and the tokenizer's weights under the keys of this project, those of
        training left out.

    Raises:
        ValueError: They are of no known layout, or have no averages.
    """
    from taming.checkpoint import unwrapped

    named = {unwrapped(key): value for key, value in weights.items()}
    if not any(key.startswith("encoder.") for key in named):
        named = {
            k.removeprefix(_FIRST_STAGE): v for k, v in named.items() if k.startswith(_FIRST_STAGE)
        }
    own = {
        key: _averaged(key, value, named) if ema else value
        for key, value in named.items()
        if key.split(".")[0] in _PARTS
    }
    for name, layout in LAYOUTS.items():
        if any(key.startswith(layout.levels) for key in own):
            return name, _translated(own, layout)
    raise ValueError(
        f"the keys are of no known layout ({', '.join(LAYOUTS)}); they are like {[*weights][:3]}"
    )


def _averaged(key: str, value: Tensor, named: Mapping[str, Tensor]) -> Tensor:
    name = _EMA + key.replace(".", "")
    if name not in named:
        raise ValueError(f"the checkpoint has no averaged weights: {name} is not in it")
    return named[name]


def _translated(weights: Mapping[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    last = _count(weights, layout.levels) - 1
    back = tuple((theirs, ours) for ours, theirs in (*layout.before, *layout.table))
    return {
        translate(key, back, last): _as_convolution(key, value)
        for key, value in weights.items()
        if key not in layout.unused
    }


def translate(key: str, table: Iterable[tuple[str, str]], last: int) -> str:
    """Translate a key by pairs of its names and others'; ``last`` is the number of the last level.

    Example:
        >>> translate("decoder.up.0.block.1.conv1.bias", LAYOUTS["diffusers"].table, last=3)
        'decoder.up_blocks.3.resnets.1.conv1.bias'
    """
    for name, other in table:
        pattern = re.sub(r"<(\w)>", r"(?P<\1>\\d+)", re.escape(name))
        if found := re.search(pattern, key):
            values = found.groupdict()
            for one, two in (("i", "r"), ("r", "i")):
                if one in values and f"<{two}>" in other:
                    values[two] = str(last - int(values[one]))
            new = re.sub(r"<(\w)>", lambda m, v=values: v[m[1]], other)
            key = key[: found.start()] + new + key[found.end() :]
    return key


def _as_convolution(key: str, value: Tensor) -> Tensor:
    """Give the linear layers of an attention the shape of the 1 x 1 convolutions that they are."""
    is_linear = value.ndim == 2 and not key.startswith("quantize.")
    return value[:, :, None, None] if is_linear else value


def _count(weights: Iterable[str], start: str) -> int:
    """Return the number of parts whose keys go on with a number after a start."""
    keys = [*weights]
    return next(n for n in count() if not any(key.startswith(f"{start}{n}.") for key in keys))


def parameters_from(weights: Mapping[str, Tensor], resolution: int, groups: int) -> dict[str, Any]:
    """Read the arguments of `VQModel` off the shapes of weights.

    Args:
        weights: Under the keys of this project.
        resolution: Side in pixels of the images of training, which no shape shows.
        groups: Groups of the norms, which none shows either.

    Raises:
        ValueError: The weights are not those of a VQ model.
    """
    needed = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_out", "quant_conv")
    if lacking := [name for name in needed if f"{name}.weight" not in weights]:
        raise ValueError(
            f"there is no {lacking[0]}.weight: these are not the weights of a VQ model"
        )
    if "colorize" in weights:
        raise ValueError("the images are label maps or of many channels: give the model's --config")
    levels = _count(weights, "encoder.down.")
    ch, in_channels = weights["encoder.conv_in.weight"].shape[:2]
    widths = [len(weights[f"encoder.down.{i}.block.0.conv2.weight"]) for i in range(levels)]
    if any(width % ch for width in widths):
        raise ValueError(f"the widths {widths} are no multiples of the first convolution's {ch}")
    attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in weights]
    quantizer, codes = _quantizer_from(weights)
    ddconfig = {
        "double_z": False,
        "z_channels": len(weights["encoder.conv_out.weight"]),
        "resolution": resolution,
        "in_channels": in_channels,
        "out_ch": len(weights["decoder.conv_out.weight"]),
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": _count(weights, "encoder.down.0.block."),
        "attn_resolutions": [resolution // 2**i for i in attention],
        "resamp_with_conv": levels == 1 or "encoder.down.0.downsample.conv.weight" in weights,
        "num_groups": groups,
    }
    return {
        "ddconfig": ddconfig,
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        "n_embed": len(weights[codes]),
        "embed_dim": len(weights["quant_conv.weight"]),
        **({"quantizer_config": quantizer} if quantizer else {}),
    }


def _quantizer_from(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any] | None, str]:
    """Return the block of the quantizer, None for the default, and the key of its codebook."""
    where = "taming.modules.vqvae.quantize"
    if "quantize.used" in weights:
        raise ValueError("the indices are remapped (quantize.used): give the model's --config")
    if "quantize.embed.weight" in weights:
        return {"target": f"{where}.GumbelQuantize"}, "quantize.embed.weight"
    if "quantize.embedding.weight" not in weights:
        found = [key for key in weights if key.startswith("quantize.")][:3]
        raise ValueError(f"the weights have no codebook of a known quantizer, only {found}")
    if "quantize.embedding.embed_avg" in weights:
        params = {"beta": 0.25}
        block = {"target": f"{where}.EMAVectorQuantizer", "params": params}
        return block, "quantize.embedding.weight"
    return None, "quantize.embedding.weight"
