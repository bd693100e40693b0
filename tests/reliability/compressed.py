"""Damage compressed pictures in many ways, and count what becomes of them.

python -m tests.reliability.compressed --n 100000

Files of five tokenizers, raw, by tables and under a context network, are flipped, cut and spliced;
half of all are rewritten with other headers and segments and right checksums, as a hostile writer
would. Each must be refused by a ValueError, or give a picture of the size that its header states;
one whose checksums were left alone, the picture that it was or, cut after a segment, that of fewer
turns. All are decompressed in a child process, whose memory is limited to little more than it had
before (on Linux), so that a crash and a hang are counted too. Exits with 1 if anything else came of
one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taming.codec.container import Header, decode_file, encode_file
from taming.tokenizer import Tokenizer
from tests.support.codec import fill_tables
from tests.support.context import network_of
from tests.support.models import QUANTIZED, tokenizer_of

KINDS = ("residual", "depth", "beam", "attract", "plain")
RIGHT = ("refused", "whole", "fewer turns", "another picture")
MOST_PIXELS = 4096  # of a picture, so that a valid one takes milliseconds
MOST_GROWTH = 64 << 20  # bytes that a child process may ask for beyond what it had at first
TIMEOUT = 120.0  # seconds for a block of files


class Kind:
    """A tokenizer and its files: (bytes, what they and their first segments decode to)."""

    def __init__(self, name: str) -> None:
        model = tokenizer_of(name)
        levels, names, network = [*model.levels.values()], ["raw"], None
        self.dummies = any(level.sequence.dummies for level in levels)
        if all(level.variable_rate for level in levels):
            names.append("static")
            for level in levels:
                fill_tables(level)
        if len(levels) == 1 and not self.dummies:
            network = network_of(levels[0].sequence.n_e, levels[0].sequence.max_loops)
            names.append("context")
        self.tokenizer = Tokenizer(model, max_pixels=MOST_PIXELS, context=network)
        generator = np.random.default_rng(0)
        self.files: list[bytes] = []
        for size in ((1, 9), (16, 16), (23, 40)):
            pixels = generator.integers(0, 256, (*size, 3), np.uint8)
            self.files += [self.tokenizer.compress(pixels, entropy=name) for name in names]
        self.shown = {data: self._pictures(data) for data in self.files}

    def _pictures(self, data: bytes) -> list[bytes]:
        """Pixels of a file's picture after each turn but those that decode to nothing."""
        turns = range(1, decode_file(data)[0].segments + 1)
        first = turns if not self.dummies else turns[-1:]
        return [self.tokenizer.decompress(data, number).tobytes() for number in first]


# --- damage --------------------------------------------------------------------------------------


def damage_bytes(dice: random.Random, data: bytes, other: bytes) -> bytes:
    """Change some bytes of a file, or splice another into it."""
    changed, place = bytearray(data), dice.randrange(len(data))
    end = place + dice.choice((1, 1, 2, 4, 16))
    match dice.randrange(8):
        case 0 | 1:
            for _ in range(dice.choice((1, 1, 2, 8))):
                changed[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case 2:
            changed[place] = dice.choice((0, 1, 0x7F, 0x80, 0xFF))
        case 3:
            del changed[place:]
        case 4:
            del changed[place:end]
        case 5:
            changed[place:place] = dice.randbytes(end - place)
        case 6:
            changed[place:] = other[dice.randrange(len(other)) :]
        case _:
            changed[place:end] = bytes(len(changed[place:end]))
    return bytes(changed)


def cut_off(dice: random.Random, data: bytes, other: bytes) -> bytes:
    """Cut a file after any of its segments, or after its header."""
    header, segments = decode_file(data)
    return encode_file(header, segments[: dice.randint(0, len(segments))])


def damage_parts(dice: random.Random, data: bytes, other: bytes) -> bytes:
    """Change the header or segments of a file, and write it with right checksums."""
    header, segments = decode_file(data)
    fields: dict[str, Any] = header._asdict()
    for _ in range(dice.choice((1, 1, 2))):
        number = dice.randrange(len(segments))
        match dice.randrange(9):
            case 0:
                side = (0, 1, 2, 15, 16, 17, 64, 4096, 1 << 16, 1 << 31)
                fields["size"] = (dice.choice(side), dice.choice(side))
            case 1:
                fields["segments"] = dice.choice((0, 1, 2, 3, 4, 255, 1 << 30))
            case 2:
                fields["mode"] = dice.choice((0, 1, 2, 255))
                fields["entropy"] = dice.choice((bytes(4), header.entropy))
            case 3:
                name = dice.choice(("tokenizer", "entropy"))
                fields[name] = dice.randbytes(4)
            case 4:
                segments[number] = decode_file(other)[1][0]
            case 5:
                dice.shuffle(segments)
            case 6:
                segments[number] = dice.randbytes(dice.choice((0, 3, 4, 8, 60)))
            case _:
                if segments[number]:
                    segments[number] = damage_bytes(dice, segments[number], other)
    return encode_file(Header(**fields), segments)


def attempt(dice: random.Random, kinds: Sequence[Kind]) -> str:
    """Damage and decompress a file; return one of RIGHT, or why it is none."""
    kind = dice.choice(kinds)
    data, other = dice.choice(kind.files), dice.choice(dice.choice(kinds).files)
    damage = dice.choice([damage_bytes] * 8 + [cut_off] * 2 + [damage_parts] * 10)
    damaged = damage(dice, data, other)
    turns, partial = dice.choice(((None, False), (None, False), (None, True), (1, False)))
    try:
        picture = kind.tokenizer.decompress(damaged, turns, partial)
    except ValueError as error:
        return "refused" if str(error) else "ValueError without a message"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    height, width = decode_file(damaged, partial)[0].size
    if picture.mode != "RGB" or picture.size != (width, height):
        return f"a picture of {picture.mode} {picture.size} for {width} x {height}"
    if damage is damage_parts:
        return "another picture"
    pixels = picture.tobytes()
    for file in (data, other):  # what was spliced may be whole
        if pixels in kind.shown.get(file, ()):
            return "whole" if pixels == kind.shown[file][-1] else "fewer turns"
    return "a picture that nobody compressed"


# --- counting ------------------------------------------------------------------------------------


def try_files(kinds: Sequence[Kind], n: int, seed: int) -> Counter[str]:
    """Damage n files; count what came of them."""
    dice = random.Random(seed)
    return Counter(attempt(dice, kinds) for _ in range(n))


def limit_memory() -> None:
    """Let this process ask for no more memory than a picture of MOST_PIXELS explains."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def serve(connection: Any, names: Sequence[str]) -> None:
    """Try the blocks of files that are asked for, and answer with their counts."""
    torch.set_num_threads(1)
    kinds = [Kind(name) for name in names]
    try_files(kinds, 100, -1)  # what the first files load is no growth
    if sys.platform == "linux":
        limit_memory()
    connection.send("ready")
    while (block := connection.recv()) is not None:
        connection.send(try_files(kinds, *block))


def count(n: int, seed: int, names: Sequence[str] = KINDS, block: int = 500) -> Counter[str]:
    """Try n files of tokenizers of these kinds in a child process, and count what came of them."""
    context = multiprocessing.get_context("spawn")
    total: Counter[str] = Counter()
    child, ours = None, None
    for number in range(-(-n // block)):
        if child is None or ours is None:
            ours, theirs = context.Pipe()
            child = context.Process(target=serve, args=(theirs, names), daemon=True)
            child.start()
            theirs.close()
            ours.recv()
        try:
            ours.send((min(block, n - number * block), seed * 1_000_000 + number))
            if not ours.poll(TIMEOUT):
                raise TimeoutError
            total += ours.recv()
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            total["hung" if isinstance(error, TimeoutError) else "crashed"] += 1
            child.kill()
            child = None
        sys.stderr.write(f"\r{total.total()} files")
    sys.stderr.write("\n")
    if child is not None and ours is not None:
        ours.send(None)
        child.join()
    return total


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=sorted(QUANTIZED), default=KINDS)
    options = parser.parse_args()
    total = count(options.n, options.seed, options.kinds)
    for name in [*RIGHT, *sorted(set(total) - set(RIGHT))]:
        sys.stdout.write(f"{total[name]:8} {name}\n")
    raise SystemExit(bool(set(total) - set(RIGHT)))


if __name__ == "__main__":
    main()
