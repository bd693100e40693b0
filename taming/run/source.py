"""Finds the definition that a dotted path names by reading source with ``ast``.

Nothing is imported and nothing of it runs, so that a misspelt path is found within a fraction of a
second, while importing torch and Lightning alone takes seconds.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class TargetError(ValueError):
    """A target path names nothing that exists."""


class UnreadableError(Exception):
    """Source alone cannot tell: compiled code, or names made at run time."""


@dataclass(frozen=True)
class Module:
    """A module that was found but not imported.

    Attributes:
        name: Its dotted name.
        file: Its source; None for a package without ``__init__.py``.
        folders: Where its submodules lie; empty unless it is a package.
    """

    name: str
    file: Path | None
    folders: tuple[Path, ...]

    @property
    def statements(self) -> list[ast.stmt]:
        """Statements of the module; of alternatives, the first branch comes last and so wins."""
        return [] if self.file is None else _statements_of(self.file, self.file.stat().st_mtime_ns)

    @property
    def names(self) -> list[str]:
        """Names that the module's statements bind, and its submodules."""
        names = {name for statement in self.statements for name in _bound_names(statement)}
        for folder in self.folders:
            names.update(file.stem for file in folder.glob("*.py"))
            names.update(file.parent.name for file in folder.glob("*/__init__.py"))
        return sorted(names)


@dataclass(frozen=True)
class Definition:
    """A class or function and the module in whose scope its names are to be read."""

    module: Module
    node: ast.ClassDef | Function


def nearest(name: str, valid: Sequence[str]) -> str:
    """Return the end of an error sentence, which points to the nearest valid names."""
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(sorted(valid))}" if 0 < len(valid) <= 12 else ""


def find_definition(path: str) -> Definition:
    """Find the class or function that a dotted path names, through imports and aliases.

    Args:
        path: Such as ``taming.models.vqgan.VQModel``.

    Raises:
        TargetError: The path names nothing that exists, or a module.
        UnreadableError: Source alone cannot tell.
    """
    parent, _, name = path.rpartition(".")
    if not parent:
        raise TargetError(f"{path!r} is no dotted path like 'package.module.Name'")
    module = find_module(parent)
    if module is None:
        raise _missing_module(parent)
    found = _lookup(module, name)
    if found is None:
        raise TargetError(f"{parent} has no {name!r}{nearest(name, module.names)}")
    if isinstance(found, Module):
        raise TargetError(f"{path} is a module; a target names a class or function in one")
    return found


def resolve_expression(module: Module, node: ast.expr) -> Definition:
    """Find what a name such as ``Base`` or ``nn.Module`` means in a module.

    Raises:
        UnreadableError: Source alone cannot tell.
    """
    if isinstance(node, ast.Subscript):  # Generic[T]
        return resolve_expression(module, node.value)
    owner: Definition | Module | None = module
    for name in ast.unparse(node).split("."):
        owner = _lookup(owner, name) if isinstance(owner, Module) else None
    if not isinstance(owner, Definition):
        raise UnreadableError(ast.unparse(node))
    return owner


def find_module(name: str) -> Module | None:
    """Find a module without importing it or its packages; None if there is none.

    Raises:
        UnreadableError: It is there but is not Python source.
    """
    parent, _, leaf = name.rpartition(".")
    if not parent:
        return _top_level_module(name)
    package = find_module(parent)
    for folder in package.folders if package else ():
        path = folder / leaf
        if (path / "__init__.py").is_file():
            return Module(name, path / "__init__.py", (path,))
        if path.with_suffix(".py").is_file():
            return Module(name, path.with_suffix(".py"), ())
        if any(folder.glob(f"{leaf}.*so")) or any(folder.glob(f"{leaf}.*pyd")):
            raise UnreadableError(name)
        if path.is_dir():
            return Module(name, None, (path,))
    return None


def _top_level_module(name: str) -> Module | None:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError as error:  # made at run time, without a file
        raise UnreadableError(name) from error
    if spec is None:
        return None
    folders = tuple(Path(folder) for folder in spec.submodule_search_locations or ())
    if spec.has_location and spec.origin is not None and spec.origin.endswith(".py"):
        return Module(name, Path(spec.origin), folders)
    if folders:
        return Module(name, None, folders)
    raise UnreadableError(name)


def _missing_module(name: str) -> TargetError:
    """Return the error that names the first part of a module's path that does not exist."""
    parent, _, leaf = name.rpartition(".")
    if not parent:
        return TargetError(f"there is no module {name!r}{nearest(name, ['taming', 'main'])}")
    package = find_module(parent)
    if package is None:
        return _missing_module(parent)
    return TargetError(f"{parent} has no module {leaf!r}{nearest(leaf, package.names)}")


@lru_cache
def _statements_of(file: Path, modified: int) -> list[ast.stmt]:
    try:
        return list(_flatten(ast.parse(file.read_text(encoding="utf-8")).body))
    except SyntaxError as error:
        raise TargetError(f"{file}:{error.lineno} is not valid Python: {error.msg}") from error


def _flatten(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _flatten([*statement.orelse, *statement.body])
        elif isinstance(statement, ast.Try):
            handlers = [s for handler in statement.handlers for s in handler.body]
            yield from _flatten([*handlers, *statement.body, *statement.orelse])
        elif isinstance(statement, ast.With | ast.For | ast.While):
            yield from _flatten(statement.body)
        else:
            yield statement


def _bound_names(statement: ast.stmt) -> list[str]:
    """Names that a statement defines in its module."""
    if isinstance(statement, ast.ClassDef | Function):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [_bound_by(alias) for alias in statement.names]
    if isinstance(statement, ast.Assign):
        nodes = [node for target in statement.targets for node in ast.walk(target)]
        return [node.id for node in nodes if isinstance(node, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


def _bound_by(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _lookup(module: Module, name: str) -> Definition | Module | None:
    """Find what a name means in a module; None if it is not there."""
    for statement in reversed(module.statements):
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            found = _imported(module, statement, name)
            if found is not None:
                return found
        elif name in _bound_names(statement):
            return _meaning(module, statement, name)
    submodule = find_module(f"{module.name}.{name}")
    if submodule is None and _makes_names(module):
        raise UnreadableError(name)
    return submodule


def _meaning(module: Module, statement: ast.stmt, name: str) -> Definition | Module | None:
    """Follow the statement that binds a name."""
    if isinstance(statement, ast.ClassDef | Function):
        return Definition(module, statement)
    found = None
    if isinstance(statement, ast.ImportFrom):
        alias = next(alias for alias in statement.names if _bound_by(alias) == name)
        found = _imported(module, statement, alias.name)
    elif isinstance(statement, ast.Import):
        alias = next(alias for alias in statement.names if _bound_by(alias) == name)
        found = find_module(alias.name if alias.asname else name)
    elif isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
        found = _lookup(module, statement.value.id)
    if found is None:
        raise UnreadableError(name)
    return found


def _imported(module: Module, statement: ast.ImportFrom, name: str) -> Definition | Module | None:
    """Find a name in the module that a ``from ... import`` reads."""
    origin = statement.module or ""
    if statement.level:
        package = module.name.split(".") if module.folders else module.name.split(".")[:-1]
        package = package[: len(package) - statement.level + 1]
        origin = ".".join([*package, *filter(None, [statement.module])])
    if origin == module.name:  # a package that imports its own submodule
        return find_module(f"{origin}.{name}")
    source = find_module(origin)
    return _lookup(source, name) if source else None


def _makes_names(module: Module) -> bool:
    """Whether a module may have names that its statements do not show."""
    bound = {name for statement in module.statements for name in _bound_names(statement)}
    nodes = (node for statement in module.statements for node in ast.walk(statement))
    dynamic = any(isinstance(node, ast.Name) and node.id == "globals" for node in nodes)
    return dynamic or ("__getattr__" in bound and "__all__" not in bound)
