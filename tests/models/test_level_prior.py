"""Priors of a VQ-VAE-2's levels: each learns, and is drawn, given the levels above."""

from typing import Any

import pytest
import torch
from support.models import (
    GPT,
    LEVELS,
    every_pair,
    images,
    level_config,
    pictures,
    spread_codes,
    trainer,
)

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.level_prior import LowerLevelPrior, check_priors, sample_levels
from taming.models.pixelcnn import PixelCNNPrior
from taming.models.vqvae2 import Level
from taming.modules.transformer.generate import SamplingParams

START = torch.zeros(3, 1, dtype=torch.int64)
CLASSES = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}


def level_prior(name: str, *kinds: str, **sizes: Any) -> Net2NetTransformer:
    """A small prior over a level; its tokenizer is the same each time."""
    side = 8 >> LEVELS[len(kinds)][::-1].index(name)
    gpt = {**GPT["params"], "block_size": 400, "site_shape": (side, side, 3), **sizes}
    config = {**GPT, "params": gpt}, level_config(name, *kinds)
    torch.manual_seed(0)
    built = (
        Net2NetTransformer(*config, cond_stage_config="__is_unconditional__")
        if name == "top"
        else LowerLevelPrior(*config)
    )
    spread_codes(stage_of(built).model)
    return built.eval()


def pixelcnn_prior(*kinds: str) -> PixelCNNPrior:
    """The same for the top level, with convolutions."""
    stacks = {"channels": 8, "layers": 2}
    stacks = {"target": "taming.modules.pixelcnn.stacks.GatedStacks", "params": stacks}
    torch.manual_seed(0)
    built = PixelCNNPrior(level_config("top", *kinds), stacks)
    spread_codes(stage_of(built).model)
    return built.eval()


def stage_of(prior: Any) -> Level:
    return prior.first_stage_model


@every_pair
def test_a_lower_levels_prior_learns_given_what_stands_above(
    kinds: tuple[str, ...], tmp_path
) -> None:
    prior, batch = level_prior("bottom", *kinds), images(4, 4)
    frozen = {k: v.clone() for k, v in prior.first_stage_model.state_dict().items()}
    prior.learning_rate = 1e-2
    fit = trainer(tmp_path, max_epochs=6)
    (before,) = fit.validate(prior, batch, verbose=False)
    fit.fit(prior.train(), batch, batch)
    (after,) = fit.validate(prior, batch, verbose=False)
    assert after["val/bits_per_image"] < 0.9 * before["val/bits_per_image"]
    for name, value in prior.first_stage_model.state_dict().items():
        assert torch.equal(value, frozen[name]), name

    x = next(iter(batch))["image"].movedim(3, 1)
    with torch.no_grad():
        logits, targets = prior.eval()(x, x)
        other, same = prior(x, x.flip(0))  # the same codes, under those of another image
    assert torch.equal(targets, same)
    assert (logits != other).any(dim=-1)[targets >= 0].all()
    shown = prior.log_images(next(iter(batch)))
    assert all(picture.shape == (4, 3, 16, 16) for picture in shown.values())
    with torch.no_grad():
        torch.testing.assert_close(shown["reconstructions"], stage_of(prior).model(x)[0])


@every_pair
def test_one_pass_of_the_tokenizer_sees_what_two_would(kinds: tuple[str, ...]) -> None:
    prior, batch = level_prior("bottom", *kinds), next(iter(images(4, 4)))
    for own, general in zip(
        prior.tokenize_batch(batch), Net2NetTransformer.tokenize_batch(prior, batch), strict=True
    ):
        torch.testing.assert_close(own, general, rtol=0, atol=0)
    with pytest.raises(ValueError, match="train this prior from images"):
        prior.tokenize_batch(batch | {"fingerprint": ["x"]})


@pytest.mark.parametrize("top", ["transformer", "pixelcnn"])
@pytest.mark.parametrize(
    "kinds", [("ema", "flat"), ("loopy", "loopy"), ("loopy", "flat", "ema")], ids="-".join
)
def test_each_level_is_drawn_given_those_above(kinds: tuple[str, ...], top: str) -> None:
    lower = [level_prior(name, *kinds) for name in LEVELS[len(kinds)][1:]]
    highest = level_prior("top", *kinds) if top == "transformer" else pixelcnn_prior(*kinds)
    priors = [highest, *lower]
    first, again, other = (
        torch.manual_seed(seed) and sample_levels(priors, START, SamplingParams(top_k=9))
        for seed in (1, 1, 2)
    )
    for one, same, different in zip(first, again, other, strict=True):
        assert torch.equal(one, same) and not torch.equal(one, different)
    assert stage_of(lower[-1]).model.decode_code(first).shape == (3, 3, 16, 16)
    assert first[0].shape[:3] == (3, *highest.grid)
    greedy = sample_levels(priors, START, SamplingParams(greedy=True))
    for number, prior in enumerate(lower, 1):
        condition = stage_of(prior).condition_tokens(greedy[:number])
        grid = prior.grid
        tokens = prior.sample(condition[:, :0], condition, grid=grid)
        assert torch.equal(prior.tokens_to_codes(tokens, grid), greedy[number])


def class_prior(*kinds: str) -> Net2NetTransformer:
    """A prior over the top level that looks at the class, and has seen it hidden."""
    gpt = {**GPT, "params": {**GPT["params"], "vocab_size": 18, "site_shape": (4, 4, 3)}}
    labels = {"cond_stage_config": CLASSES, "cond_stage_key": "class_label"}
    built = Net2NetTransformer(gpt, level_config("top", *kinds), **labels, condition_dropout=0.1)
    spread_codes(stage_of(built).model)
    with torch.no_grad():
        for parameter in built.transformer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return built.eval()


def test_the_class_is_that_of_the_top_and_guides_it() -> None:
    priors = [class_prior("ema", "flat"), level_prior("bottom", "ema", "flat")]
    draw = {
        (label, scale): sample_levels(
            priors, START + label, SamplingParams(greedy=True, guidance=scale)
        )
        for label in (3, 7)
        for scale in (0.0, 1.0, 3.0)
    }
    assert not torch.equal(draw[3, 1.0][0], draw[7, 1.0][0])
    assert not torch.equal(draw[3, 1.0][0], draw[3, 3.0][0])
    # At a scale of 0 only its unconditional prediction is left; the bottom follows the top.
    for one, other in zip(draw[3, 0.0], draw[7, 0.0], strict=True):
        assert torch.equal(one, other)
    alone = [level_prior("top", "ema", "flat"), priors[1]]
    with pytest.raises(ValueError, match="guidance 3.0 needs .*level"):
        sample_levels(alone, START, SamplingParams(guidance=3.0))


@every_pair
@torch.no_grad()
def test_a_prior_of_the_top_level_draws_and_completes_what_that_says(
    kinds: tuple[str, ...],
) -> None:
    prior, x = pixelcnn_prior(*kinds), pictures(2)
    codes = prior.encode_codes(x)
    assert prior.grid == codes.shape[1:3] == (4, 4)
    torch.testing.assert_close(prior.decode_codes(codes), stage_of(prior).decode_code(codes))
    nats, lengths = prior(x, x)
    assert nats.shape == (2,) and (lengths >= 16).all()


def moved() -> Net2NetTransformer:
    """A prior over the bottom level of another tokenizer."""
    prior = level_prior("bottom", "ema", "flat")
    with torch.no_grad():
        stage_of(prior).model.quantize.levels[0].embedding.weight.add_(1)
    return prior


def test_priors_that_do_not_belong_together_are_refused() -> None:
    kinds = ("ema", "flat")
    top, bottom = (level_prior(name, *kinds) for name in LEVELS[2])
    plain = Net2NetTransformer(
        {**GPT, "params": {**GPT["params"], "site_shape": (8, 8, 3)}},
        level_config("bottom", *kinds),
        cond_stage_config="__is_unconditional__",
    )
    check_priors([top, bottom])
    for priors, message in (
        ([bottom, top], "from the top down, .'top', 'bottom'.*levels .'bottom', 'top'"),
        ([top], "got 1 priors with the levels .'top'"),
        ([top, moved()], "the prior of 'bottom' was trained on another tokenizer's codes"),
        ([top, plain], "the prior of 'bottom' must be a LowerLevelPrior"),
    ):
        with pytest.raises(ValueError, match=message):
            check_priors(priors)


def test_priors_of_levels_that_do_not_fit_are_refused() -> None:
    kinds = ("loopy", "flat")
    with pytest.raises(TypeError, match="downsample_cond_size"):  # would do nothing
        LowerLevelPrior(GPT, level_config("bottom", *kinds), downsample_cond_size=4)
    with pytest.raises(ValueError, match="taming.models.vqvae2.Level below the top"):
        LowerLevelPrior(GPT, level_config("top", *kinds))
    with pytest.raises(ValueError, match="vocab_size 16 .*Level .* 16$"):
        level_prior("bottom", *kinds, vocab_size=16)
    with pytest.raises(ValueError, match="16, .*condition_dropout"):
        LowerLevelPrior(GPT, level_config("bottom", *kinds), condition_dropout=0.1)
