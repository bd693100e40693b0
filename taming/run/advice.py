"""What tells a user that a training goes wrong, or cannot do what was asked, and what to change."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from taming.run.rundir import PreparationError
from taming.util import nearest

logger = logging.getLogger("taming.advice")

LOOKS = 2  # in a row at which something must be wrong: a first epoch may be bad for other reasons

Numbers = Mapping[str, float]  # by name, without split and level


class Symptom(NamedTuple):
    """Something that can be wrong with a training.

    Attributes:
        split: ``train`` or ``val``, whose numbers count.
        holds: Numbers -> True if it is wrong; KeyError if one is missing.
        text: The warning, with numbers by name.
    """

    split: str
    holds: Callable[[Numbers], bool]
    text: str


SYMPTOMS = {
    "collapse": Symptom(
        "train",
        lambda it: it["usage"] < 0.05,
        "only {usage:.1%} of the codes are in use: the codebook has collapsed. Learn it by moving "
        "averages that revive codes (ema_decay: 0.99 and revive_below: 0.05 of a loopy quantizer), "
        "or lower n_embed",
    ),
    "endless": Symptom(
        "val",
        lambda it: it["never_within_threshold"] > 0.95 and it["mean_length"] > 1,
        "{never_within_threshold:.1%} of the loops run into their last turn without a code within "
        "the threshold: raise threshold or max_loops, or set a target_length in its place",
    ),
    "idle": Symptom(
        "val",
        lambda it: it["relative_threshold"] > 0 and it["mean_length"] < 1.01,
        "nearly all loops end at their first turn ({mean_length:.2f} codes of a site), so that the "
        "threshold steers nothing: lower threshold, or set a target_length above 1 in its place",
    ),
    "discriminator": Symptom(
        "val",
        lambda it: it["disc_factor"] > 0 and it["disc_loss"] < 0.05 * it["disc_factor"],
        "the discriminator recognises nearly all reconstructions (loss {disc_loss:.3f}), "
        "so that little is to be learned from it: raise disc_start, or lower disc_num_layers or "
        "disc_weight",
    ),
}


class Advice(Callback):
    """Warn once about each of `SYMPTOMS`, if it lasts for two validations, or epochs, in a row."""

    def __init__(self) -> None:
        self._looks: Counter[tuple[str, str]] = Counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the numbers of a validation."""
        if not trainer.sanity_checking:
            self._look(trainer, "val")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the numbers of the epoch before, which the model logs as the last of all."""
        self._look(trainer, "train")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the numbers of the last epoch."""
        self._look(trainer, "train")

    def _look(self, trainer: Trainer, split: str) -> None:
        for level, numbers in by_level(trainer.callback_metrics, split).items():
            for name, symptom in SYMPTOMS.items():
                if symptom.split != split:
                    continue
                try:
                    wrong = symptom.holds(numbers)
                except KeyError:  # another kind of model
                    continue
                looks = self._looks[level, name]
                # Once it has been named, it is not counted any more.
                self._looks[level, name] = looks + 1 if wrong or looks >= LOOKS else 0
                if wrong and looks + 1 == LOOKS and trainer.is_global_zero:
                    place = f"level {level}: " if level else ""
                    logger.warning("%s%s", place, symptom.text.format_map(numbers))


def by_level(metrics: Mapping[str, Any], split: str) -> dict[str, dict[str, float]]:
    """Group the numbers of a split by the level of a hierarchy; "" for a model without.

    Example:
        >>> by_level({"val/top_usage": 0.5, "val/psnr": 20.0, "train/usage": 1.0}, "val")
        {'top': {'usage': 0.5}, '': {'psnr': 20.0}}
    """
    found: dict[str, dict[str, float]] = {}
    known = ("usage", "mean_length", "never_within_threshold", "relative_threshold")
    for key, value in metrics.items():
        own, _, name = key.partition("/")
        if own != split:
            continue
        level = next((name[: -len(n) - 1] for n in known if name.endswith(f"_{n}")), "")
        found.setdefault(level, {})[name[len(level) + 1 :] if level else name] = float(value)
    return found


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
