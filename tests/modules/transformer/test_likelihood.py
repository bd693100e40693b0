"""Every network of a prior is a probability distribution over images, computed image by image."""

from itertools import product

import pytest
import torch
from modules.transformer.test_generate import MODERN, K, every_network, every_sequence, model
from torch import Tensor

from taming.modules.sequence.notations import RasterSequence, RunLengthSequence, UnarySequence
from taming.modules.transformer.generate import SamplingParams, generate
from taming.modules.transformer.gpt import length_groups
from taming.modules.transformer.logits import mask_logits

TINY = [
    RasterSequence(3),
    UnarySequence(2, 3, dummies=True),
    UnarySequence(2, 2, dummies=False),
    RunLengthSequence(2, 3, dummies=True),
    RunLengthSequence(2, 2, dummies=False),
]


def sites_of(sequence) -> list[list[int]]:
    """All codes that a site can have."""
    codes, turns = range(sequence.n_e), range(1, sequence.max_loops + 1)
    empty = [-1] * sequence.max_loops
    if isinstance(sequence, RasterSequence):
        return [[code] for code in codes]
    if sequence.dummies:
        kinds = [[sequence.n_e] * (n - 1) + [code] for n in turns for code in codes]
    else:
        kinds = [list(kind) for n in turns for kind in product(codes, repeat=n)]
    return [(kind + empty)[: sequence.max_loops] for kind in kinds]


def nats(network, condition: Tensor, sequence, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """-log p (B,) of sequences."""
    states, present = sequence.states(tokens), tokens >= 0
    logits = network.predict(condition.expand(len(tokens), -1), tokens, states, grid)
    logits = mask_logits(logits, sequence.allowed(states)[present])
    picked = logits.log_softmax(-1).gather(-1, tokens[present][:, None])[:, 0]
    return -torch.zeros(len(tokens)).index_add(0, present.nonzero()[:, 0], picked.float())


@every_network
@pytest.mark.parametrize("sequence", TINY, ids=lambda s: type(s).__name__)
def test_the_probabilities_of_all_images_sum_to_one(levels: int, sequence) -> None:
    images = torch.tensor(list(product(sites_of(sequence), repeat=3)))[:, None]
    tokens, _ = sequence.encode(images)
    assert len(tokens.unique(dim=0)) == len(images)
    with torch.no_grad():
        log_p = -nats(model(levels), torch.tensor([[3, 1]]), sequence, tokens, (1, 3))
    torch.testing.assert_close(log_p.double().exp().sum(), torch.ones(()).double())


@every_network
@every_sequence
def test_an_image_is_as_likely_alone_as_among_others(levels: int, sequence) -> None:
    network, condition = model(levels), torch.randint(12, (9, 2))
    tokens = generate(network, condition, sequence, (2, 3), SamplingParams(2.0))
    with torch.no_grad():
        together = nats(network, condition, sequence, tokens, (2, 3))
        for row in range(9):
            own = tokens[row : row + 1, : int((tokens[row] >= 0).sum())]
            alone = nats(network, condition[row : row + 1], sequence, own, (2, 3))
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)


@every_network
def test_a_token_sees_its_past_alone(levels: int) -> None:
    network, sequence = model(levels), RunLengthSequence(K, 3, dummies=False)
    condition = torch.randint(12, (1, 2))
    tokens = generate(network, condition, sequence, (2, 3), SamplingParams(2.0))
    states = sequence.states(tokens)

    def logits(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return network.predict(condition, inputs, states, (2, 3))

    before = logits(tokens)
    for place in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % 12
        after = logits(changed)
        torch.testing.assert_close(before[: place + 1], after[: place + 1])
        if place + 1 < tokens.shape[1]:
            assert not torch.allclose(before[place + 1 :], after[place + 1 :])


@pytest.mark.parametrize("waste", [0.0, 0.1, 0.5])
def test_groups_hold_every_sequence_once_and_little_padding(waste: float) -> None:
    for _ in range(20):
        lengths = torch.randint(1, 400, (64,))
        groups = length_groups(lengths, waste)
        assert torch.cat(groups).sort().values.tolist() == list(range(64))
        for group in groups:
            own = lengths[group]
            assert own[0] == own.max()
            assert own.sum() >= (1 - waste) * own.max() * len(group)
    assert len(length_groups(torch.full((8,), 256))) == 1


@every_network
@pytest.mark.parametrize("options", [(), MODERN], ids=["plain", "modern"])
def test_mixed_precision_is_nearly_as_good(levels: int, options: tuple[str, ...]) -> None:
    network, sequence = model(levels, **dict.fromkeys(options, True)), UnarySequence(K, 3, False)
    condition = torch.randint(12, (6, 1))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tokens = generate(network, condition, sequence, (2, 3))
        rough = nats(network, condition, sequence, tokens, (2, 3))
    assert sequence.decode(tokens, (2, 3)).shape == (6, 2, 3, 3)
    with torch.no_grad():
        exact = nats(network, condition, sequence, tokens, (2, 3))
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.3)
