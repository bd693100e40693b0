"""Sizes of a prior's network: derived from tokenizer and condition, or stated and checked."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from taming.models.sampling import Grid
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.transformer.network import PriorNetwork
from taming.util import (
    get_obj_from_str,
    instantiate_from_config,
    instantiate_with_sizes,
    parameters_of,
)


def build_network(
    config: Mapping[str, Any],
    sequence: TokenSequence,
    stage: Any,
    grid: Grid,
    spare: bool,
    any_length: bool = False,
) -> PriorNetwork:
    """Build a network; sizes that its block leaves out are derived.

    Args:
        config: ``{target, params}``; ``site_shape: true`` stands for the derived one, which is only
            filled in by itself where the target needs it.
        sequence: Token sequence of an image.
        stage: The condition stage.
        grid: (h, w) of an image.
        spare: Keep one more token free, to stand for a hidden condition.
        any_length: Do not rely on the stage's ``condition_length``.

    Raises:
        ValueError: A size cannot be derived, or a stated one is too small.
    """
    if not isinstance(config, Mapping) or "target" not in config:
        return instantiate_from_config(config)  # which names the mistake
    target = get_obj_from_str(config["target"])
    taken, params = parameters_of(target)[0], dict(config.get("params") or {})
    needs_shape = "site_shape" in taken and taken["site_shape"].default is Parameter.empty
    if params.get("site_shape", needs_shape) is True:
        params["site_shape"] = (*grid, sequence.site_tokens)
    h, w = (params.get("site_shape") or grid)[:2]
    inputs = getattr(target, "inputs_of", PriorNetwork.inputs_of)(h * w, sequence.site_tokens)
    vocabulary, length = stage.condition_vocab_size, stage.condition_length
    if any_length and length != 1:
        length = None
    sizes = {
        "vocab_size": None if vocabulary is None else max(sequence.vocab_size, vocabulary) + spare,
        "block_size": None if length is None else length + inputs,
    }
    sizes = {name: size for name, size in sizes.items() if name not in params and name in taken}
    for name in (name for name, size in sizes.items() if size is None):
        raise ValueError(
            f"{name} of {config['target']} must be stated: only the data determine the tokens of "
            f"the condition's {type(stage).__name__}"
        )
    network = instantiate_with_sizes({**config, "params": params}, sizes)
    images = (
        f"{type(sequence).__name__} with n_e={sequence.n_e}, max_loops={sequence.max_loops} writes "
        f"{sequence.vocab_size} tokens"
    )
    conditions = (
        f"the condition's {type(stage).__name__} writes tokens up to {(vocabulary or 0) - 1}"
    )
    for what, needed in ((images, sequence.vocab_size), (conditions, vocabulary or 0)):
        if network.vocab_size < needed + spare:
            and_one = ", and condition_dropout needs one more" if spare else ""
            raise ValueError(
                f"transformer vocab_size {network.vocab_size} is too small: {what}{and_one}"
            )
    shape = network.site_shape
    if shape is not None and shape[2] < sequence.site_tokens:
        raise ValueError(
            f"transformer site_shape {shape} has {shape[2]} depths, but a site takes up to "
            f"{sequence.site_tokens} tokens"
        )
    return network


def check_inputs(network: PriorNetwork, sequence: TokenSequence, length: int, grid: Grid) -> None:
    """Refuse inputs that are too many for a network, or that would reveal what it predicts.

    Args:
        network: The network.
        sequence: Token sequence of an image.
        length: Tokens of a condition.
        grid: (h, w) of an image.

    Raises:
        ValueError: Names the size that does not fit.
    """
    (h, w), shape = grid, network.site_shape
    if shape is not None and (h > shape[0] or w > shape[1]):
        raise ValueError(
            f"a grid of {h}x{w} sites does not fit the transformer's site_shape {shape}"
        )
    if network.n_unmasked > length:
        raise ValueError(
            f"transformer n_unmasked {network.n_unmasked} goes beyond the condition's {length} "
            "token(s), so that an image's tokens would see those after them"
        )
    # The last token of an image is predicted, and not an input.
    needed = length + network.inputs_of(h * w, sequence.site_tokens) - 1
    if network.block_size is not None and network.block_size < needed:
        raise ValueError(
            f"transformer block_size {network.block_size} is too small: {h * w} sites of up to "
            f"{sequence.site_tokens} token(s) after a condition of {length} need {needed}"
        )
