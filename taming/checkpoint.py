"""Load checkpoints without running code from them, and freeze modules.

Nothing here needs Lightning, so that a trained model can be used without it.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


class CallbackKey:
    """Stand-in for the callback classes that Lightning 1 used as keys of callback states."""


# Lightning 1 pickled these classes by name. Unpickling these stand-ins runs no code.
HARMLESS = [
    (CallbackKey, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (CallbackKey, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]


def load_checkpoint(
    path: str | os.PathLike[str], trust_checkpoint: bool = False, lazy: bool = False
) -> dict[str, Any]:
    """Load a checkpoint onto the CPU.

    The file is read whole once, to compare it with its checksums. Files saved by torch before 1.6,
    or with ``torch.serialization.set_crc32_options(False)``, have none.

    Args:
        path: File saved by ``torch.save`` or Lightning (versions 1 and 2), or ``.safetensors``.
        trust_checkpoint: Also load objects of any class; such a file can run arbitrary code while
            it is loaded.
        lazy: Map a file of torch into memory, so that unused tensors, such as those of optimizers,
            take no memory. The file must not change meanwhile.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, is not a checkpoint, or needs ``trust_checkpoint``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # takes a while, and few need it

            return load_file(path)
        with open(path, "rb") as file:
            start = file.read(4)
        is_zip = start == b"PK\x03\x04"  # torch before 1.6 wrote none
        if is_zip:
            _check_records(path)
        with torch.serialization.safe_globals(HARMLESS):
            checkpoint = torch.load(
                path,
                map_location="cpu",
                weights_only=not trust_checkpoint,
                mmap=lazy and is_zip,
            )
    except Exception as error:  # damaged bytes may raise anything in the reader
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise ValueError(
                f"{path} holds an object of the class {unsafe[1]}, which may run code when loaded; "
                "if you trust the source of the file, set trust_checkpoint: true beside "
                "ckpt_path, or resume with --trust_checkpoint"
            ) from error
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"
        if isinstance(error, pickle.UnpicklingError):  # which advises to run what is in the file
            reason = f"it begins with {start!r}, unlike a file of torch.save"
        raise ValueError(
            f"{path} cannot be read as a checkpoint; it is damaged, incompletely downloaded or of "
            f"another kind: fetch it again, or use another checkpoint of its run ({reason})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dict of weights")
    return checkpoint


def _check_records(path: str | os.PathLike[str]) -> None:
    """Compare every record of a zip file with its CRC-32, which torch never does.

    Raises:
        zipfile.BadZipFile: A record differs; names it.
    """
    with zipfile.ZipFile(path) as archive, ThreadPoolExecutor() as pool:
        records = archive.infolist()
        if any(record.CRC for record in records):  # all are 0 if torch was told to compute none
            for _ in pool.map(partial(_check_record, archive), records):  # zlib frees the GIL
                pass


def _check_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    if record.external_attr & 0x10 and not record.is_dir():  # torch would read nothing, silently
        raise zipfile.BadZipFile(f"{record.filename} is marked as a folder")
    with archive.open(record) as opened:
        left = record.file_size
        while block := opened.read(1 << 20):  # the last one raises if the CRC-32 differs
            left -= len(block)
    if left:
        raise zipfile.BadZipFile(f"{record.filename} lacks {left} bytes")


# Where programs put a model's weights in a file, the first of them that is there; and what
# DataParallel, DDP and torch.compile put into the names of the modules that they wrap.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "ema")
_WRAPPERS = {"module", "_orig_mod"}
# Parts that no model was ever meant to take up from random weights.
_ESSENTIAL = {"encoder", "decoder", "quant_conv", "post_quant_conv", "transformer", "pixelcnn"}


def weights_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict of a checkpoint, which may hold it beside other things."""
    inner = next((checkpoint[k] for k in _WEIGHTS if isinstance(checkpoint.get(k), Mapping)), None)
    return checkpoint if inner is None else weights_of(inner)


def unwrapped(key: str) -> str:
    """Return the key of a weight without what wrappers of modules put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _as_named_by(module: nn.Module, weights: Mapping[str, Any], path: Any) -> dict[str, Any]:
    """Return weights under the keys of a module, wherever it or theirs was wrapped."""
    own = {unwrapped(key): key for key in module.state_dict()}
    own |= {key: key for key in module.state_dict()}
    named = {own.get(k, own.get(unwrapped(k), unwrapped(k))): v for k, v in weights.items()}
    wrapped = {part for k in weights for part in k.split(".") if part in _WRAPPERS and k not in own}
    if wrapped:
        names = " and ".join(f"{part}." for part in sorted(wrapped))
        logger.info("left %s of a wrapped model out of the keys in %s", names, path)
    return named


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    ignore_keys: Sequence[str] = (),
    trust_checkpoint: bool = False,
) -> None:
    """Load a module's parameters and buffers from a checkpoint.

    Unexpected keys are logged. Missing weights of a loss (keys with a part ``loss``) are logged too
    and keep their values; any other missing key is an error.

    Args:
        module: The module, changed in place.
        path: A Lightning checkpoint (with ``state_dict``), a bare state dict, or one under a name
            such as ``model``; of a model that was wrapped by DataParallel, DDP or torch.compile,
            too.
        ignore_keys: Prefixes of keys to skip; these weights keep their values.
        trust_checkpoint: Also load objects of any class, which can run arbitrary code.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be read, a shape differs, a key is missing or none matches.
    """
    if isinstance(ignore_keys, str):
        raise ValueError(f"ignore_keys must be a list of prefixes, got the string {ignore_keys!r}")
    name, prefixes = type(module).__name__, tuple(ignore_keys)
    checkpoint = load_checkpoint(path, trust_checkpoint, lazy=True)
    weights = _as_named_by(module, weights_of(checkpoint), path)
    weights = {key: value for key, value in weights.items() if not key.startswith(prefixes)}
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        details = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{path} does not fit {name}: {' '.join(details)}") from error
    if len(unexpected) == len(weights):
        raise ValueError(
            f"{path} holds no weights of {name}: its keys are like {list(weights)[:3]}, "
            f"expected keys like {list(module.state_dict())[:3]}"
        )
    missing = [key for key in missing if not key.startswith(prefixes)]
    if absent := [key for key in missing if not _is_of_loss(key)]:
        # Nobody wants an encoder of random weights; a part that is new is another matter.
        essential = any(_ESSENTIAL & {*key.split(".")} for key in absent)
        remedy = f"; is it of another model? Its keys are like {list(weights)[:3]}"
        if not essential:
            remedy = "; to keep their initial values, list prefixes of them in ignore_keys"
        raise ValueError(f"{path} lacks weights of {name}: {', '.join(absent)}{remedy}")
    if missing:
        logger.warning("%s lacks weights of the loss, which stay as they were: %s", path, missing)
    _log_unexpected(path, name, unexpected)
    logger.info("loaded %s from %s", name, path)


def _log_unexpected(path: str | os.PathLike[str], name: str, keys: Sequence[str]) -> None:
    # A frozen tokenizer is built without its loss; a list of all its weights would bury the rest.
    if unknown := [key for key in keys if not _is_of_loss(key)]:
        logger.warning("%s holds weights that %s does not have: %s", path, name, unknown)
    if of_loss := len(keys) - len(unknown):
        logger.debug("%s needs no loss: left out its %d weights in %s", name, of_loss, path)


def _is_of_loss(key: str) -> bool:
    """Return True if a weight belongs to the loss of a model or of a nested model."""
    return "loss" in key.split(".")


def stay_in_eval(module: M, mode: bool = True) -> M:
    """Replace ``train`` of a frozen module: do nothing."""
    return module


def freeze(module: M) -> M:
    """Freeze a module: no gradients, and evaluation mode even when its parent trains.

    Args:
        module: Changed in place.

    Returns:
        The module.
    """
    module.eval().requires_grad_(False)
    # A partial of a module-level function survives copying and pickling, unlike a closure.
    module.train = partial(stay_in_eval, module)
    return module


def freeze_parts(parts: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Freeze parts of a model, with averages and statistics that they keep, by name.

    Args:
        parts: Name -> part, all that train.
        names: Those to freeze.

    Raises:
        ValueError: There is no part of a name, or nothing would be left to train.
    """
    if isinstance(names, str):
        raise ValueError(f"freeze must be a list of parts, got the text {names!r}: use [{names}]")
    if unknown := [name for name in names if name not in parts]:
        raise ValueError(
            f"freeze: there is no part {unknown[0]!r}; the parts are {', '.join(parts)}"
        )
    for name in names:
        freeze(parts[name])
    if not any(p.requires_grad for part in parts.values() for p in part.parameters()):
        raise ValueError(f"freeze: {', '.join(names)} leaves nothing to train")
