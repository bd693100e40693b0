"""The folder of a run, and what is started in it.

``logs/<time>_<name>/`` holds ``checkpoints`` (``last.ckpt`` and the best ones), ``configs`` (one
pair of files for each start that took a step) and ``images``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from taming.run.lock import locked
from taming.run.parts import WEIGHTS, folder_of, is_shared, missing, place_of

# Environment variable by which processes that Lightning starts find their parent's run.
_RUN_VARIABLE = "TAMING_RUN"

# Environment variables with the number of a process: of torchrun, Lightning, Slurm and jsrun.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")

# Name of the tokenizer's run in the priors' recipes, for the user to replace.
_PLACEHOLDER = "the_tokenizers_run"

# Format of the time in the names of folders and files.
_TIME = "%Y-%m-%dT%H-%M-%S"


def is_first_process() -> bool:
    """Return True in the first, or only, process of a run, also before they communicate."""
    return _process_number() == 0


def _process_number() -> int:
    # Slurm may number the nodes in another order than torchrun, which it starts.
    names = ("RANK",) if "TORCHELASTIC_RUN_ID" in os.environ else _RANK_VARIABLES
    return max(int(os.environ.get(name) or 0) for name in names)


class PreparationError(ValueError):
    """Training could not begin because of a user error."""


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def configs(self) -> Path:
        """Folder of the configurations of all starts of the run."""
        return self.path / "configs"

    @property
    def last_checkpoint(self) -> Path:
        """Newest checkpoint, from which the run is resumed."""
        return self.checkpoints / "last.ckpt"

    @property
    def saved_configs(self) -> list[Path]:
        """All saved configurations, oldest first."""
        return sorted(self.configs.glob("*.yaml"))

    @property
    def project_config(self) -> Path:
        """File with the model and data blocks of the latest start.

        A published model has a single file of any name, such as ``model.yaml``.

        Raises:
            ValueError: There is no such file, or there are several candidates.
        """
        saved = self.saved_configs
        projects = [path for path in saved if path.name.endswith("-project.yaml")]
        if not projects and len(saved) != 1:
            raise ValueError(f"{self.path} has no configs/*-project.yaml, which names its model")
        return (projects or saved)[-1]

    def start_time(self) -> str:
        """Return the time that names the files of this start of the run.

        It is later than the times of all earlier starts, failed ones included, even if the clock
        was set back: by another time zone, or at the end of summer time.

        Raises:
            PreparationError: A file bears the last date that there is.
        """
        earliest = datetime.now()
        for path in (*self.saved_configs, *self.path.glob("csv/*")):
            try:
                saved = datetime.strptime(path.name[:19], _TIME)
                earliest = max(earliest, saved + timedelta(seconds=1))
            except ValueError:  # a published model's file may have any name
                continue
            except OverflowError as error:
                raise PreparationError(
                    f"{path} bears the last date that there is, and each start a later one than "
                    "those before: rename it by the time of its start"
                ) from error
        return earliest.strftime(_TIME)

    @classmethod
    def new(cls, name: str, root: str | Path = "logs") -> RunDir:
        """Create the folder of a new run, which no other run can claim.

        Only the first of several processes creates it. Processes that Lightning starts take its
        path from the environment; those of ``torchrun`` and Slurm get it from the callbacks.

        Args:
            name: Part of the folder's name after the time.
            root: Folder of all runs.

        Returns:
            The run.
        """
        now = datetime.now()
        if not is_first_process() and _RUN_VARIABLE in os.environ:
            return cls(Path(os.environ[_RUN_VARIABLE]))
        if not is_first_process():  # of torchrun, or one of several independent jobs
            return cls(Path(root) / f"{now.strftime(_TIME)}_{name}_{_process_number()}")
        while True:
            path = Path(root) / f"{now.strftime(_TIME)}_{name}"
            with suppress(FileExistsError):  # claimed by another run
                path.mkdir(parents=True)
                os.environ[_RUN_VARIABLE] = str(path.absolute())
                return cls(path)
            now += timedelta(seconds=1)

    @contextmanager
    def kept_if_used(self) -> Iterator[None]:
        """Hold the folder's lock; on exit, remove the folder, and that of all runs, if empty.

        After an error it counts as empty unless a step was taken, by which its configuration was
        saved, or a checkpoint was.

        Raises:
            ValueError: Another process uses the folder; names it.
        """
        try:
            with locked(self.path) if is_first_process() else nullcontext():
                yield
        except BaseException:
            is_used = self.saved_configs or any(self.checkpoints.glob("*.ckpt"))
            if is_first_process() and not is_used:
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        finally:
            with suppress(OSError):  # not empty, or removed before, or by another process
                self.path.rmdir()
            if not self.path.exists():
                with suppress(OSError):
                    self.path.parent.rmdir()

    @classmethod
    def resume(cls, path: str | Path) -> tuple[RunDir, Path]:
        """Find the run of a run folder or of one of its checkpoints.

        Args:
            path: ``logs/<run>`` or ``logs/<run>/checkpoints/<file>.ckpt``.

        Returns:
            The run and the checkpoint (``last.ckpt`` for a folder).

        Raises:
            FileNotFoundError: The path does not exist, or the run has no checkpoint yet.
            ValueError: The path is not a run, or a shared model.
        """
        path = Path(path).expanduser()
        if path.name == _PLACEHOLDER:
            raise FileNotFoundError(
                f"{path} is a placeholder: set the `run` of the first_stage_config to your "
                "tokenizer's, such as logs/<run>"
            )
        if is_shared(shared := place_of(path)):
            raise ValueError(
                f"{path} is a model without the state of a training to resume; to start from its "
                "weights, give a recipe of such a model with -b, and "
                f"model.params.ckpt_path={shared / WEIGHTS} (docs/photos.md)"
            )
        if not path.exists():
            raise missing(path)
        run = cls(folder_of(path))
        if not run.saved_configs:
            named = "" if path == run.path else f"{path}: "
            raise ValueError(
                f"{named}{run.path} is not a run, since it has no configs/*.yaml; "
                "expected logs/<run> or logs/<run>/checkpoints/<file>.ckpt"
            )
        checkpoint = run.last_checkpoint if path.is_dir() else path
        if not checkpoint.exists():
            raise FileNotFoundError(f"the run {path} has no {checkpoint}")
        return run, checkpoint


@dataclass(frozen=True)
class Experiment:
    """A checked configuration, and the run that is started or resumed with it.

    Attributes:
        run: Folder in which everything is saved.
        checkpoint: Checkpoint to continue from; None starts anew.
        model: The ``model`` block.
        data: The ``data`` block.
        lightning: The ``lightning`` block.
        wandb_project: Weights & Biases project to log to as well, or None.
        trust_checkpoint: Allow the checkpoint to hold objects of any class.
        trials: Trainer arguments for this start alone.
    """

    run: RunDir
    checkpoint: Path | None
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    lightning: Mapping[str, Any]
    wandb_project: str | None = None
    trust_checkpoint: bool = False
    trials: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> dict[str, Any]:
        """Trainer arguments of this start."""
        return {**(self.lightning.get("trainer") or {}), **self.trials}

    @cached_property
    def start_time(self) -> str:
        """Time that names the files of this start."""
        return self.run.start_time()


def run_name(name: str, base: Sequence[str], postfix: str = "") -> str:
    """Return the name of a new run: ``name`` or else the first file's stem, and the postfix."""
    return (name or (Path(base[0]).stem if base else "run")) + postfix
