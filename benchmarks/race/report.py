"""Table, plot and verdicts of a race, from its measurements."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger("taming.benchmark")

LOOPY = ("loopy, one checkpoint", "loopy, dedicated")
ONE = ("loopy, one checkpoint",)
FIXED = ("fixed depth, separate", "fixed depth, shared", "fixed depth, mapped")
NUMBERS = ("tokens", "raw_bits", "entropy_bits", "prior_bits", "psnr", "ssim", "usage")
Point = dict[str, Any]


def average(rows: Sequence[Point]) -> list[Point]:
    """Mean and standard deviation over seeds of each contender at each of its rates."""
    groups: dict[tuple[str, str, str], list[Point]] = defaultdict(list)
    for row in rows:
        groups[row["name"], row["group"], row["length"]].append(row)
    points = []
    for (name, group, length), members in groups.items():
        point: Point = {"name": name, "group": group, "length": length, "seeds": len(members)}
        for number in NUMBERS:
            values = [float(m[number]) for m in members if m[number] not in ("", None)]
            point[number] = float(np.mean(values)) if values else None
            point[f"{number}_std"] = float(np.std(values)) if values else None
        points.append(point)
    return sorted(points, key=lambda point: (point["tokens"], -point["psnr"]))


def table(points: Sequence[Point]) -> str:
    """Markdown table, ordered by tokens."""
    lines = [
        "| quantizer | length | tokens | raw bits | entropy | prior | PSNR dB | SSIM | usage |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        prior = "" if p["prior_bits"] is None else f"{p['prior_bits']:.0f}"
        deviation = f" ± {p['psnr_std']:.2f}" if p["seeds"] > 1 else ""
        lines.append(
            f"| {p['name']} | {p['length']} | {p['tokens']:.0f} | {p['raw_bits']:.0f} "
            f"| {p['entropy_bits']:.0f} | {prior} | {p['psnr']:.2f}{deviation} "
            f"| {p['ssim']:.3f} | {100 * p['usage']:.0f}% |"
        )
    return "\n".join(lines)


def curve(rows: Sequence[Point], group: str, seed: int, rate: str) -> list[tuple[float, float]]:
    """(rate, PSNR) of a group with one seed, in the order of the rate."""
    return sorted(
        (float(row[rate]), float(row["psnr"]))
        for row in rows
        if row["group"] == group and int(row["seed"]) == seed and row[rate] not in ("", None)
    )


def best_at(
    rows: Sequence[Point], groups: Sequence[str], seed: int, kind: str, rate: float
) -> float | None:
    """Best PSNR of some groups at a rate, linear between measurements in the rate's logarithm.

    A rate outside what a group was measured at (by more than 1%) is none of it; None if all are.
    """
    found = []
    for group in groups:
        points = curve(rows, group, seed, kind)
        if points and points[0][0] * 0.99 <= rate <= points[-1][0] * 1.01:
            rates, quality = zip(*points, strict=True)
            found.append(float(np.interp(np.log(rate), np.log(rates), quality)))
    return max(found, default=None)


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.2f}{deviation} dB"


def margins(rows: Sequence[Point], peer: Point, groups: Sequence[str], rate: str) -> list[float]:
    """By how much some groups beat a peer's point at its own rate, one number per seed, in dB."""
    found = []
    for row in rows:
        same = (row["name"], row["length"]) == (peer["name"], peer["length"])
        if same and row[rate] not in ("", None):
            best = best_at(rows, groups, int(row["seed"]), rate, float(row[rate]))
            if best is not None:
                found.append(best - float(row["psnr"]))
    return found


def verdicts(rows: Sequence[Point], points: Sequence[Point]) -> list[str]:
    """Say, for each peer and control, who wins at its tokens and at its bits."""
    lines = []
    for rate, title in (
        ("tokens", "at equal tokens"),
        ("entropy_bits", "at equal bits (zero-order entropy)"),
        ("prior_bits", "at equal bits (prior)"),
    ):
        lines += ["", f"Loopy (the better of its models) {title}:"]
        for peer in points:
            if peer["group"] not in LOOPY:
                found = margins(rows, peer, LOOPY, rate)
                if found:
                    label = f"{peer['name']} {peer['length']}".strip()
                    lines.append(f"- {label} ({peer[rate]:.0f}): {_spread(found)}")
    lines += ["", "Fewer tokens at the PSNR of fixed depth:", *savings(rows, points)]
    lines += ["", "One checkpoint against the dedicated model at its tokens:"]
    for peer in points:
        if peer["group"] == "loopy, dedicated" and (found := margins(rows, peer, ONE, "tokens")):
            lines.append(f"- {peer['name']} ({peer['tokens']:.0f}): {_spread(found)}")
    return lines[1:]


def savings(rows: Sequence[Point], points: Sequence[Point]) -> list[str]:
    """Tokens that the loop needs for the PSNR of each fixed depth, as a share of its tokens."""
    lines = []
    for peer in points:
        if peer["group"] not in FIXED:
            continue
        found = []
        for row in rows:
            if (row["name"], row["length"]) == (peer["name"], peer["length"]):
                seed, wanted, tokens = int(row["seed"]), float(row["psnr"]), float(row["tokens"])
                for share in np.arange(0.3, 1.3, 0.01):
                    best = best_at(rows, LOOPY, seed, "tokens", share * tokens)
                    if best is not None and best >= wanted:
                        found.append(100 * (1 - share))
                        break
        if found:
            deviation = f" ± {np.std(found):.0f}" if len(found) > 1 else ""
            lines.append(f"- {peer['name']}: {np.mean(found):.0f}{deviation}%")
    return lines


def plot(points: Sequence[Point], file: Path) -> None:
    """Draw PSNR and SSIM over tokens and over bits, a line for each group."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rates = [("tokens", "tokens per image"), ("entropy_bits", "bits per image (entropy)")]
    if any(p["prior_bits"] is not None for p in points):
        rates.append(("prior_bits", "bits per image (prior)"))
    figure, axes = plt.subplots(2, len(rates), figsize=(5 * len(rates), 8), squeeze=False)
    for row, quality in zip(axes, ("psnr", "ssim"), strict=True):
        for axis, (rate, title) in zip(row, rates, strict=True):
            for group in dict.fromkeys(p["group"] for p in points):
                line = [p for p in points if p["group"] == group and p[rate] is not None]
                style = "--" if group.startswith("control") else "-"
                width = 2.5 if group in LOOPY else 1.2
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
    """Write ``report.md`` and ``rate_distortion.png``, and show the report."""
    points = average(rows)
    head = (
        f"K = {plan.codes}, D = {plan.channels}; {plan.base_steps} steps without codes, then "
        f"{plan.steps} with each quantizer, of {plan.batch_size} images; "
        f"{plan.test_images} held-out images; {len({row['seed'] for row in rows})} seed(s)"
    )
    text = "\n\n".join([head, table(points), "\n".join(verdicts(rows, points))])
    (folder / "report.md").write_text(text + "\n")
    plot(points, folder / "rate_distortion.png")
    logger.info("%s\n\nwritten to %s", text, folder)
