"""An image tokenizer with a loopy quantizer, and autoregressive priors over its tokens.

>>> import taming
>>> tokenizer = taming.load("logs/<tokenizer>")  # doctest: +SKIP
>>> codes = tokenizer.encode("photo.jpg", max_codes=2000)  # doctest: +SKIP
>>> tokenizer.decode(codes).save("again.png")  # doctest: +SKIP
>>> taming.load("logs/<prior>").sample(16, seed=0, top_p=0.95)  # doctest: +SKIP
>>> taming.evaluate("logs/<tokenizer>", "photos").numbers  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taming.codes import Codes
    from taming.evaluation.evaluate import Evaluation, evaluate
    from taming.generator import Generator
    from taming.loading import load
    from taming.tokenizer import Tokenizer

__all__ = ["Codes", "Evaluation", "Generator", "Tokenizer", "evaluate", "load"]

# Imported on first use, so that ``import taming`` does not load torch.
_HOMES = {"Codes": "codes", "Generator": "generator", "Tokenizer": "tokenizer"}
_HOMES["load"] = "loading"
_HOMES |= dict.fromkeys(("Evaluation", "evaluate"), "evaluation.evaluate")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taming' has no attribute {name!r}")
    return getattr(importlib.import_module(f"taming.{_HOMES[name]}"), name)
