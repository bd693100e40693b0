"""Whether a transformer can take the tokens of images and conditions: how many kinds, how many."""

from __future__ import annotations

from typing import Any

from taming.models.vqgan import VQModel
from taming.models.vqvae2 import Level
from taming.modules.misc.coord import CoordStage
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.transformer.blocks import GPTConfig
from taming.modules.transformer.gpt import GPT
from taming.modules.transformer.two_level import TwoLevelGPT
from taming.modules.util import Labelator, SOSProvider


def condition_tokens(stage: Any) -> int:
    """Return how many different tokens conditions may have; 0 where only the data know."""
    if isinstance(stage, Labelator):
        return stage.n_classes
    if isinstance(stage, SOSProvider):
        return stage.sos_token + 1
    if isinstance(stage, CoordStage):
        return stage.n_embed  # the mean of a site's coordinates is less than 1
    if isinstance(stage, VQModel):
        return stage.quantize.sequence.vocab_size
    return stage.condition_vocab_size if isinstance(stage, Level) else 0


def check_condition(stage: Any) -> None:
    """Refuse a condition stage whose sequences differ in length.

    Raises:
        ValueError: It is a loopy tokenizer.
    """
    if isinstance(stage, VQModel) and stage.quantize.sequence.max_loops > 1:
        raise ValueError(
            f"the condition's {type(stage.quantize).__name__} writes sequences of different "
            "lengths; a condition needs one of one code for each site, such as VectorQuantizer2"
        )


def check_tokens(config: GPTConfig, sequence: TokenSequence, stage: Any, spare: bool) -> None:
    """Refuse a vocabulary that lacks tokens.

    Args:
        config: The transformer's.
        sequence: How images are written.
        stage: Writes conditions.
        spare: One more token must be free, to stand for a hidden condition.

    Raises:
        ValueError: Says whose tokens do not fit.
    """
    images = (
        f"{type(sequence).__name__} with n_e={sequence.n_e}, max_loops={sequence.max_loops} writes "
        f"{sequence.vocab_size} tokens"
    )
    tokens = condition_tokens(stage)
    conditions = f"the condition's {type(stage).__name__} writes tokens up to {tokens - 1}"
    for what, needed in ((images, sequence.vocab_size), (conditions, tokens)):
        if config.vocab_size < needed + spare:
            and_null = ", and condition_dropout needs one more" if spare else ""
            raise ValueError(
                f"transformer vocab_size {config.vocab_size} is too small: {what}{and_null}"
            )


def check_depths(config: GPTConfig, sequence: TokenSequence) -> None:
    """Refuse tables of places that are too small for a site.

    Raises:
        ValueError: A site may take more tokens.
    """
    shape = config.site_shape
    if shape is not None and shape[2] < sequence.site_tokens:
        raise ValueError(
            f"transformer site_shape {tuple(shape)} has {shape[2]} depths, but a site takes up "
            f"to {sequence.site_tokens} tokens"
        )


def check_grid(config: GPTConfig, grid: tuple[int, int]) -> None:
    """Refuse a grid (h, w) that the tables of places do not reach.

    Raises:
        ValueError: It does not fit.
    """
    shape = config.site_shape
    if shape is not None and (grid[0] > shape[0] or grid[1] > shape[1]):
        raise ValueError(
            f"a grid of {grid[0]}x{grid[1]} sites does not fit the transformer's site_shape "
            f"{tuple(shape)}"
        )


def check_lengths(
    transformer: GPT | TwoLevelGPT, sequence: TokenSequence, condition: int, sites: int
) -> None:
    """Refuse a transformer that is too short, or that would see the tokens it is to predict.

    Args:
        transformer: What is to read them.
        sequence: How images are written.
        condition: Tokens of a condition.
        sites: Sites of an image.

    Raises:
        ValueError: Says what does not fit.
    """
    config = transformer.config
    if config.n_unmasked > condition:
        raise ValueError(
            f"transformer n_unmasked {config.n_unmasked} goes beyond the condition's {condition} "
            "token(s), so that an image's tokens would see those after them"
        )
    # The last token of an image is not read.
    needed = condition + transformer.inputs_of(sites, sequence.site_tokens) - 1
    if config.block_size < needed:
        raise ValueError(
            f"transformer block_size {config.block_size} is too small: {sites} sites of up to "
            f"{sequence.site_tokens} token(s) after a condition of {condition} need {needed}"
        )
