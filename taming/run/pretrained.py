"""The folder of a shared model: ``config.yaml`` and ``model.safetensors``, and nothing of training.

Each top-level block of ``config.yaml`` describes a module: ``model``; ``context``, the context
network of a tokenizer; ``level_0``, ``level_1``, ... the priors of all levels of a VQ-VAE-2. Keys
in ``model.safetensors`` begin with the name of the block, except those of ``model``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from taming.run.check import check_block
from taming.run.config import LoadedConfig, load_config
from taming.run.parts import CONFIG, WEIGHTS, is_run, loading
from taming.run.trust import check_trust
from taming.util import instantiate_from_config, replacing

if TYPE_CHECKING:
    from torch import Tensor, nn

CARD = "README.md"

_BLOCKS = re.compile("model|context|level_[0-9]+")
_NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}
# Arguments of models that only training, or the machine at hand, needs.
_OF_TRAINING = (
    *("ckpt_path", "ignore_keys", "trust_checkpoint", "scheduler_config", "compile"),
    *("freeze", "quantize_start"),
)
_MOST_KEYS = 3  # named in an error


# --- saving --------------------------------------------------------------------------------------


def save_modules(
    folder: str | Path, modules: Mapping[str, Any], card: str, dtype: Any = None
) -> None:
    """Save modules with all that their use needs; an existing ``README.md`` stays.

    Args:
        folder: The folder; it is created.
        modules: Block name -> a module with ``to_config``.
        card: Text of ``README.md``.
        dtype: Floating-point dtype, or its name, for the weights of models; None keeps theirs, as
            do weights beyond the range of the dtype. Those of a context network keep theirs, since
            they must be exact.

    Raises:
        ValueError: The folder is a run, the dtype is none, or a file cannot state a configuration.
        WriteError: A file cannot be saved.
    """
    from safetensors.torch import save

    folder = Path(folder)
    if is_run(folder):
        raise ValueError(f"{folder} is a run: choose another folder to share its model")
    kind = _floating(dtype)
    config = {name: _for_inference(module.to_config()) for name, module in modules.items()}
    weights = {}
    for name, module in modules.items():
        for key, value in _weights_of(module, name).items():
            weights[key] = value if name == "context" else _converted(value, kind)
    with replacing(folder / WEIGHTS) as part:
        part.write_bytes(save(weights, {"format": "pt"}))  # save_file would let only its user read
    with replacing(folder / CONFIG) as part:
        part.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if not (folder / CARD).exists():
        with replacing(folder / CARD) as part:
            part.write_text(card, encoding="utf-8")


def _for_inference(value: Any, where: str = "model") -> Any:
    """Return a configuration without what only training needs, and with a loss of no weights."""
    if isinstance(value, list):
        return [_for_inference(item, where) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("remap") is not None:
        raise ValueError(f"{where}.remap names a file, {value['remap']}, which would not go along")
    kept = {key: item for key, item in value.items() if key not in _OF_TRAINING}
    return {
        key: _NO_LOSS if key == "lossconfig" else _for_inference(item, f"{where}.{key}")
        for key, item in kept.items()
    }


def _weights_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return a module's tensors under the keys of the file, each once, those of losses left out."""
    prefix = "" if name == "model" else f"{name}."
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in module.state_dict(keep_vars=True).items():
        if "loss" not in key.split(".") and id(value) not in seen:
            seen.add(id(value))
            found[prefix + key] = value.detach()
    return found


def _floating(dtype: Any) -> Any:
    """Return the floating-point dtype of a name, or the dtype itself; None for None."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must be one of floating point such as 'float16', got {dtype!r}")
    return found


def _converted(value: Tensor, dtype: Any) -> Tensor:
    value = value.contiguous()
    if dtype is None or not value.is_floating_point():
        return value
    converted = value.to(dtype)
    return converted if converted.isfinite().all() else value


# --- loading -------------------------------------------------------------------------------------


def load_modules(
    folder: Path, config: LoadedConfig | None = None, trust_config: bool = False, **params: Any
) -> dict[str, Any]:
    """Build the modules of a shared folder with their weights, in evaluation mode.

    Args:
        folder: The folder.
        config: Configuration to use in place of its own.
        trust_config: Build any targets that its ``config.yaml`` names.
        **params: Values that replace entries of ``model.params``.

    Returns:
        Block name -> module.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The folder is a run, a block is unknown or asks for what it may not, or the
            weights do not fit it.
    """
    from taming.checkpoint import load_checkpoint

    _check_files(folder)
    config = config or load_config([folder / CONFIG], untrusted=None if trust_config else folder)
    names = [name for name in config.values if name not in ("data", "lightning")]
    if not names or (unknown := [name for name in names if not _BLOCKS.fullmatch(name)]):
        found = ", ".join(unknown) if names else "no block"
        raise config.error("", f"{folder / CONFIG} has {found}; expected model, context or level_0")
    for name in names:  # all before any is built
        check_trust(config, "model", name)
        check_block(config, name, config.block(name), extra=["base_learning_rate"])
    with loading(folder, trust_config):
        given = {"model": params}
        modules = {name: _build(config.block(name), given.get(name, {})) for name in names}
    fill(modules, load_checkpoint(folder / WEIGHTS), f"{folder / WEIGHTS}")
    return modules


def fill(modules: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> None:
    """Fill modules with the weights of a file, each of which must be there and have a place.

    Args:
        modules: Block name -> module.
        weights: Key -> tensor; of losses, there are none.
        source: Name of the file, for the error.

    Raises:
        ValueError: A key is missing or unknown, or a shape differs.
    """
    own = {
        key: v for name, module in modules.items() for key, v in _weights_of(module, name).items()
    }
    if misfits := [*_misfits(own, weights)]:
        raise ValueError(f"{source} does not fit its model: {'; '.join(misfits)}")
    for key, value in own.items():
        value.copy_(weights[key])


def _check_files(folder: Path) -> None:
    if is_run(folder):
        raise ValueError(
            f"{folder} is a run: load it with taming.load, and save_pretrained makes a folder to "
            "share of it"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: expected a folder of save_pretrained, with {CONFIG} and "
                f"{WEIGHTS}"
            )


def _build(block: Mapping[str, Any], params: Mapping[str, Any]) -> nn.Module:
    merged = {**(block.get("params") or {}), **params}
    return instantiate_from_config({"target": block["target"], "params": merged}).eval()


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield what is wrong with the keys and shapes of a file."""
    if lacking := [key for key in own if key not in weights]:
        yield f"it lacks {_listed(lacking)}"
    if unknown := [key for key in weights if key not in own]:
        yield f"nothing takes its {_listed(unknown)}"
    shapes = {
        key: (tuple(weights[key].shape), tuple(own[key].shape)) for key in own if key in weights
    }
    if wrong := [f"{key} of {a} in place of {b}" for key, (a, b) in shapes.items() if a != b]:
        yield f"it holds {_listed(wrong)}"


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_KEYS
    return ", ".join(names[:_MOST_KEYS]) + (f" and {more} more" if more > 0 else "")
