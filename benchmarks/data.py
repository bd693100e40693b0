"""Time the data's way: picture files to batches, and token caches to batches and training steps.

python -m benchmarks.data
python -m benchmarks.data -r logs/<run of the prior> --cache cache/train

Pictures: JPEG files of 500 x 375 pixels, their short side rescaled to 256 and the middle cut out,
against loops that only decode, rescale and cut with Pillow or torchvision, and do not even make
batches. Tokens: a cache of 2,000 sequences of 500 to 600. With a run and a cache
(``scripts/encode.py``), also a prior's training step from images and from tokens, at the run's
batch size; on a GPU, in wall time.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from skimage.data import astronaut, chelsea, coffee, rocket
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from benchmarks.timing import in_turn, save, table
from taming.data.custom import ImageFolder
from taming.data.loader import Loader
from taming.data.token_files import CacheInfo, name_of, save_file, seal
from taming.data.tokens import TokenCache
from taming.models.prior import Prior, is_cached
from taming.run.cli import choose_device, run, script_parser
from taming.run.folder import data_from_run, model_from_run

logger = logging.getLogger("taming.benchmark")

SIDE, FILES, BATCH = 256, 64, 8
IMAGES, VOCABULARY = 2000, 513  # of the token cache
CPU = torch.device("cpu")

Row = dict[str, Any]
Work = Callable[[Mapping[str, Any]], object]  # on a batch


def with_pillow(file: Path) -> Tensor:
    """Decode a file with Pillow: (3, H, W) uint8."""
    with Image.open(file) as image:
        return pil_to_tensor(image.convert("RGB"))


def with_torchvision(file: Path) -> Tensor:
    """Decode a file with torchvision: (3, H, W) uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision will do without decoders
        pixels = decode_jpeg(read_file(str(file)), ImageReadMode.RGB)
    assert isinstance(pixels, Tensor)
    return pixels


def consume(items: Iterable[Any]) -> None:
    """Go through items."""
    for _ in items:
        pass


def measure_pictures(folder: Path, repeats: int) -> list[Row]:
    """Time the bare loops and ours over a folder, after a comparison of all their pixels.

    Raises:
        RuntimeError: A picture differs by more than one level.
    """
    for number in range(FILES):
        photo = Image.fromarray((astronaut, chelsea, coffee, rocket)[number % 4]())
        photo.resize((500, 375)).save(folder / f"{number:02}.jpg", quality=90)
    files = sorted(folder.glob("*.jpg"))
    cut = v2.Compose([v2.Resize(SIDE, antialias=True), v2.CenterCrop(SIDE)])
    to_floats = v2.ToDtype(torch.float32, scale=True)
    dataset = ImageFolder(str(folder), SIDE)
    for number, file in enumerate(files):
        ours = torch.from_numpy(dataset[number]["image"]).movedim(-1, 0) * 127.5 + 127.5
        if not (cut(with_pillow(file)) - ours).abs().max() < 1:
            raise RuntimeError(f"our picture of {file} differs")

    def bare(decode: Callable[[Path], Tensor]) -> Callable[[], object]:
        return lambda: consume(to_floats(cut(decode(file))) for file in files)

    shuffled = ImageFolder(str(folder), SIDE, random_crop=True, random_flip=True)
    times = in_turn(
        {
            "Pillow, bare loop": bare(with_pillow),
            "torchvision, bare loop": bare(with_torchvision),
            "our data set": lambda: consume(dataset[i] for i in range(FILES)),
            "our batches": lambda: consume(Loader(dataset, BATCH)),
            "our batches, random crops": lambda: consume(Loader(shuffled, BATCH, shuffle=True)),
        },
        repeats,
    )
    pillow = times["Pillow, bare loop"].cpu
    return [
        {
            "pictures": name,
            "each, ms": timing.cpu / FILES * 1e3,
            "speed over Pillow's": pillow / timing.cpu,
            "spread": timing.spread,
        }
        for name, timing in times.items()
    ]


def measure_tokens(folder: Path, repeats: int) -> Row:
    """Time the reading of a cache by one thread, after a comparison of its sequences."""
    lengths = torch.randint(500, 601, (IMAGES,))
    tokens = torch.randint(VOCABULARY, (IMAGES, int(lengths.max())))
    tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = -1
    columns = {"tokens": [row[row >= 0].numpy() for row in tokens], "class_label": [0] * IMAGES}
    columns |= {
        "key": list(map(str, range(IMAGES))),
        "height": [64] * IMAGES,
        "width": [64] * IMAGES,
    }
    save_file(folder / name_of(0), CacheInfo("0" * 64, VOCABULARY, 4), columns)
    seal(folder)
    cache = TokenCache(str(folder))
    read = torch.cat([batch["tokens"] for batch in Loader(cache, BATCH)])
    if not torch.equal(read, tokens):
        raise RuntimeError("the cache's tokens differ from those written")
    timing = in_turn({"cache": lambda: consume(Loader(cache, BATCH, shuffle=True))}, repeats)
    rate = int(lengths.sum()) / timing["cache"].cpu / 1e6
    return {"cache of images": IMAGES, "million tokens/s": rate, "spread": timing["cache"].spread}


def training_step_of(model: Prior) -> Work:
    """Return a function that trains a prior on a batch as Lightning does, without the schedule."""
    configured: Any = model.configure_optimizers()
    optimizer = configured[0][0] if isinstance(configured, tuple) else configured

    def step(batch: Mapping[str, Any]) -> None:
        nats, lengths = model.measure_nats(model.tokenize_batch(batch))
        optimizer.zero_grad()
        (nats.sum() / lengths.sum()).backward()
        optimizer.step()

    return step


def measure_prior(
    run: str, folder: str, repeats: int, device: torch.device = CPU
) -> tuple[Row, Row]:
    """Time a prior's way to tokens, and its training step, from images and from a cache.

    Raises:
        ValueError: The run is not of a prior that was trained from images.
    """
    data, model = data_from_run(run), model_from_run(run)
    data.setup("fit")
    sides = {"images": data.datasets["train"], "tokens": TokenCache(folder)}
    if not isinstance(model, Prior):
        raise ValueError(f"{run} holds a {type(model).__name__}, not a prior")
    if is_cached(sides["images"][0]):
        raise ValueError(f"{run} was trained from a token cache, not from images")
    model = model.to(device).train()

    def row(title: str, work: Work) -> Row:
        def on(dataset: Any) -> Callable[[], object]:
            loader = Loader(dataset, data.batch_size, shuffle=True)
            batches = chain.from_iterable(repeat(loader))  # epoch after epoch
            return lambda: work(move_data_to_device(next(batches), device))

        times = in_turn({name: on(dataset) for name, dataset in sides.items()}, repeats)
        seconds = [t.cpu if device.type == "cpu" else t.wall for t in times.values()]
        images, tokens = (each / data.batch_size * 1e3 for each in seconds)
        spread = max(timing.spread for timing in times.values())
        about = {"an image": title, "from images, ms": images, "from tokens, ms": tokens}
        return {**about, "faster by": images / tokens, "spread": spread}

    step = training_step_of(model)
    return row("until its tokens are there", model.tokenize_batch), row("training step", step)


def main() -> None:
    """Log the tables and save them."""
    parser = script_parser(__doc__)
    parser.add_argument("-r", "--resume", help="run of a prior that was trained from images")
    parser.add_argument("--cache", help="token cache of its training images")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds (default: 9)")
    options = parser.parse_args()
    if bool(options.resume) != bool(options.cache):
        raise ValueError("give --resume and --cache together, or neither")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        tables = [
            measure_pictures(Path(name), options.repeats),
            [measure_tokens(Path(name) / "cache", options.repeats)],
        ]
    if options.resume:
        device = choose_device(options.device)
        rows = measure_prior(options.resume, options.cache, options.repeats, device)
        tables.append([*rows])
    for rows in tables:
        logger.info("Processor time of one thread:\n%s\n", table(rows))
    logger.info("saved %s", save("data", [row for rows in tables for row in rows]))


if __name__ == "__main__":
    run(main)
