"""Sample from the priors of all levels of a VQ-VAE-2: ``sample.py`` with several runs."""

import runpy
from pathlib import Path

from taming.run import cli


def main() -> None:
    """Sample images, from the top level down."""
    runpy.run_path(str(Path(__file__).with_name("sample.py")))["main"](all_levels=True)


if __name__ == "__main__":
    cli.run(main)
