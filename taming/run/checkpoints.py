"""Checkpoints of a run: when they are saved, how they are written, and the state to resume from."""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from taming.checkpoint import load_checkpoint
from taming.run.folder import PreparationError
from taming.run.signals import Interrupted, Request, watch
from taming.util import NonFiniteError, WriteError, nearest

logger = logging.getLogger(__name__)


class SafeCheckpointIO(TorchCheckpointIO):
    """Save checkpoints of a Trainer, and load the one that it resumes from.

    Args:
        trust_checkpoint: Also load objects of any class, which can run arbitrary code.
    """

    def __init__(self, trust_checkpoint: bool = False) -> None:
        super().__init__()
        self.trust_checkpoint = trust_checkpoint

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save to a file beside the target, then rename it.

        A full disk or a kill thus leaves the earlier file, unlike with Lightning's copy from the
        system's temporary folder. Addresses such as ``s3://...`` are left to Lightning.

        Raises:
            WriteError: The file cannot be saved; names it and the free space.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, str(path), storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may save the same file when one of them has died.
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            torch.save(checkpoint, part)
            part.replace(path)
        except (OSError, RuntimeError) as error:  # the latter is torch's on a full disk
            free = shutil.disk_usage(path.parent).free
            raise WriteError(
                f"the checkpoint {path} cannot be saved, {free} bytes are free there ({error})"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | os.PathLike[str], *_: Any, **__: Any) -> dict[str, Any]:
        """Load a checkpoint of Lightning 1 or 2 onto the CPU.

        The states of Lightning 1's callbacks and of a Timer are dropped.

        Raises:
            ValueError: The file holds only weights, or cannot be loaded.
        """
        checkpoint = load_checkpoint(path, self.trust_checkpoint)
        if not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise ValueError(
                f"{path} holds weights but no state of a training to resume; to start from these "
                "weights, name the file in model.params.ckpt_path"
            )
        # Lightning 1 used classes as keys. A Timer starts anew: max_time counts for each job.
        states = checkpoint.get("callbacks") or {}
        checkpoint["callbacks"] = {
            key: state for key, state in states.items() if isinstance(key, str) and key != "Timer"
        }
        return checkpoint


class RngState(Callback):
    """Save the states of the random number generators in every checkpoint.

    A run that was interrupted at the end of an epoch then continues with the same batches and noise
    as an uninterrupted one. All processes have the same seed, so the first one's states suffice.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the states in types that ``torch.load(weights_only=True)`` accepts."""
        name, keys, *rest = np.random.get_state(legacy=True)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "numpy": (name, [int(key) for key in keys], *rest),
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generators, before the first batches of the resumed run are sampled."""
        torch.set_rng_state(state_dict["torch"])
        if state_dict["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state_dict["cuda"])
        name, keys, *rest = state_dict["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        version, state, gauss = state_dict["python"]
        random.setstate((version, tuple(state), gauss))


class LastCheckpoint(Checkpoint):
    """Save ``last.ckpt``, from which a run is resumed.

    It is saved at the end of every epoch, every so many steps, at the end of a batch in which any
    process received a signal (see `taming.run.signals`), and when training is interrupted. A
    `NonFiniteError` or a `WriteError` leaves it as it is. Any other error in one of several
    processes, or the death of one, does so too, and the processes that are left save
    ``interrupted.ckpt`` beside it, unless each has only a share of the state.

    Args:
        ckptdir: Folder of the file.
        every_n_train_steps: Steps between checkpoints within an epoch.

    Raises:
        ValueError: ``every_n_train_steps`` is below 1.
    """

    def __init__(self, ckptdir: str | Path, every_n_train_steps: int = 2000) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        self.path = Path(ckptdir) / "last.ckpt"
        self.every_n_train_steps = every_n_train_steps
        self._has_started = False
        self._saved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the path of the first process; those of other nodes have folders of their own."""
        self.path = trainer.strategy.broadcast(self.path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look out for signals after every batch from here on."""
        self._has_started = watch.is_polled = True
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is due or a signal asks for it, and end training if the signal does."""
        request = _agree_on_request(trainer)
        if request or trainer.global_step - self._saved_step >= self.every_n_train_steps:
            self._save(trainer)
        watch.end(request)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and end training if a signal asks for it; the validation is then done again."""
        # Processes that validate on streams may have different numbers of batches: each ends alone.
        is_even = all(map(math.isfinite, trainer.num_val_batches))
        request = _agree_on_request(trainer) if is_even else watch.request
        if not self._has_started or not request.ends:
            return
        if is_even:
            _restart_validation(trainer)
            self._save(trainer)
        else:
            self._save_alone(trainer, Interrupted(request))
        watch.end(request)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the epoch and its validation, and end training if a signal asks for it."""
        request = _agree_on_request(trainer)
        self._save(trainer)
        watch.end(request)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the program at once if a signal asks for it from here on."""
        self._has_started = watch.is_polled = False
        watch.end(watch.request)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the current state, without waiting for processes that may have died."""
        watch.is_polled = False
        if not self._has_started or isinstance(exception, Interrupted):
            return
        if not isinstance(exception, NonFiniteError | WriteError):
            if trainer.world_size > 1:
                watch.find_death()
            self._save_alone(trainer, exception)

    def _save_alone(self, trainer: Trainer, exception: BaseException) -> None:
        """Save without the other processes, unless a share of the state is in each of them."""
        is_alone = trainer.world_size == 1
        if not is_alone and not isinstance(trainer.strategy, DDPStrategy):
            return
        if trainer.validating:
            _restart_validation(trainer)
        path = self.path
        is_wanted = watch.request.ends or isinstance(
            exception, KeyboardInterrupt | SIGTERMException
        )
        if not is_alone and not is_wanted:
            # It may be the consequence of a value that is not finite on another process.
            path = self.path.with_name("interrupted.ckpt")
        elif not trainer.is_global_zero:
            return
        try:
            if is_alone:
                self._save(trainer)
            else:  # Trainer.save_checkpoint would wait at a barrier for the other processes
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
            logger.warning("%s: saved %s", type(exception).__name__, path)
        except WriteError as error:  # must not hide the reason why training stopped
            logger.warning("%s: %s", type(exception).__name__, error)

    def _save(self, trainer: Trainer) -> None:
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)
        watch.saved()


def _agree_on_request(trainer: Trainer) -> Request:
    """Return the most urgent request that any process received; all must ask."""
    if trainer.world_size == 1:
        return watch.request
    urgency = torch.tensor(watch.request.value, device=trainer.strategy.root_device)
    return Request(int(trainer.strategy.reduce(urgency, reduce_op="max")))


def _restart_validation(trainer: Trainer) -> None:
    """Make the resumed run repeat the whole validation.

    Lightning would continue after the last batch, and rank the checkpoint by the remaining ones;
    between two batches it would skip the validation.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()  # within the first batch


class MonitorCheck(Callback):
    """Stop a run whose best checkpoints depend on a metric that validation does not log.

    Without validation, it only warns.

    Args:
        monitor: Name of the metric. Metrics of the training are not checked.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn on the first process if there is no validation."""
        needs_it = self.monitor is not None and self.monitor.startswith("val/")
        if needs_it and not trainer.enable_validation and trainer.is_global_zero:
            message = "no validation and so no %s: only last.ckpt is kept, not the best checkpoints"
            logger.warning(message, self.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that a validation, such as the sanity check, logged the metric.

        Raises:
            PreparationError: It did not.
        """
        name, logged = self.monitor, list(trainer.callback_metrics)
        if name is None or name.startswith("train/") or name in (*logged, "step", "epoch"):
            return
        raise PreparationError(
            f"validation does not log the monitor {name!r}{nearest(name, logged)}"
        )
