"""Measure how fast pictures become tokens, and compute what a billion of them take.

python -m benchmarks.scale -r logs/<run of a tokenizer> --size 256 --max_codes 512
python -m benchmarks.scale -r logs/<run> --pictures 4000 --device cuda --price 2

Crops of the photographs inside scikit-image, as JPEG files, are encoded by one process with
`taming.scale`, in two numbers: the difference leaves out the start. On a CPU, the rate is that of
processor time, one core's; on a GPU that of wall time, with the cores that read beside it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import save, table
from taming.data.photos import PhotosTrain
from taming.pictures import save_picture
from taming.run.cli import choose_device, run, script_parser
from taming.scale import encode_shards

BILLION = 10**9
WEEK = 7 * 24 * 3600


def write_pictures(folder: Path, number: int, size: int) -> None:
    """Write JPEG files of ``size`` pixels a side."""
    photos = PhotosTrain(size=size, length=number)
    for index in range(number):
        image = torch.as_tensor(photos[index]["image"]).permute(2, 0, 1)
        save_picture(image, folder / f"{index:06}.jpg")


def encode(run: str, data: Path, output: Path, device: str, **rate: Any) -> tuple[float, Any, int]:
    """Encode a folder; return the seconds, the report and the bytes of the cache's files."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    begun = clock()
    report = encode_shards(run, str(data), output, devices=[device], **rate)
    seconds = clock() - begun
    return seconds, report, sum(file.stat().st_size for file in output.glob("*.arrow"))


def measure(
    run: str, pictures: int, size: int, device: str, price: float, max_codes: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rates of one process, and the cost of a billion pictures by them."""
    with tempfile.TemporaryDirectory() as root:
        seconds = []
        for number in (pictures // 4, pictures):
            data = Path(root, f"pictures{number}")
            write_pictures(data, number, size)
            output = Path(root, f"cache{number}")
            spent, report, size_of = encode(run, data, output, device, max_codes=max_codes)
            seconds.append(spent)
    rate = (pictures - pictures // 4) / (seconds[1] - seconds[0])
    hours = BILLION / rate / 3600
    what = "core" if device == "cpu" else "GPU"
    about = {"side, pixels": size, f"pictures/s of a {what}": rate}
    about |= {"tokens each": report.tokens / pictures, "bytes each": size_of / pictures}
    cost = {f"{what}-hours": hours, f"{what}s for a week": BILLION / rate / WEEK}
    cost |= {"TB of cache": BILLION * size_of / pictures / 1e12}
    return about, cost | ({f"at {price:g} an hour": hours * price} if price else {})


def main() -> None:
    """Print both tables."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("-r", "--resume", required=True, help="run of a tokenizer")
    add("--pictures", type=int, default=400)
    add("--size", type=int, default=256, help="side of the pictures in pixels")
    add("--max_codes", type=int, help="largest number of codes of a picture")
    add("--price", type=float, default=0, help="of an hour of a core or a GPU")
    options = parser.parse_args()
    device = str(choose_device(options.device))
    arguments = (options.resume, options.pictures, options.size, device)
    about, cost = measure(*arguments, options.price, options.max_codes)
    sys.stdout.write(f"{table([about])}\n\nA billion pictures:\n\n{table([cost])}\n")
    save("scale", [about | cost])


if __name__ == "__main__":
    run(main)
