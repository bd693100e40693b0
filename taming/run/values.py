"""Fit the values of a configuration to the types and ranges of the arguments that take them."""

from __future__ import annotations

import collections.abc as abc
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

# A list of YAML serves for each of them.
_LISTS = (list, set, frozenset, abc.Sequence, abc.Iterable, abc.Collection)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_TEXTS = (str, Path, os.PathLike)

# Least and greatest values of this package's arguments, by name. A name means the same wherever it
# occurs. Constructors refuse most of these values too, but only here can the key be named, and
# before anything is allocated.
_RANGES: dict[str, tuple[float, float]] = {
    r"ch|out_ch|in_channels|z_channels|num_groups|channels|n_embd|n_head|disc_ndf|n_labels"
    r"|n_e|n_embed|e_dim|embed_dim|embedding_dim|num_tokens|codebook_dim|n_classes|down_factor"
    r"|disc_in_channels|vocab_size|block_size|kernel_size|max_bins|max_decay_steps": (1, 1e18),
    r"batch_frequency|every_n_train_steps": (1, 1e18),
    r"resolution|target_image_size|ch_mult|max_loops": (1, 2**16),
    r"size|crop_size|max_images": (0, 2**16),
    r"sos_token|quantize_start|disc_start|disc_ramp_steps|start_batches|warm_up_steps": (0, 1e18),
    r"scales?|random_scale": (1, 2**16),
    r"batch_size": (1, 2**20),
    r"devices|num_nodes": (-1, 2**16),
    r"limit_train_batches": (math.ulp(0), 1e18),  # none would train nothing
    r"gradient_clip_val": (0, math.inf),
    r"length": (1, 10**9),
    r"num_res_blocks|n_layer|layers|disc_num_layers|num_workers": (0, 1000),
    r"\w+_weight|beta|disc_factor|lr_\w+|temp_init": (0, 1e9),
    r"dropout|\w+_dropout|\w+_pdrop|pkeep|ema_decay|decay|betas": (0, 1),
    r"base_learning_rate": (0, 100),
    r"threshold": (0, math.inf),
}
_ANY = (-1e38, 1e38)  # of float32


class Misfit(ValueError):
    """A value does not fit its argument; the message begins with "must be"."""


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the only type."""
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def fit(value: Any, annotation: Any, path: str = "", texts: Mapping[str, str] | None = None) -> Any:
    """Return a value of YAML as an argument takes it.

    A whole float such as 1e4 becomes an int where one is taken; where a str is taken, a number or
    a date becomes the text that was written, such as ``007``. Types without a counterpart in YAML
    are not checked.

    Args:
        value: Plain value.
        annotation: Type of the argument.
        path: Key path of the value.
        texts: Key path -> source text.

    Raises:
        Misfit: The value does not fit.
    """
    for known in (None, texts or {}):  # without conversions first: 3 is an int for str | int
        try:
            return _fit(value, annotation, path, known)
        except Misfit:
            continue
    raise Misfit(f"must be {_describe(annotation)}, got {value!r}")


def _fit(value: Any, kind: Any, path: str, texts: Mapping[str, str] | None) -> Any:
    """Fit a value as `fit` does; convert it only if there are texts."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        _require(any((type(value), value) == (type(option), option) for option in inner))
        return value
    if origin in (Union, UnionType):
        for option in inner:
            with suppress(Misfit):
                return _fit(value, option, path, texts)
        raise Misfit
    if origin is tuple or origin in _LISTS:
        return _fit_list(value, inner, path, texts, has_length=origin is tuple)
    if origin in _MAPPINGS:
        _require(isinstance(value, dict))
        item = inner[1] if len(inner) == 2 else Any
        return {k: _fit(v, item, f"{path}.{k}", texts) for k, v in value.items()}
    return _fit_scalar(value, origin, path, texts)


def _fit_list(
    value: Any,
    kinds: tuple[Any, ...],
    path: str,
    texts: Mapping[str, str] | None,
    has_length: bool,
) -> list[Any]:
    """Fit a list: to one type for all items, or, with a fixed length, to one for each."""
    _require(isinstance(value, list | tuple))
    if has_length and kinds and kinds[-1] is not Ellipsis:
        _require(len(value) == len(kinds))
    else:
        kinds = (kinds[0] if kinds else Any,) * len(value)
    pairs = enumerate(zip(value, kinds, strict=True))
    return [_fit(item, kind, f"{path}.{i}", texts) for i, (item, kind) in pairs]


def _fit_scalar(value: Any, kind: Any, path: str, texts: Mapping[str, str] | None) -> Any:
    if texts is not None:
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind in _TEXTS and isinstance(value, bool | int | float):
            value = texts.get(path, value)
    if kind in (int, float):
        kinds = (int,) if kind is int else (int, float)
        _require(type(value) in kinds and not math.isnan(value))
    elif kind in (bool, NoneType, *_TEXTS):
        _require(type(value) is (str if kind in _TEXTS else kind))
    return value


def _require(fits: bool) -> None:
    if not fits:
        raise Misfit


def _describe(kind: Any) -> str:
    """Return the words for a type, such as ``list of int | None``."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(_describe, inner))
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return f"list of {len(inner)} values ({', '.join(map(_describe, inner))})"
    if origin is tuple or origin in _LISTS:
        return f"list of {_describe(inner[0])}" if inner else "list"
    if origin in _MAPPINGS:
        return "mapping"
    if origin in _TEXTS:
        return "str"
    return "None" if kind is NoneType else getattr(kind, "__name__", str(kind))


def check_range(name: str, value: Any) -> None:
    """Refuse a number, or one in a list, that an argument of this package cannot mean.

    Raises:
        Misfit: The number is not finite or out of range.
    """
    if isinstance(value, list):
        for item in value:
            check_range(name, item)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = next((r for names, r in _RANGES.items() if re.fullmatch(names, name)), _ANY)
    if not value >= low:
        least = "above 0" if 0 < low < 1 else f"at least {low}"
        raise Misfit(f"must be {least}, got {value}")
    if not value <= high:
        raise Misfit(f"must be at most {high:g}, got {value}")
