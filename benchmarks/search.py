"""Time the nearest-code search against the bare matrix product that it needs.

python -m benchmarks.search

The limit is ``torch.mm`` of all vectors with all codes into a preallocated buffer: no search by
scores can be faster. The indices are compared with float64. A block of memory is freed beforehand,
as a network frees its activations; otherwise the C library returns every freed tensor to the
system, and each pass pays for fresh pages, which takes as long as the product.

Axis letters: N vectors, D channels, K codes.
"""

from __future__ import annotations

import logging
import resource

import torch
from torch import Tensor

from benchmarks.timing import in_turn, save, table
from taming.modules.vqvae.nearest import nearest_codes
from taming.modules.vqvae.quantize import VectorQuantizer2
from taming.run.cli import run, script_parser

logger = logging.getLogger("taming.benchmark")

SIZES = ((4096, 256, 1024), (4096, 256, 16384), (4096, 8, 16384), (8192, 64, 256))


LARGE = (65536, 256, 16384)


def extra_memory(n: int, d: int, k: int) -> float:
    """Return the MB that ``VectorQuantizer2.forward`` takes at most above inputs and codebook."""
    quantizer, z = VectorQuantizer2(k, d, beta=0.25).eval(), torch.randn(n // 1024, d, 32, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        quantizer(z)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def wrong_share(found: Tensor, vectors: Tensor, codebook: Tensor) -> float:
    """Return the share of vectors (N, D) whose code (N,) is not the argmin of float64 distances."""
    exact = [torch.cdist(v.double(), codebook.double()).argmin(dim=1) for v in vectors.split(512)]
    return float((found != torch.cat(exact)).double().mean())


def measure(n: int, d: int, k: int, repeats: int) -> dict[str, float]:
    """Measure one size on one thread.

    Returns:
        The row of the table: sizes, milliseconds of the product, ratios to it (of the product and
        ``argmin``; of the search; of ``VectorQuantizer2.forward``), the largest spread, and the
        share of vectors with another code than in float64.
    """
    quantizer = VectorQuantizer2(k, d, beta=0.25, sane_index_shape=True).eval()
    torch.nn.init.normal_(quantizer.embedding.weight)
    codebook = quantizer.embedding.weight.detach()
    z = torch.randn(n // 64, d, 8, 8)
    vectors = z.movedim(1, -1).reshape(n, d)
    scores = torch.empty(n, k)
    with torch.no_grad():
        sides = {
            "product": lambda: torch.mm(vectors, codebook.T, out=scores),
            "argmin": lambda: torch.mm(vectors, codebook.T, out=scores).argmin(dim=1),
            "search": lambda: nearest_codes(vectors, codebook),
            "forward": lambda: quantizer(z),
        }
        times = in_turn(sides, repeats)
        wrong = wrong_share(nearest_codes(vectors, codebook), vectors, codebook)
    product = times["product"]
    return {
        "N": n,
        "D": d,
        "K": k,
        "product, ms": product.cpu * 1e3,
        **{name: times[name].cpu / product.cpu for name in ("argmin", "search", "forward")},
        "spread": max(timing.spread for timing in times.values()),
        "wrong": wrong,
    }


def main() -> None:
    """Log the table and save it."""
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default: 15)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logger.info("N, D, K = %s: %.0f MB above inputs and codebook", LARGE, extra_memory(*LARGE))
    torch.empty(1 << 23).fill_(0)  # 32 MiB
    rows = [measure(*size, repeats) for size in SIZES]
    logger.info("Processor time of one thread over that of the product alone:\n%s", table(rows))
    logger.info("saved %s", save("search", rows))


if __name__ == "__main__":
    run(main)
