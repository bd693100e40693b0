"""Checkpoints of a run: when they are saved, how they are written, and the state to resume from."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException

from taming.checkpoint import load_checkpoint
from taming.data.loader import EPOCH, TRAINING, VALIDATION, seed_generators
from taming.run.position import settle
from taming.run.signals import Interrupted, Request, watch
from taming.util import NonFiniteError, WriteError, replacing

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
        with replacing(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | os.PathLike[str], *_: Any, **__: Any) -> dict[str, Any]:
        """Load a checkpoint of Lightning 1 or 2 onto the CPU.

        The states of Lightning 1's callbacks and of a Timer are dropped, and the counters are set
        to a place from which training continues; see `settle`.

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
        settle(checkpoint.get("loops", {}).get("fit_loop", {}))
        return checkpoint


class RngState(Callback):
    """Seed the random number generators for each epoch, batch and validation.

    What a model draws thus follows from (seed, epoch, batch), and is the same in a resumed run,
    which keeps the seed that it began with. Processes draw the same but while they train, where
    each has images of its own. A data module of one's own whose loaders have no state is shuffled
    alike if the run is resumed at an epoch's end.
    """

    def __init__(self) -> None:
        self.seed = torch.initial_seed()  # that seed_everything has set
        self.epoch = 0
        self._is_resuming = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the generators before the loaders begin the epoch; in a resumed run, they have."""
        self.epoch = trainer.current_epoch
        if not self._is_resuming:
            seed_generators(self.seed, EPOCH, self.epoch, devices=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators."""
        self.epoch, self._is_resuming = trainer.current_epoch, False
        rank = [trainer.global_rank] if trainer.global_rank else []
        seed_generators(self.seed, TRAINING, self.epoch, batch_idx, *rank, devices=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the generators."""
        if trainer.state.fn == TrainerFn.FITTING:
            batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            key = trainer.current_epoch, batches.processed
            seed_generators(self.seed, VALIDATION, *key, devices=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the epoch."""
        self.epoch = trainer.current_epoch + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, and the epoch that is to begin or has begun."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the run that is resumed, before its loaders begin.

        Runs of earlier versions saved the generators' states instead.
        """
        self.seed = state_dict.get("seed", self.seed)
        self.epoch = state_dict.get("epoch", 0)
        self._is_resuming = True
        seed_generators(self.seed, EPOCH, self.epoch, devices=True)


class LastCheckpoint(Checkpoint):
    """Save ``last.ckpt``, from which a run is resumed.

    It is saved at the end of every epoch, every so many steps, after a batch in which any process
    received a signal (see `taming.run.signals`), and when training is interrupted: always between
    two batches, once the gradients that are accumulated have been used. A `NonFiniteError` or a
    `WriteError` leaves it as it is. Any other error within a batch, or in one of several processes,
    or the death of one, does so too, and the processes that are left save ``interrupted.ckpt``
    beside it, unless each has only a share of the state.

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
        self._saved_step = self._first_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the path of the first process; those of other nodes have folders of their own."""
        self.path = trainer.strategy.broadcast(self.path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look out for signals after every batch from here on."""
        watch.is_polled = True
        self._saved_step = self._first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the earlier epoch, its validation and all that ends with it."""
        request = _agree_on_request(trainer)
        if trainer.global_step > self._first_step:
            self._save(trainer)
        watch.end(request)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Save after the batch before, whose values Lightning has only now logged."""
        self._obey(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the batch before the validation."""
        if not trainer.sanity_checking:
            self._obey(trainer)

    def _obey(self, trainer: Trainer) -> None:
        """Save if it is due or a signal asks for it, and end training if the signal does."""
        request = _agree_on_request(trainer)
        if not self._has_started or _is_accumulating(trainer):
            return  # a signal waits, too
        if request or trainer.global_step - self._saved_step >= self.every_n_train_steps:
            self._save(trainer)
        watch.end(request)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that there is something to save; what fails in the first batch changed nothing."""
        self._has_started = True

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
            self._save(trainer)
        else:
            trainer.state.status = TrainerStatus.INTERRUPTED  # callbacks must not gather any more
            self._save_alone(trainer, Interrupted(request))
        watch.end(request)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the last epoch, and end the program if a signal asks for it."""
        self._save(trainer)
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
        by_user = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        is_wanted = is_alone or by_user or watch.request.ends
        path = self.path
        # A resumed run would repeat a batch that has begun. The error may be the consequence of a
        # value that is not finite on another process.
        if not is_wanted or (path.exists() and _is_within_batch(trainer)):
            path = self.path.with_name("interrupted.ckpt")
        elif not trainer.is_global_zero:
            return
        try:
            if is_alone:
                self._save(trainer, path)
            else:  # Trainer.save_checkpoint would wait at a barrier for the other processes
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
            logger.warning("%s: saved %s", type(exception).__name__, path)
        except WriteError as error:  # must not hide the reason why training stopped
            logger.warning("%s: %s", type(exception).__name__, error)

    def _save(self, trainer: Trainer, path: Path | None = None) -> None:
        self._saved_step = trainer.global_step
        for destination in trainer.loggers:  # a resumed run does not log this again
            destination.save()
        trainer.save_checkpoint(path or self.path, weights_only=False)
        watch.saved()


def _agree_on_request(trainer: Trainer) -> Request:
    """Return the most urgent request that any process received; all must ask."""
    if trainer.world_size == 1:
        return watch.request
    urgency = torch.tensor(watch.request.value, device=trainer.strategy.root_device)
    return Request(int(trainer.strategy.reduce(urgency, reduce_op="max")))


def _is_accumulating(trainer: Trainer) -> bool:
    """Return True if gradients of the last batches wait for an optimizer step; none are saved."""
    model, batches = trainer.lightning_module, trainer.fit_loop.epoch_loop.batch_progress
    current: Any = batches.current
    owner = trainer if model.automatic_optimization else model
    every = getattr(owner, "accumulate_grad_batches", 1)
    return current.processed % every != 0 and not batches.is_last_batch


def _is_within_batch(trainer: Trainer) -> bool:
    """Return True if a batch has begun to change the model and is not done."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.started > batches.processed or _is_accumulating(trainer)
