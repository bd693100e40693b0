"""The prior of a context network trains on any tokenizer's codes, at all of its rates."""

import math

import pytest
import torch
from support.models import images, tokenizer_config, trainer, vqmodel_config, vqvae2_config

from taming.models.context import ContextPrior
from taming.models.sampling import Progress
from taming.modules.transformer.generate import SamplingParams
from taming.modules.vqvae.entropy import EntropyTables

NETWORK = {
    "target": "taming.modules.context.ContextNetwork",
    "params": {"channels": 4, "hidden": 8},
}


def prior(kind: str = "residual", **kwargs) -> ContextPrior:
    """A small prior whose tokenizer spreads latents over its codes."""
    built = ContextPrior(tokenizer_config(kind), NETWORK, **kwargs)
    with torch.no_grad():
        built.first_stage_model.quantize.embedding.weight.copy_(torch.randn(16, 4) * 0.5)
    return built


@pytest.mark.parametrize("kind", ["residual", "plain"])
def test_training_lowers_the_bits_and_leaves_the_tokenizer(kind: str, tmp_path) -> None:
    model = prior(kind)
    frozen = {k: v.clone() for k, v in model.first_stage_model.state_dict().items()}
    model.learning_rate = 1e-2
    before = trainer(tmp_path).validate(model, images(4, 4), verbose=False)[0]
    fit = trainer(tmp_path, max_epochs=4)
    fit.fit(model.train(), images(8, 4), images(4, 4))
    for name, value in model.first_stage_model.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    logged = {k.removeprefix("val/"): v for k, v in fit.callback_metrics.items() if "val/" in k}
    assert logged["bits_per_image"] < before["val/bits_per_image"]
    torch.testing.assert_close(logged["bits_per_image"] / 16**2, logged["bits_per_pixel"])
    torch.testing.assert_close(logged["bits_per_token"], logged["loss"] / math.log(2))


def test_rates_are_those_of_the_range_spread_evenly_where_nothing_is_trained() -> None:
    model, x = prior(length_range=[1, 3]).eval(), torch.rand(4, 3, 16, 16)
    counts = (model.encode_codes(x) >= 0).flatten(1).sum(dim=1)
    assert bool((counts <= torch.tensor([80, 112, 144, 176])).all())
    assert bool((counts.diff() > 0).all())
    torch.manual_seed(0)
    trained = {int((model.train().encode_codes(x)[0] >= 0).sum()) for _ in range(8)}
    assert len(trained) > 3 and min(trained) >= 64


def test_the_logits_start_at_the_tables_of_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.rand(3, 16)
    monkeypatch.setattr(EntropyTables, "code_bits", lambda tables: bits)
    monkeypatch.setattr(EntropyTables, "learned", True)
    torch.testing.assert_close(prior().context.shares.detach(), -math.log(2) * bits)
    monkeypatch.setattr(EntropyTables, "learned", False)
    assert not prior().context.shares.detach().any()


def test_completions_keep_known_sites_and_samples_depend_on_their_generator_alone() -> None:
    model, x = prior().eval(), torch.rand(2, 3, 16, 16)
    codes, condition = model.encode_codes(x), torch.zeros(2, 1, dtype=torch.int64)
    known, seen = torch.rand(8, 8) < 0.5, []
    found = model.sample_codes(condition, codes=codes, known=known, callback=seen.append)
    unknown = int((~known).sum())
    turns = [(turn * unknown, 3 * unknown) for turn in (1, 2, 3)]
    assert [(progress.tokens, progress.most) for progress in seen] == turns
    assert torch.equal(found[:, known], codes[:, known])
    assert not torch.equal(found, codes)
    model.sequence.encode(found)  # raises unless they are codes
    greedy = SamplingParams(greedy=True)
    assert torch.equal(*(model.sample_codes(condition, greedy) for _ in range(2)))
    with pytest.raises(ValueError, match="no guidance"):
        model.sample_codes(condition, SamplingParams(guidance=2.0))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="writes dummies"):
        prior("attract")
    for wrong in ([0.5, 2], [2, 1], [1, 4]):
        with pytest.raises(ValueError, match=r"two bounds in \[1, max_loops = 3\]"):
            prior(length_range=wrong)


def test_codes_so_far_can_be_decoded_at_a_fixed_length_too() -> None:
    params = {"name": "ResidualVQ", "num_quantizers": 3}
    library = {"target": "taming.modules.vqvae.zoo.LibraryQuantizer", "params": params}
    model = ContextPrior(vqmodel_config(quantizer_config=library), NETWORK).eval()
    seen: list[Progress] = []
    model.sample_codes(torch.zeros(2, 1, dtype=torch.int64), callback=seen.append)
    assert len(seen) == 3
    for progress in seen:
        model.decode_codes(progress.codes())


def test_the_codes_of_a_level_are_refused() -> None:
    level = {"target": "taming.models.vqvae2.Level", "params": {"level": "top"}}
    level["params"]["model_config"] = vqvae2_config("loopy", "flat")
    with pytest.raises(ValueError, match="whole tokenizer"):
        ContextPrior(level, NETWORK)
