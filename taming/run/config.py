"""Load a configuration: merge YAML files with overrides, and check every key before a run begins.

Targets are imported, so that their arguments can be inspected, but nothing is built.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from taming.run.legacy import modernize
from taming.util import get_obj_from_str, nearest, parameters_of

COMMAND_LINE = "command line"
TRAINER = "lightning.pytorch.Trainer"

DEFAULT_CALLBACKS: dict[str, dict[str, Any]] = {
    "setup_callback": {"target": "taming.run.callbacks.SetupCallback"},
    "rng_state": {"target": "taming.run.callbacks.RngState"},
    "image_logger": {"target": "taming.run.callbacks.ImageLogger"},
    "codebook_telemetry": {"target": "taming.run.callbacks.CodebookTelemetry"},
    "learning_rate_logger": {
        "target": "lightning.pytorch.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "last_checkpoint": {"target": "taming.run.callbacks.LastCheckpoint"},
}
DEFAULT_LOGGER = {"target": "lightning.pytorch.loggers.TensorBoardLogger"}
DEFAULT_CHECKPOINT = {"target": "lightning.pytorch.callbacks.ModelCheckpoint"}

# Arguments that taming.run.trainer adds when it builds callbacks and loggers.
_ADDED_BY_TRAINER = ("now", "logdir", "ckptdir", "cfgdir", "config", "lightning_config", "save_dir")

# Required sizes that the surrounding model fills in (taming.util.instantiate_with_sizes).
_ADDED_BY_MODEL = {
    "quantizer_config": ("n_e", "e_dim", "n_embed", "embedding_dim", "num_hiddens"),
    "transform_config": ("max_loops", "e_dim"),
    "transformer_config": ("vocab_size", "block_size", "site_shape"),
}

# Mappings whose keys a class passes on as keyword arguments: parameter -> the receivers.
_NETWORKS = "taming.modules.diffusionmodules.model"
_SPLATTED = {"ddconfig": (f"{_NETWORKS}.Encoder", f"{_NETWORKS}.Decoder")}

# Types of YAML values that fit an argument, by the argument's type. Other types are not checked.
_FITTING = {
    "int": {int},
    "float": {float, int},
    "bool": {bool},
    "str": {str},
    "None": {type(None)},
    "Mapping[str, Any]": {dict},
}

_INTERPOLATED = re.compile(r"\$\{\s*(\w+)")


class ConfigError(ValueError):
    """A configuration cannot be read, or has a key or value that nothing accepts."""


class LoadedConfig(NamedTuple):
    """A merged configuration and the origin of each of its keys.

    Attributes:
        values: Plain nested dicts and lists; interpolations are resolved.
        origins: Dotted key path -> the file that set it last, or ``command line``.
        interpolated: Top-level keys that a ``${...}`` refers to.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    interpolated: frozenset[str] = frozenset()

    def origin(self, path: str) -> str:
        """Return the file that set a key, or the nearest key above it."""
        while path and path not in self.origins:
            path = path.rpartition(".")[0]
        return self.origins.get(path, COMMAND_LINE)

    def error(self, path: str, message: str) -> ConfigError:
        """Return an error that begins with the file that set a key."""
        return ConfigError(f"{self.origin(path)}: {message}")

    def block(self, name: str) -> dict[str, Any]:
        """Return a top-level block.

        Raises:
            ConfigError: The configuration has no such block.
        """
        if self.values.get(name) is None:
            raise ConfigError(f"there is no {name!r} block; add a YAML file that has one with -b")
        return self.values[name]


def load_config(
    paths: Sequence[str | Path],
    dotlist: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> LoadedConfig:
    """Merge YAML files from left to right, then overrides, then ``key=value`` items.

    Mappings are merged key by key and lists are replaced, as OmegaConf does. A later ``target``
    thus keeps the earlier ``params``; `check_block` reports those that it does not take. Old
    spellings are translated (`taming.run.legacy`).

    Args:
        paths: YAML files.
        dotlist: Items such as ``model.params.n_embed=64`` or ``data="{target: main.X}"``.
        overrides: Nested values that override the files.

    Raises:
        ConfigError: A file is missing or broken, or two files cannot be merged.
    """
    merged, origins = OmegaConf.create(), {}
    sources = [(str(path), _read(Path(path))) for path in paths]
    if overrides:
        sources.append((COMMAND_LINE, modernize(overrides)))
    if dotlist:
        sources.append((COMMAND_LINE, _parse_dotlist(dotlist)))
    for name, values in sources:
        try:
            merged = OmegaConf.merge(merged, values)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ConfigError(f"{name} cannot be merged into the files before: {error}") from error
        _record(values, name, "", origins)
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise LoadedConfig({}, origins).error(error.full_key or "", message) from error
    assert isinstance(plain, dict)
    # An override may have replaced the value that referred to a key.
    named = frozenset(_INTERPOLATED.findall(str(sources)))
    return LoadedConfig({str(key): value for key, value in plain.items()}, origins, named)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}")
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line} is not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping with the keys model, data, lightning")
    return _to_modern(loaded, str(path))


def _parse_dotlist(dotlist: Sequence[str]) -> dict[str, Any]:
    try:
        return _to_modern(OmegaConf.from_dotlist(list(dotlist)), COMMAND_LINE)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{COMMAND_LINE}: cannot read {' '.join(dotlist)}: {message}") from error


def _to_modern(config: DictConfig, name: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    try:
        return modernize({str(key): value for key, value in plain.items()})
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _record(value: Any, name: str, path: str, origins: dict[str, str]) -> None:
    """Record the file that set a value and everything inside it."""
    if path:
        origins[path] = name
    for key, item in _entries(value):
        _record(item, name, f"{path}.{key}" if path else str(key), origins)


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the keys and values of a mapping, or the positions and items of a list."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def merge_block(default: Mapping[str, Any], block: Any) -> Any:
    """Complete a ``{target, params}`` block with the defaults for its target.

    A block without a target takes the default's; one with another target takes no defaults.
    `check_block` refuses what is not a mapping.
    """
    block = {} if block is None else block
    if not isinstance(block, Mapping) or block.get("target") not in (None, default["target"]):
        return block
    params = block.get("params") or {}
    if isinstance(params, Mapping):
        params = {**(default.get("params") or {}), **params}
    return {**default, **block, "target": default["target"], "params": params}


def callback_blocks(lightning: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Merge the configured callbacks into the default ones; a null entry removes a default."""
    configured = lightning.get("callbacks") or {}
    defaults = {
        name: merge_block(block, configured.get(name)) for name, block in DEFAULT_CALLBACKS.items()
    }
    blocks = {**defaults, **{k: v for k, v in configured.items() if k not in defaults}}
    return {name: b for name, b in blocks.items() if name not in configured or configured[name]}


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
    check_block(config, "model", model, extra=["base_learning_rate"])
    check_block(config, "data", data)
    rate = model.get("base_learning_rate")
    if train and not isinstance(rate, float | int):
        raise config.error("model", f"model.base_learning_rate must be a number, got {rate!r}")
    _check_lightning(config, config.values.get("lightning") or {})


def _check_lightning(config: LoadedConfig, lightning: Any) -> None:
    valid = ["trainer", "logger", "modelcheckpoint", "callbacks", "ckpt_path"]
    check_keys(config, "lightning", lightning, valid)
    start = lightning.get("ckpt_path")
    if start and not Path(start).is_file():
        raise config.error("lightning.ckpt_path", f"there is no checkpoint {start} (ckpt_path)")
    _check_arguments(config, "lightning.trainer", lightning.get("trainer") or {}, TRAINER)
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
    required = [n for n, p in parameters_of(found)[0].items() if p.default is p.empty]
    if missing := [name for name in required if name not in given]:
        raise config.error(path, f"{path}.params lacks {', '.join(missing)} for {target}")


def _check_arguments(config: LoadedConfig, path: str, params: Any, target: str) -> None:
    if not isinstance(params, dict):
        raise config.error(path, f"{path} must be a mapping, got {params!r}")
    parameters, is_open = parameters_of(get_obj_from_str(target))
    for name, value in params.items():
        where = f"{path}.{name}"
        if name not in parameters and not is_open:
            end = f"{target} takes no {name!r}{nearest(str(name), parameters)}"
            raise config.error(where, f"unknown key {where}: {end}")
        if name in _SPLATTED and isinstance(value, Mapping):
            receivers = [parameters_of(get_obj_from_str(r))[0] for r in _SPLATTED[name]]
            check_keys(config, where, value, [key for taken in receivers for key in taken])
        _check_value(config, where, value)
        if name not in parameters:  # it is one of **kwargs
            continue
        types = type_names(parameters[name].annotation)
        # The Trainer takes more than it declares, such as 0 for False; of it, check numbers alone.
        if target != TRAINER or (value is not None and {*types} <= {"int", "float", "None"}):
            params[name] = _to_type(config, where, value, types)


def _check_value(config: LoadedConfig, path: str, value: Any) -> None:
    """Check the ``{target, params}`` blocks anywhere inside a value."""
    if isinstance(value, Mapping) and _is_meant_as_block(value):
        check_block(config, path, value)
        return
    for key, item in _entries(value):
        _check_value(config, f"{path}.{key}", item)


def _is_meant_as_block(value: Mapping[str, Any]) -> bool:
    """Return True if a mapping has the keys of ``{target, params}``, perhaps misspelt."""
    return "params" in value or bool(get_close_matches("target", map(str, value), cutoff=0.8))


def _to_type(config: LoadedConfig, path: str, value: Any, names: Sequence[str]) -> Any:
    """Refuse a value whose type does not fit its argument; 1e4 becomes an int."""
    if not set(names) <= set(_FITTING) or any(type(value) in _FITTING[name] for name in names):
        return value
    if "int" in names and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = " | ".join(names).replace("Mapping[str, Any]", "mapping")
    raise config.error(path, f"{path} must be {wanted}, got {value!r}")


def type_names(annotation: Any) -> list[str]:
    """Return the types, such as ``["int", "None"]``, of an annotation or of its source text."""
    if isinstance(annotation, str):
        return annotation.split(" | ")
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    names = (re.sub(r"\w+\.", "", inspect.formatannotation(kind)) for kind in kinds)
    return ["None" if name == "NoneType" else name for name in names]
