"""Look at a trained tokenizer or prior in a page of the browser.

python -m taming.demo -r logs/<run>
python -m taming.demo -r logs/<run> logs/<another>

Drop a picture, drag its rate and watch reconstruction, lengths, PSNR and file size; click a site to
see its loop. With a prior: sample, and complete what you paint over. Several runs stand side by
side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taming.run import cli

if TYPE_CHECKING:
    import argparse

PROGRAM = "taming demo"  # of which this is the command, also as ``python -m taming.demo``
SHIPPED = "photos"  # name of the tokenizer that comes with the package


def port(text: str) -> int:
    """Return an option's port.

    Raises:
        ValueError: It is no integer, or beyond 65535.
    """
    if not 0 <= (number := int(text)) < 1 << 16:
        raise ValueError
    return number


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the page itself."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=port, default=8501)
    parser.add_argument("--no_browser", action="store_true", help="do not open the page")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.script_parser(__doc__)
    add = parser.add_argument
    run_help = "run, or one of its checkpoints; default: the tokenizer that is shipped"
    given: dict[str, Any] = {"nargs": "+", "default": [SHIPPED], "type": cli.existing_run}
    add("-r", "--resume", metavar="RUN", **given, help=run_help)
    add("--trust_config", action="store_true", help=cli.TRUST_HELP)
    add(
        "--tokenizer",
        metavar="RUN",
        type=cli.existing_run,
        help="run of a prior's tokenizer, if it was moved",
    )
    add_page_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Serve the page until interrupted."""
    options = parse_options()
    from taming.demo.exhibit import Exhibit
    from taming.demo.serve import serve

    device = cli.choose_device(options.device)
    trust = {"trust_config": options.trust_config, "tokenizer": options.tokenizer}
    exhibits = [Exhibit.load(run, device, **trust) for run in options.resume]
    serve(exhibits, options.host, options.port, not options.no_browser)


if __name__ == "__main__":
    cli.run(main)
