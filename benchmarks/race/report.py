"""Table, plot and comparisons of a race, from its measurements."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger("taming.benchmark")

BY_RATE = "loopy by rate, one checkpoint"
LOOPS = ("loopy, one checkpoint", "loopy, dedicated", BY_RATE, f"{BY_RATE}, loss")
CONTROL = "control: "
RATES = {
    "tokens": "codes per image",  # the column's name in results that already exist
    "raw_bits": "bits per image (raw)",
    "entropy_bits": "bits per image (entropy)",
    "prior_bits": "bits per image (prior)",
}
NUMBERS = ("tokens", "raw_bits", "entropy_bits", "prior_bits", "psnr", "ssim", "usage")
Point = dict[str, Any]


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation, or 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def average(rows: Sequence[Point]) -> list[Point]:
    """Compute the mean and standard deviation over seeds for each contender and rate."""
    groups: dict[tuple[str, str, str], list[Point]] = defaultdict(list)
    for row in rows:
        groups[row["name"], row["group"], row["length"]].append(row)
    points = []
    for (name, group, length), members in groups.items():
        point: Point = {"name": name, "group": group, "length": length, "seeds": len(members)}
        for number in NUMBERS:
            values = [float(m[number]) for m in members if m[number] not in ("", None)]
            point[number] = float(np.mean(values)) if values else None
            point[f"{number}_std"] = deviation(values)
        points.append(point)
    return sorted(points, key=lambda point: (point["tokens"], -point["psnr"]))


def table(points: Sequence[Point]) -> str:
    """Format a Markdown table, ordered by codes per image."""
    lines = [
        "| quantizer | length | codes | raw bits | entropy | prior | PSNR dB | SSIM | usage |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        prior = "" if p["prior_bits"] is None else f"{p['prior_bits']:.0f}"
        spread = f" ± {p['psnr_std']:.2f}" if p["seeds"] > 1 else ""
        lines.append(
            f"| {p['name']} | {p['length']} | {p['tokens']:.0f} | {p['raw_bits']:.0f} "
            f"| {p['entropy_bits']:.0f} | {prior} | {p['psnr']:.2f}{spread} "
            f"| {p['ssim']:.3f} | {100 * p['usage']:.0f}% |"
        )
    return "\n".join(lines)


def curve(rows: Sequence[Point], group: str, seed: int, rate: str) -> list[tuple[float, float]]:
    """Return (rate, PSNR in dB) of a group with one seed, ordered by rate."""
    return sorted(
        (float(row[rate]), float(row["psnr"]))
        for row in rows
        if row["group"] == group and int(row["seed"]) == seed and row[rate] not in ("", None)
    )


def quality_at(
    rows: Sequence[Point], group: str, seed: int, kind: str, rate: float
) -> float | None:
    """Interpolate a group's PSNR in dB at a rate, linearly in the logarithm of the rate.

    Returns None for a rate more than 1% outside the group's measured range.
    """
    points = curve(rows, group, seed, kind)
    if not points or not points[0][0] * 0.99 <= rate <= points[-1][0] * 1.01:
        return None
    rates, quality = zip(*points, strict=True)
    return float(np.interp(np.log(rate), np.log(rates), quality))


def codes_at(rows: Sequence[Point], group: str, seed: int, psnr: float) -> float | None:
    """Interpolate the codes per image at which a group reaches a PSNR in dB.

    Returns None for a PSNR outside the group's measured range.
    """
    points = curve(rows, group, seed, "tokens")
    if not points or not points[0][1] <= psnr <= points[-1][1]:
        return None
    codes, quality = zip(*points, strict=True)
    return float(np.exp(np.interp(psnr, quality, np.log(codes))))


def of_each_seed(rows: Sequence[Point], peer: Point, rate: str) -> list[Point]:
    """Return the rows of a peer's point that have a rate, one per seed."""
    name = (peer["name"], peer["length"])
    return [r for r in rows if (r["name"], r["length"]) == name and r[rate] not in ("", None)]


def margins(rows: Sequence[Point], peer: Point, group: str, rate: str) -> list[float | None]:
    """Return a group's PSNR minus a peer's at the peer's rate, in dB, one number per seed."""
    found = []
    for row in of_each_seed(rows, peer, rate):
        quality = quality_at(rows, group, int(row["seed"]), rate, float(row[rate]))
        found.append(None if quality is None else quality - float(row["psnr"]))
    return found


def savings(rows: Sequence[Point], peer: Point, group: str) -> list[float | None]:
    """Return the codes that a group saves at a peer's PSNR, in percent, one number per seed."""
    found = []
    for row in of_each_seed(rows, peer, "tokens"):
        codes = codes_at(rows, group, int(row["seed"]), float(row["psnr"]))
        found.append(None if codes is None else 100 * (1 - codes / float(row["tokens"])))
    return found


def cell(values: Sequence[float | None], digits: int) -> str:
    """Format the mean and deviation over seeds; count the seeds if some have no value (None)."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {deviation(known):.{digits}f}" if len(known) > 1 else ""
    seeds = f" ({len(known)} of {len(values)} seeds)" if len(known) < len(values) else ""
    return f"{np.mean(known):+.{digits}f}{spread}{seeds}"


def comparison(rows: Sequence[Point], peers: Sequence[Point], group: str) -> str:
    """Format a Markdown table of a group's gains over each peer, controls last."""
    lines = [
        f"| {group}: dB above | at its codes | at its raw bits | at its entropy "
        "| at its bits of the prior | % fewer codes at its PSNR |",
        "|---|---|---|---|---|---|",
    ]
    for peer in sorted(peers, key=lambda peer: peer["group"].startswith(CONTROL)):
        cells = [cell(margins(rows, peer, group, rate), 2) for rate in RATES]
        cells.append(cell(savings(rows, peer, group), 0))
        if any(cells):
            label = f"{peer['name']} {peer['length']}".strip()
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(points: Sequence[Point], file: Path) -> None:
    """Plot PSNR and SSIM against codes and bits per image, one line per group."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rates = [(r, title) for r, title in RATES.items() if any(p[r] is not None for p in points)]
    figure, axes = plt.subplots(2, len(rates), figsize=(5 * len(rates), 8), squeeze=False)
    for row, quality in zip(axes, ("psnr", "ssim"), strict=True):
        for axis, (rate, title) in zip(row, rates, strict=True):
            for group in dict.fromkeys(p["group"] for p in points):
                line = [p for p in points if p["group"] == group and p[rate] is not None]
                style = "--" if group.startswith("control") else "-"
                width = 2.5 if group in LOOPS else 1.2
                axis.errorbar(
                    [p[rate] for p in line],
                    [p[quality] for p in line],
                    yerr=[p[f"{quality}_std"] for p in line],
                    marker="o",
                    markersize=4,
                    linestyle=style,
                    linewidth=width,
                    label=group,
                )
            axis.set(xlabel=title, ylabel={"psnr": "PSNR dB", "ssim": "SSIM"}[quality])
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_report(rows: Sequence[Point], plan: Any, folder: Path) -> None:
    """Save ``report.md`` and ``rate_distortion.png``, and log the report."""
    points = average(rows)
    head = (
        f"K = {plan.codes}, D = {plan.channels}; {plan.base_steps} steps without codes, then "
        f"{plan.steps} with each quantizer, of {plan.batch_size} images; "
        f"{plan.test_images} held-out images; {len({row['seed'] for row in rows})} seed(s)"
    )
    peers = {group: [p for p in points if p["group"] != group] for group in LOOPS}
    gains = [comparison(rows, others, group) for group, others in peers.items()]
    text = "\n\n".join([head, table(points), *gains])
    (folder / "report.md").write_text(text + "\n")
    plot(points, folder / "rate_distortion.png")
    logger.info("%s\n\nsaved in %s", text, folder)
