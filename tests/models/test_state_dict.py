"""Every model of the original has the state dict that its checkpoints have: keys, shapes, types."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.original import CONFIGS, PUBLISHED

from taming.util import instantiate_from_config

FOLDER = Path(__file__).resolve().parents[2] / "configs"
NAMES = [*CONFIGS, *PUBLISHED]


def without_checkpoints(block: Any) -> Any:
    """A configuration that starts from nothing."""
    if not isinstance(block, dict):
        return block
    return {key: without_checkpoints(value) for key, value in block.items() if key != "ckpt_path"}


def model_config(name: str) -> dict[str, Any]:
    if name in PUBLISHED:
        return PUBLISHED[name]
    shipped: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / name))
    return without_checkpoints(shipped["model"])


def expected_keys(shared: Path) -> dict[str, dict[str, list]]:
    return json.loads((shared / "upstream/state_dict_keys.json").read_text())


def test_every_model_of_the_original_is_here(shared: Path) -> None:
    assert sorted(expected_keys(shared)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_keys_shapes_and_types_are_the_originals(name: str, shared: Path) -> None:
    keys = expected_keys(shared)[name]
    with torch.device("meta"):
        model = instantiate_from_config(model_config(name))
    found = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in model.state_dict().items()
    }
    assert found == {key: value for key, value in keys.items() if not key.endswith(".attn.mask")}
    # The masks that the original stored are taken without a word.
    whole = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in keys.items()
    }
    model.load_state_dict(whole, strict=True, assign=True)
