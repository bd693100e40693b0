"""Signatures: the keyword parameters that a class or function takes, and the nearest to others."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error message that names the valid name nearest to a wrong one.

    Args:
        name: The wrong name.
        valid: The valid names.

    Returns:
        ``"; did you mean 'x'?"``; where no name is close, a list of them if there are few.

    Example:
        >>> nearest("widht", ["width", "height"])
        "; did you mean 'width'?"
    """
    names = sorted(set(valid))
    bare = {other.lstrip("-"): other for other in names}  # dashes make all flags alike
    close = get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {bare[close[0]]!r}?"
    return f"; valid: {', '.join(names)}" if 0 < len(names) <= 12 else ""


def naming_nearest(*others: Callable[..., Any]) -> Callable[[F], F]:
    """Make an unknown keyword of a function a TypeError that names the nearest to it.

    Args:
        *others: Classes or functions whose parameters the function's ``**kwargs`` may be.

    Returns:
        A decorator.

    Example:
        >>> @naming_nearest()
        ... def encode(picture, max_codes=None): ...
        >>> encode("photo.jpg", max_code=3)
        Traceback (most recent call last):
        TypeError: encode() takes no 'max_code'; did you mean 'max_codes'?
    """

    def decorate(function: F) -> F:
        known = [inspect.signature(target).parameters.values() for target in (function, *others)]
        names = {p.name for own in known for p in own if p.kind is not p.VAR_KEYWORD}

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in names:
                    end = nearest(name, names - {"self"})
                    raise TypeError(f"{function.__name__}() takes no {name!r}{end}")
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """List the keyword parameters of a class or function.

    Where a constructor forwards its ``**kwargs`` to a base class, the parameters of the next
    constructor in the MRO follow. They count as optional, since ``*args`` may carry them.

    Args:
        target: Class or function.

    Returns:
        Name -> parameter, whose annotation is a type where its source text can be evaluated; and
        True if the target may take other keywords as well.
    """
    classes = getattr(target, "__mro__", ())
    inits = [vars(c)["__init__"] for c in classes if inspect.isfunction(vars(c).get("__init__"))]
    found: dict[str, inspect.Parameter] = {}
    hidden: set[str] = set()
    for depth, init in enumerate(inits or [target]):
        try:
            parameters = [*inspect.signature(init).parameters.values()][bool(inits) :]
        except (TypeError, ValueError):  # compiled code may have no signature
            return found, True
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in hidden:
                is_made_optional = depth and p.default is p.empty
                p = p.replace(annotation=_evaluated(p.annotation, init))
                found.setdefault(p.name, p.replace(default=...) if is_made_optional else p)
        if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
            return found, False
        set_by_call = _forwarded(init, parameters[-1].name)
        if set_by_call is None:
            return found, True
        hidden |= set_by_call
    return found, True


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    """Evaluate the source text of an annotation; return it as it is if its names are unknown."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except (NameError, AttributeError, TypeError, SyntaxError):  # imported for type checkers only
        return annotation


def _forwarded(init: Callable[..., Any], kwargs: str) -> set[str] | None:
    """Return the keywords that a constructor sets where it forwards ``**kwargs`` to a base.

    None means that ``**kwargs`` may go elsewhere, so that any keyword may be valid.
    """
    try:
        nodes = [*ast.walk(ast.parse(textwrap.dedent(inspect.getsource(init))))]
    except (OSError, SyntaxError):
        return None
    if sum(isinstance(node, ast.Name) and node.id == kwargs for node in nodes) != 1:
        return None
    for call in nodes:
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".__init__"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if keywords.get(None) == kwargs:
                return {name for name in keywords if name}
    return None
