"""Signatures read from source agree with those of the imported objects."""

import inspect
import subprocess
import sys

import pytest

from taming.run.config import get_obj_from_str
from taming.run.signature import signature_of
from taming.run.source import TargetError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules of a package ``shop`` that nobody may import."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shop").mkdir()

    def write(**modules):
        for name, source in modules.items():
            text = f"raise RuntimeError('imported')\n{source}"
            (tmp_path / "shop" / f"{name}.py").write_text(text)

    write(__init__="")
    return write


@pytest.mark.parametrize(
    "target",
    [
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.loggers.CSVLogger",
        "torch.nn.Linear",
        "torch.utils.data.DataLoader",
        "torchvision.datasets.CIFAR10",
        "taming.util.download",
        "taming.run.callbacks.ImageLogger",
        "main.DataModuleFromConfig",
        "main.ImageLogger",
        "support.models.ToyTestedModel",
    ],
)
def test_agrees_with_inspect(target):
    real = inspect.signature(get_obj_from_str(target)).parameters
    read = signature_of(target)
    assert not read.open
    assert read.names == list(real)
    assert read.required == [n for n, p in real.items() if p.default is inspect.Parameter.empty]


def test_imports_nothing():
    code = (
        "import sys; from taming.run.signature import signature_of;"
        "assert signature_of('lightning.pytorch.Trainer').names;"
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_keywords_travel_to_base_classes(package):
    package(
        base="class Base:\n    def __init__(self, size, colour='red'): ...",
        derived=(
            "from .base import Base as Parent\n"
            "class Derived(Parent):\n"
            "    def __init__(self, n, *args, **kwargs):\n"
            "        super().__init__(*args, colour='blue', **kwargs)"
        ),
    )
    signature = signature_of("shop.derived.Derived")
    assert (signature.names, signature.required, signature.open) == (["n", "size"], ["n"], False)


@pytest.mark.parametrize("use", ["self.rest = kwargs", "Other(**kwargs)", "kwargs.pop('x')"])
def test_keywords_that_go_elsewhere_leave_it_open(package, use):
    package(thing=f"class A:\n    def __init__(self, a, **kwargs):\n        {use}")
    signature = signature_of("shop.thing.A")
    assert (signature.names, signature.open) == (["a"], True)


def test_follows_reexports_aliases_stars_and_type_checking(package):
    package(
        __init__="from shop.deep import *\nfrom shop import deep as sea",
        deep="class Fish:\n    def __init__(self, fins): ...\nShark = Fish",
        lazy=(
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from .deep import Shark as Hai\n"
            "def __getattr__(name): ...\n__all__ = ['Hai']"
        ),
    )
    for target in ("shop.Fish", "shop.deep.Shark", "shop.lazy.Hai"):
        assert signature_of(target).names == ["fins"]
    with pytest.raises(TargetError, match="did you mean 'Hai'"):
        signature_of("shop.lazy.Hay")


def test_data_classes_and_named_tuples(package):
    package(
        records=(
            "from dataclasses import dataclass, field\n"
            "from typing import ClassVar, NamedTuple\n"
            "@dataclass(frozen=True)\nclass A:\n    a: int\n    k: ClassVar[int] = 3\n"
            "@dataclass\nclass B(A):\n    b: list = field(default_factory=list)\n"
            "    c: int = field(init=False)\n"
            "class T(NamedTuple):\n    x: int\n    y: int = 0"
        )
    )
    b, t = signature_of("shop.records.B"), signature_of("shop.records.T")
    assert (b.names, b.required) == (["a", "b"], ["a"])
    assert (t.names, t.required) == (["x", "y"], ["x"])


@pytest.mark.parametrize(
    "source",
    [
        "from math import sin as A",
        "A = make()",
        "globals()['A'] = 3",
        "def __getattr__(name): ...",
        "from shop.circle import A",
        "@register\nclass A: ...",
        "from nowhere import Base\nclass A(Base): ...",
    ],
)
def test_open_where_source_cannot_tell(package, source):
    package(circle="from shop.thing import A", thing=source)
    assert signature_of("shop.thing.A").open


@pytest.mark.parametrize("block", ["with lock:", "for _ in range(1):", "while True:", "try:"])
def test_blocks_of_a_module_are_looked_into(package, block):
    rest = "\nfinally: pass" if block == "try:" else ""
    package(thing=f"{block}\n    class A:\n        def __init__(self, x): ...{rest}")
    assert signature_of("shop.thing.A").names == ["x"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("taming.modls.vqgan.VQModel", "taming has no module 'modls'; did you mean 'models'?"),
        ("tamin.x.Y", "there is no module 'tamin'; did you mean 'taming'?"),
        ("support.models.ToyModle", "support.models has no 'ToyModle'; did you mean 'ToyModel'?"),
        ("main.ImageLoger", "main has no 'ImageLoger'; did you mean 'ImageLogger'?"),
        ("VQModel", "'VQModel' is no dotted path"),
        ("taming.data", "taming.data is a module"),
    ],
)
def test_missing_targets_are_named(target, message):
    with pytest.raises(TargetError) as raised:
        signature_of(target)
    assert message in str(raised.value)


def test_broken_source_is_named(package):
    package(broken="class A(:")
    with pytest.raises(TargetError, match=r"broken\.py:2 is not valid Python"):
        signature_of("shop.broken.A")
