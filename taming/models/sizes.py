"""Sizes of a prior's network: derived from tokenizer and condition, or stated and checked."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from taming.models.prior import Prior
from taming.models.sampling import Grid
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.transformer.network import PriorNetwork
from taming.signatures import parameters_of
from taming.util import get_obj_from_str, instantiate_from_config


def build_network(config: Mapping[str, Any], prior: Prior) -> PriorNetwork:
    """Build the network of a `Net2NetTransformer`; derive sizes left out, check the others.

    Args:
        config: ``{target, params}``; ``site_shape: true`` stands for the derived one, which is only
            filled in by itself where the target needs it.
        prior: All its other parts are built.

    Raises:
        ValueError: A size cannot be derived, or a stated one is too small.
    """
    if isinstance(config, Mapping) and "target" in config:  # otherwise, building names the mistake
        config = {**config, "params": _with_sizes(config, prior)}
    network: PriorNetwork = instantiate_from_config(config)
    _check_tokens(network, prior)
    order = prior.permuter.order
    if prior.cond_stage_model.condition_length == 1:  # of images, it depends on their size
        sites = (0, 0) if order is None else (1, len(order))
        rows, columns = (network.site_shape or sites)[:2]
        check_inputs(network, prior.sequence, 1, (rows, columns))
    if network.uses_sites:
        network.site_order = order
    return network


def _with_sizes(config: Mapping[str, Any], prior: Prior) -> dict[str, Any]:
    """Return the params of a network's block, with sizes that the target takes filled in."""
    target, params = get_obj_from_str(config["target"]), dict(config.get("params") or {})
    taken, sequence, stage = parameters_of(target)[0], prior.sequence, prior.cond_stage_model
    grid: Grid = prior.first_stage_model.grid
    needs_shape = "site_shape" in taken and taken["site_shape"].default is Parameter.empty
    if params.get("site_shape", True) in (None, False):
        del params["site_shape"]  # off, which some targets do not have
    if params.get("site_shape", needs_shape) is True:
        params["site_shape"] = (*grid, sequence.site_tokens)
    h, w = (params.get("site_shape") or grid)[:2]
    inputs = getattr(target, "inputs_of", PriorNetwork.inputs_of)(h * w, sequence.site_tokens)
    vocabulary, length = stage.condition_vocab_size, stage.condition_length
    if vocabulary is not None:
        vocabulary = max(sequence.vocab_size, vocabulary) + (prior.condition_dropout > 0)
    is_scaled = prior.downsample_cond_size > -1 and length != 1
    length = None if length is None or is_scaled else length + inputs
    for name, size in (("vocab_size", vocabulary), ("block_size", length)):
        if name in params or name not in taken:
            continue
        if size is None:
            raise ValueError(
                f"{name} of {config['target']} must be stated: only the data determine the tokens "
                f"of the condition's {type(stage).__name__}"
            )
        params[name] = size
    return params


def _check_tokens(network: PriorNetwork, prior: Prior) -> None:
    """Refuse a network with too few tokens, or too few depths in its tables of places."""
    sequence, stage, spare = prior.sequence, prior.cond_stage_model, prior.condition_dropout > 0
    image = f"{type(sequence).__name__} with n_e={sequence.n_e}, max_loops={sequence.max_loops}"
    last = (stage.condition_vocab_size or 0) - 1
    for needed, what in (
        (sequence.vocab_size, f"{image} writes {sequence.vocab_size} tokens"),
        (last + 1, f"the condition's {type(stage).__name__} writes tokens up to {last}"),
    ):
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
            f"a grid of {h}x{w} sites does not fit the transformer's site_shape {shape}: the size "
            "of the images, or the site_shape, must change"
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
            f"{sequence.site_tokens} token(s) after a condition of {length} make {needed} inputs"
        )
