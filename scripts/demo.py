"""Run the whole pipeline on photographs that ship with scikit-image.

Trains a loopy VQGAN and a transformer over its tokens, then evaluates, reconstructs, samples and
completes images, each with the program that a user would call. Each part names what it makes and
where, and every command is printed.

python scripts/demo.py
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from taming.run import cli

logger = logging.getLogger("taming.demo")


def announce(text: str, *where: str | Path) -> None:
    """Print what a part of the demo makes, and where it appears."""
    logger.info("\n--- " + text, *where)


def call(*command: str | Path) -> None:
    """Print and run a command of ``taming`` with this Python.

    Raises:
        SystemExit: The program failed; its own output has the reason.
    """
    words = [str(word) for word in command]
    logger.info("\n$ taming %s", shlex.join(words))
    code = subprocess.run([sys.executable, "-m", "taming", *words]).returncode
    if code:
        sys.exit(code)


def train(config: str, *arguments: str) -> Path:
    """Train a recipe of ``configs/demo`` and return its run folder."""
    name = f"demo_{config}"
    call("train", "--base", f"demo/{config}", "-t", "-n", name, *arguments)
    return max(Path("logs").glob(f"*_{name}"))


def remove_earlier(folder: Path) -> None:
    """Remove the results of an earlier demo that `evaluate` and `sample` would not overwrite."""
    numbers = ("tokenizer.json", "tokenizer.html", "prior.json", "prior.html")
    for pattern in (*numbers, "samples/grid.png", "samples/0*.png", "completions/0*.png"):
        for file in folder.glob(pattern):
            file.unlink()


def main() -> None:
    """Run all steps and log the total time."""
    parser = cli.script_parser(__doc__, device=False)
    parser.add_argument("-o", "--outdir", default="results/demo", help="folder of the results")
    more = "passed to both trainings, such as lightning.x=y"
    parser.add_argument("overrides", nargs="*", help=more)
    options = parser.parse_args()
    from taming.data.photos import VALIDATION_PHOTOS

    start, out = time.monotonic(), Path(options.outdir).resolve()
    photos = [str(files("skimage") / "data" / name) for name in VALIDATION_PHOTOS]

    announce("1 of 5: train a tokenizer, about 750 steps; pictures appear in logs/<run>/images")
    tokenizer = train("loopy_vqgan", *options.overrides)
    announce("2 of 5: train a prior over its tokens, about 400 steps; it is saved in logs/<run>")
    first_stage = f"model.params.first_stage_config.params.run={tokenizer}"
    prior = train("loopy_transformer", first_stage, *options.overrides)

    announce("3 of 5: measure both on two photographs; pages appear in %s", out)
    remove_earlier(out)
    for run, name in ((tokenizer, "tokenizer"), (prior, "prior")):  # without downloads
        call("evaluate", "-r", run, "--no_pretrained", "-o", out / f"{name}.json")
    announce("4 of 5: reconstruct two photographs; pictures appear in %s", out / "reconstructions")
    where = ("-o", out / "reconstructions")
    call("reconstruct", "-r", tokenizer, *photos, "--size", "256", *where)
    text = "5 of 5: sample 16 pictures, complete the photographs, and collect all in %s"
    announce(text, out / "report.html")
    call("sample", "-r", prior, "-n", "16", "--top_p", "0.95", "-o", out / "samples")
    more = ("-n", "4", "--top_p", "0.95", "-o", out / "completions")
    call("sample", "-r", prior, "--complete", *photos, *more)
    call("report", out)
    minutes = (time.monotonic() - start) / 60
    logger.info("%.1f minutes", minutes)


if __name__ == "__main__":
    cli.run(main)
