"""The transformer equals the original and does not depend on how its input is split."""

import pytest
import torch
from golden import load_golden

from taming.modules.transformer.mingpt import GPT


def gpt(**kwargs) -> GPT:
    sizes = {"vocab_size": 11, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 8}
    model = GPT(**{**sizes, **kwargs})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_equals_the_original_with_unmasked_tokens(shared) -> None:
    golden = load_golden(shared, "gpt_unmasked")
    logits, loss = golden.build()(golden.io["idx"])
    torch.testing.assert_close(logits, golden.io["logits"], rtol=1e-5, atol=1e-5)
    assert loss is None


@pytest.mark.parametrize("kwargs", [{}, {"site_shape": (4, 4, 3)}, {"n_unmasked": 3}])
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 1, 1, 3], [9]])
def test_cached_equals_uncached(kwargs: dict, cuts: list[int]) -> None:
    model, idx = gpt(**kwargs), torch.randint(11, (3, 9))
    if "n_unmasked" in kwargs and cuts[0] < 3:
        cuts = [3] + [1] * 6  # unmasked tokens see each other, so they must come in together
    sites = torch.randint(3, (3, 9, 3))
    whole, _ = model(idx, sites=sites)
    cache, parts, start = model.new_cache(3), [], 0
    for cut in cuts:
        part = slice(start, start + cut)
        parts.append(model(idx[:, part], sites=sites[:, part], cache=cache)[0])
        start += cut
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_a_token_sees_nothing_after_it() -> None:
    model, idx = gpt(), torch.randint(11, (1, 8))
    changed = idx.clone()
    changed[0, 5] = (idx[0, 5] + 1) % 11
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_sites_belong_to_the_last_inputs() -> None:
    model = gpt(site_shape=(4, 4, 3))
    idx, sites = torch.randint(11, (2, 6)), torch.randint(3, (2, 4, 3))
    embedded = model.tok_emb(idx)
    embedded = torch.cat([embedded[:, :2], embedded[:, 2:] + model.site_emb(sites)], dim=1)
    expected, _ = model(idx[:, :0], embeddings=embedded)
    torch.testing.assert_close(model(idx, sites=sites)[0], expected)


def test_loss_ignores_padding() -> None:
    model, idx = gpt(), torch.randint(11, (2, 6))
    targets = torch.randint(11, (2, 6))
    targets[1, 3:] = -1
    logits, loss = model(idx, targets=targets)
    rows = torch.cat([logits[0], logits[1, :3]]).log_softmax(-1)
    expected = -rows.gather(1, torch.cat([targets[0], targets[1, :3]])[:, None]).mean()
    torch.testing.assert_close(loss, expected)


def test_sequences_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens do not fit the transformer's block_size 24"):
        gpt()(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="n_embd 8 is not a multiple of n_head 3"):
        gpt(n_head=3)
