"""Reading checkpoints: safely, into modules that fit, and freezing what was read."""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from taming.util import WriteError

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


def load_checkpoint(
    path: str | os.PathLike[str], trust_checkpoint: bool = False, lazy: bool = False
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: File written by ``torch.save`` or Lightning (versions 1 and 2).
        trust_checkpoint: Also rebuild objects of any class; such a file can run any code when it
            is read.
        lazy: Leave tensors in the file until they are used, such as those of optimizers never; the
            file must stay as it is meanwhile.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no checkpoint, or needs ``trust_checkpoint``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            checkpoint = torch.load(
                path,
                map_location="cpu",
                weights_only=not trust_checkpoint,
                mmap=lazy and zipfile.is_zipfile(path),  # files of torch before 1.6 are none
            )
    except Exception as error:  # damaged bytes fail in the reader in any way whatever
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise ValueError(
                f"{path} holds an object of the class {unsafe[1]}, which may run code when read; "
                "if you know where the file comes from, set trust_checkpoint: true beside "
                "ckpt_path, or resume with --trust_checkpoint"
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
    trust_checkpoint: bool = False,
) -> None:
    """Load a module's parameters and buffers from a checkpoint.

    Keys that the module does not know are logged. Missing weights of a loss (keys with a part
    ``loss``) are logged too and keep their values; any other missing key is an error.

    Args:
        module: What to load into.
        path: A Lightning checkpoint (with ``state_dict``) or a bare state dict.
        ignore_keys: Prefixes of keys to leave out; these weights keep their values.
        trust_checkpoint: See `load_checkpoint`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, a shape differs, a key is missing or none matches.
    """
    if isinstance(ignore_keys, str):
        raise ValueError(f"ignore_keys must be a list of prefixes, got the string {ignore_keys!r}")
    name, prefixes = type(module).__name__, tuple(ignore_keys)
    checkpoint = load_checkpoint(path, trust_checkpoint, lazy=True)
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
    if absent := [key for key in missing if not _is_of_loss(key)]:
        raise ValueError(
            f"{path} lacks weights of {name}: {', '.join(absent)}; list prefixes in ignore_keys "
            "to leave them as they are"
        )
    if missing:
        logger.warning("%s lacks weights of the loss, left as they are: %s", path, missing)
    # A tokenizer that is only used has no loss; naming all its weights would bury the rest.
    if unknown := [key for key in unexpected if not _is_of_loss(key)]:
        logger.warning("%s holds weights that %s does not have: %s", path, name, unknown)
    if of_loss := len(unexpected) - len(unknown):
        logger.info("%s holds %d weights of a loss that %s does not have", path, of_loss, name)
    logger.info("loaded %s from %s", name, path)


def _is_of_loss(key: str) -> bool:
    """Whether a weight belongs to the loss of a model, or of one inside it."""
    return "loss" in key.split(".")


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints of a Trainer, and reads the one from which it goes on.

    Args:
        trust_checkpoint: See `load_checkpoint`.
    """

    def __init__(self, trust_checkpoint: bool = False) -> None:
        super().__init__()
        self.trust_checkpoint = trust_checkpoint

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint beside an earlier one of that name, and then in its place.

        So a full disk or a kill leaves the earlier one. Lightning writes to the system's folder of
        temporary files and copies from there, which does not, where that is another disk.

        Args:
            checkpoint: What the file is to hold.
            path: The file; an address such as ``s3://...`` is left to Lightning.
            storage_options: None.

        Raises:
            WriteError: The file cannot be written; names it and the space that is left.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        try:
            torch.save(checkpoint, part)
            part.replace(path)
        except (OSError, RuntimeError) as error:  # the latter is torch's, where a disk is full
            free = shutil.disk_usage(path.parent).free
            raise WriteError(
                f"the checkpoint {path} cannot be written, {free} bytes are free there ({error})"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint of Lightning, versions 1 and 2, onto the CPU.

        Args:
            path: The file.
            map_location: Plays no part.
            weights_only: Plays no part; ``trust_checkpoint`` says what may be read.

        Returns:
            What the file holds, without the states of Lightning 1's callbacks and of a Timer.

        Raises:
            ValueError: The file holds only weights, or see `load_checkpoint`.
        """
        checkpoint = load_checkpoint(path, self.trust_checkpoint)
        if not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise ValueError(
                f"{path} holds weights but no state of a training to resume; to start from these "
                "weights, name the file in model.params.ckpt_path"
            )
        # Lightning 1 kept them under the callbacks' classes, where no callback looks today. A Timer
        # counts anew: max_time is that of one job, and the next has as much.
        states = checkpoint.get("callbacks") or {}
        checkpoint["callbacks"] = {
            key: state for key, state in states.items() if isinstance(key, str) and key != "Timer"
        }
        return checkpoint


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
