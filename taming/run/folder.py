"""The model and data of a run, loaded from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taming.run.check import check_block
from taming.run.config import LoadedConfig, load_config
from taming.run.parts import (
    CONFIG,
    WEIGHTS,
    find_run,
    folder_of,
    is_shared,
    is_trusting,
    loading,
    name_tokenizer,
    place_of,
)
from taming.run.pretrained import load_modules
from taming.run.rundir import RunDir
from taming.run.trust import check_trust
from taming.signatures import parameters_of
from taming.util import get_obj_from_str, instantiate_from_config


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
        run = RunDir(folder_of(path))
        if is_shared(path):
            checkpoint, files = path / WEIGHTS, [path / CONFIG, *files]
        elif path.is_file() and files and not run.saved_configs:
            checkpoint = path
        else:
            run, checkpoint = RunDir.resume(path)
            files = [run.project_config, *files]
        files, own = files[-1:] if alone else files, path if is_shared(path) else run.configs
        untrusted = None if trust else own
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

    def validation(self) -> Any:
        """Build the data module with its validation set.

        Raises:
            ValueError: As for `data`, or it has no validation set.
        """
        from lightning.pytorch.utilities.model_helpers import is_overridden  # takes seconds

        if not is_overridden("val_dataloader", data := self.data("validate")):
            raise ValueError(
                f"the data of the run {self.folder} has no validation set: state one in its "
                "configuration, or name other pictures"
            )
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
