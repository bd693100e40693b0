"""The sources of a configuration: YAML files, recipes that ship, and ``key=value`` items."""

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
from taming.util import home, nearest

COMMAND_LINE = "command line"

_BROKEN = (yaml.YAMLError, OmegaConfBaseException)

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


class Source(NamedTuple):
    """Attributes: name of a file or the command line, its values, and texts as `LoadedConfig`."""

    name: str
    values: dict[str, Any]
    texts: dict[str, str]


def entries(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the keys and values of a mapping, or the positions and items of a list."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def lies_below(path: Path, folder: Path) -> bool:
    """Compare paths without following links: a link in the folder may lead anywhere."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def recipes() -> dict[str, Path]:
    """Return the configurations that ship, by name: ``loopy_vqgan``, ``demo/loopy_vqgan``, ..."""
    folder = home() / "configs"
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _find(path: Path) -> Path:
    """Return a file, or else the recipe of that name, which may end in ``.yaml``."""
    path, known = path.expanduser(), recipes()
    if path.is_file():
        return path
    name = path.as_posix().removesuffix(".yaml")
    if name not in known:
        raise ConfigError(
            f"there is no configuration file {path}{nearest(name, known)} "
            f"The recipes are {', '.join(known)}"
        )
    return known[name]


def read(path: Path, untrusted: Path | None) -> Source:
    """Read a YAML file, or the recipe of that name; those of an untrusted folder call no resolver.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
    """
    path = _find(path)
    try:
        loaded = OmegaConf.load(path)
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line} is not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, RecursionError, *_BROKEN) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping with the keys model, data, lightning")
    if untrusted is not None and lies_below(path, untrusted):
        _refuse_resolvers(str(path), OmegaConf.to_container(loaded))
    return Source(str(path), _to_modern(loaded, str(path)), dict(_plain_texts(node, "")))


def _refuse_resolvers(name: str, value: Any) -> None:
    """Refuse ``${oc.env:TOKEN}`` and functions that a program registers, often ``eval``."""
    if isinstance(value, str) and _RESOLVER.search(value):
        raise ConfigError(f"{name}: a saved run may not call a resolver, {value!r}; {TRUST_REMEDY}")
    for _, item in entries(value):
        _refuse_resolvers(name, item)


def parse_dotlist(dotlist: Sequence[str]) -> Source:
    """Parse ``key=value`` items.

    Raises:
        ConfigError: An item cannot be read.
    """
    texts: dict[str, str] = {}
    try:
        values = _to_modern(OmegaConf.from_dotlist(list(dotlist)), COMMAND_LINE)
        for key, _, text in (item.partition("=") for item in dotlist):
            path = key.replace("[", ".").replace("]", "")
            texts.update(_plain_texts(yaml.compose(text, Loader=yaml.SafeLoader), path))
    except _BROKEN as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{COMMAND_LINE}: cannot read {' '.join(dotlist)}: {message}") from error
    return Source(COMMAND_LINE, values, texts)


def _plain_texts(node: yaml.Node | None, path: str) -> Iterable[tuple[str, str]]:
    """Yield key path and text of the unquoted scalars of a YAML node."""
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        yield path, node.value
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _plain_texts(item, f"{path}.{index}")
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            yield from _plain_texts(item, f"{path}.{key.value}" if path else str(key.value))


def _to_modern(config: DictConfig, name: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    try:
        return modernize({str(key): value for key, value in plain.items()})
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
