"""Check a merged configuration before a run begins: every key, value and type.

Targets are imported, so that their arguments can be inspected, but nothing is built.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter
from pathlib import Path
from types import NoneType
from typing import Any

from taming.run.config import LoadedConfig
from taming.run.defaults import DEFAULT_CHECKPOINT, DEFAULT_LOGGER, callback_blocks, merge_block
from taming.run.sources import entries
from taming.run.trust import check_trust
from taming.run.values import Misfit, check_range, fit, members
from taming.signatures import parameters_of
from taming.util import QUANTIZER_SIZES, get_obj_from_str, nearest

logger = logging.getLogger(__name__)

TRAINER = "lightning.pytorch.Trainer"

# Arguments that taming.run.trainer adds when it builds callbacks and loggers.
_ADDED_BY_TRAINER = ("now", "logdir", "ckptdir", "cfgdir", "config", "lightning_config", "save_dir")

# Required sizes that the surrounding model fills in (taming.util.instantiate_with_sizes).
_ADDED_BY_MODEL = {
    "quantizer_config": tuple(QUANTIZER_SIZES),
    "transform_config": ("max_loops", "e_dim"),
    "context_config": ("n_codes", "max_loops"),
    "transformer_config": ("vocab_size", "block_size", "site_shape"),
    "transformer_config.depth": ("vocab_size", "block_size"),
    "quantizer_config.ddconfig": ("in_channels", "out_ch", "z_channels", "double_z"),
}

# Blocks by the name of their key: what they describe, and a method of it.
_ROLES = {
    "model": ("a model", "training_step"),
    "data": ("a data module", "from_datasets"),
    **dict.fromkeys(("train", "validation", "test"), ("a data set", "__getitem__")),
    "first_stage_config": ("a tokenizer", "encode_to_codes"),
    "model_config": ("a tokenizer", "encode_to_codes"),
    "cond_stage_config": ("a condition stage", "encode"),
    "quantizer_config": ("a quantizer", "codebook_metrics"),
    "transform_config": ("a transform", "retrace"),
    "lossconfig": ("a loss", "fetch_weights"),
    "transformer_config": ("a transformer", "predict"),
    "stacks_config": ("stacks of a PixelCNN", "no_past"),
    "context_config": ("a context network", "walk"),
    "sequence_config": ("a token sequence", "allowed"),
    "permuter_config": ("a permuter", "forward"),
    "scheduler_config": ("a schedule", "__call__"),
    "temperature_scheduler_config": ("a schedule", "__call__"),
}
_OWN = ("taming.", "main.")

# Options in the ``config`` of the original's data sets.
_OPTIONS = {"size": int | None, "root": str | None, "sub_indices": str | None}

# Arguments for which `true` asks the surrounding model.
_DERIVED = ("site_shape", "depth_embedding")

# Mappings whose keys a class passes on as keyword arguments: parameter -> the receivers.
_NETWORKS = "taming.modules.diffusionmodules.model"
_SPLATTED = {
    "ddconfig": (f"{_NETWORKS}.Encoder", f"{_NETWORKS}.Decoder"),
    "depth": ("taming.modules.transformer.gpt.GPT",),
}


def check_experiment(config: LoadedConfig, train: bool) -> None:
    """Check a whole configuration before building any part of it.

    Whole floats such as 1e4 become ints where a target takes an int.

    Args:
        config: The merged configuration.
        train: Require a learning rate.

    Raises:
        ConfigError: A key or value is wrong; the message names the file, the key path and the
            nearest valid name.
    """
    check_keys(config, "", config.values, ["model", "data", "lightning", *config.interpolated])
    model, data = config.block("model"), config.block("data")
    for name in ("model", "data", "lightning"):
        check_trust(config, name)
    # First, since model and data may refer to what a flag sets there.
    _check_lightning(config, config.values.get("lightning") or {})
    _check_part(config, "model", "model", model)
    _check_part(config, "data", "data", data)
    rate = model.get("base_learning_rate")
    if train or rate is not None:
        _fit(config, "model.base_learning_rate", rate, float)
        _check_range(config, "model.base_learning_rate", rate)


def _check_lightning(config: LoadedConfig, lightning: Any) -> None:
    valid = ["trainer", "logger", "modelcheckpoint", "callbacks", "ckpt_path"]
    check_keys(config, "lightning", lightning, valid)
    start = lightning.get("ckpt_path")
    if start and not Path(start).is_file():
        raise config.error("lightning.ckpt_path", f"there is no checkpoint {start} (ckpt_path)")
    for arguments in (lightning.get("trainer") or {}, config.trials):
        _check_arguments(config, "lightning.trainer", arguments, TRAINER)
    for name, default in (("logger", DEFAULT_LOGGER), ("modelcheckpoint", DEFAULT_CHECKPOINT)):
        merged = merge_block(default, lightning.get(name))
        check_block(config, f"lightning.{name}", merged, added=_ADDED_BY_TRAINER)
        if lightning.get(name):
            lightning[name] = merged  # 1e4 may have become an int
    callbacks = lightning.get("callbacks") or {}
    if not isinstance(callbacks, dict):
        message = f"lightning.callbacks must be a mapping name: block, got {callbacks!r}"
        raise config.error("lightning.callbacks", message)
    for name, block in callback_blocks(lightning).items():
        check_block(config, f"lightning.callbacks.{name}", block, added=_ADDED_BY_TRAINER)
        if name in callbacks:
            callbacks[name] = block


def check_keys(config: LoadedConfig, path: str, block: Any, valid: Sequence[str]) -> None:
    """Refuse a mapping with an invalid key.

    Raises:
        ConfigError: Names the file, the key path and the nearest valid key.
    """
    if not isinstance(block, Mapping):
        keys = ", ".join(sorted(valid)[:4])
        message = f"{path} must be a mapping with keys such as {keys}, got {block!r}"
        raise config.error(path, message)
    for key in block:
        if key not in valid:
            where = f"{path}.{key}" if path else str(key)
            raise config.error(where, f"unknown key {where}{nearest(str(key), valid)}")


def check_block(
    config: LoadedConfig,
    path: str,
    block: Any,
    extra: Sequence[str] = (),
    added: Sequence[str] = (),
) -> None:
    """Check a ``{target, params}`` block, and those inside it, against what the targets take.

    Where a target takes an int, a whole float in ``params`` becomes one.

    Args:
        config: The configuration, for the origin of keys.
        path: Key path of the block, such as ``model``.
        block: The block.
        extra: Keys that may stand beside ``target`` and ``params``.
        added: Arguments that the caller adds when it builds the object.

    Raises:
        ConfigError: A target does not exist, a key is not an argument of its target, or a required
            argument is missing; names the file, the key path and the nearest valid name.
    """
    check_keys(config, path, block, ["target", "params", *extra])
    target = block.get("target")
    if not isinstance(target, str):
        raise config.error(path, f"{path} has no target like 'main.Name', got {target!r}")
    try:
        found = get_obj_from_str(target)
    except ValueError as error:
        raise config.error(f"{path}.target", f"{path}.target: {error}") from error
    if not callable(found):
        kind = "module" if inspect.ismodule(found) else type(found).__name__
        message = f"{path}.target must name a class or function, but {target} is a {kind}"
        raise config.error(f"{path}.target", message)
    params = {} if block.get("params") is None else block["params"]
    _check_arguments(config, f"{path}.params", params, target)
    given = {*params, *added, *_ADDED_BY_MODEL.get(path.rpartition(".")[2], ())}
    names = _sizes_of(found)
    given |= {name for name in names if names[name] in map(names.get, params)}
    required = [n for n, p in parameters_of(found)[0].items() if p.default is p.empty]
    if missing := [name for name in required if name not in given]:
        raise config.error(path, f"{path}.params lacks {', '.join(missing)} for {target}")


def _check_part(config: LoadedConfig, path: str, name: str, block: Any) -> None:
    """Check that an argument of `_ROLES` is a block of a class that can play the part."""
    if name == "quantizers":  # by level
        for level, item in block.items():
            _check_part(config, f"{path}.{level}", "quantizer_config", item)
    if name not in _ROLES:
        return
    extra = ["base_learning_rate"] if path == "model" else []
    check_block(config, path, block, extra)
    kind, method = _ROLES[name]
    found, plays = get_obj_from_str(block["target"]), True
    if inspect.isclass(found):
        is_module = "forward" in dir(found)
        plays = any(method in vars(base) for base in found.__mro__)
        if method == "__getitem__":  # streams iterate
            plays = (plays or "__iter__" in dir(found)) and not is_module
        plays = plays and not (method == "__call__" and is_module)
    elif block["target"].endswith(".model_from_run"):  # other functions may return anything
        plays = kind in ("a tokenizer", "a condition stage")
    if not plays:
        message = f"{path}.target must name {kind}, got {block['target']}"
        raise config.error(f"{path}.target", message)


def _sizes_of(found: Any) -> Mapping[str, str]:
    """Return the names under which a quantizer gets its sizes, whichever are its own."""
    return QUANTIZER_SIZES if _ROLES["quantizer_config"][1] in dir(found) else {}


def _check_arguments(config: LoadedConfig, path: str, params: Any, target: str) -> None:
    if not isinstance(params, dict):
        raise config.error(path, f"{path} must be a mapping, got {params!r}")
    found = get_obj_from_str(target)
    parameters, is_open = parameters_of(found)
    known = {*parameters, *_sizes_of(found)}
    if old := [n for n in params if n not in known and f"{path}.{n}" in config.outdated]:
        names = ", ".join(f"{name}={params.pop(name)!r}" for name in old)
        logger.warning("%s: %s does not take %s of the target before it", path, target, names)
    for name, value in params.items():
        where = f"{path}.{name}"
        if name not in known and not is_open:
            end = f"{target} takes no {name!r}{nearest(str(name), parameters)}"
            raise config.error(where, f"unknown key {where}: {end}")
        is_own = target.startswith(_OWN)
        if is_own and name in _SPLATTED and isinstance(value, dict):
            _check_splatted(config, where, value)
        if is_own and name == "config" and isinstance(value, dict):
            for key, item in value.items():
                value[key] = _fit(config, f"{where}.{key}", item, _OPTIONS.get(key, Any))
        if is_own and (isinstance(value, dict) or name not in parameters):
            _check_part(config, where, name, value)
        _check_value(config, where, value)
        if name in parameters and not (value is True and name in _DERIVED):  # or of **kwargs
            kinds = members(parameters[name].annotation)
            # The Trainer takes more than it declares, such as 0 for False; check numbers alone.
            if target != TRAINER or (value is not None and {*kinds} <= {int, float, NoneType}):
                params[name] = _fit(config, where, value, parameters[name].annotation)
        if is_own or target == TRAINER:
            _check_range(config, where, params[name])


def _check_splatted(config: LoadedConfig, path: str, value: dict[str, Any]) -> None:
    """Check a mapping whose items become keyword arguments of networks."""
    name, surrounding = path.rpartition(".")[2], path.split(".")[-3]
    taken: dict[str, Parameter] = {}
    for receiver in _SPLATTED[name]:
        taken |= parameters_of(get_obj_from_str(receiver))[0]
    check_keys(config, path, value, list(taken))
    given = {*value, *_ADDED_BY_MODEL.get(f"{surrounding}.{name}", ())}
    required = [name for name, p in taken.items() if p.default is p.empty]
    if missing := [name for name in required if name not in given]:
        raise config.error(path, f"{path} lacks {', '.join(missing)}")
    for key, item in value.items():
        value[key] = _fit(config, f"{path}.{key}", item, taken[key].annotation)


def _fit(config: LoadedConfig, path: str, value: Any, annotation: Any) -> Any:
    try:
        return fit(value, annotation, path, config.texts)
    except Misfit as error:
        raise config.error(path, f"{path} {error}") from error


def _check_range(config: LoadedConfig, path: str, value: Any) -> None:
    """Check the numbers in an argument of this package, except in blocks of other targets."""
    if isinstance(value, Mapping):
        if not _is_meant_as_block(value):
            for key, item in value.items():
                _check_range(config, f"{path}.{key}", item)
        return
    try:
        check_range(path.rpartition(".")[2], value)
    except Misfit as error:
        raise config.error(path, f"{path} {error}") from error


def _check_value(config: LoadedConfig, path: str, value: Any) -> None:
    """Check the ``{target, params}`` blocks anywhere inside a value."""
    if isinstance(value, Mapping) and _is_meant_as_block(value):
        check_block(config, path, value)
        return
    for key, item in entries(value):
        _check_value(config, f"{path}.{key}", item)


def _is_meant_as_block(value: Mapping[str, Any]) -> bool:
    """Return True if a mapping has the keys of ``{target, params}``, perhaps misspelt."""
    return "params" in value or bool(get_close_matches("target", map(str, value), cutoff=0.8))
