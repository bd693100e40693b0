"""What a training shows: the parts of the model, and a bar with the few numbers that matter."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, TQDMProgressBar
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from torch import Tensor

logger = logging.getLogger(__name__)

STEPS = 50  # over which images are counted
SHOWN = ("val/mean_length", "val/usage")  # beside what a model sends to the bar itself


class Progress(TQDMProgressBar):
    """Lightning's bar of one line, whatever else is installed, with lengths, usage and speed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._images = 0
        self._times: deque[tuple[float, int]] = deque(maxlen=STEPS)  # with the images before them

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the images of the batch."""
        self._images += size_of(batch) * trainer.world_size
        self._times.append((time.monotonic(), self._images))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count anew after it, so that its time does not count."""
        self._times.clear()
        super().on_validation_start(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the line of each bar, which is not drawn again below what is said of the error."""
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:
                bar.leave = True
                bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the bar shows, by name."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the run's folder is its name
        known = trainer.callback_metrics
        metrics |= {name: round(float(known[name]), 3) for name in SHOWN if name in known}
        if speed := self.images_per_second:
            metrics["images/s"] = f"{speed:.3g}"
        return metrics

    @property
    def images_per_second(self) -> float:
        """Images of all processes per second over the last steps; 0 before the second."""
        if len(self._times) < 2:
            return 0.0
        (first, before), (last, after) = self._times[0], self._times[-1]
        return (after - before) / max(last - first, 1e-9)


class Summary(ModelSummary):
    """Lightning's table of a model's parts, without operations, which it does not count here."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        *_: Any,
        **__: Any,
    ) -> None:
        """Log the parts, and the numbers of parameters of all and of those that train."""
        columns = dict(summary_data)
        for part in zip(columns["Name"], columns["Type"], columns["Params"], strict=True):
            logger.info("  %-16s %-24s %8s", *part)
        numbers = map(get_human_readable_count, (total_parameters, trainable_parameters))
        logger.info("%s parameters, of which %s train", *map(str.strip, numbers))


def size_of(batch: Any) -> int:
    """Return the number of images in a batch, by its first tensor; 0 without one.

    Example:
        >>> import torch
        >>> size_of({"path": ["a", "b"], "image": torch.zeros(2, 8, 8, 3)})
        2
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch
    parts = [batch] if isinstance(batch, Tensor) else parts
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), 0)
