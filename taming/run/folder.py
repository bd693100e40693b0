"""The folder of a run, and the model and data that are loaded from it.

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

from taming.run.check import check_block
from taming.run.config import LoadedConfig, load_config
from taming.run.lock import locked
from taming.run.parts import (
    CONFIG,
    WEIGHTS,
    find_run,
    is_shared,
    is_trusting,
    loading,
    missing,
    name_tokenizer,
    place_of,
)
from taming.run.pretrained import load_modules
from taming.run.trust import check_trust
from taming.signatures import parameters_of
from taming.util import get_obj_from_str, instantiate_from_config

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
            ValueError: The path is not a run.
        """
        path = Path(path).expanduser()
        if path.name == _PLACEHOLDER:
            raise FileNotFoundError(
                f"{path} is a placeholder: set the `run` of the first_stage_config to your "
                "tokenizer's, such as logs/<run>"
            )
        if not path.exists():
            raise missing(path)
        run = cls(path if path.is_dir() else path.absolute().parent.parent)
        if not run.saved_configs:
            raise ValueError(
                f"{path}: {run.path} is not a run, since it has no configs/*.yaml; "
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


def without_starts(value: Any) -> Any:
    """Drop every ``ckpt_path``, and what stands beside it, from a block and those inside it.

    They name the files that parts of a model once started from. A checkpoint of the whole model
    holds all weights, so these files are not needed any more, and may be gone.
    """
    if isinstance(value, list):
        return [without_starts(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    starts = ("ckpt_path", "ignore_keys", "trust_checkpoint")
    return {key: without_starts(item) for key, item in value.items() if key not in starts}


@dataclass(frozen=True)
class SavedRun:
    """A trained run, loaded to use its model and data.

    Attributes:
        folder: Folder of the run.
        checkpoint: File with the weights.
        config: Configuration to build the model and the data from, overrides included.
        trust_config: Build any targets that the run's own files name.
    """

    folder: Path
    checkpoint: Path
    config: LoadedConfig
    trust_config: bool = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        files: Sequence[str | Path] = (),
        dotlist: Sequence[str] = (),
        *,
        alone: bool = False,
        ignore_data: bool = False,
        tokenizer: str | Path | None = None,
        trust_config: bool = False,
    ) -> SavedRun:
        """Find a run and load its latest configuration.

        Args:
            path: Run folder (``last.ckpt`` is used), one of its checkpoints, the folder of a shared
                model or the name of one that ships (`taming.run.pretrained`), or, with ``files``
                that describe its model, a checkpoint anywhere.
            files: YAML files to merge into the run's own, from left to right.
            dotlist: ``key=value`` items to merge last.
            alone: Use the last file only, instead of the run's own.
            ignore_data: Ignore the ``data`` block of all files.
            tokenizer: Run of a prior's tokenizer, in place of the one that the prior names.
            trust_config: Build any targets that the run's own files name, and those that it loads.

        Raises:
            FileNotFoundError: The run or the checkpoint does not exist.
            ValueError: The path is not a run, a file cannot be read, or the model is no prior with
                a tokenizer of another run.
        """
        path, trust = place_of(path), trust_config or is_trusting()
        run = RunDir(path.absolute().parent.parent)
        untrusted = run.configs
        if is_shared(path):
            run, checkpoint, untrusted = RunDir(path), path / WEIGHTS, path
            files = [path / CONFIG, *files]
        elif path.is_file() and files and not run.saved_configs:
            checkpoint, files = path, list(files)
        else:
            run, checkpoint = RunDir.resume(path)
            files, untrusted = [run.project_config, *files], run.configs
        files, untrusted = files[-1:] if alone else files, None if trust else untrusted
        config = load_config(files, dotlist, untrusted=untrusted, ignore_data=ignore_data)
        if tokenizer is not None:
            name_tokenizer(config, tokenizer)
        return cls(run.path, checkpoint, config, trust)

    def model(self, **params: Any) -> Any:
        """Build the model with its trained weights, in evaluation mode.

        Args:
            **params: Values that replace entries of ``model.params``.

        Raises:
            ValueError: The configuration is wrong or asks for what it may not, the checkpoint does
                not match it, or the model does not take one of the params.
        """
        block = self.config.block("model")
        check_trust(self.config, "model")
        check_block(self.config, "model", block, extra=["base_learning_rate"])
        target = block["target"]
        valid, is_open = parameters_of(get_obj_from_str(target))
        if not is_open and (unknown := [name for name in params if name not in valid]):
            raise ValueError(
                f"the run {self.folder} holds a {target}, which takes no {', '.join(unknown)}; "
                "name the run of a model that does, such as a tokenizer"
            )
        if self.checkpoint == self.folder / WEIGHTS:
            return load_modules(self.folder, self.config, self.trust_config, **params)["model"]
        merged = {**(block.get("params") or {}), **params}
        wanted = without_starts(merged) | {"ckpt_path": str(self.checkpoint)}
        of_user = not self.config.is_untrusted("model.params.trust_checkpoint")
        if merged.get("trust_checkpoint") and (of_user or "trust_checkpoint" in params):
            wanted["trust_checkpoint"] = True
        with loading(self.folder, self.trust_config):
            return instantiate_from_config({"target": target, "params": wanted}).eval()

    def data(self, stage: str | None = None) -> Any:
        """Build the data module and set up its data sets.

        Args:
            stage: Stage to set up the data sets of, such as ``validate``; None for all stages.

        Raises:
            ValueError: The configuration is wrong or asks for what it may not.
        """
        block = self.config.block("data")
        check_trust(self.config, "data")
        check_block(self.config, "data", block)
        with loading(self.folder, self.trust_config):
            data = instantiate_from_config(block)
            data.prepare_data()
            data.setup(stage)
        return data

    def step(self) -> int:
        """Return the number of steps that the model was trained for."""
        from taming.checkpoint import load_checkpoint  # imports torch, which --help does not need

        return load_checkpoint(self.checkpoint, lazy=True).get("global_step", 0)


def model_from_run(
    run: str | Path,
    *,
    tokenizer: str | Path | None = None,
    trust_config: bool = False,
    **params: Any,
) -> Any:
    """Build the model of a run with its trained weights, in evaluation mode.

    The YAML file of a prior names its tokenizer so:
    ``first_stage_config: {target: taming.run.folder.model_from_run, params: {run: logs/<run>}}``.

    Args:
        run: Run folder (``last.ckpt`` is loaded) or one of its checkpoints. When the model of
            another run is loaded, it may also lie beside that one (`find_run`).
        tokenizer: Run of a prior's tokenizer, in place of the one that the prior names.
        trust_config: Build any targets that the run's own files name, and those that it loads.
        **params: Values that replace entries of the saved ``model.params``.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The run or the checkpoint does not exist.
        ValueError: The path is not a run, its model does not take one of the params, or its
            configuration asks for what it may not (`taming.run.trust`).
    """
    path = find_run(run)
    return SavedRun.load(path, tokenizer=tokenizer, trust_config=trust_config).model(**params)


def data_from_run(run: str | Path, *, trust_config: bool = False) -> Any:
    """Build the data module of a run, set up for validation.

    Args:
        run: Run folder or one of its checkpoints.
        trust_config: Build any targets that the run's own files name.

    Raises:
        FileNotFoundError: The run or the checkpoint does not exist.
        ValueError: The path is not a run, or its configuration asks for what it may not.
    """
    return SavedRun.load(find_run(run), trust_config=trust_config).data("validate")
