"""The Gumbel quantizer: the original's scores and draws, and certainty in eval mode."""

import numpy as np
import pytest
import torch
from support.original import load_golden

from taming.modules.vqvae.quantize import GumbelQuantize
from taming.util import NonFiniteError

K, C, D = 16, 6, 4


def gumbel(**kwargs) -> GumbelQuantize:
    return GumbelQuantize(C, D, K, **kwargs)


def test_scores_and_divergence_are_the_originals(shared) -> None:
    golden = load_golden(shared, "gumbel")
    _, loss, info, logits = golden.build()(golden.io["z"], return_logits=True)
    torch.testing.assert_close(logits, golden.io["logits"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, golden.io["kl"], rtol=1e-5, atol=0)
    assert torch.equal(info.indices, golden.io["logits"].argmax(dim=1))


def test_draws_in_eval_mode_are_the_originals_under_legacy(shared) -> None:
    golden = load_golden(shared, "gumbel")
    golden.config["params"]["legacy"] = True
    quantizer = golden.build()
    torch.manual_seed(7)
    quant, _, (_, _, indices) = quantizer(golden.io["z"])
    assert torch.equal(indices, golden.io["indices"])
    torch.testing.assert_close(quant, golden.io["quant"], rtol=1e-5, atol=1e-6)


def test_evaluation_is_certain_and_training_is_not() -> None:
    quantizer, z = gumbel().eval(), torch.randn(4, C, 8, 8)
    first, again = quantizer(z), quantizer(z)
    assert torch.equal(first.info.indices, again.info.indices)
    assert torch.equal(first.z_q, again.z_q)
    quantizer.train()
    assert not torch.equal(quantizer(z).info.indices, quantizer(z).info.indices)


@pytest.mark.parametrize("straight_through", [True, False])
def test_training_draws_codes_or_mixtures_with_gradient(straight_through: bool) -> None:
    quantizer, z = gumbel(straight_through=straight_through).train(), torch.randn(2, C, 3, 3)
    z_q, _, info = quantizer(z.requires_grad_())
    entry = quantizer.get_codebook_entry(info.indices, (2, 3, 3, D))
    assert torch.allclose(z_q, entry, atol=1e-5) == straight_through
    z_q.square().sum().backward()
    assert z.grad.abs().sum() > 0 and quantizer.embed.weight.grad.abs().sum() > 0


def test_a_low_temperature_draws_what_a_high_one_mixes() -> None:
    quantizer, z = gumbel(straight_through=False).train(), torch.randn(2, C, 3, 3)

    def far_from_any_code(temp: float | None) -> float:
        z_q = quantizer(z, temp).z_q.permute(0, 2, 3, 1).reshape(-1, D)
        return torch.cdist(z_q, quantizer.codebook).min(dim=1).values.mean().item()

    assert far_from_any_code(1e-4) < 1e-3 < far_from_any_code(None)
    quantizer.temperature = 1e-4
    assert far_from_any_code(None) < 1e-3


def test_codes_that_are_not_used_are_never_drawn(tmp_path) -> None:
    np.save(tmp_path / "used.npy", np.array([7, 2, 11]))
    quantizer = gumbel(remap=str(tmp_path / "used.npy")).train()
    z_q, _, info = quantizer(torch.randn(2, C, 8, 8))
    assert set(info.indices.unique().tolist()) == {0, 1, 2}
    codes = torch.tensor([7, 2, 11])[info.indices]
    expected = quantizer.codebook[codes].permute(0, 3, 1, 2)
    torch.testing.assert_close(z_q, expected, rtol=1e-5, atol=1e-5)


def test_the_plain_interface_returns_indices_by_themselves() -> None:
    z = torch.randn(2, C, 3, 3)
    quantizer = gumbel(use_vqinterface=False).eval()
    z_q, loss, indices = quantizer(z)
    quantizer.use_vqinterface = True
    expected = quantizer(z)
    assert torch.equal(indices, expected.info.indices)
    assert torch.equal(z_q, expected.z_q) and torch.equal(loss, expected.loss)


@pytest.mark.reported(13)
def test_all_is_float32_under_autocast() -> None:
    quantizer, z = gumbel().train(), torch.randn(2, C, 3, 3, dtype=torch.bfloat16)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *found, _, logits = quantizer(z, return_logits=True)
    torch.manual_seed(1)
    *expected, _, expected_logits = quantizer(z.float(), return_logits=True)
    torch.testing.assert_close([*found, logits], [*expected, expected_logits], rtol=0, atol=0)


def test_latents_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        gumbel()(torch.full((1, C, 2, 2), float("inf")))


def test_a_temperature_of_zero_is_refused_where_codes_are_drawn() -> None:
    quantizer = GumbelQuantize(num_hiddens=8, embedding_dim=4, n_embed=16, temp_init=0.0)
    quantizer.eval()(torch.randn(1, 8, 2, 2))
    with pytest.raises(ValueError, match=r"temperature .* > 0, got 0"):
        quantizer.train()(torch.randn(1, 8, 2, 2))
