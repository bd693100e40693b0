"""Trains the shipped configurations at the smallest sizes, for tests of recipes and scripts."""

import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image

import main as program

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TOKENIZER_OF = {
    "loopy_transformer.yaml": "loopy_vqgan.yaml",
    "demo/loopy_transformer.yaml": "demo/loopy_vqgan.yaml",
    "custom_transformer.yaml": "custom_vqgan.yaml",
}
TRAINER = [
    *("--accelerator", "cpu", "--devices", "1"),
    *("--limit_train_batches", "2", "--limit_val_batches", "1"),
    *("--enable_progress_bar", "false", "--enable_model_summary", "false"),
    "lightning.callbacks.image_logger.params.batch_frequency=1",
    "lightning.callbacks.image_logger.params.max_images=2",
    "data.params.batch_size=2",
    "data.params.num_workers=0",
]
LOOPY = [f"model.params.quantizer_config.params.{size}" for size in ("n_e=16", "e_dim=8")]
GAN = [
    f"model.params.lossconfig.params.{item}"
    for item in ("perceptual_weight=0.0", "disc_ndf=8", "disc_start=1")
]
PHOTOS = ["data.params.train.params.length=8", "data.params.validation.params.length=4"]


def tokenizer(size: int, levels: int) -> list[str]:
    """A VQModel of 16 codes for images of ``size`` pixels, f = 2^(levels - 1)."""
    sizes = ["ch=32", f"ch_mult={[1] * levels}", "num_res_blocks=1", "attn_resolutions=[]"]
    return [
        *(f"model.params.ddconfig.{item}" for item in (*sizes, "z_channels=8")),
        *(f"model.params.{item}" for item in ("n_embed=16", "embed_dim=8")),
        f"model.params.ddconfig.resolution={size}",
        *pixels(size),
    ]


def prior(size: int, side: int, vocab_size: int, turns: int) -> list[str]:
    """A GPT for ``side`` x ``side`` sites of up to ``turns`` tokens."""
    shape = [side, side, turns]
    sizes = [f"vocab_size={vocab_size}", f"block_size={side**2 * turns + 1}", f"site_shape={shape}"]
    return [
        *(f"model.params.transformer_config.params.{item}" for item in sizes),
        *(f"model.params.transformer_config.params.{n}" for n in ("n_layer=1", "n_head=2")),
        "model.params.transformer_config.params.n_embd=8",
        *pixels(size),
    ]


def pixels(size: int) -> list[str]:
    return [f"data.params.{split}.params.size={size}" for split in ("train", "validation")]


def shipped() -> list[str]:
    """All configurations, relative to ``configs/``."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def overrides(data: Path) -> dict[str, list[str]]:
    """What makes each shipped configuration tiny, and lets it find the images in ``data``."""
    lists = [
        f"data.params.train.params.training_images_list_file={data / 'list.txt'}",
        f"data.params.validation.params.test_images_list_file={data / 'list.txt'}",
    ]
    splits = ("train", "validation")
    folder = [f"data.params.{split}.params.root={data / 'images'}" for split in splits]
    folder += [f"data.params.{split}.params.validation_fraction=0.5" for split in splits]
    parquet = [f"data.params.{split}.params.path={data / 'images.parquet'}" for split in splits]
    return {
        "cifar10_loopy.yaml": [*tokenizer(16, 3), *LOOPY, *parquet],
        "custom_loopy_vqgan.yaml": [*tokenizer(32, 5), *LOOPY, *GAN, *folder],
        "custom_transformer.yaml": [*prior(32, 2, 16, 1), *lists],
        "custom_vqgan.yaml": [*tokenizer(32, 5), *GAN, *lists],
        "demo/loopy_transformer.yaml": [*prior(16, 4, 17, 5), *PHOTOS],
        "demo/loopy_vqgan.yaml": [*tokenizer(16, 3), *LOOPY, *GAN, *PHOTOS],
        "loopy_transformer.yaml": [*prior(32, 4, 17, 6), *PHOTOS],
        "loopy_vqgan.yaml": [*tokenizer(32, 4), *LOOPY, *GAN, *PHOTOS],
    }


def write_data(folder: Path) -> None:
    """Write ``images/``, a ``list.txt`` of them, and an ``images.parquet`` with ten classes."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    paths, rows = [], []
    for number in range(12):
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
        paths.append(folder / "images" / f"{number}.png")
        picture.save(paths[-1])
        buffer = io.BytesIO()
        picture.resize((32, 32)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": paths[-1].name})
    (folder / "list.txt").write_text("\n".join(map(str, paths)))
    table = pa.table({"img": rows, "label": [number % 10 for number in range(12)]})
    pq.write_table(table, folder / "images.parquet")


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
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.overrides = overrides(folder / "data")
        self.runs: dict[str, Path] = {}
        write_data(folder / "data")

    def of(self, name: str) -> Path:
        """Run of a shipped configuration."""
        if name not in self.runs:
            first_stage = self.first_stage(TOKENIZER_OF[name]) if name in TOKENIZER_OF else []
            arguments = [*self.overrides[name], *first_stage]
            self.runs[name] = self._train(CONFIGS / name, arguments)
        return self.runs[name]

    def class_conditional(self) -> Path:
        """Run of a prior over the CIFAR-10 tokenizer's tokens, given the class."""
        name = "class_conditional"
        if name not in self.runs:
            images = OmegaConf.load(CONFIGS / "cifar10_loopy.yaml")
            config = OmegaConf.load(CONFIGS / "loopy_transformer.yaml")
            config.data = images.data
            config.model.params.cond_stage_key = "class_label"
            config.model.params.cond_stage_config = {
                "target": "taming.modules.util.Labelator",
                "params": {"n_classes": 10},
            }
            OmegaConf.save(config, self.folder / f"{name}.yaml")
            parquet = [o for o in self.overrides["cifar10_loopy.yaml"] if o.startswith("data")]
            arguments = [*prior(16, 4, 17, 6), *parquet, *self.first_stage("cifar10_loopy.yaml")]
            self.runs[name] = self._train(self.folder / f"{name}.yaml", arguments)
        return self.runs[name]

    def first_stage(self, name: str) -> list[str]:
        return [f"model.params.first_stage_config.params.run={self.of(name)}"]

    def _train(self, config: Path, arguments: Sequence[str]) -> Path:
        name = f"run{len(self.runs)}"
        run_main(self.folder, "-b", config, "-t", "-n", name, "--max_steps=2", *TRAINER, *arguments)
        (run,) = (self.folder / "logs").glob(f"*_{name}")
        return run
