"""Modules that can state the configuration by which they are built again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any


class Recorded:
    """Remembers the arguments of its constructor, so that `to_config` can state them.

    A module that goes along with a shared model derives from it, before ``nn.Module``.

    Attributes:
        built_from: Parameter that holds the block of a part -> attribute that holds the part. Such
            a block may name another run; the part's own block, which does not, takes its place.

    Example:
        >>> from torch import nn
        >>> class Scale(Recorded, nn.Module):
        ...     def __init__(self, factor: float, bias: float = 0.0) -> None:
        ...         super().__init__()
        >>> Scale(2.0)._arguments
        ((2.0,), {})
    """

    built_from: Mapping[str, str] = {}
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Remember the arguments; of mappings and lists, as they are now."""
        built = super().__new__(cls)
        vars(built)["_arguments"] = tuple(map(_copied, args)), _copied(kwargs)
        return built

    def to_config(self) -> dict[str, Any]:
        """Return the ``{target, params}`` block of plain values that builds this again, untrained.

        Raises:
            ValueError: A file cannot state it: the class is defined inside a function, or an
                argument is an object.
        """
        kind, (args, kwargs) = type(self), self._arguments
        target = f"{kind.__module__}.{kind.__qualname__}"
        if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
            raise ValueError(f"{target} cannot be found by this name: define it in a module")
        signature = inspect.signature(kind.__init__)
        bound = signature.bind(self, *args, **kwargs).arguments
        params: dict[str, Any] = {}
        for name, value in [*bound.items()][1:]:
            found = signature.parameters[name].kind
            if found is inspect.Parameter.VAR_POSITIONAL:
                raise ValueError(f"{target} was built with arguments without names: name them")
            params |= value if found is inspect.Parameter.VAR_KEYWORD else {name: value}
        for name, attribute in self.built_from.items():
            own = getattr(getattr(self, attribute), "to_config", None)
            if isinstance(params.get(name), dict) and own is not None:
                params[name] = own()
        _refuse_objects(params, target)
        return {"target": target, "params": params}


def _copied(value: Any) -> Any:
    """Copy mappings and sequences of any kind, such as OmegaConf's, to dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _copied(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_copied(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def _refuse_objects(value: Any, where: str) -> None:
    """Refuse what YAML cannot state; ``where`` is the path of the value."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_objects(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _refuse_objects(item, f"{where}.{number}")
    elif not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"{where} is a {type(value).__name__}: a file only holds plain values")
