"""Which keyword arguments a target takes, read from its source without importing it.

Where source cannot tell, a signature is open: it accepts everything, and the real constructor has
the last word.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

from taming.run.source import (
    Definition,
    Function,
    UnreadableError,
    find_definition,
    resolve_expression,
)


@dataclass(frozen=True)
class Parameter:
    """One keyword argument.

    Attributes:
        name: Its name.
        default: Source text of its default; None where a value is required.
        annotation: Source text of its type; empty where it has none.
    """

    name: str
    default: str | None
    annotation: str = ""


@dataclass(frozen=True)
class Signature:
    """Keyword arguments that a target takes.

    Attributes:
        parameters: Arguments in the order of their definition.
        open: Whether it may take others as well.
        doc: Docstring of the constructor or function.
    """

    parameters: tuple[Parameter, ...] = ()
    open: bool = False
    doc: str = ""

    @property
    def names(self) -> list[str]:
        """Names of all arguments."""
        return [parameter.name for parameter in self.parameters]

    @property
    def annotations(self) -> dict[str, str]:
        """Source text of the type of each argument."""
        return {parameter.name: parameter.annotation for parameter in self.parameters}

    @property
    def required(self) -> list[str]:
        """Names of the arguments without a default."""
        return [parameter.name for parameter in self.parameters if parameter.default is None]


_WITHOUT_ARGUMENTS = {"object", "ABC", "abc.ABC", "Protocol", "typing.Protocol", "Generic"}


def signature_of(target: str) -> Signature:
    """Read which keyword arguments a target takes, without importing it.

    Args:
        target: Dotted path to a class or function, such as ``taming.models.vqgan.VQModel``.

    Returns:
        Its signature; open where source alone cannot tell.

    Raises:
        TargetError: The path names nothing that exists.
    """
    try:
        definition = find_definition(target)
        if isinstance(definition.node, ast.ClassDef):
            return _class_signature(definition, definition.node)
        return _function_signature(definition.node)
    except (UnreadableError, RecursionError):  # the latter where modules import in a circle
        return Signature(open=True)


def _function_signature(node: Function, skip: int = 0) -> Signature:
    """Read a function's keyword arguments, without the first ``skip`` (``self``)."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = [*zip(positional, [*missing, *arguments.defaults], strict=True)][skip:]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters = (
        Parameter(
            a.arg,
            ast.unparse(d) if d else None,
            ast.unparse(a.annotation) if a.annotation else "",
        )
        for a, d in pairs
    )
    doc = ast.get_docstring(node) or ""
    return Signature(tuple(parameters), open=arguments.kwarg is not None, doc=doc)


def _class_signature(definition: Definition, node: ast.ClassDef) -> Signature:
    init = _method(node, "__init__")
    if init is None:
        return _implicit_signature(definition, node)
    own = _function_signature(init, skip=1)
    set_by_call = _forwarded(init) if init.args.kwarg else None
    if set_by_call is None:
        return own
    inherited = _bases_signature(definition, node)
    # *args may carry what a base requires, so nothing inherited is required by name.
    more = tuple(
        replace(parameter, default=parameter.default or "...")
        for parameter in inherited.parameters
        if parameter.name not in {*own.names, *set_by_call}
    )
    return Signature(own.parameters + more, open=inherited.open, doc=own.doc)


def _forwarded(init: ast.FunctionDef) -> set[str] | None:
    """Tell whether ``**kwargs`` goes to a base's ``__init__`` whole and nowhere else.

    Returns:
        The keywords that the call sets itself; None if the arguments may go elsewhere.
    """
    assert init.args.kwarg is not None
    name = init.args.kwarg.arg
    uses = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(init))
    for call in (node for node in ast.walk(init) if isinstance(node, ast.Call)):
        if not (isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"):
            continue
        starred = [keyword.value for keyword in call.keywords if keyword.arg is None]
        if uses == 1 and any(isinstance(v, ast.Name) and v.id == name for v in starred):
            return {keyword.arg for keyword in call.keywords if keyword.arg}
    return None


def _implicit_signature(definition: Definition, node: ast.ClassDef) -> Signature:
    """Read a class without ``__init__``: a data class, a named tuple, or what its bases take."""
    bases = [ast.unparse(base) for base in node.bases]
    if "NamedTuple" in bases or "typing.NamedTuple" in bases:
        return Signature(tuple(_fields(node)))
    inherited = _bases_signature(definition, node)
    decorators = [ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list]
    if "dataclass" in decorators or "dataclasses.dataclass" in decorators:
        fields = {p.name: p for p in [*inherited.parameters, *_fields(node)]}
        return Signature(tuple(fields.values()), open=inherited.open)
    if decorators or _method(node, "__new__"):
        raise UnreadableError(node.name)
    return inherited


def _fields(node: ast.ClassDef) -> Iterator[Parameter]:
    """Yield the arguments that the fields of a data class or named tuple make."""
    for statement in node.body:
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        value = statement.value
        default = ast.unparse(value) if value else None
        if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
            if options.get("init") == "False":
                continue
            default = options.get("default") or options.get("default_factory")
        if "ClassVar" not in ast.unparse(statement.annotation):
            yield Parameter(statement.target.id, default)


def _bases_signature(definition: Definition, node: ast.ClassDef) -> Signature:
    """Unite what the base classes take: cooperative constructors pass arguments along."""
    parameters: dict[str, Parameter] = {}
    is_open = False
    for base in node.bases:
        if ast.unparse(base).partition("[")[0] in _WITHOUT_ARGUMENTS:
            continue
        found = resolve_expression(definition.module, base)
        if not isinstance(found.node, ast.ClassDef):
            raise UnreadableError(ast.unparse(base))
        signature = _class_signature(found, found.node)
        parameters.update((p.name, p) for p in signature.parameters if p.name not in parameters)
        is_open |= signature.open
    return Signature(tuple(parameters.values()), open=is_open)


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == name]
    return methods[-1] if methods else None
