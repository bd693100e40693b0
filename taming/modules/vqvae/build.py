"""Quantizers from their ``{target, params}`` blocks, whatever names they give their sizes.

Axis letters: K codes, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taming.modules.vqvae.base import Quantizer
from taming.modules.vqvae.quantize import VectorQuantizer2
from taming.util import QUANTIZER_SIZES, instantiate_with_sizes

# Arguments of a model for the default quantizer, which a quantizer_config replaces.
DEFAULTS = {"beta": 0.25, "remap": None, "sane_index_shape": False, "legacy": True}


def build_quantizer(
    config: Mapping[str, Any] | None, arguments: Mapping[str, Any] | None = None, **sizes: int
) -> Quantizer:
    """Build a quantizer; by default a `VectorQuantizer2`.

    Sizes may stand in the block under any of the names of `QUANTIZER_SIZES`, and reach the
    quantizer under its own.

    Args:
        config: ``{target, params}`` of the quantizer; None builds the default.
        arguments: Those of `DEFAULTS`.
        **sizes: ``n_e``, K, and ``e_dim``, D, of the model around it; those left out must stand in
            the block.

    Raises:
        ValueError: The block states other sizes, or ``arguments`` would be lost.
    """
    arguments = arguments or {}
    if config is None:
        return VectorQuantizer2(**sizes, **arguments)
    if lost := [name for name, value in arguments.items() if value != DEFAULTS[name]]:
        raise ValueError(f"{', '.join(lost)}: set it in quantizer_config.params")
    if not isinstance(config, Mapping):
        return instantiate_with_sizes(config, {})  # raises the error
    params = {**(config.get("params") or {})}
    for name in QUANTIZER_SIZES.keys() & params.keys():
        size, stated = QUANTIZER_SIZES[name], params.pop(name)
        if sizes.setdefault(size, stated) != stated:
            raise ValueError(
                f"{config.get('target')}: {name} is {stated}, but the model around it has "
                f"{sizes[size]}; leave {name} out, or state {sizes[size]}"
            )
    named = {name: sizes[size] for name, size in QUANTIZER_SIZES.items() if size in sizes}
    return instantiate_with_sizes({**config, "params": params}, named)
