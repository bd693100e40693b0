"""Measure a trained tokenizer or prior, with the protocol beside the numbers.

python scripts/evaluate.py -r logs/<run>
python scripts/evaluate.py -r logs/<run> --data photos/ --codes 1,1.5,2,3,4
python scripts/evaluate.py -r logs/<prior's run> --generated 5000

Writes a JSON file and beside it a page, .html, with the best, median and worst reconstructions;
prints a table. docs/evaluation.md explains each number.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import taming
from taming.run import cli
from taming.run.folder import SavedRun
from taming.run.page import Section, captioned, draw_histograms, page, picture, table
from taming.run.parts import folder_of, place_of
from taming.util import replacing

if TYPE_CHECKING:
    from taming import Evaluation
    from taming.evaluation.examples import Example

logger = logging.getLogger("taming.evaluate")

LARGEST = 2000  # columns of a picture on the page, which shows larger ones smaller


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.script_parser(__doc__)
    add = parser.add_argument
    run = "run, one of its checkpoints, or the name of a model that ships (default: %(default)s)"
    add("-r", "--resume", default="photos", type=cli.existing_run, help=run)
    add("--trust_config", action="store_true", help=cli.TRUST_HELP)
    add("--tokenizer", metavar="RUN", help="run of a prior's tokenizer, where it is not found")
    data_help = "folder of images, text file that lists some, Parquet file, or owner/name on the\n"
    add("--data", help=data_help + "hub; default: the validation set of the run")
    add("--split", default="test", help="split of a data set of the hub (default: test)")
    size_help = "side of square crops of --data in pixels;\n"
    add("-s", "--size", type=int, help=size_help + "default: whole pictures; for a prior, its own")
    codes_help = "rates of a loopy tokenizer besides its own, as mean codes of a site,\n"
    add("--codes", default="", help=codes_help + "such as 1,1.5,2,3,4")
    generated_help = "pictures that a prior generates, to be compared with the data"
    add("--generated", type=int, default=0, help=generated_help)
    add("--batch_size", type=int, default=16)
    error_help = "skip pictures that cannot be read, or raise an error; default: skip"
    add("--on_error", choices=("skip", "raise"), default="skip", help=error_help)
    without = "leave out measures by pretrained networks, whose weights are downloaded if missing"
    add("--no_pretrained", action="store_true", help=without)
    shown = "best, median and worst reconstructions on the page, of each (default: 3)"
    add("--examples", type=int, default=3, help=shown)
    add("-t", "--temperature", type=float, help="of generated pictures")
    add("-k", "--top_k", type=int, help="sample among the k likeliest tokens")
    add("-p", "--top_p", type=float, help="sample among the likeliest of this mass")
    add("--guidance", type=float, help="scale of classifier-free guidance")
    add("--seed", type=int, default=23, help="of generated pictures")
    output_help = ".json file, not to be there yet; default: results/evaluations/<run>.json"
    add("-o", "--output", type=Path, help=output_help)
    options = parser.parse_args()
    if options.output is None:
        name = folder_of(place_of(options.resume)).absolute().name
        options.output = Path("results/evaluations") / f"{name}.json"
    if options.output.is_dir() or options.output.suffix != ".json":
        raise ValueError(f"-o names the .json file to be written, got {options.output}")
    try:
        options.codes = [float(rate) for rate in options.codes.split(",") if options.codes]
    except ValueError as error:
        raise ValueError(f"--codes takes numbers such as 1,1.5,2, got {options.codes!r}") from error
    return options


def png_of(example: Example) -> bytes:
    """Encode the picture of an example, scaled down where it is wider than a page needs."""
    from taming.pictures import to_picture

    image = to_picture(example.picture)
    if image.width > LARGEST:
        image = image.resize((LARGEST, round(image.height * LARGEST / image.width)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value of all entries of nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}: ")
        else:
            yield prefix + name, value


def sections(result: Evaluation) -> Iterator[Section]:
    """Yield the sections of the page: what is missing, pictures, lengths, protocol."""
    numbers = result.numbers
    for key, title in (("missing", "Not measured"), ("left_out", "Left out")):
        if numbers[key]:
            yield title, "", table(numbers[key].items(), kind="text")
    if unreadable := numbers["unreadable"]:
        yield "Not read", "", table(enumerate(unreadable, 1), kind="text")
    for group in dict.fromkeys(example.group for example in result.examples):
        shown = [example for example in result.examples if example.group == group]
        elements = (captioned(png_of(example), example.caption) for example in shown)
        yield f"{group.capitalize()} pictures", "", "".join(elements)
    own = numbers.get("rates", {}).get("own", {})
    if lengths := own.get("histograms", {}).get("lengths"):  # several levels have several
        drawn = draw_histograms(lengths, own["per_image"]["tokens"])
        yield "Lengths", "At the tokenizer's own rate.", picture(drawn, "lengths")
    text = "What the numbers depend on: compare them only with those of the same protocol."
    yield "Protocol", text, table(flat(numbers["protocol"]), kind="text")


def check_data(options: argparse.Namespace) -> None:
    """Refuse a model without data of its own if none is given.

    Raises:
        ValueError: It names --data.
    """
    if options.data is not None:
        return
    given = {"tokenizer": options.tokenizer, "trust_config": options.trust_config}
    if SavedRun.load(options.resume, **given).config.values.get("data") is None:
        raise ValueError(f"{options.resume} comes without pictures: give --data FOLDER")


def main() -> None:
    """Write the numbers and the page, and print the table.

    Raises:
        ValueError: A file of the results is there already, or an option is wrong.
        IncompleteError: Pictures could not be read; the numbers are of the others.
    """
    options = parse_options()
    html_file = options.output.with_suffix(".html")
    cli.check_folder(options.output.parent)
    cli.refuse_existing([options.output, html_file])
    check_data(options)
    names = ("temperature", "top_k", "top_p", "guidance")
    params = {name: getattr(options, name) for name in names}
    names = (
        "data",
        "codes",
        "generated",
        "size",
        "split",
        "batch_size",
        "examples",
        "seed",
        "on_error",
    )
    result = taming.evaluate(
        options.resume,
        device=cli.choose_device(options.device),
        tokenizer=options.tokenizer,
        trust_config=options.trust_config,
        pretrained=not options.no_pretrained,
        **{name: getattr(options, name) for name in names},
        **{name: value for name, value in params.items() if value is not None},
    )
    head, rows = result.rows()
    title = f"Evaluation of {options.resume}"
    with replacing(options.output) as part:
        part.write_text(json.dumps(result.numbers, indent=2), encoding="utf-8")
    with replacing(html_file) as part:
        text = page(title, table(rows, head), sections(result))
        part.write_bytes(text.encode("utf-8", "backslashreplace"))  # of files' names
    sys.stdout.write(result.table().encode("utf-8", "backslashreplace").decode())
    logger.info("written to %s and %s", options.output, html_file)
    from taming.data.preprocessing import refuse_failed

    unreadable, protocol = result.numbers["unreadable"], result.numbers["protocol"]
    refuse_failed(unreadable, len(unreadable) + protocol["images"])


if __name__ == "__main__":
    cli.run(main)
