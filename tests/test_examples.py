"""The examples in docstrings run and print what they claim."""

import doctest
import importlib
import pkgutil

import pytest

import taming

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(taming.__path__, "taming.") if not module.ispkg
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
