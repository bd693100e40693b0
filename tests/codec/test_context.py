"""Segments under a context network decode to their codes, on every machine from the same bytes."""

import math
from collections.abc import Iterator
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from support.context import codes_of, network_of

from taming.codec.context import Context, exponentials, frequencies
from taming.modules import context as module
from taming.modules.context import ContextNetwork

# Segments of codes_of((6, 7), 3, 16) under network_of(16, 3), and the network's fingerprint.
STORED = (
    "2465fad8597824bef57d7e7110b86da749825f065f72b735b417e9a6",
    "686e48ff5e3d0664ed11debf2de67b143331e7578edcd06900dc8818",
    "7694e1191b2fdbdb4b53ff157ae16fff",
)
FINGERPRINT = "351e15fd"


def test_the_bytes_of_a_fixed_seed_are_those_stored() -> None:
    model, codes = Context(network_of(16, 3)), codes_of((6, 7), 3, 16)
    assert tuple(segment.hex() for segment in model.encode(codes)) == STORED
    assert model.fingerprint().hex() == FINGERPRINT
    assert torch.equal(model.decode([bytes.fromhex(text) for text in STORED], (6, 7)), codes)


@pytest.mark.parametrize("grid", [(1, 1), (2, 9), (13, 6)])
@pytest.mark.parametrize(("turns", "n_codes"), [(1, 1), (1, 5), (4, 2), (3, 1000)])
@pytest.mark.parametrize("fixed", [False, True])
def test_decoding_is_the_inverse_of_encoding_cut_anywhere(
    grid: tuple[int, int], turns: int, n_codes: int, fixed: bool
) -> None:
    torch.manual_seed(sum(grid) + turns)
    model = Context(ContextNetwork(n_codes, turns, 4, 8, fixed_length=fixed).eval())
    codes = codes_of(grid, turns, n_codes, seed=turns).clamp(min=0 if fixed else -1)
    segments = list(model.encode(codes))
    assert len(segments) == int((codes >= 0).sum(dim=-1).max())
    for count in range(1, len(segments) + 1):
        cut = torch.where(torch.arange(turns) < count, codes, -1)
        assert torch.equal(model.decode(segments[:count], grid), cut)


def test_the_bytes_do_not_depend_on_threads_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, codes = Context(network_of(100, 3)), codes_of((20, 30), 3, 100)
    wanted = list(model.encode(codes))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert list(model.encode(codes)) == wanted
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    assert list(model.encode(codes)) == wanted
    assert torch.equal(model.decode(wanted, (20, 30)), codes)


def test_a_segment_is_as_long_as_its_model_says() -> None:
    torch.manual_seed(0)
    network = ContextNetwork(256, 3, 8, 16).eval()
    with torch.no_grad():
        network.codes.weight.mul_(8)  # far from uniform
    model = Context(network)
    codes = codes_of((30, 40), 3, 256)
    lost = float(model.network.nats(codes[None])) / math.log(2) / 8
    segments = list(model.encode(codes))
    assert lost < sum(map(len, segments)) < 1.01 * lost + 32


def test_the_table_is_that_of_the_exponential() -> None:
    with localcontext(prec=50):
        wanted = [round(2**24 * (Decimal(-i) / 64).exp()) for i in range(len(exponentials()))]
    assert exponentials().tolist() == wanted
    assert wanted[-2:] == [1, 0]


@pytest.mark.parametrize("symbols", [1, 2, 17, 8192])
def test_frequencies_are_near_the_softmax_and_sum_to_16_bits(symbols: int) -> None:
    logits = torch.from_numpy(np.random.RandomState(0).randint(-(2**24), 2**24, (50, symbols)))
    logits[0] = 0  # all alike
    logits = logits.double() / 2**22
    found = frequencies(logits)
    assert bool((found >= 1).all()) and bool((found.sum(dim=1) == 2**16).all())
    assert torch.equal(frequencies(logits + 5), found)
    expected = 1 + logits.softmax(dim=1) * (2**16 - symbols)
    left = symbols / expected.amax(dim=1, keepdim=True)  # what rounding down leaves
    near = (found - expected).abs() <= 1 + expected * (
        0.02 + left * (found == found.amax(1)[:, None])
    )
    assert bool(near.all())


def mutated(segments: list[bytes], number: int) -> Iterator[list[bytes]]:
    """Yield segments with changed, dropped, added or swapped bytes."""
    stream = np.random.RandomState(0)
    for _ in range(number):
        parts = [bytearray(segment) for segment in segments]
        part = parts[stream.randint(len(parts))]
        kind, place = stream.randint(5), stream.randint(len(part))
        if kind == 0:
            part[place] ^= 1 << stream.randint(8)
        elif kind == 1:
            del part[place:]
        elif kind == 2:
            part[place:place] = stream.bytes(stream.randint(1, 9))
        elif kind == 3:
            parts += [part] * stream.randint(1, 4)
        else:
            part[:] = stream.bytes(4 * stream.randint(0, 40))
        yield [bytes(part) for part in parts]


def test_mutated_segments_are_refused_or_give_codes() -> None:
    model, codes = Context(network_of(16, 3)), codes_of((6, 7), 3, 16)
    refused = 0
    for segments in mutated(list(model.encode(codes)), 100):
        try:
            found = model.decode(segments, (6, 7))
        except ValueError as error:
            refused += 1
            assert str(error)
            continue
        assert found.shape == codes.shape and bool(((found >= -1) & (found < 16)).all())
        assert bool((found[..., 0] >= 0).all())
        assert bool(((found[..., 1:] < 0) | (found[..., :-1] >= 0)).all())
    assert refused > 50


def test_mistakes_are_named() -> None:
    network = network_of(16, 3)
    model, codes = Context(network), codes_of((6, 7), 3, 16)
    with pytest.raises(ValueError, match="training mode"):
        Context(network.train())
    with pytest.raises(ValueError, match="at most 16384 codes"):
        Context(ContextNetwork(16385, 1, 2, 2).eval())
    fixed = Context(network_of(16, 3, fixed_length=True))
    assert fixed.fingerprint() != model.fingerprint()
    with pytest.raises(ValueError, match="the sites differ in length"):
        next(iter(fixed.encode(codes)))
    segments = list(model.encode(codes))
    for wrong in ([], segments * 2):
        with pytest.raises(ValueError, match="segments for 3 turns"):
            model.decode(wrong, (6, 7))
    with pytest.raises(ValueError, match="no site takes the turn of segment 1"):
        model.decode([segments[0], b""], (6, 7))  # nothing reads as symbols 0
    with pytest.raises(ValueError, match="16"):
        next(iter(model.encode(codes + 1)))
