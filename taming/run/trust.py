"""The targets that the configuration of a saved run may build.

A run may have been downloaded, and a ``target`` is called with any arguments. So a target that
comes from a run's own files must be a class of a kind that is known to be harmless, unless the user
trusts the run or the target's module. ``docs/security.md`` describes the line for users.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from taming.run.config import LoadedConfig
from taming.run.sources import TRUST_REMEDY, TRUST_VARIABLE, entries
from taming.util import MAIN_NAMES, get_obj_from_str


class _Allowed(NamedTuple):
    """Classes that are defined in a module or below it."""

    module: str
    base: str = ""  # full name of a class that they derive from; empty for any
    names: tuple[str, ...] = ()  # of the classes; empty for all


_MODULE = "torch.nn.modules.module.Module"
_DATASET = "torch.utils.data.dataset.Dataset"
_METRIC = "torchmetrics.metric.Metric"

# Data sets whose files are pictures and tables, or pickles of a known digest.
_TORCHVISION = (
    *("Caltech101", "Caltech256", "CelebA", "CIFAR10", "CIFAR100", "DTD", "EMNIST", "EuroSAT"),
    *("FakeData", "FashionMNIST", "Flowers102", "Food101", "GTSRB", "ImageFolder", "Imagenette"),
    *("KMNIST", "MNIST", "OxfordIIITPet", "Places365", "QMNIST", "STL10", "SUN397", "SVHN"),
)
_CALLBACKS = (
    *("DeviceStatsMonitor", "EarlyStopping", "EMAWeightAveraging", "GradientAccumulationScheduler"),
    *("LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "RichModelSummary"),
    *("RichProgressBar", "StochasticWeightAveraging", "TQDMProgressBar", "Timer"),
    "WeightAveraging",
)
_LIGHTNING = "lightning.pytorch"

# Top-level block -> the classes that may be built anywhere inside it. Left out are those that write
# or fetch files of any name, unpickle, start processes or call what they are given: most loggers,
# plugins and launchers of Lightning, metrics that load networks, and LSUN.
_ALLOWED: dict[str, tuple[_Allowed, ...]] = {
    "model": (
        *map(_Allowed, ("taming.models", "taming.modules", "taming.lr_scheduler", "torch.optim")),
        _Allowed("torch.nn", _MODULE),
        _Allowed("vector_quantize_pytorch", _MODULE),
        _Allowed("torchmetrics.aggregation", _METRIC),
        _Allowed("torchmetrics.classification", _METRIC),
        _Allowed("torchmetrics.image.psnr", _METRIC),
        _Allowed("torchmetrics.image.ssim", _METRIC),
        _Allowed("torchmetrics.regression", _METRIC),
    ),
    "data": (
        _Allowed("taming.data", _DATASET),
        _Allowed("taming.data.datamodule", names=("DataModuleFromConfig",)),
        _Allowed("torch.utils.data.dataset", _DATASET),
        _Allowed("torchvision.datasets", _DATASET, _TORCHVISION),
        _Allowed("torchvision.transforms"),
    ),
    "lightning": (
        _Allowed("taming.run.advice", f"{_LIGHTNING}.callbacks.callback.Callback"),
        _Allowed("taming.run.averages", f"{_LIGHTNING}.callbacks.callback.Callback"),
        _Allowed("taming.run.callbacks", f"{_LIGHTNING}.callbacks.callback.Callback"),
        _Allowed("taming.run.checkpoints", f"{_LIGHTNING}.callbacks.callback.Callback"),
        _Allowed("taming.run.epoch_values", f"{_LIGHTNING}.callbacks.callback.Callback"),
        _Allowed(f"{_LIGHTNING}.callbacks", names=_CALLBACKS),
        _Allowed(f"{_LIGHTNING}.loggers", names=("CSVLogger", "TensorBoardLogger")),
        _Allowed("lightning.fabric.plugins.environments", names=("LightningEnvironment",)),
        _Allowed(f"{_LIGHTNING}.plugins.precision", names=("MixedPrecision", "FSDPPrecision")),
        _Allowed(f"{_LIGHTNING}.profilers", names=("AdvancedProfiler", "SimpleProfiler")),
        _Allowed(f"{_LIGHTNING}.strategies", names=("DDPStrategy", "FSDPStrategy")),
    ),
}

# Functions: the runs that these load are checked in their turn.
_FUNCTIONS = {
    "model": ("taming.run.folder.model_from_run",),
    "data": ("taming.run.folder.data_from_run",),
}

# Modules whose import runs nothing but definitions; the classes above are named through them.
_IMPORTABLE = (
    *("taming", "torch.nn", "torch.optim", "torch.utils.data", "torchmetrics"),
    *("torchvision.datasets", "torchvision.transforms", "vector_quantize_pytorch"),
    "lightning.pytorch",
)

# Arguments in the lightning block that name the folder of files to be written.
_FOLDERS = ("dirpath", "save_dir", "default_root_dir", "logdir", "ckptdir", "cfgdir")


def check_trust(config: LoadedConfig, block: str, name: str | None = None) -> None:
    """Refuse what a saved run's own files may not ask for in a top-level block.

    Args:
        config: A configuration; unless it has ``untrusted`` files, everything is allowed.
        block: ``model``, ``data`` or ``lightning``.
        name: Name of the top-level block if it is another, which may build what ``block`` may.

    Raises:
        ConfigError: Names the file, the key path and the target.
    """
    if config.untrusted is not None:
        name = name or block
        _check_entries(config, block, name, config.values.get(name))


def _check_entries(config: LoadedConfig, block: str, path: str, value: Any) -> None:
    for key, item in entries(value):
        where = f"{path}.{key}"
        if isinstance(item, Mapping | list):
            _check_entries(config, block, where, item)
        elif item and config.is_untrusted(where):
            try:
                found = _problem(config, block, key, item)
            except ValueError as error:  # there is no such target
                raise config.error(where, f"{where}: {error}") from error
            if found:
                raise config.error(where, f"{where}: {found}; {TRUST_REMEDY}")


def _problem(config: LoadedConfig, block: str, key: Any, value: Any) -> str | None:
    """Return the reason why a value is refused, None if it is not."""
    assert config.untrusted is not None
    if key == "target" and not (isinstance(value, str) and _is_allowed(value, block)):
        return f"a saved run may not build {value}"
    # A path that the data sets of scenes look up.
    if str(key).endswith("_target") and not (isinstance(value, str) and _is_plain(value)):
        return f"a saved run may not look up {value}"
    # Beside a ckpt_path in the model, it only ever concerns that file, which is not loaded again.
    if key == "trust_config" or (key == "trust_checkpoint" and block != "model"):
        return f"a saved run may not ask for trust, with {key}: {value}"
    if block == "lightning" and isinstance(value, str):
        run = config.untrusted.parent
        leaves = value.startswith("~") or ".." in Path(value).parts or "::" in value
        outside = not Path(value).resolve().is_relative_to(run.resolve())
        if leaves or "://" in value or (outside and (key in _FOLDERS or Path(value).is_absolute())):
            return f"a saved run may only write into its own folder {run}, not to {value}"
    return None


def _is_allowed(target: str, block: str) -> bool:
    """Return True if a target of a saved run may be built inside a top-level block.

    Raises:
        ValueError: There is no such target.
    """
    module = MAIN_NAMES.get(target, target).rpartition(".")[0]
    if not _lies_in(module, *_trusted_modules()) and not _is_importable(module):
        return False
    found = get_obj_from_str(target)
    own, name = getattr(found, "__module__", ""), getattr(found, "__qualname__", "")
    if getattr(sys.modules.get(own), name, None) is not found:
        return False
    if _lies_in(own, *_trusted_modules()) or f"{own}.{name}" in _FUNCTIONS.get(block, ()):
        return callable(found)
    if not isinstance(found, type):
        return False
    bases = {f"{base.__module__}.{base.__qualname__}" for base in found.__mro__}
    return any(
        _lies_in(own, allowed.module)
        and (not allowed.base or allowed.base in bases)
        and (not allowed.names or name in allowed.names)
        for allowed in _ALLOWED.get(block, ())
    )


def _is_plain(path: str) -> bool:
    """Return True if a path leads to data, such as a list of categories.

    Raises:
        ValueError: It leads nowhere.
    """
    if not _lies_in(path, "taming.data", *_trusted_modules()):
        return False
    return isinstance(get_obj_from_str(path), Mapping | list | tuple | set | frozenset)


def _is_importable(module: str) -> bool:
    """Return True for the modules above, unless they would come from the current folder.

    A downloaded folder may bring a module of the name of a package that is not installed.
    """
    if not _lies_in(module, *_IMPORTABLE):
        return False
    package, root = module.partition(".")[0], Path(__file__).parents[2]
    spec = importlib.util.find_spec(package)
    place = spec and (spec.submodule_search_locations or [spec.origin])[0]
    if not place:
        return True  # it is not installed, and importing it will say so
    folder = Path(place).resolve().parent
    return folder == root if package == "taming" else folder != Path.cwd()


def _trusted_modules() -> tuple[str, ...]:
    names = os.environ.get(TRUST_VARIABLE, "").split(",")
    return tuple(name.strip() for name in names if name.strip())


def _lies_in(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)
