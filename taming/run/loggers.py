"""The loggers of a run: tables and TensorBoard files that a full disk or lost folder does not stop.

They are for looking at, unlike checkpoints: where they cannot be written, a warning is logged and
training goes on. Rows of ``metrics.csv`` wait until they can be written; what TensorBoard misses
meanwhile is left out there.
"""

from __future__ import annotations

import csv
import importlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter

from taming.extras import naming_extras
from taming.run.cli import Console
from taming.run.defaults import DEFAULT_LOGGER, merge_block
from taming.run.rundir import Experiment
from taming.util import WriteError, instantiate_from_config, replacing

logger = logging.getLogger(__name__)

# Messages of Lightning about intended behaviour.
_KNOWN_WARNINGS = (
    r".*does not have many workers",  # recipes for a CPU have none on purpose: cores train as well
    r"This DataLoader will create .* worker processes",  # of a recipe for a larger machine
    r"Consider setting `persistent_workers=True`",  # a resumed run needs new ones each epoch
    r"Total length of `list` across ranks is zero",
    r"The dirpath has changed from",
    r"You're resuming from a checkpoint that ended before the epoch ended",  # of other loaders
    r"Be aware that when using `ckpt_path`, callbacks used to create",  # fast_dev_run saves nothing
    r"`ModelCheckpoint\(monitor=.*could not find the monitored key",
    r".*number of training batches .* is smaller than the logging interval",
    r".*Checkpoint directory .* exists and is not empty",
    r".*Using ModelCheckpoint with manual optimization and every_n_train_steps",
    r".*Found .* in eval mode at the start of training",
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
)

# The same, of its log.
_KNOWN_MESSAGES = ("💡 Tip: For seamless", "TPU available: False", "Seed set to ")


class Tolerance:
    """Context that turns an OSError into a warning, one until writing succeeds again.

    Args:
        what: What is written, for the warning.

    Attributes:
        failed: True if the last attempt failed.
    """

    def __init__(self, what: str) -> None:
        self.what, self.failed = what, False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if isinstance(error, ValueError) and isinstance(error.__cause__, OSError):
            error = error.__cause__  # as Lightning wraps those of TensorBoard
        if error is not None and not isinstance(error, OSError):
            return False
        if error is not None and not self.failed:
            logger.warning("%s cannot be saved, training goes on: %s", self.what, error)
        self.failed = error is not None
        return True


class TableWriter(ExperimentWriter):
    """Writer of ``metrics.csv``: rows that cannot be saved wait, and rows that were are never lost.

    Lightning's empties the file before it writes the rows anew for a new column.
    """

    def save(self) -> None:
        """Append the new rows, or save the whole table for new columns."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        columns = sorted({*self.metrics_keys}.union(*self.metrics))
        if columns == self.metrics_keys and path.is_file():
            self._append(path)
        else:
            with replacing(path) as part, open(part, "w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                if path.is_file():
                    with open(path, newline="") as earlier:
                        writer.writerows(csv.DictReader(earlier))
                writer.writerows(self.metrics)
        self.metrics, self.metrics_keys = [], columns

    def _append(self, path: Path) -> None:
        size = path.stat().st_size
        try:
            with open(path, "a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        except OSError:
            os.truncate(path, size)  # no half row; all are saved next time
            raise


class Tolerant(Logger):
    """Base class of loggers to files, which go on where Lightning's raise an OSError."""

    what = "a log"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        what = f"{self.what} in {self.save_dir}"
        # Apart, since rows are logged without an error while they cannot be saved.
        self.logging, self.saving = Tolerance(what), Tolerance(what)

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Log metrics as Lightning's logger does."""
        with self.logging:
            super().log_metrics(*args, **kwargs)  # type: ignore[safe-super]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log hyperparameters as Lightning's logger does."""
        with self.logging:
            super().log_hyperparams(*args, **kwargs)  # type: ignore[safe-super]

    def save(self) -> None:
        """Save what waits."""
        with self.saving:
            super().save()

    def finalize(self, status: str) -> None:
        """Save what waits, and close the file."""
        with self.saving:
            super().finalize(status)


class Table(Tolerant, CSVLogger):
    """Lightning's CSVLogger, with a `TableWriter`."""

    what = "metrics.csv"

    @property
    @rank_zero_experiment
    def experiment(self) -> TableWriter:
        """The writer, made when it is first used."""
        writer: Any = self._experiment or TableWriter(self.log_dir)
        self._experiment = writer
        return writer


class Events(Tolerant, TensorBoardLogger):
    """Lightning's TensorBoardLogger; it begins another file after one that failed."""

    what = "TensorBoard's file"

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer, made when it is first used; a run does not start without one."""
        try:
            return super().experiment
        except OSError as error:
            where = f"{self.what} in {self.save_dir}"
            raise WriteError(f"{where} cannot be saved ({error})") from error

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Log metrics; after a failure, to a new file."""
        super().log_metrics(*args, **kwargs)
        if self.logging.failed:  # its thread has ended, and it would raise for ever
            self._experiment = None


def build_loggers(experiment: Experiment) -> list[Logger]:
    """Build the CSV and TensorBoard loggers, Weights & Biases on request, and a configured one.

    They log to ``csv/<start time>/metrics.csv``, ``tensorboard`` and ``wandb``. The params of the
    ``lightning.logger`` block are merged into those of the logger with the same target.

    Raises:
        ValueError: Weights & Biases is asked for and not installed.
    """
    module, path = "lightning.pytorch.loggers", experiment.run.path
    given = experiment.lightning.get("logger")
    block = given and merge_block(DEFAULT_LOGGER, given)
    defaults = {
        f"{module}.CSVLogger": {"name": f"csv/{experiment.start_time}", "version": ""},
        f"{module}.TensorBoardLogger": {"name": "tensorboard", "version": ""},
    }
    project, wandb = experiment.wandb_project, f"{module}.WandbLogger"
    if project or (block and block["target"] == wandb):
        with naming_extras():
            importlib.import_module("wandb")
        run_id = re.sub(r"[^\w.-]", "-", path.name)[-64:]
        defaults[wandb] = {"name": path.name, "id": run_id, "project": project or "taming"}
    folder = {"save_dir": str(path)}
    blocks = {t: {"target": t, "params": {**folder, **p}} for t, p in defaults.items()}
    if block:
        blocks[block["target"]] = merge_block(blocks.get(block["target"]) or block, block)
    for name, own in (("CSVLogger", "Table"), ("TensorBoardLogger", "Events")):
        if block := blocks.get(f"{module}.{name}"):
            block["target"] = f"taming.run.loggers.{own}"  # the same, but a full disk is no end
    return [instantiate_from_config(block) for block in blocks.values()]


def quiet_lightning() -> None:
    """Hide Lightning's advertisements, and its warnings about intended behaviour."""
    quiet_threads()
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for package in ("lightning.pytorch", "lightning.fabric"):
        for name in ("utilities.rank_zero", "utilities.seed"):
            logging.getLogger(f"{package}.{name}").addFilter(_is_news)
        own = logging.getLogger(package)
        own.handlers = [Console() for _ in own.handlers]


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KNOWN_MESSAGES)


def quiet_threads() -> None:
    """Leave out the traceback of TensorBoard's thread, whose exception `Events` reports."""
    if not isinstance(threading.excepthook, partial):
        threading.excepthook = partial(_report_thread, threading.excepthook)


def _report_thread(before: Callable[[Any], Any], args: threading.ExceptHookArgs) -> None:
    if not (isinstance(args.thread, _AsyncWriterThread) and isinstance(args.exc_value, OSError)):
        before(args)
