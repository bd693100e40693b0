"""What makes a run resumable: ``last.ckpt``, and random states inside every checkpoint."""

from __future__ import annotations

import logging
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from taming.util import NonFiniteError, WriteError

logger = logging.getLogger(__name__)


class RngState(Callback):
    """Keeps the states of the random number generators in every checkpoint.

    A run that was interrupted at the end of an epoch then goes on with the same batches and noise
    as if it had not been. All processes are seeded alike, so the first one's states serve all.
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
        """Put the generators back, before the first batches of the resumed run are drawn."""
        torch.set_rng_state(state_dict["torch"])
        if state_dict["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state_dict["cuda"])
        name, keys, *rest = state_dict["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        version, state, gauss = state_dict["python"]
        random.setstate((version, tuple(state), gauss))


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt``, the one to resume from.

    It is written at the end of every epoch, every so many steps, when the process receives SIGUSR1
    (at the end of that batch), and when training is interrupted. After a
    :class:`~taming.util.NonFiniteError`, or where nothing can be written, it is left alone; after
    another error of one of several processes too, and ``interrupted.ckpt`` is written beside it.
    SIGUSR2 opens a debugger.

    Args:
        ckptdir: Folder to write to.
        every_n_train_steps: Steps between checkpoints within an epoch.
    """

    def __init__(self, ckptdir: str | Path, every_n_train_steps: int = 2000) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        self.path = Path(ckptdir) / "last.ckpt"
        self.every_n_train_steps = every_n_train_steps
        self._has_started = False
        self._requested = False
        self._saved_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write where the first process does: that of another node chose a folder of its own."""
        self.path = trainer.strategy.broadcast(self.path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals, unless somebody (SLURM's requeueing) already does."""
        self._has_started = True
        self._saved_step = trainer.global_step
        handlers = {"SIGUSR1": self._request, "SIGUSR2": lambda *_: breakpoint()}
        for name, handler in handlers.items():
            number = signal.Signals.__members__.get(name)  # Windows has neither
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, handler)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save when it is due; all processes agree, for saving waits for all of them."""
        requested = trainer.strategy.reduce_boolean_decision(self._requested, all=False)
        due = trainer.global_step - self._saved_step >= self.every_n_train_steps
        if requested or due:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save once the epoch and its validation are over."""
        self._save(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save what was reached, without waiting for processes that may be gone."""
        if not self._has_started or isinstance(exception, NonFiniteError | WriteError):
            return
        if trainer.validating:
            _begin_validation_anew(trainer)
        path = self.path
        try:
            if trainer.world_size == 1:
                self._save(trainer)
            elif isinstance(trainer.strategy, DDPStrategy) and trainer.is_global_zero:
                # Trainer.save_checkpoint would wait at a barrier for the other processes.
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                if not isinstance(exception, KeyboardInterrupt | SIGTERMException):
                    # It may only be the echo of a value that is not finite elsewhere.
                    path = self.path.with_name("interrupted.ckpt")
                trainer.strategy.save_checkpoint(checkpoint, path)
            else:
                return
        except WriteError as error:  # must not hide what stopped the training
            logger.warning("%s: %s", type(exception).__name__, error)
        else:
            logger.warning("%s: %s was saved", type(exception).__name__, path)

    def _request(self, *_: Any) -> None:
        self._requested = True

    def _save(self, trainer: pl.Trainer) -> None:
        self._requested = False
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)


def _begin_validation_anew(trainer: pl.Trainer) -> None:
    """Have the resumed run do the whole validation again.

    Lightning would go on after the last batch, and rank the checkpoint by what was left; between
    two batches it would leave the validation out.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()  # within the first batch
