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


class _Untrained(nn.Module):
    """What inference takes from a LightningModule."""

    global_step = 0

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(chain(self.parameters(), self.buffers())).device


if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as Model
else:

    class Model(_Untrained):
        """A LightningModule if Lightning was imported before it is built.

        One that was built before has no way to a Trainer: build it again.
        """

        def __new__(cls, *args: Any, **kwargs: Any) -> Model:
            """Take up Lightning's base class, once for all models, before one is built."""
            if "lightning.pytorch" in sys.modules and Model.__bases__ == (_Untrained,):
                from lightning.pytorch import LightningModule

                Model.__bases__ = (LightningModule,)
            return super().__new__(cls)
