"""Pictures to look at beside the numbers: best, median and worst reconstructions, or samples.

Axis letters: H W image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from taming.evaluation.images import ImageSet
from taming.evaluation.tokenizer import OWN, reconstruct
from taming.pictures import arrange, from_levels, side_by_side, to_levels
from taming.tokenizer import Tokenizer

ORDER = "PSNR"  # the measure by which reconstructions are good or bad


@dataclass(frozen=True)
class Example:
    """A picture with its place and its caption.

    Attributes:
        group: best, median, worst or generated.
        caption: What is to be seen, from left to right.
        picture: (3, H, W) in [-1, 1].
    """

    group: str
    caption: str
    picture: Tensor


def choose(values: Sequence[float], number: int) -> dict[int, str]:
    """Choose so many best, median and worst each: position -> group, each position once.

    Of too few for all, the best are taken first, then the worst.
    """
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    middle = max((len(order) - number) // 2, 0)
    chosen: dict[int, str] = {}
    for group, part in (
        ("best", order[:number]),
        ("worst", order[::-1][:number]),
        ("median", order[middle : middle + number]),
    ):
        for position in part:
            chosen.setdefault(position, group)
    return chosen


def reconstructions(
    tokenizer: Tokenizer, images: ImageSet, numbers: Mapping[str, Any], number: int
) -> list[Example]:
    """Show the best, median and worst reconstructions by the PSNR of the tokenizer's own rate.

    Args:
        tokenizer: The tokenizer.
        images: The images that were evaluated, which are read once more.
        numbers: What `evaluate_tokenizer` returned for them.
        number: Number of pictures in each group.

    Returns:
        Groups in order; each picture shows the original, the reconstruction at each rate, and the
        lengths of sites if they differ.
    """
    rates = numbers["rates"]
    values = {rate: found["per_image"][ORDER] for rate, found in rates.items()}
    chosen = choose(values[OWN], number) if number else {}
    found: list[tuple[int, Example]] = []
    left, groups = len(chosen), ("best", "median", "worst")
    for position, (name, image) in enumerate(images.images(tokenizer.model.image_key)):
        if not left:
            break
        if (group := chosen.get(position)) is None:
            continue
        left -= 1
        found.append((position, _example(tokenizer, name, image, group, values, position)))
    found.sort(key=lambda pair: (groups.index(pair[1].group), -values[OWN][pair[0]]))
    return [example for _, example in found]


def _example(
    tokenizer: Tokenizer,
    name: str,
    image: Tensor,
    group: str,
    values: Mapping[str, Sequence[float]],
    position: int,
) -> Example:
    """Put an image (C, H, W) and its reconstructions side by side."""
    model = tokenizer.model
    x = from_levels(to_levels(image[None])).to(model.device)
    shown, extra = [model.to_rgb(x)], {}
    codes = [float(rate) for rate in values if rate != OWN]
    for rate, _, quantized, levels in reconstruct(model, x, codes):
        shown.append(model.to_rgb(from_levels(levels)))
        if rate == OWN:
            height, width = (-(-side // model.factor) * model.factor for side in x.shape[2:])
            extra = model.code_pictures(quantized, (height, width))
    shown += [picture[..., : x.shape[2], : x.shape[3]] for picture in extra.values()]
    decibels = [f"{_title(rate)} {found[position]:.2f} dB" for rate, found in values.items()]
    caption = f"{name}: original; {'; '.join([*decibels, *extra])}"
    return Example(group, caption, side_by_side(*(picture[0] for picture in shown)))


def _title(rate: str) -> str:
    return "own rate" if rate == OWN else f"{rate} codes a site"


def grid_of(pictures: Sequence[Image.Image]) -> list[Example]:
    """Show generated pictures of one size in rows of four; [] without any."""
    if not pictures:
        return []
    return [Example("generated", f"the first {len(pictures)}", arrange(pictures, 4))]
