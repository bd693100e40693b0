"""Class-conditional priors over the tokens of one tokenizer, to be compared.

Axis letters: B images, L tokens, T tokens of a site, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from race.plans import MODERN
from race.training import schedule
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.pixelcnn import PixelCNNPrior
from taming.models.vqgan import VQModel
from taming.modules.sequence.notations import TokenSequence, UnarySequence

TRANSFORMER = "taming.modules.transformer"
HIDDEN = 0.1  # fraction of the classes hidden from transformers in training, for guidance
NAMES = ("unary", "run-length", "unary-modern", "two-level", "two-level-modern", "pixelcnn")
Sizes = Mapping[str, Mapping[str, Any]]


def build_prior(name: str, sizes: Sizes, tokenizer: VQModel, steps: int) -> pl.LightningModule:
    """Build a prior for the ten classes of CIFAR-10.

    Args:
        name: One of ``NAMES``.
        sizes: Parameters of ``main`` (all transformers), ``depth`` (the two-level ones' second
            network) and ``pixelcnn``.
        tokenizer: A loopy tokenizer.
        steps: Training steps of the learning rate's schedule.
    """
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    common: dict[str, Any] = {
        "first_stage_config": {"target": "race.training.keep", "params": {"model": tokenizer}},
        "cond_stage_config": labels,
        "cond_stage_key": "class_label",
        "scheduler_config": schedule(steps),
    }
    if name == "pixelcnn":
        stacks = {"target": "taming.modules.pixelcnn.stacks.GatedStacks", "params": sizes[name]}
        return PixelCNNPrior(stacks_config=stacks, **common)
    own = tokenizer.quantize.sequence
    assert isinstance(own, UnarySequence)
    params = {"n_e": own.n_e, "max_loops": own.max_loops, "dummies": own.dummies}
    kind = "RunLengthSequence" if name == "run-length" else "UnarySequence"
    target = f"taming.modules.sequence.notations.{kind}"
    sequence = UnarySequence(**params)
    depth = sequence.site_tokens + (name == "run-length")  # its count token
    side = tokenizer.grid[0]
    two_level = name.startswith("two-level")
    network: dict[str, Any] = {
        "vocab_size": own.n_e + own.max_loops + 1,  # enough for either sequence, no condition
        "block_size": side * side * (1 if two_level else depth) + 1,
        "site_shape": (side, side, depth),
        **sizes["main"],
    }
    modern = MODERN if name.endswith("modern") else {}
    network |= modern | {"rotary": bool(modern)}
    if two_level:
        network["depth"] = {**sizes["depth"], **modern}
    path = "two_level.TwoLevelGPT" if two_level else "mingpt.GPT"
    return Net2NetTransformer(
        {"target": f"{TRANSFORMER}.{path}", "params": network},
        sequence_config={"target": target, "params": params},
        condition_dropout=HIDDEN,
        **common,
    )


class OrderZero:
    """Frequencies of tokens at each place within a site, counted in training images.

    Args:
        sequence: The tokens' notation.
        training: Batches of tokens (B, L) int64, -1 after the end of a sequence.
    """

    def __init__(self, sequence: TokenSequence, training: Iterable[Tensor]) -> None:
        self.sequence = sequence
        self.counts = torch.ones(sequence.site_tokens, sequence.vocab_size)
        for tokens in training:
            self.counts.index_put_(self._places(tokens), torch.ones(()), accumulate=True)

    def _places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place within its site, and the value, of every token."""
        tokens = tokens.cpu()
        present = tokens >= 0
        return self.sequence.states(tokens).depth[present], tokens[present]

    def bits(self, tokens: Tensor) -> float:
        """Return -log2 p of the tokens (B, L), summed over all images."""
        share = self.counts / self.counts.sum(dim=1, keepdim=True)
        return -float(share[self._places(tokens)].double().log().sum()) / math.log(2)
