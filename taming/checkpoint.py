"""Reading checkpoints: safely, into modules that fit, and freezing what was read."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


class CallbackKey:
    """Stands for a callback class of Lightning 1, which used classes as keys of their state."""


# Lightning 1 pickled these by name. None of them runs code here, whatever is installed.
HARMLESS = [
    (CallbackKey, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (CallbackKey, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]


def load_checkpoint(path: str | os.PathLike[str], trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: File written by ``torch.save`` or Lightning (versions 1 and 2).
        trust: Also rebuild objects of any class; such a file can run any code when it is read.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no checkpoint, or needs ``trust``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # damaged bytes fail in the reader in any way whatever
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise ValueError(
                f"{path} holds an object of the class {unsafe[1]}, which may run code when read; "
                "if you know where the file comes from, load it with trust=True"
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint; it may be damaged or only partly downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dict of weights")
    return checkpoint


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    ignore_keys: Sequence[str] = (),
    trust: bool = False,
) -> None:
    """Load a module's parameters and buffers from a checkpoint.

    Keys that the module does not know are logged. Missing weights of a loss (keys under ``loss.``)
    are logged too and keep their values; any other missing key is an error.

    Args:
        module: What to load into.
        path: A Lightning checkpoint (with ``state_dict``) or a bare state dict.
        ignore_keys: Prefixes of keys to leave out; these weights keep their values.
        trust: See `load_checkpoint`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, a shape differs, a key is missing or none matches.
    """
    if isinstance(ignore_keys, str):
        raise ValueError(f"ignore_keys must be a list of prefixes, got the string {ignore_keys!r}")
    name, prefixes = type(module).__name__, tuple(ignore_keys)
    checkpoint = load_checkpoint(path, trust)
    weights = checkpoint.get("state_dict", checkpoint)
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
    if absent := [key for key in missing if not key.startswith("loss.")]:
        raise ValueError(
            f"{path} lacks weights of {name}: {', '.join(absent)}; list prefixes in ignore_keys "
            "to leave them as they are"
        )
    if missing:
        logger.warning("%s lacks weights of the loss, left as they are: %s", path, missing)
    # A tokenizer that is only used has no loss; naming all its weights would bury the rest.
    if unknown := [key for key in unexpected if not key.startswith("loss.")]:
        logger.warning("%s holds weights that %s does not have: %s", path, name, unknown)
    if of_loss := len(unexpected) - len(unknown):
        logger.info("%s holds %d weights of a loss that %s does not have", path, of_loss, name)
    logger.info("loaded %s from %s", name, path)


def stay_in_eval(module: M, mode: bool = True) -> M:
    """Do nothing, in place of the ``train`` of a frozen module."""
    return module


def freeze(module: M) -> M:
    """Fix a module for good: no gradients, and evaluation mode even when a parent trains.

    Args:
        module: Changed in place.

    Returns:
        The module.
    """
    module.eval().requires_grad_(False)
    # A partial of a module-level function survives copying and pickling, unlike a closure.
    module.train = partial(stay_in_eval, module)
    return module
