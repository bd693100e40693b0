"""The base class of models: Lightning's, in programs that import Lightning.

Lightning takes longer to import than all else that inference needs, and inference needs none of it.
So until a program imports Lightning, models are plain modules of torch.
"""

from __future__ import annotations

import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from taming.modules.recorded import Recorded


class _Untrained(nn.Module):
    """Base class of `Model` without Lightning."""

    global_step = 0


if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    class Model(Recorded, LightningModule):
        """A LightningModule that remembers its arguments."""

else:

    class Model(Recorded, _Untrained):
        """A LightningModule if Lightning is imported before one is built.

        Those that were built before go on, but no Trainer takes them: build them again.
        """

        _trainer = None  # of those built before

        def __new__(cls, *args: Any, **kwargs: Any) -> Model:
            """Give all models Lightning's base class, before the first that may be trained."""
            if "lightning.pytorch" in sys.modules and _Untrained in Model.__bases__:
                from lightning.pytorch import LightningModule

                Model.__bases__ = (Recorded, LightningModule)
            return super().__new__(cls, *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            """Look up parameters and modules; explain what a model built too early lacks."""
            try:
                return super().__getattr__(name)
            except AttributeError as error:
                if _Untrained in Model.__bases__ or "_trainer" in vars(self):
                    raise
                reason = "was built before Lightning was imported: build it again to train it"
                raise AttributeError(f"{error}; this model {reason}") from error

        @property
        def device(self) -> torch.device:
            """Device of the weights."""
            return next(chain(self.parameters(), self.buffers())).device
