"""Averages of a model's weights, which are validated, saved and shared in their place."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from taming.run.rundir import PreparationError

logger = logging.getLogger(__name__)


class MovingAverages(WeightAveraging):
    """Keep an exponential moving average of all parameters (Polyak and Juditsky 1992).

    Validation, its pictures and its metrics use the averages. A checkpoint holds them as its
    ``state_dict``, which is what everything but a resume reads, and the weights that train as
    ``current_model_state``; a resumed run continues with both, bit for bit. Once training has
    ended, the model has the averages.

    Buffers are not averaged but those of the model at the last average: statistics of a quantizer
    (its counts, threshold and maps) and of a batch norm are running means already, and an average
    of step numbers or of a permutation has no meaning. Codes are parameters and are averaged with
    the encoder that they quantize, however they are learned.

    Args:
        decay: Weight of the old averages in [0, 1).
        every_n_steps: Steps of the generator between two averages.
        device: Device of the averages; None for that of the model.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self, decay: float = 0.999, every_n_steps: int = 1, device: str | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        # By lerp, which leaves what does not change (a frozen tokenizer) as it is, to the bit.
        average = get_ema_multi_avg_fn(decay)
        super().__init__(device=device, use_buffers=False, multi_avg_fn=average)
        self.every_n_steps, self.device = every_n_steps, device
        self._is_validating = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Average after every so many steps, from the first on."""
        return step_idx is not None and step_idx % self.every_n_steps == 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the averages to their device, to which the model has only now been moved.

        Checkpoints of weights alone are refused: Lightning saves them without asking callbacks.

        Raises:
            PreparationError: A checkpoint callback would save the weights that train.
        """
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise PreparationError(
                    "save_weights_only leaves the averages out of a checkpoint: set it to false, "
                    "the averages are then what the checkpoint's state_dict holds"
                )
        assert self._average_model is not None
        self._average_model.to(self.device or pl_module.device)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the model."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._is_validating = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights that train back into the model."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._is_validating = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights that train for the last checkpoint, which follows."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the model for good."""
        self._copy_average_to_current(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averages as the model, and the weights that train beside them."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._is_validating:  # a signal or an error met the validation: they are exchanged
            names = ("state_dict", "current_model_state")
            checkpoint.update(zip(names, [checkpoint[name] for name in names[::-1]], strict=True))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up both; of a checkpoint without averages, its weights are the first ones."""
        if self._average_model is None:  # to test a model, its averages are all that is needed
            return
        if "current_model_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        else:
            logger.info("the checkpoint has no averages: they begin with its weights")
            self._average_model.module.load_state_dict(checkpoint["state_dict"])
