"""Values over an epoch in checkpoints that are saved within it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerStatus
from torchmetrics import Metric

_KEY = "epoch_values"


class EpochValues(Callback):
    """Save what is summed over an epoch, so that a resumed run logs the same values at its end.

    Lightning saves neither the sums of logged values nor the model's torchmetrics. It also counts
    the steps of logged values wrongly in some resumed runs, so that number is saved too.
    """

    def __init__(self) -> None:
        self._steps = 0  # that Lightning counts before the next batch
        self._kept: dict[str, Any] | None = None  # the values before a validation or an early end
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model's metrics."""
        for name, metric in pl_module.named_modules():
            saved = (self._loaded or {}).get("metrics", {}).get(name)
            if isinstance(metric, Metric) and saved is not None:
                for key, value in saved["states"].items():
                    moved = [
                        v.to(metric.device) for v in (value if isinstance(value, list) else [value])
                    ]
                    setattr(metric, key, moved if isinstance(value, list) else moved[0])
                metric._update_count, metric._computed = saved["updates"], None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the number of steps."""
        if self._loaded is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._loaded["steps"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the sums before the checkpoint to those of the first batch after it."""
        loop, self._kept = trainer.fit_loop.epoch_loop, None
        self._steps = loop._batches_that_stepped + (not loop._should_accumulate())
        sums = (self._loaded or {}).get("sums", {})
        self._loaded = None
        for key, result in loop._results.items():
            if saved := sums.get(key):
                result.value = saved["sum"].to(result.value) + result.value
                result.cumulated_batch_size = saved["weight"] + result.cumulated_batch_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the values without those of this validation, which a resumed run repeats."""
        if not trainer.sanity_checking:
            self._kept = self._values(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the values again."""
        self._kept = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sums of a run that was resumed after the last batch of an epoch.

        If training ends within the epoch, a resumed run continues it, so the values are kept.
        """
        loop = trainer.fit_loop.epoch_loop
        # Lightning keeps ReduceLROnPlateau from its step in a resumed run, for want of the values.
        trainer.fit_loop._restarting = False
        if not loop._num_ready_batches_reached():
            self._kept = self._collect(trainer, pl_module)
        if self._loaded is not None:
            loop._batches_that_stepped = self._loaded["steps"]
            for saved in self._loaded.get("sums", {}).values():
                pl_module.log(saved["name"], saved["sum"] / saved["weight"])
            self._loaded = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the values of all processes, or of this one if the others may have died."""
        values = [self._kept or self._values(trainer, pl_module)]
        if trainer.world_size > 1 and trainer.state.status != TrainerStatus.INTERRUPTED:
            values *= trainer.world_size
            dist.all_gather_object(values, values[0])
        checkpoint[_KEY] = values

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the values of this process."""
        values = checkpoint.get(_KEY, [])[trainer.global_rank :]
        self._loaded = values[0] if values else None
        self._steps = self._loaded["steps"] if self._loaded else 0

    def _values(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if self._loaded is not None:  # nothing has been added yet
            return self._loaded
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if epochs.processed == epochs.started:  # all is logged
            return {"steps": self._steps}
        return self._collect(trainer, pl_module)

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {
            name: {"states": _on_cpu(metric.metric_state), "updates": metric._update_count}
            for name, metric in pl_module.named_modules()
            if isinstance(metric, Metric) and metric._update_count
        }
        sums = {
            key: {
                "name": result.meta.forked_name(on_step=False),
                "sum": result.value.cpu().clone(),
                "weight": int(result.cumulated_batch_size),
            }
            for key, result in trainer.fit_loop.epoch_loop._results.items()
            if result.is_tensor and result.meta.on_epoch and result.meta.is_mean_reduction
            if result.cumulated_batch_size > 0
        }
        return {"metrics": metrics, "sums": sums, "steps": self._steps}


def _on_cpu(states: dict[str, Any]) -> dict[str, Any]:
    def copied(value: torch.Tensor) -> torch.Tensor:
        return value.detach().cpu().clone()

    return {
        key: [copied(v) for v in value] if isinstance(value, list) else copied(value)
        for key, value in states.items()
    }
