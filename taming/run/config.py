"""Load a configuration: merge YAML files with overrides, and keep the origin of every key."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from taming.run.legacy import modernize
from taming.run.sources import (
    COMMAND_LINE,
    ConfigError,
    Source,
    entries,
    lies_below,
    parse_dotlist,
    read,
)

# Trainer arguments for trying something out. From the command line, they count for one start only.
TRIALS = (
    *("fast_dev_run", "limit_train_batches", "limit_val_batches", "limit_test_batches"),
    *("limit_predict_batches", "overfit_batches", "num_sanity_val_steps", "detect_anomaly"),
    *("profiler", "barebones"),
)

_INTERPOLATED = re.compile(r"\$\{\s*(\w+)")


class LoadedConfig(NamedTuple):
    """A merged configuration, and the origin and source text of its values.

    Attributes:
        values: Plain nested dicts and lists; interpolations are resolved.
        origins: Dotted key path -> the file that gave the value, the first of several that agree,
            or ``command line``.
        interpolated: Top-level keys that a ``${...}`` refers to.
        untrusted: Folder of the files whose targets are checked by `taming.run.trust`, or None.
        texts: Dotted key path -> text of an unquoted value.
        trials: Trainer arguments of `TRIALS` that the command line gives. They belong to this
            start alone and are not in ``values``, which a resumed run gets again.
        outdated: Key paths of params that were given for a target which a later source replaced.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    interpolated: frozenset[str] = frozenset()
    untrusted: Path | None = None
    texts: Mapping[str, str] = {}
    trials: Mapping[str, Any] = {}
    outdated: frozenset[str] = frozenset()

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
        return origin != COMMAND_LINE and lies_below(Path(origin), self.untrusted)

    def block(self, name: str) -> dict[str, Any]:
        """Return a top-level block.

        Raises:
            ConfigError: The configuration has no such block.
        """
        if self.values.get(name) is None:
            raise ConfigError(f"there is no {name!r} block; add a YAML file that has one with -b")
        return self.values[name]

    def to_yaml(self) -> str:
        """Return the values as YAML, each with its origin in a comment."""
        lines = _yaml_lines(self.values, "", lambda path: self.origins.get(path, "default"))
        if self.trials:
            lines += ["# lightning.trainer of this start alone:"]
            lines += _yaml_lines(self.trials, "", lambda _: COMMAND_LINE, "#   ")
        return "".join(f"{line}\n" for line in lines)


def _yaml_lines(
    values: Mapping[Any, Any], path: str, origin: Callable[[str], str], indent: str = ""
) -> list[str]:
    """Return a mapping as lines of YAML, with the origin of each value."""
    lines = []
    for key, value in values.items():
        where, name = f"{path}.{key}" if path else str(key), _yaml_line(key)
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:", *_yaml_lines(value, where, origin, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {_yaml_line(value)}  # {origin(where)}")
    return lines


def _yaml_line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def load_config(
    paths: Sequence[str | Path],
    dotlist: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    untrusted: Path | None = None,
    ignore_data: bool = False,
) -> LoadedConfig:
    """Merge YAML files from left to right, then overrides, then ``key=value`` items.

    Mappings are merged key by key and lists are replaced, as OmegaConf does. A later ``target``
    thus keeps the earlier ``params``; `taming.run.check` drops those that it does not take. Old
    spellings are translated (`taming.run.legacy`), and ``~/`` is the user's home.

    Args:
        paths: YAML files, or names of `recipes`.
        dotlist: Items such as ``model.params.n_embed=64`` or ``data="{target: main.X}"``.
        overrides: Nested values that override the files.
        untrusted: Folder of a saved run's own configurations, if the run is not trusted.
        ignore_data: Ignore the ``data`` block of all files.

    Raises:
        ConfigError: A file is missing or broken, two files cannot be merged, or one that is not
            trusted calls a resolver.
    """
    files, given = [read(Path(path), untrusted) for path in paths], []
    if ignore_data:
        for source in files:
            source.values.pop("data", None)
    if overrides:
        given.append(Source(COMMAND_LINE, modernize(overrides), {}))
    if dotlist:
        given.append(parse_dotlist(dotlist))
    merged, tried = OmegaConf.create(), {}
    origins: dict[str, str] = {}
    texts: dict[str, str] = {}
    outdated: dict[str, str] = {}  # path -> its origin
    for source in [*files, *(_without_trials(source, tried) for source in given)]:
        before = OmegaConf.to_container(merged)
        outdated |= {path: origins[path] for path in _outdated(before, source.values, "")}
        _record(source, source.values, before, "", origins, texts)
        merged = _merge(merged, source)
    values, trials = _to_plain(merged, origins), {}
    if tried:
        for source in given:
            merged = _merge(merged, source)
        trainer = _to_plain(merged, origins)["lightning"]["trainer"]
        trials = {name: trainer[name] for name in tried}
        origins.update({f"lightning.trainer.{name}": COMMAND_LINE for name in tried})
    # An override may have replaced the value that referred to a key.
    named = frozenset(_INTERPOLATED.findall(str([*files, *given])))
    stale = frozenset(path for path, origin in outdated.items() if origins[path] == origin)
    return LoadedConfig(values, origins, named, untrusted, texts, trials, stale)


def _merge(merged: Any, source: Source) -> Any:
    try:
        return OmegaConf.merge(merged, source.values)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        where = _clash(OmegaConf.to_container(merged), source.values, "")
        message = f"{source.name} cannot be merged into the files before: {where}: {error}"
        raise ConfigError(message) from error


def _clash(old: Any, new: Any, path: str) -> str:
    """Return the key path at which a list and a mapping meet."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = ((old[key], value, f"{path}.{key}") for key, value in new.items() if key in old)
        return next(filter(None, (_clash(*pair) for pair in pairs)), "")
    meet = isinstance(old, dict | list) and isinstance(new, dict | list)
    return path[1:] if meet and type(old) is not type(new) else ""


def _outdated(old: Any, new: Any, path: str) -> Iterable[str]:
    """Yield the paths of params in blocks whose target is replaced, unless they are given anew."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return
    if "target" in old and new.get("target", old["target"]) != old["target"]:
        before, given = (dict(entries(block.get("params"))) for block in (old, new))
        yield from (f"{path}params.{name}" for name in before if name not in given)
    for key in old.keys() & new.keys():
        yield from _outdated(old[key], new[key], f"{path}{key}.")


def _to_plain(merged: Any, origins: dict[str, str]) -> dict[str, Any]:
    """Resolve interpolations and ``~/``."""
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise LoadedConfig({}, origins).error(error.full_key or "", message) from error
    assert isinstance(plain, dict)
    return {str(key): _expand_home(value) for key, value in plain.items()}


def _expand_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value[:2] == "~/" else value


def _without_trials(source: Source, found: dict[str, Any]) -> Source:
    """Return a source without the `TRIALS`, which are collected in ``found``."""
    lightning = source.values.get("lightning")
    if not isinstance(lightning, dict) or not isinstance(trainer := lightning.get("trainer"), dict):
        return source
    found.update({name: value for name, value in trainer.items() if name in TRIALS})
    kept = {name: value for name, value in trainer.items() if name not in TRIALS}
    return source._replace(values={**source.values, "lightning": {**lightning, "trainer": kept}})


def _record(
    source: Source, value: Any, old: Any, path: str, origins: dict[str, str], texts: dict[str, str]
) -> None:
    """Record the origin and the text of a value that replaces an old one, and of those inside."""
    if path:
        # A run's later starts save all values again, beside the earlier files.
        is_same = not isinstance(value, Mapping) and (type(old), old) == (type(value), value)
        is_beside = Path(origins.get(path, "")).parent == Path(source.name).parent
        if not (is_same and is_beside and path in origins) or source.name == COMMAND_LINE:
            origins[path] = source.name
        texts.pop(path, None)
        texts.update({path: source.texts[path]} if path in source.texts else {})
    inside = dict(entries(old))
    for key, item in entries(value):
        where = f"{path}.{key}" if path else str(key)
        _record(source, item, inside.get(key), where, origins, texts)
