"""Runs of the shipped configurations at the smallest sizes, and calls of scripts."""

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image
from support.data import write_coco, write_faces, write_imagenet, write_parquet

import main as program
from taming.run.cli import run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOKENIZER_OF = {
    "cifar10_transformer.yaml": "cifar10_loopy.yaml",
    "cifar10_two_level_transformer.yaml": "cifar10_loopy.yaml",
    "loopy_transformer.yaml": "loopy_vqgan.yaml",
    "demo/loopy_transformer.yaml": "demo/loopy_vqgan.yaml",
    "custom_transformer.yaml": "custom_vqgan.yaml",
    "custom_loopy_transformer.yaml": "custom_loopy_vqgan.yaml",
    "custom_small_transformer.yaml": "custom_small.yaml",
    "imagenet_transformer.yaml": "imagenet_vqgan.yaml",
    "sflckr_transformer.yaml": "custom_vqgan.yaml",
    "photos_context.yaml": "photos.yaml",
    "pixelcnn_cifar10.yaml": "cifar10_loopy.yaml",
    "vqvae2_bottom_prior.yaml": "vqvae2_cifar10.yaml",
    "vqvae2_top_prior.yaml": "vqvae2_cifar10.yaml",
    # The original's name a checkpoint instead of a run.
    "coco_scene_images_transformer.yaml": "imagenet_vqgan.yaml",
    "drin_transformer.yaml": "imagenet_vqgan.yaml",
    "faceshq_transformer.yaml": "faceshq_vqgan.yaml",
    "open_images_scene_images_transformer.yaml": "imagenet_vqgan.yaml",
}
CONDITION_OF = {
    "drin_transformer.yaml": "imagenetdepth_vqgan.yaml",
    "sflckr_transformer.yaml": "sflckr_cond_stage.yaml",
}
ORIGINALS = [
    *("coco_cond_stage.yaml", "sflckr_cond_stage.yaml", "custom_vqgan.yaml", "faceshq_vqgan.yaml"),
    *("imagenet_vqgan.yaml", "imagenetdepth_vqgan.yaml", "drin_transformer.yaml"),
    *("faceshq_transformer.yaml", "coco_scene_images_transformer.yaml"),
    "open_images_scene_images_transformer.yaml",
]
# They count for one start, not for those that resume its run.
LIMITS = ["--limit_train_batches", "2", "--limit_val_batches", "1"]
TRAINER = [
    *("--accelerator", "cpu", "--devices", "1", *LIMITS),
    *("--enable_progress_bar", "false", "--enable_model_summary", "false"),
    "lightning.callbacks.image_logger.params.batch_frequency=1",
    "lightning.callbacks.image_logger.params.max_images=2",
    "data.params.batch_size=2",
    "data.params.num_workers=0",
]
GAN = [
    f"model.params.lossconfig.params.{item}"
    for item in ("perceptual_weight=0.0", "disc_ndf=8", "disc_start=1")
]
STACKS = [f"model.params.stacks_config.params.{size}" for size in ("channels=8", "layers=2")]
CONTEXT = [f"model.params.context_config.params.{size}" for size in ("channels=4", "hidden=8")]
TWO_LEVELS = [
    f"model.params.transformer_config.params.{size}"
    for size in ("n_embd=16", "depth.n_head=2", "depth.n_embd=8")
]
LEVELS = [
    f"model.params.quantizer_config.params.{item}"
    for item in (
        *(
            f"quantizers.{n}.params.{size}"
            for n in ("top", "bottom")
            for size in ("n_e=8", "e_dim=4")
        ),
        *("ddconfig.ch=32", "ddconfig.resolution=4", "ddconfig.num_res_blocks=1"),
    )
]
PHOTOS = ["data.params.train.params.length=8", "data.params.validation.params.length=4"]


def vqmodel(size: int, levels: int, path: str = "model") -> list[str]:
    """A VQModel of 16 codes for images of ``size`` pixels, f = 2^(levels - 1)."""
    sizes = ["ch=32", f"ch_mult={[1] * levels}", "num_res_blocks=1", "attn_resolutions=[]"]
    sizes += ["z_channels=8", f"resolution={size}"]
    return [
        *(f"{path}.params.ddconfig.{item}" for item in sizes),
        *(f"{path}.params.{item}" for item in ("n_embed=16", "embed_dim=8")),
    ]


def tokenizer(size: int, levels: int) -> list[str]:
    """A VQModel and images of its size."""
    return [*vqmodel(size, levels), *pixels(size)]


def prior(size: int) -> list[str]:
    """A GPT of one layer, and images of its tokenizer's size."""
    return [*gpt(), *pixels(size)]


def gpt(*sizes: str) -> list[str]:
    """A GPT of one layer."""
    path = "model.params.transformer_config.params"
    return [f"{path}.{item}" for item in (*sizes, "n_layer=1", "n_head=2", "n_embd=8")]


def pixels(size: int, *names: str) -> list[str]:
    """Sizes of the images, under other names than ``size`` if given."""
    return both(*(f"{name}={size}" for name in names or ("size",)))


def both(*items: str) -> list[str]:
    """Parameters of both data sets."""
    return [f"data.params.{s}.params.{item}" for s in ("train", "validation") for item in items]


def mixed(data: Path) -> list[str]:
    """A mixture of a folder and a Parquet file, of 32 pixels, and the folder to validate."""
    parts = {"custom.ImageFolder": f"root: {data / 'images'}"}
    parts["hub.ParquetImages"] = f"path: {data / 'images.parquet'}"
    blocks = [f"{{target: taming.data.{t}, params: {{{p}, size: 32}}}}" for t, p in parts.items()]
    train = ("length=8", "shares=[1, 1]", f"datasets=[{', '.join(blocks)}]")
    return [
        *(f"data.params.train.params.{v}" for v in train),
        *(f"data.params.validation.params.{v}" for v in (f"root={data / 'images'}", "size=32")),
    ]


def shipped() -> list[str]:
    """All configurations, relative to ``configs/``."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def overrides(data: Path) -> dict[str, list[str]]:
    """Overrides that make each configuration tiny and let it find the images in ``data``."""
    lists = [
        f"data.params.train.params.training_images_list_file={data / 'list.txt'}",
        f"data.params.validation.params.test_images_list_file={data / 'list.txt'}",
    ]
    folder = both(f"root={data / 'images'}", "validation_fraction=0.5")
    parquet = both(f"path={data / 'images.parquet'}")
    return (
        originals()
        | zoo(parquet)
        | {
            "cifar10_loopy.yaml": [*tokenizer(16, 3), *parquet],
            "cifar10_transformer.yaml": [*prior(16), *parquet],
            "cifar10_two_level_transformer.yaml": [*prior(16), *TWO_LEVELS, *parquet],
            "custom_loopy_vqgan.yaml": [*tokenizer(32, 5), *GAN, *folder],
            "custom_loopy_transformer.yaml": [*prior(32), *folder],
            "custom_small.yaml": [*vqmodel(32, 5), *folder],
            "custom_small_transformer.yaml": [*prior(32), *TWO_LEVELS, *folder],
            "custom_transformer.yaml": [*prior(32), *lists],
            "custom_vqgan.yaml": [*tokenizer(32, 5), *GAN, *lists],
            "demo/loopy_transformer.yaml": [*prior(16), *TWO_LEVELS, *PHOTOS],
            "demo/loopy_vqgan.yaml": [*tokenizer(16, 3), *GAN, *PHOTOS],
            "imagenet_gumbel_vqgan.yaml": [*vqmodel(32, 4), *GAN, *pixels(32, "config.size")],
            "imagenet_transformer.yaml": [*gpt(), *pixels(32, "config.size")],
            "loopy_transformer.yaml": [*prior(32), *PHOTOS],
            "loopy_vqgan.yaml": [*tokenizer(32, 4), *GAN, *PHOTOS],
            "photos.yaml": [*vqmodel(32, 5), *mixed(data)],
            "photos_context.yaml": [*CONTEXT, *mixed(data)],
            "pixelcnn_cifar10.yaml": [*STACKS, *pixels(16), *parquet],
            "vqvae2_bottom_prior.yaml": [*prior(16), *parquet],
            "vqvae2_cifar10.yaml": [*tokenizer(16, 3), *LEVELS, *parquet],
            "vqvae2_top_prior.yaml": [*prior(16), *parquet],
            "vqvae_cifar10.yaml": [*tokenizer(16, 3), *parquet],
            "vqvae_mnist.yaml": [*tokenizer(16, 3), *parquet],
            "vqvae_single_code.yaml": [*tokenizer(32, 6), *parquet],
        }
    )


def zoo(data: Sequence[str]) -> dict[str, list[str]]:
    """The same for the quantizers of vector-quantize-pytorch, whose levels make 16 codes."""
    levels = ["model.params.quantizer_config.params.levels=[4,4]"]
    return {
        name: [*tokenizer(16, 3), *levels * ("fsq" in name), *data]
        for name in shipped()
        if name.startswith("zoo/")
    }


def originals() -> dict[str, list[str]]:
    """The same for the original's data sets, at 32 pixels and 2 x 2 sites."""
    first, condition = (f"model.params.{stage}_stage_config" for stage in ("first", "cond"))
    examples = SHARED / "data/taming"
    scenes = [*vqmodel(32, 5, first), *gpt("block_size=96"), *pixels(32, "target_image_size")]
    return {
        "coco_cond_stage.yaml": [*vqmodel(32, 5), *pixels(32, "size", "crop_size")],
        "coco_scene_images_transformer.yaml": [
            *scenes,
            *both(f"data_path={examples / 'coco_annotations_100'}"),
        ],
        "drin_transformer.yaml": [
            *vqmodel(32, 5, first),
            *vqmodel(32, 5, condition),
            *gpt("vocab_size=16", "block_size=8"),
            *pixels(32),
        ],
        "faceshq_transformer.yaml": [
            *vqmodel(32, 5, first),
            f"{condition}.params.n_embed=16",
            *gpt("vocab_size=16", "block_size=8"),
            *pixels(32, "size", "crop_size"),
        ],
        "faceshq_vqgan.yaml": [*vqmodel(32, 5), *GAN, *pixels(32, "size", "crop_size")],
        "imagenet_vqgan.yaml": [*vqmodel(32, 5), *GAN, *pixels(32, "config.size")],
        "imagenetdepth_vqgan.yaml": [*vqmodel(32, 5), *GAN, *pixels(32)],
        "open_images_scene_images_transformer.yaml": [
            *scenes,
            *both(f"data_path={examples / 'open_images_annotations_100'}"),
        ],
        "sflckr_cond_stage.yaml": [*vqmodel(32, 5), *pixels(32), *both(f"root={examples}")],
        "sflckr_transformer.yaml": [*prior(32), *both(f"root={examples}")],
    }


def picture(number: int) -> Image.Image:
    """A smooth picture of 48x40 pixels, the same for the same number."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)


def write_data(folder: Path) -> None:
    """Write ``images/``, a ``list.txt`` of them, an ``images.parquet``, and the originals' data."""
    (folder / "images").mkdir(parents=True)
    pictures = [picture(number) for number in range(12)]
    paths = [folder / "images" / f"{number}.png" for number in range(12)]
    for image, path in zip(pictures, paths, strict=True):
        image.save(path)
    (folder / "list.txt").write_text("\n".join(map(str, paths)))
    write_parquet(folder / "images.parquet", (image.resize((32, 32)) for image in pictures))
    write_imagenet(folder)
    write_faces(folder)
    write_coco(folder, number=4)


def run_main(folder: Path, *argv: str | Path) -> None:
    """Call the program as from within ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(logging.getLogger("taming"), "handlers", [])
        program.main([str(argument) for argument in argv])


class TinyRuns:
    """Runs of two steps each, trained when they are first asked for; not to be changed.

    Args:
        folder: Where data and logs go.

    Attributes:
        data: Value of TAMING_DATA for the original's configurations.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.overrides = overrides(self.data)
        self.runs: dict[str, Path] = {}
        write_data(self.data)

    def of(self, name: str) -> Path:
        """Run of a shipped configuration."""
        if name not in self.runs:
            arguments = [*self.overrides[name], *self.stages(name)]
            if str(SHARED) in "".join(arguments) and not SHARED.is_dir():
                pytest.skip(f"example data not found: {SHARED} does not exist")
            self.runs[name] = self._train(CONFIGS / name, arguments)
        return self.runs[name]

    def class_conditional(self) -> Path:
        """Run of a prior over the CIFAR-10 tokenizer's tokens, given the class."""
        return self.of("cifar10_transformer.yaml")

    def stages(self, name: str) -> list[str]:
        """Overrides by which a prior finds its trained stages."""
        stages = {"first": TOKENIZER_OF.get(name), "cond": CONDITION_OF.get(name)}
        paths = {
            f"model.params.{s}_stage_config.params": self.of(r) for s, r in stages.items() if r
        }
        if name in ORIGINALS:
            return [f"{k}.ckpt_path={run / 'checkpoints/last.ckpt'}" for k, run in paths.items()]
        level = "model_config.params." if name.startswith("vqvae2") else ""
        return [f"{key}.{level}run={run}" for key, run in paths.items()]

    def _train(self, config: Path, arguments: Sequence[str]) -> Path:
        name = f"run{len(list(self.folder.glob('logs/*')))}"  # also after one that failed
        start = ("-b", config, "-t", "-n", name, "--max_steps=2")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TAMING_DATA", str(self.data))
            run_main(self.folder, *start, *TRAINER, *arguments)
        (run,) = (self.folder / "logs").glob(f"*_{name}")
        return run


def call(script: str, *argv: Any) -> None:
    """Run a script of ``scripts/`` as from the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        importlib.import_module(f"scripts.{script}").main()


def fails(capsys: pytest.CaptureFixture[str], script: str, *argv: Any, status: int = 2) -> str:
    """Return the one line that a script ends with, and a status: 1 if others than some are done."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: call(script, *argv))
    assert stop.value.code == status
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert error.count("\n") == 1
    return error


def read_pixels(path: Path) -> np.ndarray:
    """Read a picture as (H, W, C) uint8."""
    with Image.open(path) as picture:
        return np.asarray(picture)
