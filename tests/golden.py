"""Reading the original's recorded outputs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from taming.util import instantiate_from_config


class Golden(NamedTuple):
    """A recorded model: its config, its parameters, its inputs and outputs by name."""

    config: dict[str, Any]
    parameters: dict[str, Tensor]
    io: dict[str, Tensor]

    def build(self) -> Any:
        """Build our model from the config and load the recorded parameters, strictly."""
        model = instantiate_from_config(self.config)
        model.load_state_dict(self.parameters, strict=True)
        return model.eval()


def load_golden(shared: Path, name: str) -> Golden:
    """Read ``upstream/golden/<name>.safetensors`` of the reference data."""
    with safe_open(shared / f"upstream/golden/{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return Golden(
        config,
        {key[6:]: value for key, value in tensors.items() if key.startswith("param/")},
        {key[3:]: value for key, value in tensors.items() if key.startswith("io/")},
    )
