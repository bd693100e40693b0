"""Measure how a loopy tokenizer adapts lengths to the content of sites and images.

Reports, on held-out images: rank correlations of a site's length with local contrast, gradient
energy and the error after one turn; of codes per image with its JPEG and PNG size; codes per image
under added noise and blur, and at three fixed errors, with the fraction of images that exceed the
error; violations of max_codes and target_psnr; and images of kinds that were not in training.

python benchmarks/adaptivity.py --race results/rate_distortion/standard --test test.parquet
python benchmarks/adaptivity.py -r logs/<run> --test photos/val --size 256
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from PIL import Image, ImageDraw
from race.measure import fixed_length
from race.plans import PLANS, images_of
from race.training import build_tokenizer, last, loader, widen_search
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from taming.models.first_stage import length_heat_map
from taming.models.vqgan import VQModel
from taming.modules.vqvae.quantize import LoopyVectorQuantizer
from taming.pictures import arrange, save_picture, to_picture
from taming.run.cli import choose_device, run, script_parser
from taming.run.folder import model_from_run

logger = logging.getLogger("taming.benchmark")


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Compute Spearman's rank correlation of two vectors (N,); ties share their mean rank."""

    def ranks(values: Tensor) -> Tensor:
        _, place, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[place].double()

    return float(torch.corrcoef(torch.stack([ranks(a.flatten()), ranks(b.flatten())]))[0, 1])


def site_statistics(x: Tensor, h: int, w: int) -> dict[str, Tensor]:
    """Compute the standard deviation and gradient energy (B, h, w) in each site of (B, 3, H, W)."""
    gray = x.mean(dim=1)
    height, width = gray.shape[1] // h, gray.shape[2] // w
    sites = {"h": h, "w": w, "a": height, "b": width}
    mean = reduce(gray, "n (h a) (w b) -> n h w", "mean", **sites)
    square = reduce(gray.square(), "n (h a) (w b) -> n h w", "mean", **sites)
    down = F.pad(gray.diff(dim=1), (0, 0, 0, 1))
    right = F.pad(gray.diff(dim=2), (0, 1))
    energy = reduce(down.square() + right.square(), "n (h a) (w b) -> n h w", "mean", **sites)
    return {"standard deviation": (square - mean.square()).clamp(min=0).sqrt(), "gradient": energy}


def file_size(image: Tensor, kind: str, **options: Any) -> int:
    """Return the size in bytes of an image (3, H, W) in [-1, 1] as a file."""
    buffer = io.BytesIO()
    to_picture(image).save(buffer, kind, **options)
    return buffer.tell()


def strange_images(size: int) -> dict[str, Tensor]:
    """Make images unlike any photograph: name -> (3, size, size) in [-1, 1]."""
    page = Image.new("RGB", (size, size), "white")
    lines = "\n".join(["to each vector its own length"] * (size // 10))
    ImageDraw.Draw(page).multiline_text((1, 1), lines, fill="black")
    text = torch.tensor(list(page.tobytes())).view(size, size, 3).permute(2, 0, 1) / 127.5 - 1
    noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    flat = torch.tensor([0.8, -0.2, -0.9])[:, None, None].expand(3, size, size)
    return {"noise": noise, "flat colour": flat, "text": text}


def lengths_of(codes: Tensor) -> Tensor:
    """Count the codes of each site in codes (B, h, w, T): (B, h, w) int64."""
    return (codes >= 0).sum(dim=-1)


@torch.no_grad()
def correlations(model: VQModel, batches: Sequence[Tensor]) -> dict[str, float]:
    """Correlate lengths of sites and codes per image with measures of their complexity."""
    per_site: dict[str, list[Tensor]] = {"codes": []}
    per_image: dict[str, list[float]] = {"codes": [], "JPEG size": [], "PNG size": []}
    for x in batches:
        z = model.encode_to_prequant(x)
        lengths = lengths_of(model.quantize(z).info.indices)
        _, h, w = lengths.shape
        per_site["codes"].append(lengths)
        for name, values in site_statistics(x, h, w).items():
            per_site.setdefault(name, []).append(values)
        assert isinstance(model.quantize, LoopyVectorQuantizer)
        path = model.quantize.whole_path(z)
        codes = path.end_at(fixed_length(1)(path, len(x))).reshape(*lengths.shape, -1)
        error = (model.decode(model.quantize.get_codebook_entry(codes)) - x).square().mean(dim=1)
        site_error = F.adaptive_avg_pool2d(error, (h, w))
        per_site.setdefault("error after one turn", []).append(site_error)
        per_image["codes"] += lengths.sum((1, 2)).tolist()
        per_image["JPEG size"] += [file_size(image, "JPEG", quality=75) for image in x]
        per_image["PNG size"] += [file_size(image, "PNG") for image in x]
    sites = {name: torch.cat(values).float() for name, values in per_site.items()}
    images = {name: torch.tensor(values).float() for name, values in per_image.items()}
    lengths, totals = sites.pop("codes"), images.pop("codes")
    found = {f"site: {name}": rank_correlation(lengths, v) for name, v in sites.items()}
    return found | {f"image: {name}": rank_correlation(totals, v) for name, v in images.items()}


@torch.no_grad()
def codes_per_image(model: VQModel, batches: Sequence[Tensor]) -> float:
    """Return the mean number of codes per image at the model's own threshold."""
    total = sum(int((model.encode(x).info.indices >= 0).sum()) for x in batches)
    return total / sum(map(len, batches))


@torch.no_grad()
def fixed_error(model: VQModel, batches: Sequence[Tensor], psnr: float) -> dict[str, float]:
    """Measure the codes that images need for a PSNR in dB.

    Returns:
        Mean and quantiles of codes per image; ``violations``, the fraction of images below the
        PSNR; ``gave up early``, the number of those with fewer than the most codes, which must
        be 0.
    """
    used, reached, most = [], [], model.quantize.sequence.max_loops
    for x in tqdm(batches, desc=f"{psnr:.1f} dB", leave=False):
        quantized = model.encode(x, target_psnr=psnr)
        x_rec = model.decode(quantized.z_q).clamp(-1, 1)
        got = peak_signal_noise_ratio(x_rec, x, data_range=2.0, dim=(1, 2, 3), reduction="none")
        lengths = lengths_of(quantized.info.indices)
        used.append(lengths.sum((1, 2)))
        reached.append(got >= psnr)
        most_codes = most * lengths[0].numel()
    counts, missed = torch.cat(used).float(), ~torch.cat(reached)
    low, high = counts.quantile(torch.tensor([0.1, 0.9], device=counts.device)).tolist()
    return {
        "mean": float(counts.mean()),
        "10%": low,
        "90%": high,
        "violations": float(missed.float().mean()),
        "gave up early": int((missed & (counts < most_codes)).sum()),
    }


@torch.no_grad()
def code_limits(model: VQModel, batches: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """For limits on codes per image, count the images that exceed it and the mean codes used."""
    latents = [model.encode_to_prequant(x) for x in batches]
    sites, found = latents[0][0, 0].numel(), {}
    for share in (1.0, 1.1, 1.5, 2.0, 3.3, 5.0):
        limit = int(share * sites)
        used = [model.quantize(z, max_codes=limit).info.indices for z in latents]
        counts = torch.cat([lengths_of(codes).sum((1, 2)) for codes in used])
        mean = float(counts.float().mean())
        found[str(limit)] = {"exceeded": int((counts > limit).sum()), "mean used": mean}
    return found


@torch.no_grad()
def pictures(model: VQModel, x: Tensor, file: Path) -> None:
    """Save images (B, 3, H, W), their reconstructions and length maps, sorted by codes."""
    quantized = model.encode(x)
    lengths = lengths_of(quantized.info.indices)
    order = lengths.sum((1, 2)).argsort()
    turns = model.quantize.sequence.max_loops
    maps = length_heat_map(lengths, turns, (x.shape[2], x.shape[3]))
    rows = [x[order], model.decode(quantized.z_q)[order], maps[order].to(x)]
    save_picture(arrange(torch.cat(rows), len(x)), file)


def load(options: argparse.Namespace) -> tuple[VQModel, int]:
    """Load the tokenizer of a run or of a race, and the side of its images in pixels.

    Raises:
        ValueError: The run or race has no loopy tokenizer.
    """
    if options.resume:
        model = model_from_run(options.resume)
        if not isinstance(model, VQModel) or not isinstance(model.quantize, LoopyVectorQuantizer):
            raise ValueError(f"{options.resume} has no loopy tokenizer")
        return model, options.size or model.encoder.resolution
    plan, file = PLANS[options.plan], options.race / "loopy-one-0.pt"
    if not file.is_file():
        raise ValueError(
            f"{options.race} has no {file.name}: run rate_distortion.py --only loopy-one first"
        )
    contender = plan.contenders()["loopy-one"]
    model = build_tokenizer(plan, contender)
    model.load_state_dict(torch.load(file, map_location="cpu"))
    widen_search(model, contender)
    return model.eval(), plan.ddconfig["resolution"]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = script_parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-r", "--resume", help="run of a loopy tokenizer")
    which.add_argument("--race", type=Path, help="results of rate_distortion.py with loopy-one")
    parser.add_argument("--plan", default="standard", choices=PLANS, help="plan of that race")
    parser.add_argument("--test", help="Parquet file or folder of images; default: CIFAR-10")
    parser.add_argument("--size", type=int, help="side of the images in pixels")
    parser.add_argument("-n", type=int, default=1000, help="number of images")
    parser.add_argument("-o", "--outdir", type=Path, default=Path("results/adaptivity"))
    return parser.parse_args()


def changed_images(batches: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Add noise (its deviation in percent of the range from black to white) or blur to images."""
    generator = torch.Generator().manual_seed(0)
    changed = {"as they are": list(batches)}
    for level in (0.05, 0.1, 0.2):
        added = [torch.randn(x.shape, generator=generator).to(x) * 2 * level for x in batches]
        noisy = [(x + n).clamp(-1, 1) for x, n in zip(batches, added, strict=True)]
        changed[f"noise of {level:.0%}"] = noisy
    for sigma in (0.5, 1.0, 2.0):
        width = 2 * math.ceil(3 * sigma) + 1
        blurred = [gaussian_blur(x, [width, width], [sigma, sigma]) for x in batches]
        changed[f"blur of {sigma} pixels"] = blurred
    return changed


@torch.no_grad()
def error_levels(model: VQModel, batches: Sequence[Tensor]) -> list[float]:
    """Choose three PSNRs in dB around the images' median at the model's own threshold."""
    own = [(model(x)[0].clamp(-1, 1) - x).square().mean((1, 2, 3)) for x in batches]
    middle = float(-10 * torch.log10(torch.cat(own).median() / 4))
    return [round(middle + step, 1) for step in (-2.0, 0.0, 1.0)]


@torch.no_grad()
def never_seen(model: VQModel, size: int, file: Path) -> dict[str, Any]:
    """Count the codes of images unlike photographs, and check that tokens decode to their codes."""
    strange = strange_images(size)
    x = torch.stack(list(strange.values())).to(model.device)
    codes, sequence = model.encode(x).info.indices, model.quantize.sequence
    tokens, _ = sequence.encode(codes)
    _, h, w, _ = codes.shape
    valid = torch.equal(sequence.decode(tokens, (h, w)), codes)
    pictures(model, x, file)
    counts = lengths_of(codes).sum((1, 2)).tolist()
    return dict(zip(strange, counts, strict=True)) | {"valid sequences": valid}


def main() -> None:
    """Measure, log, and save ``adaptivity.json`` and pictures."""
    options = parse()
    model, size = load(options)
    model = model.to(choose_device(options.device))
    data = last(images_of(options.test, "test", size, train=False), options.n)
    batches = [model.get_input(b, "image").to(model.device) for b in loader(data, 50)]
    options.outdir.mkdir(parents=True, exist_ok=True)
    levels, changed = error_levels(model, batches), changed_images(batches)
    report = {
        "images": len(data),
        "rank correlation": correlations(model, batches),
        "codes per image": {k: codes_per_image(model, v) for k, v in changed.items()},
        "fixed error": {f"{psnr} dB": fixed_error(model, batches, psnr) for psnr in levels},
        "code limits": code_limits(model, batches),
        "never seen": never_seen(model, size, options.outdir / "new.png"),
    }
    pictures(model, batches[0][:12], options.outdir / "images.png")
    (options.outdir / "adaptivity.json").write_text(json.dumps(report, indent=2))
    logger.info("%s\nsaved in %s", json.dumps(report, indent=2), options.outdir)


if __name__ == "__main__":
    run(main)
