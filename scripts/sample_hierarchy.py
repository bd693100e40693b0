"""Sample from the priors of all levels of a VQ-VAE-2: ``sample.py`` with several runs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from scripts import sample  # noqa: E402


def main() -> None:
    """Sample images, from the top level down."""
    sample.main(all_levels=True)


if __name__ == "__main__":
    sample.run(main)
