"""Helpers for all parts: objects from target paths, signatures, downloads, lookups."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import logging
import os
import pkgutil
import shutil
import signal
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


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
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(names)}" if 0 < len(names) <= 12 else ""


# Packages that only an extra of this one brings, by the name of their module.
EXTRAS = {
    **dict.fromkeys(("lightning", "matplotlib", "pyarrow", "skimage"), "train"),
    **dict.fromkeys(("tensorboard", "torchmetrics", "torchvision"), "train"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "datasets": "data",
    **dict.fromkeys(("fastapi", "gradio", "uvicorn"), "demo"),
    "huggingface_hub": "hub",
    "ray": "ray",
    "torch_fidelity": "eval",
    "vector_quantize_pytorch": "zoo",
    "wandb": "wandb",
}


@contextmanager
def naming_extras() -> Iterator[None]:
    """Name the extra that brings a package which an import inside lacks.

    Raises:
        ValueError: The package is not installed; the message holds the pip command.

    Example:
        >>> with naming_extras():  # doctest: +SKIP
        ...     import gradio
        ValueError: gradio is not installed: pip install 'loopy-taming[demo]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if remedy := _remedy(error.name or ""):
            raise ValueError(remedy) from error
        raise


def _remedy(module: str) -> str:
    """Return the message for a missing module of an extra; it is empty for any other."""
    package = module.partition(".")[0]
    if package not in EXTRAS:
        return ""
    return f"{package} is not installed: pip install 'loopy-taming[{EXTRAS[package]}]'"


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
        return importlib.import_module(name)
    except SyntaxError as error:
        where = f"{error.filename}:{error.lineno}"
        raise ValueError(f"{where} is not valid Python: {error.msg}") from error
    except ModuleNotFoundError as error:
        missing = error.name or name
        parent, _, leaf = missing.rpartition(".")
        if remedy := _remedy(missing):
            message = remedy
        elif not f"{name}.".startswith(f"{missing}."):
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
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # processes do not share it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, RuntimeError) as error:  # the latter is torch's on a full disk
        there = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(there).free
        raise WriteError(
            f"{path} cannot be saved, {free} bytes are free there ({error})"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


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


def md5_hash(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal MD5 digest of a file."""
    return file_hash(path, "md5")


def file_hash(path: str | os.PathLike[str], name: str) -> str:
    """Return the hexadecimal digest of a file by the algorithm of a name, such as sha256."""
    digest = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, local_path: str | os.PathLike[str], chunk_size: int = 1 << 16) -> None:
    """Download a file with a progress bar; the target appears only once it is complete.

    Args:
        url: Source address (``https:``, ``file:``, ...).
        local_path: Target file; missing folders are created.
        chunk_size: Bytes per read.

    Raises:
        ConnectionError: The address cannot be reached; the message names both address and target,
            for a download by hand.
    """
    target = Path(local_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Saved beside the target and renamed, so that parallel processes never see a partial file.
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
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"cannot download {url} ({error}); without a network connection, download it elsewhere "
            f"and copy it to {target}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


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


def load_network(hub: str, entry: str, **options: Any) -> Any:
    """Load a network, or the preprocessing of its input, from a torch hub repository.

    Args:
        hub: ``owner/name`` on GitHub, or a folder that holds such a repository.
        entry: Name of a function in its ``hubconf.py``.
        **options: Arguments of that function.

    Raises:
        ConnectionError: The repository, or weights that it downloads, cannot be reached.
        ValueError: The folder is not a torch hub repository, or a package that it needs is missing.
    """
    import torch  # takes seconds, which the command line's --help does not need

    is_local = Path(hub).is_dir()
    if is_local and not Path(hub, "hubconf.py").is_file():
        raise ValueError(f"{hub} has no hubconf.py, so it is not a torch hub repository")
    source = "local" if is_local else "github"
    trusted: Any = True  # the user named it; torch declares str alone
    try:
        return torch.hub.load(hub, entry, source=source, trust_repo=trusted, **options)
    except ImportError as error:
        raise ValueError(f"the network {entry} of {hub} needs another package: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"the network {entry} of {hub} is neither a local folder nor available from torch hub "
            f"({error}); without a network connection, download https://github.com/{hub} elsewhere "
            "and name its folder with --hub"
        ) from error


# Name -> address, file name and MD5 digest of published weights.
PUBLISHED = {
    "vgg_lpips": (
        "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1",
        "vgg.pth",
        "d507d7349b931f0638a25a48a722f98a",
    )
}


def get_ckpt_path(name: str, root: str | os.PathLike[str], check: bool = False) -> str:
    """Return the path of published weights in a folder, downloaded first if they are missing.

    Args:
        name: A key of `PUBLISHED`; ``"vgg_lpips"`` names the linear heads of LPIPS.
        root: Folder of the weights.
        check: Download again if an existing file has another MD5 digest.

    Raises:
        ConnectionError: The weights are missing and cannot be downloaded.
        ValueError: The name is unknown, or the download has another MD5 digest.
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


def refuse_text(name: str, values: Any) -> None:
    """Refuse a text where a list is meant: its letters would be taken for the items.

    Args:
        name: Name of the parameter, for the error.
        values: Its value.

    Raises:
        ValueError: The value is a text, bytes or a path.
    """
    if isinstance(values, (str, bytes, os.PathLike)):
        raise ValueError(f"{name} must be a list, got the text {values!r}: use [{values!r}]")


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


class WriteError(OSError):
    """A file of a run cannot be saved; the message names it."""


class NonFiniteError(RuntimeError):
    """A latent or loss is not finite; training stops and the last good checkpoint is kept."""


def outlive_signals(worker: int) -> None:
    """Let a loader process serve on after a signal to a whole group of processes.

    Its parent ends after the batch, and then ends it, or goes on.

    Args:
        worker: Its number, which torch passes on; not used.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
