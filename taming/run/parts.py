"""The run of a part of a model, such as a prior's tokenizer: where it is found, and its trust."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from taming.run.config import LoadedConfig
from taming.run.sources import COMMAND_LINE, entries

# Target by which a configuration names the model of another run.
LOADER = "taming.run.folder.model_from_run"

# Files of a shared model (`taming.run.pretrained`).
CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
SHIPPED = Path(__file__).parents[1] / "pretrained"


class _Loading(NamedTuple):
    """The runs whose models are being built, the innermost last."""

    folders: tuple[Path, ...] = ()
    trust_config: bool = False


_NONE = _Loading()
_LOADING: ContextVar[_Loading] = ContextVar("loading")


@contextmanager
def loading(run: str | Path, trust_config: bool) -> Iterator[None]:
    """While a model is built, let `find_run` look beside its run, and its parts inherit trust.

    Args:
        run: Folder of the run or one of its checkpoints; empty for a new run.
        trust_config: Trust the configurations of all runs that are loaded meanwhile.

    Raises:
        ValueError: The run is a part of itself.
    """
    outer = _LOADING.get(_NONE)
    own = (folder_of(Path(run)).resolve(),) if run else ()
    if set(own) & set(outer.folders):
        raise ValueError(f"the run {run} names itself as the run of its tokenizer")
    trust = outer.trust_config or trust_config
    token = _LOADING.set(_Loading((*outer.folders, *own), trust))
    try:
        yield
    finally:
        _LOADING.reset(token)


def is_trusting() -> bool:
    """Return True while the model of a run is built whose parts are trusted as well."""
    return _LOADING.get(_NONE).trust_config


def folder_of(path: Path) -> Path:
    """Return the folder of a run, given that or one of its checkpoints."""
    return path.absolute().parent.parent if path.is_file() else path


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.name for path in SHIPPED.glob("*") if is_shared(path))


def place_of(name: str | Path) -> Path:
    """Return the path of a run or shared model; one of that name wins over a shipped model."""
    path = Path(str(name)).expanduser()
    own = path.is_file() or is_run(path) or is_shared(path)  # a folder of pictures is neither
    return SHIPPED / path if str(path) in shipped() and not own else path


def missing(name: str | Path) -> FileNotFoundError:
    """Return the error for what is neither a path nor the name of a shipped model."""
    names = ", ".join(shipped()) or "none"
    return FileNotFoundError(
        f"{name} does not exist, and no model of this name ships (shipped: {names})"
    )


def find_run(run: str | Path) -> Path:
    """Find a run, or a checkpoint of one, that a run being loaded names as a part of its model.

    Its path counts from the current folder. Where it leads to no run, as when both runs were moved,
    its end is looked for beside the run that names it, and in the folders above, nearest first.

    Raises:
        FileNotFoundError: There is no such run; names the run that needs it.
    """
    given, folders = place_of(run), _LOADING.get(_NONE).folders
    if not folders or is_run(given) or is_shared(given):
        return given
    parts = given.parts[1:] if given.is_absolute() else given.parts
    shortest = 3 if given.suffix == ".ckpt" else 1  # <run>/checkpoints/<file>.ckpt
    for start in range(len(parts) - shortest + 1):
        for folder in folders[-1].parents:
            found = folder.joinpath(*parts[start:])
            if is_run(found) or is_shared(found):
                return found
    raise FileNotFoundError(
        f"the run {folders[-1]} needs the run {run} of its tokenizer, which is neither there nor "
        "beside it; name its place with --tokenizer (tokenizer= in taming.load), or for main.py "
        "with model.params.first_stage_config.params.run="
    )


def is_run(path: Path) -> bool:
    """Return True for the folder of a run, or one of its checkpoints."""
    return path.exists() and any((folder_of(path) / "configs").glob("*.yaml"))


def is_shared(path: Path) -> bool:
    """Return True for the folder of a shared model, even if one of its files is missing."""
    files = (path / name for name in (CONFIG, WEIGHTS))
    return any(file.is_file() for file in files) and not is_run(path)


def name_tokenizer(config: LoadedConfig, tokenizer: str | Path) -> None:
    """Replace the run of a prior's tokenizer in a configuration.

    Raises:
        ValueError: The model's first stage is not the model of another run.
    """
    model = config.block("model")
    blocks = [((model.get("params") or {}).get("first_stage_config"), "first_stage_config")]
    while blocks:
        block, path = blocks.pop()
        if isinstance(block, dict) and block.get("target") == LOADER:
            block["params"] = {**(block.get("params") or {}), "run": str(tokenizer)}
            config.origins[f"model.params.{path}.params.run"] = COMMAND_LINE
            return
        blocks += [(item, f"{path}.{key}") for key, item in entries(block)]
    raise ValueError(
        f"a tokenizer {tokenizer} is given, but the {model.get('target')} of this run takes none "
        "from another run"
    )
