"""Laws of sampling: what may be drawn, what must be kept, and equality with no cache."""

import pytest
import torch

from taming.modules.transformer.mingpt import GPT
from taming.modules.transformer.sampling import filter_logits, sample_tokens
from taming.modules.vqvae.sequence import RasterSequence, RunLengthSequence, UnarySequence

K, T, GRID = 5, 3, (2, 3)
SEQUENCES = [
    RasterSequence(K),
    UnarySequence(K, T, dummies=True),
    UnarySequence(K, T, dummies=False),
    RunLengthSequence(K, T, dummies=True),
    RunLengthSequence(K, T, dummies=False),
]
every_sequence = pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda s: type(s).__name__)


def model() -> GPT:
    """A transformer with random weights and a vocabulary larger than the sequences need."""
    gpt = GPT(12, 32, n_layer=2, n_head=2, n_embd=8, site_shape=(2, 3, 4)).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return gpt


@every_sequence
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.3}, {"top_k": 99, "top_p": 1.0}])
def test_every_sample_decodes(sequence, filters: dict) -> None:
    condition = torch.randint(12, (8, 2))
    tokens = sample_tokens(model(), condition, sequence, GRID, temperature=2.0, **filters)
    assert sequence.decode(tokens, GRID).shape == (8, *GRID, sequence.max_loops)


@every_sequence
def test_cached_sampling_equals_the_likeliest_token_of_whole_sequences(sequence) -> None:
    gpt, condition = model(), torch.randint(12, (4, 2))
    tokens = sample_tokens(gpt, condition, sequence, GRID, greedy=True)
    inputs = torch.cat([condition, tokens.clamp(min=0)], dim=1)[:, :-1]
    logits = gpt(inputs, sites=sequence.sites(tokens, GRID))[0][:, 1:, : sequence.vocab_size]
    logits = logits.masked_fill(~sequence.allowed(sequence.states(tokens)), -torch.inf)
    assert torch.equal(logits.argmax(-1)[tokens >= 0], tokens[tokens >= 0])


@every_sequence
def test_completion_keeps_what_is_known_whatever_its_length(sequence) -> None:
    gpt, condition = model(), torch.randint(12, (6, 1))
    tokens = sample_tokens(gpt, condition, sequence, GRID)
    known = torch.randint(1, 5, (6, 1))
    prefix = tokens.masked_fill(sequence.states(tokens).site >= known, -1)
    completed = sample_tokens(gpt, condition, sequence, GRID, prefix=prefix)
    assert sequence.decode(completed, GRID).shape[0] == 6
    width = min(prefix.shape[1], completed.shape[1])
    kept = prefix[:, :width] >= 0
    assert torch.equal(completed[:, :width][kept], prefix[:, :width][kept])


def test_known_halves_go_in_at_once_or_one_by_one_with_the_same_result() -> None:
    gpt, condition, sequence = model(), torch.randint(12, (2, 1)), UnarySequence(K, T, False)
    tokens = sample_tokens(gpt, condition, sequence, GRID, greedy=True)
    prefix = tokens[:1, :4].repeat(2, 1)
    together = sample_tokens(gpt, condition, sequence, GRID, prefix=prefix, greedy=True)
    prefix[1, 1:] = -1
    ragged = sample_tokens(gpt, condition, sequence, GRID, prefix=prefix, greedy=True)
    width = min(together.shape[1], ragged.shape[1])
    assert torch.equal(together[0, :width], ragged[0, :width])


def test_steps_and_callback_count_drawn_tokens() -> None:
    counts: list[int] = []
    prefix = torch.tensor([[1, 2]])
    tokens = sample_tokens(
        model(),
        torch.zeros(1, 1).long(),
        RasterSequence(K),
        GRID,
        prefix,
        3,
        callback=counts.append,
    )
    assert tokens.shape == (1, 5) and counts == [1, 2, 3]


def test_filters_keep_what_they_say() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.79).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.81).isfinite().tolist() == [[True, True, True, False]]
    assert filter_logits(logits, top_p=1e-9).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, top_k=100).isfinite().all()
    torch.testing.assert_close(filter_logits(logits, temperature=2.0), logits / 2)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filter_logits(torch.zeros(1, 4), **kwargs)
