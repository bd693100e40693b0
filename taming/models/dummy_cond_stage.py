"""A condition that already is a sequence of tokens, such as a layout of objects."""

from __future__ import annotations

from torch import Tensor

from taming.modules.util import Quantized


class DummyCondStage:
    """Passes tokens through; stands where a prior expects a condition's tokenizer.

    Args:
        conditional_key: Key of the tokens in a batch.
    """

    def __init__(self, conditional_key: str) -> None:
        self.conditional_key = conditional_key

    def eval(self) -> DummyCondStage:
        """Return itself: there is nothing to switch."""
        return self

    @staticmethod
    def encode(c: Tensor) -> Quantized:
        """Return tokens (B, L) int64 in the form of a first stage's ``encode``."""
        return c, None, (None, None, c)

    @staticmethod
    def decode(c: Tensor) -> Tensor:
        """Return tokens as they are."""
        return c

    @staticmethod
    def to_rgb(c: Tensor) -> Tensor:
        """Return tokens as they are."""
        return c
