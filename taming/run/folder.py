"""A run: its folder, the configuration it was made with, and the model it left.

``logs/<time>_<name>/`` holds ``checkpoints`` (``last.ckpt`` and the best ones), ``configs`` (what
was run) and ``images``. Nothing here imports torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from taming.run.config import instantiate_from_config, load_config
from taming.run.signature import signature_of

# Processes that Lightning starts by running the command again find their parent's run here.
_RUN_VARIABLE = "TAMING_RUN"

# Whoever starts several processes numbers them so: torchrun, Lightning, Slurm, jsrun.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")

# How the time stands in the names of folders and files.
_TIME = "%Y-%m-%dT%H-%M-%S"


def is_first_process() -> bool:
    """Whether this is the first, or the only, process of a run; known before any of them talk."""
    return _process_number() == 0


def _process_number() -> int:
    # What started torchrun numbers its nodes in another order than torchrun itself.
    names = ("RANK",) if "TORCHELASTIC_RUN_ID" in os.environ else _RANK_VARIABLES
    return max(int(os.environ.get(name) or 0) for name in names)


def _unused_time(is_used: Callable[[str], bool]) -> str:
    """Return the time, to the second, or the next one that is free."""
    now = datetime.now()
    while is_used(text := now.strftime(_TIME)):
        now += timedelta(seconds=1)
    return text


def _exists_or_make(folder: Path) -> bool:
    """Whether a folder is another's; it is made where there was none, which only one can do."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return True
    return False


class PreparationError(ValueError):
    """Training could not begin because of something the user gave."""


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
        """Folder of the configurations that the run was started and resumed with."""
        return self.path / "configs"

    @property
    def images(self) -> Path:
        """Folder of the logged images."""
        return self.path / "images"

    @property
    def last_checkpoint(self) -> Path:
        """Newest checkpoint, from which the run can be resumed."""
        return self.checkpoints / "last.ckpt"

    @property
    def saved_configs(self) -> list[Path]:
        """All saved configurations, oldest first."""
        return sorted(self.configs.glob("*.yaml"))

    @property
    def project_config(self) -> Path:
        """File with the blocks that the run was last trained with.

        A published model has a single one of any name, such as ``model.yaml``.

        Raises:
            ValueError: There is no such file, or it cannot be told which one it is.
        """
        saved = self.saved_configs
        projects = [path for path in saved if path.name.endswith("-project.yaml")]
        if not projects and len(saved) != 1:
            raise ValueError(f"{self.path} has no configs/*-project.yaml, which names its model")
        return (projects or saved)[-1]

    def start_time(self) -> str:
        """Return the time that names the files of this start of the run.

        It is later than those of all earlier starts, since the newest file wins. The clock may have
        gone back: to another time zone, or with the end of summer time.
        """
        earliest = datetime.now()
        for path in self.saved_configs:
            with suppress(ValueError):  # a published model's has any name
                saved = datetime.strptime(path.name[:19], _TIME)
                earliest = max(earliest, saved + timedelta(seconds=1))
        return earliest.strftime(_TIME)

    @classmethod
    def new(cls, name: str, root: str | Path = "logs") -> RunDir:
        """Make a folder that did not exist, so that no other run can take it.

        Args:
            name: What stands behind the time.
            root: Folder of all runs.

        Returns:
            The run. Only the first of several processes makes its folder. Those that Lightning
            starts are told the path; those of ``torchrun`` and Slurm learn it from the callbacks.
        """
        if not is_first_process() and _RUN_VARIABLE in os.environ:
            return cls(Path(os.environ[_RUN_VARIABLE]))
        if not is_first_process():  # or one of several that know nothing of each other
            time = _unused_time(lambda time: False)
            return cls(Path(root) / f"{time}_{name}_{_process_number()}")
        time = _unused_time(lambda time: _exists_or_make(Path(root) / f"{time}_{name}"))
        path = Path(root) / f"{time}_{name}"
        os.environ[_RUN_VARIABLE] = str(path.absolute())
        return cls(path)

    @contextmanager
    def kept_if_used(self) -> Iterator[None]:
        """Remove the folder in the end, and that of all runs, if nothing has been written there."""
        try:
            yield
        finally:
            with suppress(OSError):  # is not empty, or another process's to remove
                self.path.rmdir()
                self.path.parent.rmdir()

    @classmethod
    def resume(cls, path: str | Path) -> tuple[RunDir, Path]:
        """Find the run that a run folder or one of its checkpoints belongs to.

        Args:
            path: ``logs/<run>`` or ``logs/<run>/checkpoints/<file>.ckpt``.

        Returns:
            The run and the checkpoint (``last.ckpt`` for a folder).

        Raises:
            FileNotFoundError: There is no such path, or the run has no checkpoint yet.
            ValueError: It is not a run.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"the run {path} does not exist")
        run = cls(path if path.is_dir() else path.absolute().parent.parent)
        if not run.saved_configs:
            raise ValueError(
                f"{path}: {run.path} is no run, for it has no configs/*.yaml; "
                "give logs/<run> or logs/<run>/checkpoints/<file>.ckpt"
            )
        checkpoint = run.last_checkpoint if path.is_dir() else path
        if not checkpoint.exists():
            raise FileNotFoundError(f"the run {path} has no {checkpoint}")
        return run, checkpoint


def run_name(name: str, base: Sequence[str], postfix: str = "") -> str:
    """Return the name of a new run: ``name``, or the first file's, and the postfix."""
    return (name or (Path(base[0]).stem if base else "run")) + postfix


def model_from_run(run: str | Path, **params: Any) -> Any:
    """Build the model of a run with its trained weights, in evaluation mode.

    A prior's YAML names its tokenizer so:
    ``first_stage_config: {target: taming.run.folder.model_from_run, params: {run: logs/<run>}}``.

    Args:
        run: Run folder (its ``last.ckpt`` is read) or one of its checkpoints.
        **params: Replace entries of the saved ``model.params``.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: It is no run, or its model takes none of some params.
    """
    project, checkpoint = _project(run)
    block = project["model"]
    signature = signature_of(block["target"])
    if not signature.open and (unknown := [name for name in params if name not in signature.names]):
        raise ValueError(
            f"the run {run} holds a {block['target']}, which takes no {', '.join(unknown)}; name "
            "the run of a model that does"
        )
    params = {**(block.get("params") or {}), **params}
    return trained_model({"target": block["target"], "params": params}, checkpoint)


def trained_model(block: Mapping[str, Any], checkpoint: str | Path) -> Any:
    """Build a model with the weights of a checkpoint, in evaluation mode.

    Args:
        block: ``{target, params}``. A ``ckpt_path`` anywhere in it is where a part once started
            from; since the checkpoint holds all weights, that file is neither needed nor read, and
            nothing of the checkpoint is left out.
        checkpoint: File with all weights of the model.
    """
    params = {**without_starts(block.get("params") or {}), "ckpt_path": str(checkpoint)}
    return instantiate_from_config({"target": block["target"], "params": params}).eval()


def without_starts(block: Mapping[str, Any]) -> dict[str, Any]:
    """Leave every ``ckpt_path``, and its ``ignore_keys``, out of a block and those inside it."""
    return {
        key: without_starts(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if key not in ("ckpt_path", "ignore_keys")
    }


def data_from_run(run: str | Path) -> Any:
    """Build the data module of a run, ready for validation.

    Args:
        run: Run folder or one of its checkpoints.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: It is no run.
    """
    data = instantiate_from_config(_project(run)[0]["data"])
    data.prepare_data()
    data.setup("validate")
    return data


def _project(run: str | Path) -> tuple[dict[str, Any], Path]:
    """The model and data blocks that a run was last trained with, and its checkpoint."""
    folder, checkpoint = RunDir.resume(run)
    return load_config([folder.project_config]).values, checkpoint
