"""Configuration: merge YAML files with overrides, and check every key before anything is built."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from taming.run.legacy import modernize
from taming.run.signature import Signature, signature_of
from taming.run.source import TargetError, nearest
from taming.util import get_obj_from_str, instantiate_from_config

__all__ = [
    "ConfigError",
    "LoadedConfig",
    "check_block",
    "check_keys",
    "check_value",
    "get_obj_from_str",
    "instantiate_from_config",
    "load_config",
    "split_overrides",
]

COMMAND_LINE = "command line"

_INTERPOLATED = re.compile(r"\$\{\s*(\w+)")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.\[\]]*=")

# Types of a YAML value that fit an argument, by the type as its source writes it.
_FITTING = {
    "int": {int},
    "float": {float, int},
    "bool": {bool},
    "str": {str},
    "None": {type(None)},
    "Mapping[str, Any]": {dict},
}

# Mappings whose keys a class hands on as keyword arguments: parameter -> who receives them.
_SPLATTED = {
    "ddconfig": (
        "taming.modules.diffusionmodules.model.Encoder",
        "taming.modules.diffusionmodules.model.Decoder",
    ),
}


class ConfigError(ValueError):
    """A configuration cannot be read or has a key or value that nothing accepts."""


class LoadedConfig(NamedTuple):
    """A merged configuration and where each of its keys came from.

    Attributes:
        values: Plain nested dicts and lists; interpolations are resolved.
        origins: Dotted key path -> the file that set it last, or ``command line``.
        interpolated: Keys at the top that a ``${...}`` names.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    interpolated: frozenset[str] = frozenset()

    def origin(self, path: str) -> str:
        """Return the file that set a key, or the nearest key above it."""
        while path and path not in self.origins:
            path = path.rpartition(".")[0]
        return self.origins.get(path, COMMAND_LINE)


def load_config(
    paths: Sequence[str | Path],
    dotlist: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> LoadedConfig:
    """Merge YAML files from left to right, then overrides, then ``key=value`` items.

    Mappings are merged key by key and lists are replaced, as OmegaConf does. A later ``target``
    therefore meets the earlier ``params``; :func:`check_block` names those that do not fit.

    Args:
        paths: YAML files.
        dotlist: Items such as ``model.params.n_embed=64`` or ``data="{target: main.X}"``.
        overrides: Nested values that win over the files.

    Returns:
        The configuration in today's spelling (:mod:`taming.run.legacy`).

    Raises:
        ConfigError: A file is missing or broken, or two files do not fit together.
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
            raise ConfigError(f"{name} does not fit what came before: {error}") from error
        _record(values, name, "", origins)
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        origin = LoadedConfig({}, origins).origin(error.full_key or "")
        raise ConfigError(f"{origin}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    # An override may have replaced what named a key.
    named = frozenset(_INTERPOLATED.findall(str(sources)))
    return LoadedConfig({str(key): value for key, value in plain.items()}, origins, named)


def split_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Part a command line into ``key=value`` items, which may stand anywhere, and the rest.

    Args:
        parser: Knows the flags; what follows one that needs a value is its value.
        argv: Arguments without the program's name.

    Returns:
        The items, and what is left for the parser.
    """
    actions = [action for action in parser._actions if action.nargs is None]
    flags = {flag for action in actions for flag in action.option_strings}
    overrides, rest = [], []
    for before, argument in zip(["", *argv], argv, strict=False):
        is_override = _OVERRIDE.match(argument) and before not in flags
        (overrides if is_override else rest).append(argument)
    return overrides, rest


_DERIVED = ("vocab_size", "block_size", "site_shape")  # of a prior's network: it fills them in


def check_keys(config: LoadedConfig, path: str, block: Any, valid: Sequence[str]) -> None:
    """Refuse a mapping with a key that is not valid.

    Raises:
        ConfigError: Names the file, the key path and the nearest valid key.
    """
    if not isinstance(block, Mapping):
        raise ConfigError(
            f"{config.origin(path)}: {path} must be a mapping with keys such as "
            f"{', '.join(sorted(valid)[:4])}, got {block!r}"
        )
    for key in block:
        if key not in valid:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(f"{config.origin(where)}: unknown key {where}{nearest(key, valid)}")


def check_block(
    config: LoadedConfig,
    path: str,
    block: Any,
    extra: Sequence[str] = (),
    injected: Sequence[str] = (),
) -> None:
    """Check a ``{target, params}`` block, and those inside it, against what the targets take.

    Constructors are read, not imported or called. Where they take an int, 1e4 in ``params`` becomes
    one.

    Args:
        config: Where keys came from, for the message.
        path: Key path of the block, such as ``model``.
        block: The block.
        extra: Keys that may stand beside ``target`` and ``params``.
        injected: Arguments that the caller adds when it builds the object.

    Raises:
        ConfigError: A target does not exist, a key is taken by no constructor, or a required one
            is missing; names the file, the key path and the nearest valid name.
    """
    check_keys(config, path, block, ["target", "params", *extra])
    target = block.get("target")
    where = f"{path}.target"
    if not isinstance(target, str):
        raise ConfigError(
            f"{config.origin(path)}: {path} has no target (a path like 'main.Name'), got {target!r}"
        )
    try:
        signature = signature_of(target)
    except TargetError as error:
        raise ConfigError(f"{config.origin(where)}: {where}: {error}") from error
    params = block.get("params")
    params = {} if params is None else params
    _check_arguments(config, f"{path}.params", params, signature, target)
    given = {*params, *injected, *_DERIVED}
    missing = [name for name in signature.required if name not in given]
    if missing:
        raise ConfigError(
            f"{config.origin(path)}: {path}.params lacks {', '.join(missing)}, which {target} needs"
        )


def _check_arguments(
    config: LoadedConfig, path: str, params: Any, signature: Signature, target: str
) -> None:
    if not isinstance(params, dict):
        raise ConfigError(f"{config.origin(path)}: {path} must be a mapping, got {params!r}")
    for name, value in params.items():
        where = f"{path}.{name}"
        if not signature.open and name not in signature.names:
            raise ConfigError(
                f"{config.origin(where)}: unknown key {where}: {target} takes no {name!r}"
                f"{nearest(str(name), signature.names)}"
            )
        if name in _SPLATTED and isinstance(value, Mapping):
            signatures = [signature_of(receiver) for receiver in _SPLATTED[name]]
            if not any(received.open for received in signatures):
                valid = [name for received in signatures for name in received.names]
                check_keys(config, where, value, list(dict.fromkeys(valid)))
        check_value(config, where, value)
        params[name] = _to_type(config, where, value, signature.annotations.get(name, ""))


def _to_type(config: LoadedConfig, path: str, value: Any, annotation: str) -> Any:
    """Refuse a value of another type where an argument takes nothing but these; 1e4 is an int."""
    names = annotation.split(" | ")
    if not set(names) <= set(_FITTING) or any(type(value) in _FITTING[name] for name in names):
        return value
    if "int" in names and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = annotation.replace("Mapping[str, Any]", "mapping")
    raise ConfigError(f"{config.origin(path)}: {path} must be {wanted}, got {value!r}")


def check_value(config: LoadedConfig, path: str, value: Any) -> None:
    """Check the ``{target, params}`` blocks anywhere inside a value; see :func:`check_block`."""
    if isinstance(value, Mapping) and _is_meant_as_block(value):
        check_block(config, path, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_value(config, f"{path}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_value(config, f"{path}.{index}", item)


def _is_meant_as_block(value: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of ``{target, params}``, misspelt perhaps."""
    return "params" in value or bool(get_close_matches("target", map(str, value), cutoff=0.8))


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
    """Note that a file set a value and everything inside it."""
    if path:
        origins[path] = name
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        _record(item, name, f"{path}.{key}" if path else str(key), origins)
