"""Callbacks of a run: saved configurations, checkpoints, pictures and codebook histograms.

Axis letters: B images, C channels, H W image.
"""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from taming.pictures import tile, to_picture
from taming.run.folder import PreparationError
from taming.util import NonFiniteError, WriteError, nearest

logger = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Create the run's folders and save its configuration when training begins.

    Args:
        now: Time that names the files.
        logdir: Folder of the run.
        ckptdir: Folder of its checkpoints.
        cfgdir: Folder of its configurations.
        config: The ``model`` and ``data`` blocks, saved as ``<now>-project.yaml``.
        lightning_config: The ``lightning`` block, saved as ``<now>-lightning.yaml``.
    """

    def __init__(
        self,
        now: str,
        logdir: str | Path,
        ckptdir: str | Path,
        cfgdir: str | Path,
        config: Mapping[str, Any],
        lightning_config: Mapping[str, Any],
    ) -> None:
        self.now = now
        self.folders = [Path(logdir), Path(ckptdir), Path(cfgdir)]
        self.cfgdir = Path(cfgdir)
        self.config = config
        self.lightning_config = lightning_config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the folders and save the files, on the first process only."""
        if not trainer.is_global_zero:
            return
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        blocks = {"project": self.config, "lightning": {"lightning": dict(self.lightning_config)}}
        for name, block in blocks.items():
            OmegaConf.save(OmegaConf.create(dict(block)), self.cfgdir / f"{self.now}-{name}.yaml")


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

    It is saved at the end of every epoch, every so many steps, at the end of a batch in which the
    process received SIGUSR1, and when training is interrupted. A `NonFiniteError` or a `WriteError`
    leaves it as it is. Any other error in one of several processes does so too, and
    ``interrupted.ckpt`` is saved beside it. SIGUSR2 opens a debugger.

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
        self._has_started = self._requested = False
        self._saved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the path of the first process; those of other nodes have folders of their own."""
        self.path = trainer.strategy.broadcast(self.path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals, except those that already have a handler, such as Slurm's requeueing."""
        self._has_started = True
        self._saved_step = trainer.global_step
        handlers = {"SIGUSR1": self._request, "SIGUSR2": lambda *_: breakpoint()}
        for name, handler in handlers.items():
            number = signal.Signals.__members__.get(name)  # Windows has neither
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, handler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is due; all processes agree on it, since saving waits for all of them."""
        requested = trainer.strategy.reduce_boolean_decision(self._requested, all=False)
        if requested or trainer.global_step - self._saved_step >= self.every_n_train_steps:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the epoch and its validation."""
        self._save(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the current state, without waiting for processes that may have died."""
        if not self._has_started or isinstance(exception, NonFiniteError | WriteError):
            return
        is_alone = trainer.world_size == 1
        if not (is_alone or (isinstance(trainer.strategy, DDPStrategy) and trainer.is_global_zero)):
            return
        if trainer.validating:
            _restart_validation(trainer)
        path = self.path
        try:
            if is_alone:
                self._save(trainer)
            else:  # Trainer.save_checkpoint would wait at a barrier for the other processes
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                if not isinstance(exception, KeyboardInterrupt | SIGTERMException):
                    # It may be the consequence of a value that is not finite on another process.
                    path = self.path.with_name("interrupted.ckpt")
                trainer.strategy.save_checkpoint(checkpoint, path)
            logger.warning("%s: saved %s", type(exception).__name__, path)
        except WriteError as error:  # must not hide the reason why training stopped
            logger.warning("%s: %s", type(exception).__name__, error)

    def _request(self, *_: Any) -> None:
        self._requested = True

    def _save(self, trainer: Trainer) -> None:
        self._requested = False
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)


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


class ImageLogger(Callback):
    """Log grids of pictures to ``images/{train,val}``, TensorBoard and Weights & Biases.

    The pictures come from the model's ``log_images(batch, split)``, which returns name -> tensor
    (B, 3, H, W), float, in [-1, 1]; models without it are skipped. Training goes on exactly as
    without pictures: the modes of all submodules and the random states are restored.

    Args:
        batch_frequency: Steps (optimizer steps of the generator) between pictures.
        max_images: Pictures per grid; 0 turns the callback off.
        clamp: Clamp values beyond [-1, 1] instead of scaling the grid to fit.
        increase_log_steps: Log at steps 1, 2, 4, 8, ... up to ``batch_frequency`` too.
        logdir: Folder of the run; None saves no files.

    Raises:
        ValueError: ``batch_frequency`` is below 1.
    """

    def __init__(
        self,
        batch_frequency: int = 750,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        logdir: str | Path | None = None,
    ) -> None:
        if batch_frequency < 1:
            raise ValueError(f"batch_frequency must be at least 1, got {batch_frequency}")
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.increase_log_steps = increase_log_steps
        self.logdir = None if logdir is None else Path(logdir)
        self._logged_step = {"train": 0, "val": 0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip what was due before a resumed run's checkpoint."""
        self._logged_step = {"train": trainer.global_step, "val": trainer.global_step}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the batch if pictures are due."""
        self._log_if_due(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the first batch of a validation if pictures are due."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self._log_if_due(trainer, pl_module, batch, batch_idx, "val")

    def _milestone(self, step: int) -> int:
        """Return the last step, up to this one, at which pictures are due."""
        if step >= self.batch_frequency:
            return step // self.batch_frequency * self.batch_frequency
        return 1 << (step.bit_length() - 1) if step > 0 and self.increase_log_steps else 0

    def _log_if_due(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, split: str
    ) -> None:
        step = trainer.global_step
        due = self._milestone(step) > self._milestone(self._logged_step[split])
        if not due or self.max_images < 1 or not callable(getattr(pl_module, "log_images", None)):
            return
        self._logged_step[split] = step
        images = _render(trainer, pl_module, batch, split)
        if not trainer.is_global_zero:
            return
        for name, pictures in images.items():
            pictures = pictures[: self.max_images].float()
            if not self.clamp:
                pictures = pictures / pictures.abs().max().clamp(min=1)
            picture = to_picture(tile(pictures, columns=4))
            self._save(picture, trainer, f"{split}/{name}", batch_idx)

    def _save(self, picture: Image.Image, trainer: Trainer, name: str, batch_idx: int) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch
        if self.logdir is not None:
            file = f"{name}_gs-{step:06}_e-{epoch:06}_b-{batch_idx:06}.png"
            path = self.logdir / "images" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        for destination in trainer.loggers:
            if isinstance(destination, TensorBoardLogger):
                destination.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
            elif isinstance(destination, WandbLogger):
                destination.log_image(name, [picture], step=step)


@torch.no_grad()
def _render(trainer: Trainer, model: LightningModule, batch: Any, split: str) -> dict[str, Tensor]:
    """Call ``log_images`` in evaluation mode, on all processes, and restore all state."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with isolate_rng(), trainer.precision_plugin.forward_context():
        images: Any = model.log_images(batch, split=split)  # type: ignore[operator]
    for module, mode in modes:
        module.training = mode
    return images


class CodebookTelemetry(Callback):
    """Send histograms of codes and code lengths to TensorBoard and Weights & Biases.

    They come from the model's ``codebook_histograms()``, which returns ``split/name`` -> counts
    (bins,), where bin i holds how often i occurred; models without it are skipped.

    Args:
        max_bins: Most bins of a histogram; beyond it, neighbouring bins are summed.

    Raises:
        ValueError: ``max_bins`` is below 1.
    """

    def __init__(self, max_bins: int = 256) -> None:
        if max_bins < 1:
            raise ValueError(f"max_bins must be at least 1, got {max_bins}")
        self.max_bins = max_bins

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the histograms of the validation."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the histograms of the training."""
        self._log(trainer, pl_module, "train")

    def _log(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        histograms: Any = getattr(pl_module, "codebook_histograms", None) or dict
        for name, counts in histograms().items():
            if not name.startswith(f"{split}/"):
                continue
            width = -(-len(counts) // self.max_bins)
            padded = nn.functional.pad(counts.cpu().double(), (0, -len(counts) % width))
            bins = padded.view(-1, width).sum(1).numpy()
            edges = np.arange(len(bins) + 1) * width - 0.5
            for destination in trainer.loggers:
                _add_histogram(destination, name, bins, edges, trainer.global_step)


def _add_histogram(
    destination: Logger, name: str, bins: np.ndarray, edges: np.ndarray, step: int
) -> None:
    """Send counts (bins,) between edges (bins + 1,) to a logger that shows histograms."""
    if isinstance(destination, TensorBoardLogger):
        centres = (edges[:-1] + edges[1:]) / 2
        destination.experiment.add_histogram_raw(
            name,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(bins.sum()),
            sum=float((bins * centres).sum()),
            sum_squares=float((bins * centres**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=bins.tolist(),
            global_step=step,
        )
    elif isinstance(destination, WandbLogger):
        import wandb  # optional

        value: Any = wandb.Histogram(np_histogram=(bins.tolist(), edges.tolist()))
        destination.log_metrics({name: value}, step=step)
