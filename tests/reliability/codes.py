"""Decode random and mutated codes: each is refused by a ValueError, or gives what it stands for.

python -m tests.reliability.codes --n 100000

Codes of every quantizer, at first valid, are changed in values, dtype, axes and in the ``shape``
that goes with them, and decoded by ``get_codebook_entry`` or ``decode_code``. Whether a result is
right is decided by a plain loop over the sites. Exits with 1 if anything else than a right result
or a ValueError came of one of them.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tests.support.models import QUANTIZED, tokenizer_of

DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
    torch.complex64,
)
EXTREMES = (-(2**63), -(2**31), -2, -1, 0, 1, 2**8, 2**31, 2**63 - 1)


class Decoded(Exception):
    """Carries why a result is wrong."""


def valid_codes(dice: random.Random, level: Any, grid: tuple[int, ...]) -> Tensor:
    """Codes (B, h, w, T), or (B, h, w) half of the time where T is 1, that a level may write."""
    turns, count = level.sequence.max_loops, level.sequence.n_e
    rows = []
    for _ in range(grid[0] * grid[1] * grid[2]):
        length = dice.randint(1, turns)
        body = [count if level.sequence.dummies else dice.randrange(count)] * (length - 1)
        rows.append(body + [dice.randrange(count)] + [-1] * (turns - length))
    codes = torch.tensor(rows, dtype=torch.int64).reshape(*grid, turns)
    return (
        codes[..., 0] if turns == 1 and not level.variable_rate and dice.random() < 0.5 else codes
    )


def mutate(dice: random.Random, codes: Tensor) -> Any:
    """Change values, dtype or axes of codes."""
    what = dice.randrange(8)
    if what == 0 and codes.numel() and codes.dtype == torch.int64:
        flat = codes.flatten().clone()
        for _ in range(dice.randint(1, 3)):
            flat[dice.randrange(len(flat))] = dice.choice((*EXTREMES, 15, 16, 17))
        return flat.view(codes.shape)
    if what == 1:
        return codes.to(dice.choice(DTYPES)) if not codes.is_complex() else codes
    if what == 2:
        return codes.permute(dice.sample(range(codes.ndim), codes.ndim))
    if what == 3:
        return codes.flatten(dice.randrange(max(codes.ndim, 1))) if codes.ndim else codes[None]
    if what == 4 and codes.ndim:
        axis = dice.randrange(codes.ndim)
        return codes.narrow(axis, 0, dice.randint(0, codes.shape[axis]))
    if what == 5:
        return codes.unsqueeze(dice.randint(0, codes.ndim))
    if what == 6 and codes.numel():
        return codes.flatten()[dice.randrange(codes.numel())]  # no axis
    return codes if dice.random() < 0.9 else dice.choice([None, [1], 3, "codes", codes.tolist()])


def mutate_shape(dice: random.Random, shape: tuple[int, ...]) -> Any:
    """Change the shape that codes fill."""
    if dice.random() < 0.1:
        return dice.choice([(), 4, "bhwd", [1.5] * 4, [None] * 4, torch.tensor(shape)])
    sizes = list(shape)
    sizes[dice.randrange(len(sizes))] = dice.choice((-1, 0, 1, 2, 3, 4, 5, 2**40))
    if dice.random() < 0.2:
        dice.shuffle(sizes)
    return sizes if dice.random() < 0.8 else sizes[: dice.randint(0, 4)]


def expected(level: Any, codes: Tensor) -> Tensor:
    """Vectors (N, D) of codes (N, T), site by site; an error for codes that no loop writes."""
    vectors, turns, weight = [], level.sequence.max_loops, getattr(level, "codebook", None)
    for row in codes.tolist():
        length = sum(code >= 0 for code in row)
        body, last, rest = row[: length - 1], row[length - 1], row[length:]
        if length == 0 or not 0 <= last < level.n_e or rest != [-1] * (turns - length):
            raise Decoded(f"accepted {row}")
        if any(c != level.n_e if level.sequence.dummies else not 0 <= c < level.n_e for c in body):
            raise Decoded(f"accepted {row}")
        if weight is not None:
            vectors.append(weight[last])
            continue
        transform, weights = level.transform, level.embedding.weight
        written = [last] if level.sequence.dummies else row[:length]
        seen = [weights if level.sequence.dummies else None] * turns
        seen = [w if w is not None else transform.project(weights, n) for n, w in enumerate(seen)]
        depth = 0 if transform.depth is None else transform.depth[length - 1]
        vectors.append(sum(seen[turn][code] for turn, code in enumerate(written)) + depth)
    return torch.stack(vectors) if vectors else torch.zeros(0, level.e_dim)


def check(level: Any, codes: Any, shape: Any, z_q: Tensor) -> None:
    """Compare an accepted decoding of one level with that of a plain loop."""
    rows = codes.long().reshape(-1, level.sequence.max_loops)
    wanted = expected(level, rows)
    if shape is not None:
        batch, h, w, _ = shape
        wanted = wanted.reshape(batch, h, w, -1).permute(0, 3, 1, 2) if len(rows) else z_q
        if z_q.shape != (batch, level.e_dim, h, w):
            raise Decoded(f"a result of {tuple(z_q.shape)} for {shape}")
    elif z_q.ndim == 4:
        wanted = wanted.reshape(*codes.shape[:3], -1).permute(0, 3, 1, 2) if len(rows) else z_q
    torch.testing.assert_close(z_q, wanted, rtol=1e-5, atol=1e-6)


def attempt(dice: random.Random, model: Any) -> str:
    """Decode one input; return "refused" or "decoded", or why it is neither."""
    hierarchy = model.quantize
    levels = list(model.levels.values())
    top = dice.choice((0, 1, 1, 1, 2)), dice.choice((1, 2, 2, 3)), dice.choice((1, 2, 2, 3))
    grids = [(top[0], top[1] * 2**n, top[2] * 2**n) for n in range(len(levels))]
    codes: Any = [valid_codes(dice, *pair) for pair in zip(levels, grids, strict=True)]
    shape: Any = None
    for _ in range(dice.choice((0, 1, 1, 2))):
        number = dice.randrange(len(codes))
        if isinstance(codes[number], Tensor):
            codes[number] = mutate(dice, codes[number])
    if len(levels) == 1:
        (codes,) = codes
        if dice.random() < 0.5:
            shape = (*grids[0], model.quantize.e_dim)
            shape = mutate_shape(dice, shape) if dice.random() < 0.5 else shape
    elif dice.random() < 0.1:
        codes = dice.choice([codes[:0], codes[:1], codes * 2, codes[0], tuple(codes), None])
    image = dice.random() < 0.3
    try:
        if image:
            result = model.decode_code(codes, shape)
        else:
            result = hierarchy.get_codebook_entry(codes, shape)
        if not result.isfinite().all():
            raise Decoded("a result that is not finite")
        if image:
            if result.ndim != 4 or result.shape[1] != 3:
                raise Decoded(f"images of {tuple(result.shape)}")
            return "decoded"
        if len(levels) == 1:
            check(levels[0], codes, shape, result)
        else:
            channels = 0
            for level, own in zip(levels, codes, strict=False):
                part = result[:, channels : channels + level.e_dim]
                factor = result.shape[2] // max(own.shape[1], 1) or 1
                check(level, own, (*own.shape[:3], level.e_dim), part[:, :, ::factor, ::factor])
                channels += level.e_dim
        return "decoded"
    except ValueError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def try_codes(quantizer: str, n: int, seed: int) -> Counter[str]:
    """Decode n inputs for a tokenizer of `QUANTIZED`; count what came of them."""
    dice, model = random.Random(f"{seed} {quantizer}"), tokenizer_of(quantizer)
    torch.manual_seed(seed)
    return Counter(attempt(dice, model) for _ in range(n))


def main() -> None:
    """Print a table of counts for each quantizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    row = "{:14}{:>9}{:>9}{:>9}{:>7}\n"
    sys.stdout.write(row.format("quantizer", "inputs", "refused", "decoded", "wrong"))
    for quantizer in [*QUANTIZED, "all"]:
        found = total
        if quantizer != "all":
            found = try_codes(quantizer, -(-options.n // len(QUANTIZED)), options.seed)
            total = total + found
        right = found["refused"], found["decoded"]
        lost = found.total() - sum(right)
        sys.stdout.write(row.format(quantizer, found.total(), *right, lost))
    for why in sorted(set(total) - {"refused", "decoded"}):
        sys.stdout.write(f"{total[why]:7} x {why}\n")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
