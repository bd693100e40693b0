"""Sharing: a trained model as one folder, here or on a hub, that needs nothing of its run."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from taming.downloads import HUB_NAME
from taming.util import usable_device

S = TypeVar("S", bound="Shared")

_CARD = """---
library_name: loopy-taming
tags: [image-tokenizer, vector-quantization]
---

# {title}

Made by loopy-taming. Say here what it was trained on, for how long, how good it is, and what it is
not for.

{facts}

```python
import taming
{kind} = taming.{name}.from_pretrained("folder or name")
```
"""


class Shared(ABC):
    """Saves its modules as ``config.yaml`` and ``model.safetensors``, and loads them again.

    Attributes:
        name: What it was loaded by, for messages.
    """

    name: str = "this one"

    @abstractmethod
    def shared_modules(self) -> dict[str, Any]:
        """Return the modules to save, by block name (`taming.run.pretrained`)."""

    @classmethod
    @abstractmethod
    def of_modules(cls: type[S], modules: Mapping[str, Any]) -> S:
        """Return the object of loaded modules.

        Raises:
            ValueError: They are of another kind.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the facts of the model card that the configuration states: name -> value."""

    def __repr__(self) -> str:
        """Return the class and the facts, in one line."""
        facts = "; ".join(f"{key}: {value}" for key, value in self.facts().items())
        return f"{type(self).__name__}({facts})"

    def to(self: S, device: torch.device | str) -> S:
        """Move the modules to a device; return the object."""
        for module in self.shared_modules().values():
            module.to(usable_device(device))
        return self

    def frozen(self: S) -> S:
        """Make no parameter of the modules trainable; return the object."""
        for module in self.shared_modules().values():
            module.requires_grad_(False)
        return self

    @classmethod
    def from_pretrained(
        cls: type[S],
        name: str | Path,
        device: torch.device | str = "cpu",
        *,
        revision: str | None = None,
        trust_config: bool = False,
    ) -> S:
        """Load a shared model.

        Args:
            name: A folder of `save_pretrained`, else the name of a model that ships, else
                ``owner/name`` on the hub. A path that exists wins.
            device: Device for the model.
            revision: Branch, tag or commit on the hub.
            trust_config: Build whatever its configuration names, which may run any code; by
                default, only what ``docs/security.md`` lists.

        Raises:
            ConnectionError: The hub cannot be reached, and its cache does not hold the model.
            FileNotFoundError: There is no such model, or a file is missing.
            ValueError: It is a run, or a model of another kind, or asks for what it may not; its
                weights do not fit it; or there is no such device.
        """
        from taming.run.hub import download
        from taming.run.parts import missing, place_of
        from taming.run.pretrained import load_modules

        device, folder = usable_device(device), place_of(name)  # before anything is loaded
        if not folder.exists():
            if not HUB_NAME.fullmatch(str(name)):
                raise missing(name)
            folder = download(str(name), revision)
        modules = load_modules(folder, trust_config=trust_config)
        loaded = cls.of_modules(modules).frozen().to(device)
        loaded.name = str(name)
        return loaded

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
        """Save the model with all that its use needs, and nothing of its training.

        Args:
            folder: The folder; it is created. A ``README.md`` that is there stays.
            dtype: Floating-point dtype of the saved weights, such as ``float16``, which halves the
                file; they are float32 again when loaded. None keeps the model's, bit for bit.

        Raises:
            ValueError: The folder is a run, the dtype is none, or a file cannot state the model's
                configuration.
            OSError: A file cannot be saved.
        """
        from taming.run.pretrained import save_modules

        card = self._card(Path(folder).resolve().name)
        save_modules(folder, self.shared_modules(), card, dtype)

    def push_to_hub(
        self,
        name: str,
        dtype: torch.dtype | str | None = None,
        *,
        private: bool | None = None,
        message: str = "",
    ) -> str:
        """Upload the model, as `save_pretrained` saves it, in one commit.

        Args:
            name: ``owner/name``, or a name of one's own; the repository is created if there is
                none. Its ``README.md`` stays if it has one.
            dtype: Floating-point dtype of the uploaded weights, or None.
            private: Show a new repository to its owner alone; None follows the owner's settings.
            message: Message of the commit.

        Returns:
            Address of the commit.

        Raises:
            ConnectionError: The hub cannot be reached, or refuses.
            ValueError: As for `save_pretrained`, or ``huggingface_hub`` is not installed.
        """
        from taming.run.hub import upload

        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, name.rpartition("/")[2])
            self.save_pretrained(folder, dtype)
            return upload(folder, name, private, message)

    def _card(self, title: str) -> str:
        name = type(self).__name__
        facts = "\n".join(f"- {key}: {value}" for key, value in self.facts().items())
        return _CARD.format(title=title, facts=facts, name=name, kind=name.lower())


def count_parameters(module: nn.Module) -> str:
    """Return the number of a module's parameters, those of its loss left out, such as 1,024."""
    named = module.named_parameters()
    return f"{sum(p.numel() for name, p in named if 'loss' not in name.split('.')):,}"
