"""Callbacks of a run: saved configurations, pictures and codebook histograms.

Axis letters: B images, C channels, H W image.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from taming.pictures import arrange, save_picture, to_picture
from taming.run.loggers import Tolerance
from taming.util import replacing

logger = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Name the folder of a run, and save its configuration there once its first step was taken.

    What fails before has changed nothing. A checkpoint that is saved before the first step of a new
    run has the configuration beside it too.

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
        self._first_step = 0
        self._is_saved = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the folder, now that model and data are there."""
        if trainer.is_global_zero:
            logger.info("the run's folder is %s", self.folders[0])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where this start begins."""
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the files after the first step, before a checkpoint is saved."""
        if trainer.global_step > self._first_step:
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the files with the first checkpoint of a new run, if no step was taken yet."""
        if not any(self.cfgdir.glob("*.yaml")):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Create the folders and save the files, once and on the first process only."""
        if self._is_saved or not trainer.is_global_zero:
            return
        self._is_saved = True
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        blocks = {"lightning": {"lightning": dict(self.lightning_config)}, "project": self.config}
        for name, block in blocks.items():
            # Half a file would stop every later resume.
            with replacing(self.cfgdir / f"{self.now}-{name}.yaml") as part:
                OmegaConf.save(OmegaConf.create(dict(block)), part)


class ImageLogger(Callback):
    """Log grids of pictures to ``images/{train,val}``, TensorBoard and Weights & Biases.

    The pictures come from the model's ``log_images(batch, split)``, which returns name -> tensor
    (B, 3, H, W), float, in [-1, 1]; models without it are skipped. Training goes on exactly as
    without pictures: the modes of all submodules and the random states are restored, and a picture
    that cannot be saved is a warning.

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
        self._files, self._loggers = Tolerance("a picture"), Tolerance("a logger's picture")

    def state_dict(self) -> dict[str, int]:
        """Return the steps of the last pictures, so that a resumed run takes none twice."""
        return dict(self._logged_step)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the pictures of a checkpoint."""
        self._logged_step = dict(state_dict)

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
            picture = to_picture(arrange(pictures, columns=4))
            self._save(picture, trainer, f"{split}/{name}", batch_idx)

    def _save(self, picture: Image.Image, trainer: Trainer, name: str, batch_idx: int) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch
        if self.logdir is not None:
            file = f"{name}_gs-{step:06}_e-{epoch:06}_b-{batch_idx:06}.png"
            with self._files:
                save_picture(picture, self.logdir / "images" / file)
        for destination in trainer.loggers:
            with self._loggers:
                if isinstance(destination, TensorBoardLogger):
                    pixels = np.asarray(picture)
                    destination.experiment.add_image(name, pixels, step, dataformats="HWC")
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
        self._tolerance = Tolerance("a histogram")

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
                with self._tolerance:
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
