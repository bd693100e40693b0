"""Laws of sampling: what may be drawn, what must be kept, and equality with no cache."""

import math

import pytest
import torch
from torch import Tensor

from taming.modules.sequence.notations import RasterSequence, RunLengthSequence, UnarySequence
from taming.modules.transformer.backbone import Backbone
from taming.modules.transformer.blocks import KVCache
from taming.modules.transformer.generate import (
    SamplingParams,
    generate,
    generators_of,
    sample_token,
)
from taming.modules.transformer.gpt import GPT
from taming.modules.transformer.logits import filter_logits, mask_logits
from taming.modules.transformer.network import PriorNetwork
from taming.modules.transformer.two_level import NOT_WITHIN_SITES, TwoLevelGPT

K, T, GRID = 5, 3, (2, 3)
GREEDY = SamplingParams(greedy=True)
SEQUENCES = [
    RasterSequence(K),
    UnarySequence(K, T, dummies=True),
    UnarySequence(K, T, dummies=False),
    RunLengthSequence(K, T, dummies=True),
    RunLengthSequence(K, T, dummies=False),
]
every_sequence = pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda s: type(s).__name__)
every_network = pytest.mark.parametrize("levels", [1, 2])


def model(levels: int = 1, **options) -> GPT | TwoLevelGPT:
    """A transformer with random weights and a vocabulary larger than the sequences need."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 12, "site_shape": (2, 3, 4), **options}
    depth = {k: v for k, v in options.items() if k not in NOT_WITHIN_SITES}
    depth = {"n_layer": 1, "n_head": 2, "n_embd": 12, **depth}
    network = GPT(12, 32, **sizes) if levels == 1 else TwoLevelGPT(12, 8, depth=depth, **sizes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network.eval()


def predicted(network, condition: Tensor, sequence, tokens: Tensor) -> Tensor:
    """Logits (N, V) of sequences, without a cache."""
    states = sequence.states(tokens)
    logits = network.predict(condition, tokens, states, GRID)
    return mask_logits(logits, sequence.allowed(states)[tokens >= 0])


@every_network
@every_sequence
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 2}, {"top_p": 0.3}, {"top_k": 99, "top_p": 1.0, "min_p": 0.1}]
)
def test_every_sample_decodes(levels: int, sequence, filters: dict) -> None:
    condition = torch.randint(12, (8, 2))
    tokens = generate(model(levels), condition, sequence, GRID, SamplingParams(2.0, **filters))
    assert sequence.decode(tokens, GRID).shape == (8, *GRID, sequence.max_loops)


@every_network
@every_sequence
def test_cached_sampling_takes_the_likeliest_token_of_whole_sequences(levels, sequence) -> None:
    network, condition = model(levels), torch.randint(12, (4, 2))
    tokens = generate(network, condition, sequence, GRID, GREEDY)
    logits = predicted(network, condition, sequence, tokens)
    assert torch.equal(logits.argmax(-1), tokens[tokens >= 0])


MODERN = ("rms_norm", "rotary", "qk_norm", "swiglu", "adaptive_norm")


@every_network
@every_sequence
@pytest.mark.parametrize("options", [(), MODERN], ids=["plain", "modern"])
@pytest.mark.parametrize("cached", [True, False], ids=["own decoder", "default decoder"])
def test_logits_of_every_decoder_equal_those_of_whole_sequences(
    levels: int, sequence, options: tuple[str, ...], cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, condition = model(levels, **dict.fromkeys(options, True)), torch.randint(12, (5, 2))
    if not cached:
        monkeypatch.setattr(type(network), "decoder", PriorNetwork.decoder)
    tokens = generate(network, condition, sequence, GRID, SamplingParams(3.0))
    decoded: list[list[Tensor]] = [[] for _ in tokens]

    def follow(logits: Tensor, params: SamplingParams, rows: Tensor) -> Tensor:
        """Take the tokens that there are, and keep the logits."""
        places = [len(decoded[row]) for row in rows.tolist()]
        for row, part in zip(rows.tolist(), logits, strict=True):
            decoded[row].append(part)
        return tokens[rows, places]

    monkeypatch.setattr("taming.modules.transformer.generate.sample_token", follow)
    assert torch.equal(generate(network, condition, sequence, GRID), tokens)
    whole = predicted(network, condition, sequence, tokens)
    together = torch.stack([part for row in decoded for part in row])
    torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-5)


def test_the_order_of_a_sites_codes_tells_the_sites_after_it() -> None:
    network, sequence = model(levels=2), UnarySequence(K, T, dummies=False)
    codes = torch.tensor([[[[1, 4, -1], [2, -1, -1]]], [[[4, 1, -1], [2, -1, -1]]]])
    tokens, _ = sequence.encode(codes)
    condition = torch.zeros(2, 1, dtype=torch.int64)
    logits = network.predict(condition, tokens, sequence.states(tokens), (1, 2))
    one, other = logits.unflatten(0, tokens.shape)
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[3:], other[3:], atol=1e-3)


def test_unknown_sizes_of_the_depth_transformer_are_refused() -> None:
    for name in ("layers", "n_unmasked", "rotary", "site_shape"):
        with pytest.raises(ValueError, match=f"depth: unknown {name}; valid: .*'n_layer'"):
            TwoLevelGPT(12, 8, site_shape=(2, 3, 4), depth={name: 2})


@every_network
@every_sequence
def test_completion_keeps_what_is_known_whatever_its_length(levels, sequence) -> None:
    network, condition = model(levels), torch.randint(12, (6, 1))
    tokens = generate(network, condition, sequence, GRID)
    known = torch.randint(1, 5, (6, 1))
    prefix = tokens.masked_fill(sequence.states(tokens).site >= known, -1)
    completed = generate(network, condition, sequence, GRID, prefix=prefix)
    assert sequence.decode(completed, GRID).shape[0] == 6
    width = min(prefix.shape[1], completed.shape[1])
    kept = prefix[:, :width] >= 0
    assert torch.equal(completed[:, :width][kept], prefix[:, :width][kept])


@every_network
@every_sequence
@pytest.mark.parametrize("known", ["000000", "010110", "110001", "111111"])
def test_a_mask_keeps_the_sites_that_it_names(levels: int, sequence, known: str) -> None:
    network, condition = model(levels), torch.randint(12, (5, 1))
    mask = torch.tensor([digit == "1" for digit in known])
    given = generate(network, condition, sequence, GRID, SamplingParams(3.0))
    drawn = generate(network, condition, sequence, GRID, prefix=given, known=mask)
    before, after = (sequence.decode(tokens, GRID).flatten(1, 2) for tokens in (given, drawn))
    assert torch.equal(before[:, mask], after[:, mask])
    assert mask.all() or not torch.equal(before[:, ~mask], after[:, ~mask])
    greedy = generate(network, condition, sequence, GRID, GREEDY, prefix=given, known=mask)
    free = ~mask[sequence.states(greedy).site.clamp(max=5)][greedy >= 0]
    likeliest = predicted(network, condition, sequence, greedy).argmax(-1)
    assert torch.equal(likeliest[free], greedy[greedy >= 0][free])


@every_network
@every_sequence
def test_the_default_decoder_completes_as_the_network_s_own(
    levels: int, sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, condition = model(levels), torch.randint(11, (6, 2))
    given = generate(network, condition, sequence, GRID, SamplingParams(3.0))
    ragged = given.masked_fill(sequence.states(given).site >= torch.randint(5, (6, 1)), -1)
    mask = torch.tensor([False, True, False, True, True, False])
    guided, without = SamplingParams(greedy=True, guidance=2.0), torch.full((6, 2), 11)

    def completed() -> list[Tensor]:
        return [
            generate(network, condition, sequence, GRID, GREEDY, prefix=ragged),
            generate(network, condition, sequence, GRID, GREEDY, prefix=given, known=mask),
            generate(network, condition, sequence, GRID, guided, prefix=ragged, without=without),
        ]

    own = completed()
    monkeypatch.setattr(type(network), "decoder", PriorNetwork.decoder)
    for one, other in zip(own, completed(), strict=True):
        assert torch.equal(one, other)


@every_network
def test_known_halves_go_in_at_once_or_one_by_one_with_the_same_result(levels: int) -> None:
    network, condition = model(levels), torch.randint(12, (2, 1))
    sequence = UnarySequence(K, T, False)
    tokens = generate(network, condition, sequence, GRID, GREEDY)
    prefix = tokens[:1, :4].repeat(2, 1)
    together = generate(network, condition, sequence, GRID, GREEDY, prefix)
    prefix[1, 1:] = -1
    ragged = generate(network, condition, sequence, GRID, GREEDY, prefix)
    width = min(together.shape[1], ragged.shape[1])
    assert torch.equal(together[0, :width], ragged[0, :width])


@every_network
@every_sequence
def test_what_a_seed_gives_does_not_depend_on_the_batch(levels: int, sequence) -> None:
    network, condition = model(levels), torch.randint(12, (5, 1))

    def drawn(images: list[int]) -> Tensor:
        params = SamplingParams(generators=generators_of(7, images))
        tokens = generate(network, condition[images], sequence, GRID, params)
        return sequence.decode(tokens, GRID)

    together = drawn([0, 1, 2, 3, 4])
    assert torch.equal(together, torch.cat([drawn([0, 1]), drawn([2]), drawn([3, 4])]))
    assert not torch.equal(together[0], together[1])


@every_network
@every_sequence
def test_finished_sequences_cost_nothing(levels: int, sequence) -> None:
    network, condition = model(levels), torch.randint(12, (16, 2))
    read = {"main": 0, "depth": 0}

    def count(name: str, blocks) -> None:
        def add(_module, inputs) -> None:
            read[name] += inputs[0].shape[0] * inputs[0].shape[1]

        blocks[0].register_forward_pre_hook(add)

    count("main", network.blocks)
    if levels == 2:
        count("depth", network.depth.blocks)
    tokens = generate(network, condition, sequence, GRID, SamplingParams(2.0))
    lengths = (tokens >= 0).sum(dim=1)
    assert sequence.site_tokens == 1 or lengths.unique().numel() > 1
    if levels == 1:  # the last token of a sequence need not be read
        assert read["main"] == 16 * 2 + int((lengths - 1).sum())
    else:
        assert read == {"main": 16 * (2 + 5), "depth": int(lengths.sum())}


@every_network
def test_guidance_goes_from_no_condition_to_the_condition_and_beyond(levels: int) -> None:
    network, sequence = model(levels), UnarySequence(K, T, False)
    condition, without = torch.randint(11, (4, 1)), torch.full((4, 1), 11)

    def guided(scale: float) -> Tensor:
        params = SamplingParams(greedy=True, guidance=scale)
        return generate(network, condition, sequence, GRID, params, without=without)

    assert torch.equal(guided(1.0), generate(network, condition, sequence, GRID, GREEDY))
    assert torch.equal(guided(0.0), generate(network, without, sequence, GRID, GREEDY))
    beyond = guided(3.0)
    present, plain = beyond >= 0, predicted(network, condition, sequence, beyond)
    other = predicted(network, without, sequence, beyond)
    likeliest = torch.where(plain.isfinite(), other + 3 * (plain - other), -torch.inf).argmax(-1)
    assert torch.equal(likeliest, beyond[present])
    with pytest.raises(ValueError, match="guidance 2.0 needs a prior .* condition_dropout"):
        generate(network, condition, sequence, GRID, SamplingParams(guidance=2.0))


@every_network
def test_sampling_changes_no_weights_and_gives_ordinary_tensors(levels: int) -> None:
    network, sequence, shown = model(levels), UnarySequence(K, T, False), []
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tokens = generate(
        network,
        torch.randint(12, (2, 1)),
        sequence,
        GRID,
        callback=lambda state: shown.append(torch.is_inference_mode_enabled()),
    )
    after = network.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert not tokens.is_inference() and shown and not any(shown)
    logits = predicted(network.train(), torch.zeros(2, 1).long(), sequence, tokens)
    logits[logits.isfinite()].sum().backward()  # can be trained on


@every_network
@every_sequence
def test_half_precision_samples_without_a_warning(levels: int, sequence) -> None:
    network = model(levels, **dict.fromkeys(MODERN, True)).bfloat16()
    tokens = generate(network, torch.randint(12, (3, 1)), sequence, GRID)
    assert sequence.decode(tokens, GRID).shape[0] == 3


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_follow_the_probabilities_whatever_the_default_precision(
    seeded: bool, dtype: torch.dtype
) -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.298, 0.002]).log()
    rows, generators = torch.arange(20000), generators_of(0, range(20000)) if seeded else None
    torch.set_default_dtype(dtype)  # as a training in bf16-true does
    try:
        drawn = sample_token(logits.expand(20000, -1), SamplingParams(generators=generators), rows)
    finally:
        torch.set_default_dtype(torch.float32)
    shares = drawn.bincount(minlength=5) / 20000
    torch.testing.assert_close(shares, logits.exp(), rtol=0, atol=0.02)
    assert (drawn != 1).all() and 0.001 < shares[4] < 0.003


def test_steps_and_callback_count_drawn_tokens() -> None:
    counts: list[int] = []
    prefix = torch.tensor([[1, 2]])
    tokens = generate(
        model(),
        torch.zeros(1, 1).long(),
        RasterSequence(K),
        GRID,
        prefix=prefix,
        steps=3,
        callback=lambda state: counts.append(state.sampled),
    )
    assert tokens.shape == (1, 5) and counts == [1, 2, 3]


@every_network
@every_sequence
def test_steps_are_those_of_each_sequence_whatever_its_beginning(levels: int, sequence) -> None:
    network, condition = model(levels), torch.randint(12, (2, 1))
    prefix = generate(network, condition, sequence, GRID)[:, :3]
    prefix[1, 1:] = -1
    tokens = generate(network, condition, sequence, GRID, prefix=prefix, steps=2)
    assert (tokens >= 0).sum(dim=1).tolist() == [5, 3]


@every_network
def test_memory_for_keys_is_taken_once(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    new_cache, taken = Backbone.new_cache, []

    def count(self: Backbone) -> KVCache:
        taken.append(self)
        return new_cache(self)

    monkeypatch.setattr(Backbone, "new_cache", count)
    condition, sequence = torch.randint(12, (4, 1)), UnarySequence(K, T, False)
    generate(model(levels), condition, sequence, GRID, SamplingParams(2.0))
    assert len(taken) == levels


def test_filters_keep_what_they_say() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.79).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.81).isfinite().tolist() == [[True, True, True, False]]
    assert filter_logits(logits, top_p=1e-9).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, min_p=0.5).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, min_p=1.0).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, top_k=100).isfinite().all()
    torch.testing.assert_close(filter_logits(logits, temperature=2.0), logits / 2)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"temperature": 0.0}, "temperature must .* above 0, got 0.0; greedy, or top_k 1"),
        ({"temperature": math.nan}, "temperature must be a finite number above 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; .*all tokens, leave it out"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"guidance": math.nan}, "guidance must be a finite number, got nan"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_sampled(
    kwargs: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**kwargs)
