"""Examples in docstrings run and print what they claim; each class that users build has one."""

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import taming
from taming.generator import Generator
from taming.models.prior import Prior
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.vqvae.base import Quantizer
from taming.modules.vqvae.loop import Transform
from taming.tokenizer import Tokenizer

MODULES = {
    module.name: importlib.import_module(module.name)
    for module in pkgutil.walk_packages(taming.__path__, "taming.")
    if not module.ispkg
}


def concrete(base: type) -> Iterator[type]:
    """Yield the subclasses that can be built, of the package alone."""
    for child in base.__subclasses__():
        yield from concrete(child)
        if child.__module__ in MODULES and not inspect.isabstract(child):
            yield child


BASES = (Quantizer, Transform, TokenSequence, Prior)
BUILT = {Tokenizer, Generator, *(child for base in BASES for child in concrete(base))}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples_run(name: str) -> None:
    assert doctest.testmod(MODULES[name], optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("cls", sorted(BUILT, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_a_class_that_users_build_has_an_example(cls: type) -> None:
    (own,) = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__)
    assert own.examples
