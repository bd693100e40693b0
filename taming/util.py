"""Small helpers that everything else may use: objects from target paths, downloads, lookups."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import the object that a dotted path names.

    Args:
        string: Path such as ``taming.models.vqgan.VQModel``.
        reload: Import the module anew, for interactive work.

    Returns:
        The class, function or value.

    Raises:
        ValueError: The path has no dot, its module does not import or lacks the name.
    """
    module_name, _, name = string.rpartition(".")
    if not module_name:
        raise ValueError(f"target {string!r} is no dotted path like 'package.module.Name'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"target {string!r} does not import: {error}") from error
    if reload:
        module = importlib.reload(module)
    if name not in vars(module) and "__getattr__" not in vars(module):  # main makes some lazily
        raise ValueError(f"target {string!r}: module {module_name} has no {name!r}")
    return getattr(module, name)


def instantiate_from_config(config: Mapping[str, Any], **kwargs: Any) -> Any:
    """Build the object that a ``{target: path, params: {...}}`` block describes.

    Args:
        config: Mapping with ``target`` and, optionally, ``params`` (keyword arguments).
        **kwargs: Further keyword arguments, which win over ``params``.

    Returns:
        What the target returns.

    Raises:
        ValueError: It is no such block, or its ``target`` does not import.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a block with a 'target', got {config!r}")
    if "target" not in config:
        raise ValueError(f"expected a block with a 'target', got the keys {sorted(config)}")
    return get_obj_from_str(config["target"])(**{**(config.get("params") or {}), **kwargs})


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """List the keyword parameters of a class or function.

    A constructor that takes ``**kwargs`` is followed to the next one in the MRO, whose parameters
    are then optional, for ``*args`` may carry them.

    Args:
        target: Class or function.

    Returns:
        Name -> parameter; and True if it takes any other keyword as well.
    """
    inits = [c.__init__ for c in getattr(target, "__mro__", ()) if "__init__" in vars(c)]
    python_inits = [init for init in inits if inspect.isfunction(init)]
    try:
        callables = python_inits or [target]
        signatures = [[*inspect.signature(c).parameters.values()] for c in callables]
    except (TypeError, ValueError):  # compiled code may have no signature
        return {}, True
    found: dict[str, inspect.Parameter] = {}
    for depth, parameters in enumerate(signatures):
        for parameter in parameters[bool(python_inits) :]:  # without self
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                optional = depth and parameter.default is parameter.empty
                found.setdefault(
                    parameter.name, parameter.replace(default=...) if optional else parameter
                )
        if parameters[-1:] == [] or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
            return found, False
    return found, True


def instantiate_with_sizes(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """Build a ``{target, params}`` block whose sizes follow from the model around it.

    A size that the target takes and the block does not state is filled in; a size that the block
    states must agree.

    Args:
        config: The block.
        sizes: Parameter name -> size. Names that the target does not take are ignored, so that one
            mapping may hold the names of several quantizers.

    Returns:
        What the target returns.

    Raises:
        ValueError: A stated size disagrees, or see `instantiate_from_config`.

    Example:
        >>> block = {"target": "torch.nn.Linear", "params": {"in_features": 3}}
        >>> instantiate_with_sizes(block, {"in_features": 3, "out_features": 5})
        Linear(in_features=3, out_features=5, bias=True)
    """
    if not isinstance(config, Mapping) or "target" not in config:
        return instantiate_from_config(config)  # which names the mistake
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


def md5_hash(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal MD5 digest of a file."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, local_path: str | os.PathLike[str], chunk_size: int = 1 << 16) -> None:
    """Fetch a file with a progress bar; the target appears only once it is whole.

    Args:
        url: Where to read (``https:``, ``file:``, ...).
        local_path: Where to write; missing folders are made.
        chunk_size: Bytes per read.

    Raises:
        ConnectionError: The address cannot be reached; the message names the file to fetch by hand.
    """
    target = Path(local_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed, so that parallel processes never see half a file.
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=target.name) as progress:
                while chunk := response.read(chunk_size):
                    file.write(chunk)
                    progress.update(len(chunk))
            # A connection that breaks looks like the end of the file.
            if file.tell() < total:
                raise ConnectionError(f"got {file.tell()} of {total} bytes")
        os.replace(part, target)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"cannot download {url} ({error}); without a network, fetch it elsewhere "
            f"and put it at {target}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


# Name -> address, file name and MD5 digest of weights that are published elsewhere.
PUBLISHED = {
    "vgg_lpips": (
        "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1",
        "vgg.pth",
        "d507d7349b931f0638a25a48a722f98a",
    )
}


def get_ckpt_path(name: str, root: str | os.PathLike[str], check: bool = False) -> str:
    """Return the path of published weights below a folder, downloaded and checked if need be.

    Args:
        name: A key of `PUBLISHED`: "vgg_lpips" are the linear heads of LPIPS.
        root: Folder to keep them in.
        check: Download again if a file is there that has another MD5 digest.

    Raises:
        ConnectionError: They are not there and cannot be downloaded.
        ValueError: The name is unknown, or what was downloaded is another file.
    """
    if name not in PUBLISHED:
        raise ValueError(f"published weights are {', '.join(PUBLISHED)}; got {name!r}")
    url, file_name, md5 = PUBLISHED[name]
    path = Path(root, file_name)
    if not path.is_file() or (check and md5_hash(path) != md5):
        download(url, path)
        if (found := md5_hash(path)) != md5:
            raise ValueError(f"{path} from {url} has md5 {found}, expected {md5}")
    return str(path)


class KeyNotFoundError(KeyError):
    """A path-style lookup met a key that is not there."""


def retrieve(container: Any, key: str, splitval: str = "/", default: Any = None) -> Any:
    """Look a nested value up by a path such as ``model/params/ch``.

    Args:
        container: Nested mappings and sequences.
        key: Keys or positions joined by ``splitval``.
        splitval: What separates them.
        default: Returned for a missing key; None raises instead.

    Returns:
        The value found.

    Raises:
        KeyNotFoundError: A part of the path is missing and there is no default.
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


class WriteError(OSError):
    """A file of a run cannot be written; the message names it."""


class NonFiniteError(RuntimeError):
    """A latent or loss is not finite: training stops and the last good checkpoint is kept."""
