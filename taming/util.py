"""Helpers for all parts: objects from target paths, files saved whole, lookups, errors."""

from __future__ import annotations

import importlib
import os
import pkgutil
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

# The original has these here.
from taming.downloads import download as download
from taming.downloads import get_ckpt_path as get_ckpt_path
from taming.downloads import md5_hash as md5_hash
from taming.extras import naming_extras
from taming.signatures import nearest as nearest
from taming.signatures import parameters_of


def home() -> Path:
    """Return the folder of ``main.py``, ``scripts/`` and ``configs/``.

    It is the repository or, where the package was installed without it, their copy in the package.
    """
    package = Path(__file__).parent
    copy = package / "programs"
    return copy if copy.is_dir() else package.parent


# Names that configurations refer to as main.*, as the original's do, and what they are.
MAIN_NAMES = {
    "main.DataModuleFromConfig": "taming.data.datamodule.DataModuleFromConfig",
    "main.ImageLogger": "taming.run.callbacks.ImageLogger",
    "main.LearningRateMonitor": "lightning.pytorch.callbacks.LearningRateMonitor",
    "main.SetupCallback": "taming.run.callbacks.SetupCallback",
    "main.WrappedDataset": "taming.data.datamodule.WrappedDataset",
}


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import the object that a dotted path names.

    Args:
        string: Path such as ``taming.models.vqgan.VQModel``, or one of `MAIN_NAMES`.
        reload: Import the module anew, for interactive work.

    Returns:
        The class, function or value.

    Raises:
        ValueError: The path has no dot, its module does not exist or lacks the name; the message
            names the nearest valid name.
    """
    module_name, _, name = MAIN_NAMES.get(string, string).rpartition(".")
    if not module_name or string.startswith("."):
        raise ValueError(f"{string!r} is not a dotted path like 'package.module.Name'")
    module = _import_module(module_name)
    if reload:
        module = importlib.reload(module)
    try:
        return getattr(module, name)
    except AttributeError as error:
        names = [*dir(module), *getattr(module, "__all__", ()), *_submodules(module)]
        end = "; that is a module" if name in names else nearest(name, names)
        raise ValueError(f"{module_name} has no {name!r}{end}") from error


def _import_module(name: str) -> ModuleType:
    try:
        with naming_extras():
            return importlib.import_module(name)
    except SyntaxError as error:
        where = f"{error.filename}:{error.lineno}"
        raise ValueError(f"{where} is not valid Python: {error.msg}") from error
    except ModuleNotFoundError as error:
        missing = error.name or name
        parent, _, leaf = missing.rpartition(".")
        if not f"{name}.".startswith(f"{missing}."):
            message = f"{name} needs the module {missing!r}, which is not installed"
        elif parent:
            siblings = _submodules(sys.modules[parent])
            message = f"{parent} has no module {leaf!r}{nearest(leaf, siblings)}"
        else:
            end = nearest(missing, ["taming", "main"])
            if missing == "main":
                end = f"; the names in it that are known everywhere: {', '.join(MAIN_NAMES)}"
            message = f"there is no module {name!r}{end}"
        raise ValueError(message) from error


def _submodules(module: ModuleType) -> list[str]:
    return [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))]


def instantiate_from_config(config: Mapping[str, Any], **kwargs: Any) -> Any:
    """Build the object that a ``{target: path, params: {...}}`` block describes.

    Args:
        config: Mapping with ``target`` and, optionally, ``params`` (keyword arguments).
        **kwargs: Further keyword arguments, which override ``params``.

    Returns:
        What the target returns.

    Raises:
        ValueError: The block has no ``target``, or its ``target`` cannot be imported.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a block with a 'target', got {config!r}")
    if "target" not in config:
        raise ValueError(f"expected a block with a 'target', got the keys {sorted(config)}")
    return get_obj_from_str(config["target"])(**{**(config.get("params") or {}), **kwargs})


# Names that quantizers give their sizes: n_e codes of e_dim channels.
QUANTIZER_SIZES = {
    **dict.fromkeys(("n_e", "n_embed"), "n_e"),
    **dict.fromkeys(("e_dim", "embedding_dim", "num_hiddens"), "e_dim"),
}


def instantiate_with_sizes(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """Build a ``{target, params}`` block whose sizes follow from the model around it.

    A size that the target takes and the block does not state is filled in; a size that the block
    states must agree.

    Args:
        config: The block.
        sizes: Parameter name -> size. Names that the target does not take are ignored, so that one
            mapping may hold the names that different targets use.

    Returns:
        What the target returns.

    Raises:
        ValueError: A stated size disagrees, or the block has no valid ``target``.

    Example:
        >>> block = {"target": "torch.nn.Linear", "params": {"in_features": 3}}
        >>> instantiate_with_sizes(block, {"in_features": 3, "out_features": 5})
        Linear(in_features=3, out_features=5, bias=True)
    """
    if not isinstance(config, Mapping) or "target" not in config:
        return instantiate_from_config(config)  # raises the error
    taken, _ = parameters_of(get_obj_from_str(config["target"]))
    stated = config.get("params") or {}
    derived = {name: size for name, size in sizes.items() if name in taken}
    for name, size in derived.items():
        if name in stated and stated[name] != size:
            raise ValueError(
                f"{config['target']}: {name} is {stated[name]}, but the model around it has "
                f"{size}; leave {name} out, or state {size}"
            )
    return instantiate_from_config(config, **derived)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside a file to save to; rename it to the file at the end.

    An error or a kill leaves the earlier file as it was, never half of the new one.

    Args:
        path: The file; missing folders are created.

    Raises:
        WriteError: The file cannot be saved; names it and the free space.

    Example:
        >>> with replacing("numbers.json") as part:  # doctest: +SKIP
        ...     part.write_text("[1, 2]")
    """
    path = Path(path)
    # Processes do not share it; those of two machines may have one number.
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, RuntimeError) as error:  # the latter is torch's on a full disk
        there = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(there).free
        reason = "" if "enforce fail" in str(error) else f" ({error})"  # torch's line of its source
        raise WriteError(f"{path} cannot be saved, {free} bytes are free there{reason}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def at_least(least: int, **numbers: int | None) -> None:
    """Refuse options that are too small; None is not given.

    Raises:
        ValueError: Names the first.
    """
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def cores() -> int:
    """Return the number of cores that this process may use; a job scheduler may limit them."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_array(path: str | os.PathLike[str]) -> Any:
    """Load the array of an ``.npy`` file, never objects, which could run code.

    Returns:
        The array, of any shape and dtype of numbers.

    Raises:
        ValueError: The file is missing or damaged, has more or fewer bytes than its header states,
            or holds objects or several arrays.
    """
    import numpy as np  # takes a while, which the command line's --help does not need

    try:
        array = np.load(path, mmap_mode="r")  # allocates nothing for what the header states
        if not isinstance(array, np.memmap) or array.dtype.kind not in "biuf":
            raise ValueError("it holds no array of numbers")
        if array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError("it is longer than its header states")
        return np.array(array)
    except Exception as error:  # damaged bytes may raise anything in the reader
        raise ValueError(f"cannot be read as a NumPy array: {error}") from error


def usable_device(device: Any) -> Any:
    """Return the ``torch.device`` of a name.

    Raises:
        ValueError: The device is not available on this machine.
    """
    import torch  # takes seconds, which the command line's --help does not need

    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        why = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {why}") from error


class KeyNotFoundError(KeyError):
    """A path-style lookup met a missing key."""


def retrieve(container: Any, key: str, splitval: str = "/", default: Any = None) -> Any:
    """Look up a nested value by a path such as ``model/params/ch``.

    Args:
        container: Nested mappings and sequences.
        key: Keys or positions joined by ``splitval``.
        splitval: Separator of the keys.
        default: Value for a missing key; None raises instead.

    Returns:
        The value found.

    Raises:
        KeyNotFoundError: A part of the path is missing and ``default`` is None.
    """
    value = container
    for part in key.split(splitval):
        try:
            value = value[part] if isinstance(value, Mapping) else value[int(part)]
        except (KeyError, IndexError, TypeError, ValueError):
            if default is not None:
                return default
            raise KeyNotFoundError(f"{part!r} of {key!r} not found") from None
    return value


class DataError(ValueError):
    """A file of a data set cannot be used; the message names it."""


class IncompleteError(DataError):
    """Some inputs cannot be used; what the others give is done."""


class WriteError(OSError):
    """A file of a run cannot be saved; the message names it."""


class NonFiniteError(RuntimeError):
    """A latent or loss is not finite; training stops and the last good checkpoint is kept."""
