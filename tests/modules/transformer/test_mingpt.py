"""The transformer equals the original and does not depend on how its input is split."""

import pytest
import torch
from support.original import load_golden

from taming.modules.transformer.blocks import RotaryEmbedding
from taming.modules.transformer.mingpt import (
    GPT,
    CodeGPT,
    DummyGPT,
    GPT1Config,
    GPTConfig,
    KMeans,
    sample,
    sample_with_past,
)
from taming.modules.transformer.two_level import TwoLevelGPT

SIZES = {"vocab_size": 11, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 12}


def gpt(**kwargs) -> GPT:
    model = GPT(**{**SIZES, **kwargs})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_equals_the_original_with_unmasked_tokens(shared) -> None:
    golden = load_golden(shared, "gpt_unmasked")
    logits, loss = golden.build()(golden.io["idx"])
    torch.testing.assert_close(logits, golden.io["logits"], rtol=1e-5, atol=1e-5)
    assert loss is None


OPTIONS = {
    "plain": {},
    "sites": {"site_shape": (4, 4, 3)},
    "unmasked": {"n_unmasked": 3},
    **{
        name: {name: True}
        for name in ("rms_norm", "rotary", "qk_norm", "swiglu", "tied_head", "adaptive_norm")
    },
}
OPTIONS["all"] = {k: v for options in OPTIONS.values() for k, v in options.items()}
every_option = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)


@every_option
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 1, 1, 3], [9]], ids=str)
@pytest.mark.parametrize("new_cache", [GPT.new_cache, GPT.decoding_cache])
def test_cached_equals_uncached(kwargs: dict, cuts: list[int], new_cache) -> None:
    model, idx = gpt(**kwargs), torch.randint(11, (3, 9))
    if "n_unmasked" in kwargs and cuts[0] < 3:
        cuts = [3] + [1] * 6  # unmasked tokens see each other, so they must come in together
    sites = torch.randint(3, (3, 9, 3))
    whole, _ = model(idx, sites=sites)
    cache, parts, start = new_cache(model), [], 0
    for cut in cuts:
        part = slice(start, start + cut)
        parts.append(model(idx[:, part], sites=sites[:, part], cache=cache)[0])
        start += cut
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@every_option
def test_the_last_token_alone_is_that_of_all(kwargs: dict) -> None:
    model, x, sites = gpt(**kwargs), torch.randn(3, 7, 12), torch.randint(3, (3, 7, 3))
    cache = model.new_cache()
    last = model.features(x[:, :5], sites[:, :5], cache, last=True)
    whole = model.features(x, sites)
    torch.testing.assert_close(last, whole[:, 4:5], rtol=1e-5, atol=1e-5)
    after = model.features(x[:, 5:], sites[:, 5:], cache)  # all of them are cached
    torch.testing.assert_close(after, whole[:, 5:], rtol=1e-5, atol=1e-5)


@every_option
def test_sequences_that_a_cache_keeps_go_on_as_if_alone(kwargs: dict) -> None:
    model, idx, sites = gpt(**kwargs), torch.randint(11, (4, 7)), torch.randint(3, (4, 7, 3))
    cache, rows = model.new_cache(), torch.tensor([1, 3])
    model(idx[:, :5], sites=sites[:, :5], cache=cache)
    cache.keep(rows)
    logits, _ = model(idx[rows, 5:], sites=sites[rows, 5:], cache=cache)
    whole, _ = model(idx[rows], sites=sites[rows])
    torch.testing.assert_close(logits, whole[:, 5:], rtol=1e-5, atol=1e-5)


@every_option
def test_every_option_learns(kwargs: dict) -> None:
    model = GPT(**{**SIZES, **kwargs}).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    idx, sites, losses = torch.arange(8)[None], torch.randint(3, (1, 8, 3)), []
    for _ in range(40):
        _, loss = model(idx, targets=idx.roll(-1), sites=sites)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_rotary_attention_sees_distances_only() -> None:
    model, idx = gpt(rotary=True), torch.randint(11, (2, 6))
    torch.nn.init.zeros_(model.pos_emb)
    sites = torch.randint(5, (2, 6, 3))
    here, _ = model(idx, sites=sites)
    there, _ = model(idx, sites=sites + torch.tensor([3, 2, 1]))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    for axis in range(3):
        moved = sites.clone()
        moved[:, 0, axis] += 1
        assert not torch.allclose(model(idx, sites=moved)[0], here, atol=1e-3)
    with pytest.raises(ValueError, match="n_head must be even and at least 6, got 4"):
        gpt(rotary=True, n_embd=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotations_are_the_same_in_a_model_of_half_precision(dtype: torch.dtype) -> None:
    sites = torch.randint(64, (2, 6, 3))
    expected = RotaryEmbedding(16)(sites, 6)
    assert torch.equal(RotaryEmbedding(16).to(dtype)(sites, 6), expected)


def test_adaptive_blocks_start_as_the_identity() -> None:
    model, idx = GPT(**SIZES, adaptive_norm=True).eval(), torch.randint(11, (2, 6))
    expected = model.head(model.ln_f(model.tok_emb(idx) + model.pos_emb[:, :6]))
    torch.testing.assert_close(model(idx)[0], expected)
    with pytest.raises(ValueError, match="forward_with_past cannot serve adaptive_norm"):
        model.forward_with_past(idx)


@pytest.mark.parametrize("name", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_is_there_in_training_only(name: str) -> None:
    model, idx = gpt(**{name: 0.5}), torch.randint(11, (2, 6))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.allclose(model(idx)[0], model(idx)[0], atol=1e-3)


def test_a_tied_head_is_the_embedding() -> None:
    model = gpt(tied_head=True)
    assert model.head.weight is model.tok_emb.weight
    again = GPT(**SIZES, tied_head=True)
    again.load_state_dict(model.state_dict())
    assert again.head.weight is again.tok_emb.weight


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
    expected, _ = model(idx[:, :0], embeddings=embedded, sites=sites[:, :0])
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
    with pytest.raises(ValueError, match="n_embd 12 is not a multiple of n_head 5"):
        gpt(n_head=5)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"site_shape": [4, 4]}, r"rows, columns and depths, each at least 1, got \[4, 4\]"),
        ({"site_shape": [4, 0, 1]}, r"each at least 1, got \[4, 0, 1\]"),
    ],
)
def test_sizes_of_nothing_are_refused_at_every_level(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt(**sizes)
    with pytest.raises(ValueError, match=message):
        TwoLevelGPT(11, 24, **{"site_shape": [4, 4, 3], "depth": {}, **sizes})


def test_past_passed_in_and_out_equals_no_past() -> None:
    model, idx = gpt(), torch.randint(11, (3, 9))
    whole, loss = model(idx, targets=idx)
    logits, first_loss, present = model.forward_with_past(idx[:, :4], targets=idx[:, :4])
    assert present.shape == (2, 2, 3, 2, 4, 6)
    parts, past = [logits], [present]
    for position in range(4, 9):
        token = idx[:, position : position + 1]
        logits, _, present = model.forward_with_past(token, past=past, past_length=position)
        assert present.shape == (2, 2, 3, 2, 1, 6)
        parts.append(logits)
        past.append(present)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(first_loss, loss)
    with pytest.raises(ValueError, match="past_length is 3, but past holds 9 tokens"):
        model.forward_with_past(idx[:, :1], past=past, past_length=3)


def test_greedy_sampling_equals_the_original(shared) -> None:
    golden = load_golden(shared, "net2net_class")
    model, io = golden.build().transformer, golden.io
    drawn = sample_with_past(io["c_indices"], model, steps=6, sample_logits=False)
    assert torch.equal(drawn, io["greedy_with_past"])
    whole = sample(model, io["c_indices"], steps=6)
    assert torch.equal(whole, torch.cat([io["c_indices"], drawn], dim=1))


def test_sampling_takes_more_than_the_vocabulary_and_counts_from_zero() -> None:
    counts: list[int] = []
    drawn = sample_with_past(
        torch.zeros(2, 1).long(), gpt(), steps=5, top_k=250, top_p=0.9, callback=counts.append
    )
    assert drawn.shape == (2, 5) and drawn.max() < 11 and counts == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("option", [{"site_shape": (4, 4, 3)}, {"rotary": True}], ids=str)
def test_tokens_without_places_are_refused_by_a_model_that_looks_at_them(option: dict) -> None:
    model, idx = gpt(**option), torch.randint(11, (2, 3))
    for draw in (sample, sample_with_past):
        with pytest.raises(ValueError, match=r"no places.* use .*generate\.generate"):
            draw(model=model, x=idx, steps=5)
    with pytest.raises(ValueError, match="cannot serve .* site_shape or rotary"):
        model.forward_with_past(idx)
    with pytest.raises(ValueError, match="site_shape or rotary needs sites"):
        model(idx)


def test_vectors_take_the_place_of_tokens() -> None:
    model = gpt()
    codes = CodeGPT(11, 24, in_channels=5, n_layer=2, n_head=2, n_embd=12).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("tok_emb")}
    assert codes.load_state_dict(state, strict=False).missing_keys == [
        "tok_emb.weight",
        "tok_emb.bias",
    ]
    vectors = torch.randn(2, 6, 5)
    expected, _ = model(torch.zeros(2, 0).long(), embeddings=codes.tok_emb(vectors))
    torch.testing.assert_close(codes(vectors)[0], expected)
    _, loss = codes(vectors, targets=torch.randint(11, (2, 6)))
    assert loss.isfinite()


def test_configurations_and_the_stand_in() -> None:
    expected = GPTConfig(100, 20, n_layer=12, n_head=12, n_embd=768)
    assert vars(GPT1Config(100, 20)) == vars(expected)
    tokens, loss = DummyGPT(add_value=3)(torch.arange(4))
    assert tokens.tolist() == [3, 4, 5, 6] and loss is None


def test_k_means_finds_the_colours_and_gives_them_back() -> None:
    colours = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    images = colours[torch.randint(3, (2, 4, 6))].permute(0, 3, 1, 2)
    clusters = KMeans(ncluster=20, nc=3)
    assert not clusters.is_initialized()
    clusters.initialize(images.permute(0, 2, 3, 1).reshape(-1, 3))
    assert clusters.is_initialized() and set(clusters.state_dict()) == {"C", "initialized"}
    tokens = clusters(images)
    assert tokens.shape == (2, 24) and tokens.dtype == torch.int64
    torch.testing.assert_close(clusters(tokens, reverse=True, shape=(3, 4, 6)), images)
    with pytest.raises(ValueError, match=r"at least 20 pixels of 3 channels, got \(5, 3\)"):
        clusters.initialize(torch.zeros(5, 3))
