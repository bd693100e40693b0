"""Sizes of a prior's network follow from its parts; stated ones that do not fit are refused."""

from typing import Any

import pytest
import torch
from support.models import prior, tokenizer_config

from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.transformer.network import PriorNetwork


def labels(amount: int) -> dict:
    """Parameters of a prior on so many classes."""
    stage = {"target": "taming.modules.util.Labelator", "params": {"n_classes": amount}}
    return {"cond_stage_config": stage, "cond_stage_key": "class_label"}


CONDITION = tokenizer_config("plain")
CONDITION["params"]["n_embed"] = 32
ORDER = {"target": "taming.modules.transformer.permuter.SpiralIn", "params": {"H": 8, "W": 8}}
ITSELF = {"cond_stage_config": "__is_first_stage__", "cond_stage_key": "image"}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (labels(18), "vocab_size 17 .*: the condition's Labelator writes tokens up to 17$"),
        (
            {**labels(18), "gpt": {"vocab_size": 18}, "condition_dropout": 0.1},
            "Labelator writes tokens up to 17, and condition_dropout needs one more",
        ),
        ({"sos_token": 17}, "the condition's SOSProvider writes tokens up to 17"),
        ({"cond_stage_config": CONDITION}, "the condition's VQModel writes tokens up to 31"),
        ({"gpt": {"block_size": 191}}, "191 is too small: 64 sites of up to 3 .* of 1 make 192"),
        ({"levels": 2, "gpt": {"block_size": 63}}, "63 is too small: .* make 64"),
        ({"kind": "plain", "gpt": {"block_size": 63}, "permuter_config": ORDER}, "make 64 inputs"),
        ({"gpt": {"n_unmasked": 2}}, "n_unmasked 2 goes beyond the condition's 1 token"),
        ({"gpt": {"vocab_size": 16}}, "vocab_size 16 is too small: UnarySequence .* writes 17"),
        ({"gpt": {"site_shape": (8, 8, 2)}}, "has 2 depths, but a site takes up to 3 tokens"),
        (
            {
                "sequence_config": {
                    "target": "taming.modules.sequence.notations.UnarySequence",
                    "params": {"n_e": 16, "max_loops": 5, "dummies": False},
                }
            },
            "max_loops=5, .*, but the tokenizer has n_e=16, max_loops=3",
        ),
        (
            {
                "sequence_config": {
                    "target": "taming.modules.sequence.notations.RunLengthSequence",
                    "params": {"n_e": 16, "max_loops": 3, "dummies": True},
                }
            },
            "max_loops=3, dummies=True, but the tokenizer has n_e=16, max_loops=3, dummies=False",
        ),
        (
            {"first_stage_config": {"target": "models.test_sizes.prior"}},
            "first_stage_config must name a tokenizer, .* got a Net2NetTransformer",
        ),
        ({"cond_stage_config": "first_stage"}, "expected a block with a 'target'"),
        (ITSELF, "a condition needs one code for each site"),
    ],
)
def test_parts_that_do_not_fit_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior(**kwargs)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = prior(gpt={"site_shape": (4, 8, 4)}).eval()
    with pytest.raises(ValueError, match=r"8x8 sites does not fit .* \(4, 8, 4\)"):
        model(*[torch.rand(1, 3, 16, 16)] * 2)
    with pytest.raises(ValueError, match="needs the grid"):
        model.sample(torch.zeros(1, 0).long(), torch.zeros(1, 1).long(), steps=4)


@torch.no_grad()
def test_sequences_are_refused_at_the_first_batch_however_short() -> None:
    flat = torch.full((1, 3, 16, 16), 0.5)
    model = prior(gpt={"site_shape": None, "block_size": 191}).eval()
    assert model.encode_to_z(flat)[1].shape[1] < 191
    with pytest.raises(ValueError, match="block_size 191 is too small: .* make 192"):
        model(flat, flat)
    with pytest.raises(ValueError, match="condition of 64 make 127 inputs"):
        prior("plain", {"block_size": 126}, **ITSELF)(flat, flat)
    with pytest.raises(ValueError, match="n_unmasked 65 goes beyond the condition's 64"):
        prior("plain", {"n_unmasked": 65}, **ITSELF)(flat, flat)


def network_of(target: str, stated: dict, **kwargs: Any) -> PriorNetwork:
    """The network of a prior, of these stated sizes alone."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8} | stated
    config = {"target": f"taming.modules.transformer.{target}", "params": sizes}
    kind = kwargs.pop("kind", "residual")
    return Net2NetTransformer(
        config,
        **{
            "first_stage_config": tokenizer_config(kind),
            "cond_stage_config": "__is_unconditional__",
            **kwargs,
        },
    ).transformer


@pytest.mark.parametrize(
    ("target", "stated", "kwargs", "expected"),
    [
        ("mingpt.GPT", {}, {}, (17, 1 + 64 * 3, None)),
        ("mingpt.GPT", {"site_shape": True}, {}, (17, 1 + 64 * 3, (8, 8, 3))),
        ("mingpt.GPT", {"site_shape": False}, {}, (17, 1 + 64 * 3, None)),
        ("mingpt.GPT", {"site_shape": [4, 4, 3]}, {}, (17, 1 + 16 * 3, (4, 4, 3))),
        ("mingpt.GPT", {}, {"kind": "plain", **ITSELF}, (16, 64 + 64, None)),
        ("mingpt.GPT", {}, labels(20) | {"condition_dropout": 0.1}, (21, 1 + 64 * 3, None)),
        ("mingpt.GPT", {"vocab_size": 99, "block_size": 999}, {}, (99, 999, None)),
        ("two_level.TwoLevelGPT", {"depth": {}}, {}, (17, 1 + 64, (8, 8, 3))),
        ("two_level.TwoLevelGPT", {"depth": {}, "site_shape": False}, {}, (17, 65, (8, 8, 3))),
    ],
)
def test_sizes_follow_from_the_parts(
    target: str, stated: dict, kwargs: dict, expected: tuple
) -> None:
    network = network_of(target, stated, **kwargs)
    assert (network.vocab_size, network.block_size, network.site_shape) == expected


def test_a_size_that_only_the_data_determine_must_be_stated() -> None:
    stage = {
        "target": "taming.models.dummy_cond_stage.DummyCondStage",
        "params": {"conditional_key": "objects_bbox"},
    }
    layouts = {"cond_stage_config": stage, "cond_stage_key": "objects_bbox"}
    with pytest.raises(ValueError, match="vocab_size .* must be stated: .* DummyCondStage"):
        network_of("mingpt.GPT", {"block_size": 400}, **layouts)
    with pytest.raises(ValueError, match="block_size .* must be stated: .* DummyCondStage"):
        network_of("mingpt.GPT", {"vocab_size": 92}, **layouts)
    with pytest.raises(ValueError, match="block_size .* must be stated: .* VQModel"):
        network_of("mingpt.GPT", {}, kind="plain", **ITSELF, downsample_cond_size=8)
    assert network_of("mingpt.GPT", {"vocab_size": 92, "block_size": 400}, **layouts)


class Silent:
    """A condition stage as the original's were, which answers nothing."""

    def eval(self) -> None: ...

    def encode(self, c: torch.Tensor) -> tuple:
        return c, None, (None, None, c)


def test_a_condition_stage_that_does_not_answer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Silent lacks condition_vocab_size, condition_length"):
        prior(cond_stage_config={"target": "models.test_sizes.Silent"})


@torch.no_grad()
def test_what_just_fits_is_taken() -> None:
    x = torch.rand(1, 3, 16, 16)
    for model in (
        prior("plain", {"block_size": 127, "n_unmasked": 64}, **ITSELF),
        prior(levels=2, gpt={"block_size": 64, "n_unmasked": 1}),
        prior(gpt={"block_size": 192}, sos_token=16),
    ):
        assert model(x, x)[0].shape[0] == 1
    prior(**labels(17), condition_dropout=0.1, gpt={"vocab_size": 18})
