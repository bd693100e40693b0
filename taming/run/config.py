"""Load a configuration: merge YAML files with overrides, and keep the origin of every key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from taming.run.legacy import modernize

COMMAND_LINE = "command line"

DEFAULT_CALLBACKS: dict[str, dict[str, Any]] = {
    "setup_callback": {"target": "taming.run.callbacks.SetupCallback"},
    "rng_state": {"target": "taming.run.checkpoints.RngState"},
    "epoch_values": {"target": "taming.run.epoch_values.EpochValues"},
    "image_logger": {"target": "taming.run.callbacks.ImageLogger"},
    "codebook_telemetry": {"target": "taming.run.callbacks.CodebookTelemetry"},
    "learning_rate_logger": {
        "target": "lightning.pytorch.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "last_checkpoint": {"target": "taming.run.checkpoints.LastCheckpoint"},
}
DEFAULT_LOGGER = {"target": "lightning.pytorch.loggers.TensorBoardLogger"}
DEFAULT_CHECKPOINT = {"target": "lightning.pytorch.callbacks.ModelCheckpoint"}

_INTERPOLATED = re.compile(r"\$\{\s*(\w+)")

# ${name:argument}, also where the name is put together, as opposed to ${key} and ${.key}.
_RESOLVER = re.compile(r"\$\{[^}]*(:|\$\{)")

# Environment variable with modules of the user, separated by commas.
TRUST_VARIABLE = "TAMING_TRUST"

TRUST_REMEDY = (
    "if you trust whoever made the run, pass --trust_config (trust_config=True in Python), or list "
    f"modules of your own in the environment variable {TRUST_VARIABLE}; see docs/security.md"
)


class ConfigError(ValueError):
    """A configuration cannot be read, or has a key or value that nothing accepts."""


class LoadedConfig(NamedTuple):
    """A merged configuration and the origin of each of its keys.

    Attributes:
        values: Plain nested dicts and lists; interpolations are resolved.
        origins: Dotted key path -> the file that set it last, or ``command line``.
        interpolated: Top-level keys that a ``${...}`` refers to.
        untrusted: Folder of the files whose targets are checked by `taming.run.trust`, or None.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    interpolated: frozenset[str] = frozenset()
    untrusted: Path | None = None

    def origin(self, path: str) -> str:
        """Return the file that set a key, or the nearest key above it."""
        while path and path not in self.origins:
            path = path.rpartition(".")[0]
        return self.origins.get(path, COMMAND_LINE)

    def error(self, path: str, message: str) -> ConfigError:
        """Return an error that begins with the file that set a key."""
        return ConfigError(f"{self.origin(path)}: {message}")

    def is_untrusted(self, path: str) -> bool:
        """Return True if a value may come from a file that is not trusted."""
        if self.untrusted is None or self.interpolated:  # a ${...} may refer to such a value
            return self.untrusted is not None
        origin = self.origin(path)
        return origin != COMMAND_LINE and _lies_below(Path(origin), self.untrusted)

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
    untrusted: Path | None = None,
    ignore_data: bool = False,
) -> LoadedConfig:
    """Merge YAML files from left to right, then overrides, then ``key=value`` items.

    Mappings are merged key by key and lists are replaced, as OmegaConf does. A later ``target``
    thus keeps the earlier ``params``; `taming.run.check` reports those that it does not take. Old
    spellings are translated (`taming.run.legacy`).

    Args:
        paths: YAML files.
        dotlist: Items such as ``model.params.n_embed=64`` or ``data="{target: main.X}"``.
        overrides: Nested values that override the files.
        untrusted: Folder of a saved run's own configurations, if the run is not trusted.
        ignore_data: Ignore the ``data`` block of all files.

    Raises:
        ConfigError: A file is missing or broken, two files cannot be merged, or one that is not
            trusted calls a resolver.
    """
    merged, origins = OmegaConf.create(), {}
    sources = [(str(path), _read(Path(path), untrusted)) for path in paths]
    if ignore_data:
        for _, values in sources:
            values.pop("data", None)
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
    values = {str(key): value for key, value in plain.items()}
    return LoadedConfig(values, origins, named, untrusted)


def _lies_below(path: Path, folder: Path) -> bool:
    """Compare paths without following links: a link in the folder may lead anywhere."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _read(path: Path, untrusted: Path | None) -> dict[str, Any]:
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
    if untrusted is not None and _lies_below(path, untrusted):
        _refuse_resolvers(str(path), OmegaConf.to_container(loaded))
    return _to_modern(loaded, str(path))


def _refuse_resolvers(name: str, value: Any) -> None:
    """Refuse ``${oc.env:TOKEN}`` and functions that a program registers, often ``eval``."""
    if isinstance(value, str) and _RESOLVER.search(value):
        raise ConfigError(f"{name}: a saved run may not call a resolver, {value!r}; {TRUST_REMEDY}")
    for _, item in entries(value):
        _refuse_resolvers(name, item)


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
    for key, item in entries(value):
        _record(item, name, f"{path}.{key}" if path else str(key), origins)


def entries(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the keys and values of a mapping, or the positions and items of a list."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def merge_block(default: Mapping[str, Any], block: Any) -> Any:
    """Complete a ``{target, params}`` block with the defaults for its target.

    A block without a target takes the default's; one with another target takes no defaults.
    `taming.run.check` refuses what is not a mapping.
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
