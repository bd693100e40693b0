"""Encode and decode random and mutated codes and tokens with every notation.

python -m tests.reliability.sequences --n 100000 --seed 0

Whatever the values, dtype, rank, batch or grid, the answer is a ValueError or right: decoding what
was encoded gives the codes again, and encoding what was decoded gives the tokens again.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taming.modules.sequence.grammar import TokenSequence
from taming.modules.sequence.notations import RasterSequence, RunLengthSequence, UnarySequence

Random = random.Random

NOTATIONS: dict[str, Callable[[int, int], TokenSequence]] = {
    "raster": lambda k, turns: RasterSequence(k),
    "raster, several": RasterSequence,
    "unary": lambda k, turns: UnarySequence(k, turns, dummies=False),
    "unary, dummies": lambda k, turns: UnarySequence(k, turns, dummies=True),
    "run-length": lambda k, turns: RunLengthSequence(k, turns, dummies=False),
    "run-length, dummies": lambda k, turns: RunLengthSequence(k, turns, dummies=True),
}
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16]
OTHERS = [torch.bool, torch.uint64, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
VALUES = [-(2**63), -(2**31), -129, -2, -1, 0, 1, 255, 65535, 2**31, 2**62, 2**63 - 1]
SIDES = [-1, 0, 1, 2, 3, 7, 1 << 20, 1 << 40, True, 2.0, None]


def draw_codes(rng: Random, sequence: TokenSequence) -> Tensor:
    """Valid codes (B, h, w, T), with B from 0 to 2."""
    batch, h, w = rng.randrange(3), rng.randint(1, 3), rng.randint(1, 3)
    codes = torch.full((batch * h * w, sequence.max_loops), -1)
    for site in codes:
        length = rng.randint(sequence.max_loops if sequence.fixed_length else 1, sequence.max_loops)
        for turn in range(length):
            is_dummy = sequence.dummies and turn < length - 1
            site[turn] = sequence.n_e if is_dummy else rng.randrange(sequence.n_e)
    return codes.view(batch, h, w, sequence.max_loops)


def mutate(rng: Random, values: Tensor, top: int) -> Tensor:
    """Change values, which are mostly below ``top``; the order, shape, rank or dtype."""
    for _ in range(rng.choice([0, 1, 1, 2])):
        number = rng.randrange(max(values.numel(), 1))
        match rng.randrange(9):
            case 0 | 1 | 2 if values.numel():
                values = values.clone()
                value = rng.randint(-2, top + 1) if rng.random() < 0.8 else rng.choice(VALUES)
                values.view(-1)[number] = value
            case 3 if values.ndim:  # cut
                axis = rng.randrange(values.ndim)
                values = values.narrow(axis, 0, rng.randint(0, values.shape[axis]))
            case 4 if values.ndim:  # repeat the end
                axis = rng.randrange(values.ndim)
                values = torch.cat(
                    [values, values.narrow(axis, 0, min(1, values.shape[axis]))], axis
                )
            case 5 if values.ndim:  # shift
                values = values.roll(1, rng.randrange(values.ndim))
            case 6:
                values = rng.choice(
                    [values[None], values[..., None], values.flatten(), values.sum(), values.mT]
                    if values.ndim > 1
                    else [values[None]]
                )
            case _:
                values = values.to(rng.choice(INTEGERS if rng.random() < 0.8 else OTHERS))
                return values.contiguous()
        values = values.contiguous()
    return values


def check_codes(rng: Random, sequence: TokenSequence) -> bool:
    """Encode mutated codes: True if they were encoded, and decode to the same; False if refused."""
    codes = mutate(rng, draw_codes(rng, sequence), sequence.n_e)
    try:
        tokens, lengths = sequence.encode(codes)
    except ValueError:
        return False
    assert tokens.dtype == lengths.dtype == torch.int64
    assert tokens.shape == (len(codes), int(lengths.max()) if len(codes) else 0)
    assert torch.equal((tokens >= 0).sum(1), lengths) and (tokens < sequence.vocab_size).all()
    grid = codes.shape[1], codes.shape[2]
    again = sequence.decode(tokens, grid)
    assert torch.equal(again, codes.long().reshape(len(codes), *grid, sequence.max_loops))
    return True


def check_tokens(rng: Random, sequence: TokenSequence) -> bool:
    """Decode mutated tokens: True if they decoded, and encode to the same; False if refused."""
    codes = draw_codes(rng, sequence)
    tokens, grid = sequence.encode(codes)[0], codes.shape[1:3]
    if rng.random() < 0.2:
        shape = rng.randrange(3), rng.randrange(9)
        values = [rng.randint(-1, sequence.vocab_size) for _ in range(shape[0] * shape[1])]
        tokens = torch.tensor(values, dtype=torch.int64).view(shape)
    tokens = mutate(rng, tokens, sequence.vocab_size)
    if rng.random() < 0.2:
        grid = tuple(rng.choice(SIDES) for _ in range(rng.choice([0, 1, 2, 2, 2, 2, 3])))
    try:
        found = sequence.decode(tokens, grid)  # type: ignore[arg-type]
    except ValueError:
        return False
    assert found.dtype == torch.int64
    assert found.shape == (len(tokens), *grid, sequence.max_loops)
    again, lengths = sequence.encode(found)
    assert torch.equal(again, tokens.long()[:, : again.shape[1]])
    assert (tokens[:, again.shape[1] :].long() == -1).all()
    return True


CHECKS: dict[str, Callable[[Random, TokenSequence], bool]] = {
    "codes": check_codes,
    "tokens": check_tokens,
}


def draw_sequence(rng: Random, name: str) -> TokenSequence:
    """A notation of up to 6 codes and 5 turns."""
    return NOTATIONS[name](rng.randint(1, 6), rng.randint(1, 5))


def count(name: str, check: str, n: int, seed: int = 0) -> Counter[str]:
    """Count the inputs that were right, refused or wrong; print the first wrong ones."""
    counts: Counter[str] = Counter(right=0, refused=0, wrong=0)
    for number in range(n):
        rng = random.Random(f"{seed} {number}")
        try:
            result = "right" if CHECKS[check](rng, draw_sequence(rng, name)) else "refused"
        except Exception as error:
            result = "wrong"
            if counts["wrong"] < 5:
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                sys.stdout.write(f"{name}, {check} {number}: {what}\n")
        counts[result] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000, help="inputs for each notation and way")
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(f"{'notation':24}{'input':10}{'right':>10}{'refused':>10}{'wrong':>10}\n")
    wrong = 0
    for name in NOTATIONS:
        for check in CHECKS:
            counts = count(name, check, options.n, options.seed)
            row = "".join(f"{counts[result]:10}" for result in ("right", "refused", "wrong"))
            sys.stdout.write(f"{name:24}{check:10}{row}\n")
            sys.stdout.flush()
            wrong += counts["wrong"]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
