"""A condition that already is a sequence of tokens, such as a layout of objects.

Axis letters: B batch, L tokens, H W image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taming.modules.util import ConditionStage, Quantized


class DummyCondStage(ConditionStage):
    """Condition stage that passes tokens through.

    Args:
        conditional_key: Key of the tokens in a batch.
    """

    condition_vocab_size = None
    condition_length = None

    def __init__(self, conditional_key: str) -> None:
        self.conditional_key = conditional_key

    def eval(self) -> DummyCondStage:
        """Return the stage; it has only one mode."""
        return self

    @staticmethod
    def encode(c: Tensor) -> Quantized:
        """Return tokens (B, L) int64 in the form of a first stage's ``encode``."""
        return c, None, (None, None, c)

    @staticmethod
    def decode(c: Tensor) -> Tensor:
        """Return tokens unchanged."""
        return c

    @staticmethod
    def to_rgb(c: Tensor) -> Tensor:
        """Return tokens unchanged."""
        return c

    def condition_pictures(
        self, c: Tensor, quant_c: Tensor, size: tuple[int, int], datasets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Draw layouts (B, L), if a data set has ``conditional_builders`` that can.

        Such a data set also has ``get_textual_label_for_category_no``, which names categories.
        """
        for dataset in datasets.values():
            builders = getattr(dataset, "conditional_builders", {})
            if self.conditional_key in builders:
                plot = builders[self.conditional_key].plot
                label = dataset.get_textual_label_for_category_no
                pictures = [plot(layout, label, size[::-1]) for layout in c.cpu()]
                return {"conditioning": torch.stack(pictures).to(c.device)}
        return {}
