"""Convert tokenizers of other projects to a folder of this one, and back.

python scripts/convert.py last.ckpt -o folder     # of taming, latent-diffusion or LlamaGen
python scripts/convert.py prior.ckpt --config prior.yaml -o folder
python scripts/convert.py diffusers_folder -o folder
python scripts/convert.py folder --to diffusers -o out     # or --to taming

The folder that is made is one of ``save_pretrained``: ``taming.load(folder)``. See docs/convert.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import taming
from taming.run import cli
from taming.util import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from taming.models.vqgan import VQModel

logger = logging.getLogger("taming.convert")

_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Options of diffusers' VQModel of which this project's has the default alone.
_DIFFUSERS_ONLY = {"act_fn": "silu", "norm_type": "group", "mid_block_add_attention": True}
# Quantizers that take the nearest code.
_NEAREST = ("VectorQuantizer", "VectorQuantizer2", "EMAVectorQuantizer")
# Arguments of networks and models that the original has.
_DDCONFIG = (
    *("ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout"),
    *("resamp_with_conv", "in_channels", "resolution", "z_channels", "double_z"),
)


# --- to this project -----------------------------------------------------------------------------


def convert(options: argparse.Namespace) -> VQModel:
    """Build the model of a checkpoint's weights.

    Raises:
        ValueError: The weights are of no known layout, or do not fit it.
    """
    import torch

    from taming.checkpoint import load_checkpoint, weights_of
    from taming.models.vqgan import VQModel
    from taming.run.layouts import parameters_from, recognise
    from taming.run.pretrained import fill

    path, about = Path(options.checkpoint), {}
    if path.is_dir():
        path, about = _diffusers_files(path)
    checkpoint: Mapping[str, Any] = load_checkpoint(path, options.trust_checkpoint)
    inside = options.ema and isinstance(checkpoint.get("ema"), Mapping)
    weights = checkpoint["ema"] if inside else weights_of(checkpoint)
    layout, own = recognise(weights, ema=options.ema and not inside)
    if layout == "diffusers" and not about:
        raise ValueError(f"{path} is of diffusers: give its folder, with config.json")
    if layout == "LlamaGen":  # it compares directions: the nearest of unit length is the same code
        own["quantize.embedding.weight"] = torch.nn.functional.normalize(
            own["quantize.embedding.weight"], dim=-1
        )
    resolution = options.resolution or about.get("sample_size") or 256
    params = parameters_from(own, resolution, about.get("norm_num_groups", 32))
    try:
        model = VQModel(**params)
        fill({"model": model}, own, f"{path} ({layout})")
    except ValueError as error:
        raise ValueError(
            f"{path}, read as one of {layout}: {error}; name the model's configuration with "
            "--config, or make the folder of a run of this project by save_pretrained"
        ) from error
    return model.eval()


def _diffusers_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the weights and the configuration of a folder of diffusers' ``save_pretrained``."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} has no config.json of diffusers: name a checkpoint's file")
    about = json.loads(config.read_text(encoding="utf-8"))
    if (kind := about.get("_class_name")) != "VQModel":
        raise ValueError(f"{config} is of a {kind}, not of diffusers' VQModel")
    for name, value in _DIFFUSERS_ONLY.items():
        if about.get(name, value) != value:
            raise ValueError(
                f"{config}: {name} is {about[name]!r}, and only {value!r} is known here"
            )
    for name in (_DIFFUSERS_WEIGHTS, "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name, about
    raise ValueError(f"{folder} has no {_DIFFUSERS_WEIGHTS}")


def build(options: argparse.Namespace) -> Any:
    """Build the model that a configuration describes, with the weights of a checkpoint."""
    from taming.checkpoint import load_weights
    from taming.run.check import check_block
    from taming.run.config import load_config
    from taming.run.folder import without_starts
    from taming.util import instantiate_from_config

    config = load_config([options.config])
    block = config.block("model")
    check_block(config, "model", block, extra=["base_learning_rate"])
    model = instantiate_from_config(without_starts(block))
    load_weights(model, options.checkpoint, trust_checkpoint=options.trust_checkpoint)
    return model.eval()


# --- and back ------------------------------------------------------------------------------------


def plain_weights(model: VQModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``ddconfig`` and weights of a tokenizer with one code a site, the nearest.

    Raises:
        ValueError: Its quantizer is another.
    """
    name = type(getattr(model, "quantize", model)).__name__
    if name not in _NEAREST or model.colorize is not None:
        raise ValueError(
            f"a {name} has no place elsewhere: only one nearest code for each site has"
        )
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if "loss" not in k}
    own = ("embedding.cluster_size", "embedding.embed_avg")  # of the training of a codebook
    weights = {k: v for k, v in weights.items() if k.removeprefix("quantize.") not in own}
    return model.to_config()["params"]["ddconfig"], weights


def save_diffusers(model: VQModel, folder: Path) -> None:
    """Save a folder for diffusers' ``VQModel.from_pretrained``.

    Raises:
        ValueError: Its networks have no place there.
    """
    from safetensors.torch import save_file

    from taming.run.layouts import LAYOUTS, translate

    ddconfig, weights = plain_weights(model)
    multiples, side = [*ddconfig["ch_mult"]], ddconfig["resolution"]
    if multiples[0] != 1 or not ddconfig.get("resamp_with_conv", True):
        raise ValueError(
            "diffusers' VQModel begins with the width of its first level and learns its down- and "
            f"upsampling, but this model has ch_mult {multiples} and resamp_with_conv "
            f"{ddconfig.get('resamp_with_conv', True)}"
        )
    attends = [side // 2**i in ddconfig["attn_resolutions"] for i in range(len(multiples))]
    config = {
        "_class_name": "VQModel",
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "block_out_channels": [ddconfig["ch"] * multiple for multiple in multiples],
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
        "layers_per_block": ddconfig["num_res_blocks"],
        "latent_channels": ddconfig["z_channels"],
        "sample_size": side,
        "num_vq_embeddings": model.quantize.n_e,
        "vq_embed_dim": model.quantize.e_dim,
        "norm_num_groups": ddconfig.get("num_groups", 32),
        **_DIFFUSERS_ONLY,
    }
    table, last = LAYOUTS["diffusers"].table, len(multiples) - 1
    linear = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    named = {
        translate(key, table, last): value.flatten(1) if key.endswith(linear) else value
        for key, value in weights.items()
    }
    with replacing(folder / _DIFFUSERS_WEIGHTS) as part:
        save_file(named, part, metadata={"format": "pt"})
    with replacing(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=2), encoding="utf-8")


def save_taming(model: VQModel, folder: Path) -> None:
    """Save ``model.ckpt`` and ``model.yaml`` for taming-transformers and latent-diffusion.

    Raises:
        ValueError: Its networks have no place there.
    """
    import torch

    ddconfig, weights = plain_weights(model)
    if (groups := ddconfig.get("num_groups", 32)) != 32:
        raise ValueError(f"the original's norms have 32 groups, but this model's {groups}")
    params = {
        "ddconfig": {name: ddconfig[name] for name in _DDCONFIG if name in ddconfig},
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        "n_embed": model.quantize.n_e,
        "embed_dim": model.quantize.e_dim,
    }
    block = {"target": "taming.models.vqgan.VQModel", "params": params}
    with replacing(folder / "model.ckpt") as part:
        torch.save({"state_dict": weights}, part)
    with replacing(folder / "model.yaml") as part:
        part.write_text(yaml.safe_dump({"model": block}, sort_keys=False), encoding="utf-8")


# --- the command ---------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.script_parser(__doc__, device=False)
    add = parser.add_argument
    add(
        "checkpoint", help="a file of weights, or a folder of diffusers; with --to, a run or folder"
    )
    add("--config", metavar="YAML", help="configuration of the model, which may run any code")
    add("-o", "--outdir", type=Path, required=True)
    add("--to", choices=("diffusers", "taming"), help="convert from this project instead")
    add("--ema", action="store_true", help="take the moving averages of the weights")
    add("--resolution", type=int, help="side of the images of training; 256 if nothing states it")
    add("--dtype", help="of the saved weights, such as float16; default: as they are")
    add("--trust_checkpoint", action="store_true", help="unpickle any class, which may run code")
    options = parser.parse_args()
    cli.check_folder(options.outdir)
    (cli.existing_run if options.to else cli.existing)(options.checkpoint)
    if options.resolution is not None and options.resolution < 1:
        raise ValueError(f"--resolution must be at least 1, got {options.resolution}")
    return options


def main() -> None:
    """Convert to this project, or with ``--to`` from it."""
    options = parse_options()
    if options.to:
        tokenizer: Any = taming.load(options.checkpoint)
        save = {"diffusers": save_diffusers, "taming": save_taming}[options.to]
        save(tokenizer.model, options.outdir)
    else:
        model: Any = build(options) if options.config else convert(options)
        kind = taming.Generator if hasattr(model, "sample_codes") else taming.Tokenizer
        kind(model).save_pretrained(options.outdir, options.dtype)
    logger.info("converted %s to %s", options.checkpoint, options.outdir)


if __name__ == "__main__":
    cli.run(main)
