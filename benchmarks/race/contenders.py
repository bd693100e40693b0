"""The quantizers of the race, and the rates at which each is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

QUANTIZE = "taming.modules.vqvae.quantize"
TRANSFORMS = "taming.modules.vqvae.transforms"
ZOO = "taming.modules.vqvae.zoo.LibraryQuantizer"
MAX_LOOPS = 8
BEAM = 4
BETA = 0.05  # weight of the commitment; the usual 0.25 costs up to 1 dB in short trainings
COMMITMENTS = ("beta", "commitment_weight", "commitment_loss_weight")  # its names
LEARNING = {"beta": BETA, "ema_decay": 0.95, "revive_below": 0.25}
RATE_RANGE = (0.0003, 0.02)  # lambdas of a training's images: about 6 to 1 turns
RATES = {1: 0.02, 2: 0.005, 3: 0.002, 4: 0.001}  # lambdas with about so many turns
RATE_WEIGHT = 0.1  # 0.3 costs 0.1 dB at equal bits


@dataclass(frozen=True)
class Contender:
    """A quantizer in the race.

    Attributes:
        name: Unique short name.
        group: Line of the plot, shared by several contenders.
        quantizer: ``{target, params}`` block.
        lengths: Mean lengths of a site at which the trained model is measured; None measures it
            once, at its only rate.
        beam: Beam width of the search after training; None for the nearest code in each turn.
        from_scratch: Train for the same total number of steps, but with codes from the first step:
            codes that start near zero and learn by gradient cannot follow trained latents.
    """

    name: str
    group: str
    quantizer: Mapping[str, Any]
    lengths: tuple[float, ...] | None = None
    beam: int | None = None
    from_scratch: bool = False


def _block(target: str, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": params}


def _transform(name: str, turns: int, channels: int) -> dict[str, Any]:
    sizes = {
        "Attract": {"step": 0.5},
        "Residual": {"max_loops": turns},
        "LinearResidual": {"max_loops": turns, "e_dim": channels},
    }
    embedding = {"depth_embedding": (turns, channels)}
    return _block(f"{TRANSFORMS}.{name}", **sizes[name], **embedding)


def _loopy(
    transform: str, codes: int, channels: int, turns: int = MAX_LOOPS, **params: Any
) -> dict[str, Any]:
    return _block(
        f"{QUANTIZE}.LoopyVectorQuantizer",
        n_e=codes,
        e_dim=channels,
        max_loops=turns,
        **LEARNING,
        transform_config=_transform(transform, turns, channels),
        **params,
    )


def _rated(name: str, codes: int, channels: int, turns: int) -> Contender:
    """Return a quantizer of fixed depth whose codes are chosen and learned by rate."""
    rated = {"rate": RATES[turns], "rate_weight": RATE_WEIGHT}
    loop = _loopy("LinearResidual", codes, channels, turns, **rated)
    block = {**loop, "target": "race.peers.FixedRate"}
    group = "one code, by rate" if turns == 1 else "fixed depth, by rate"
    return Contender(name, group, block, beam=BEAM)


def _residual(turns: int, codes: int, channels: int, **params: Any) -> dict[str, Any]:
    sizes = {"n_e": codes, "e_dim": channels, "turns": turns}
    return _block("race.peers.ResidualVQ", **sizes, commitment_weight=BETA, **params)


def _library(name: str, codes: int, channels: int, **params: Any) -> dict[str, Any]:
    return _block(ZOO, name=name, n_e=codes, e_dim=channels, **params)


def _library_contenders(codes: int, channels: int) -> list[Contender]:
    """Return quantizers with options of their papers; K is a power of two for those of signs."""
    averages = {"commitment_weight": BETA, "decay": 0.95, "kmeans_init": True}
    averages["threshold_ema_dead_code"] = 1
    signs = {"entropy_loss_weight": 0.01, "commitment_loss_weight": BETA}
    grouped = {**averages, "groups": 2, "num_quantizers": 2, "rotation_trick": False}
    scalar = {"levels": [8, 6, 5], "num_quantizers": 2}
    by_name = {
        "vq-rotation": _library("VectorQuantize", codes, channels, **averages),
        "vq-cosine": _library("VectorQuantize", codes, channels, use_cosine_sim=True, **averages),
        "sim-vq": _library("SimVQ", codes, channels, commitment_weight=BETA),
        "lfq": _library("LFQ", codes, channels, **signs),
        "bsq": _library("LFQ", codes, channels, spherical=True, **signs),
        "grvq-2x2": _library("GroupedResidualVQ", codes, channels, **grouped),
        "rfsq-2": _library("ResidualFSQ", 240, channels, **scalar),
    }
    by_gradient = ("sim-vq", "lfq", "bsq", "rfsq-2")
    return [
        Contender(name, "library", block, from_scratch=name in by_gradient)
        for name, block in by_name.items()
    ]


def _peers(codes: int, channels: int) -> list[Contender]:
    plain = _block(
        f"{QUANTIZE}.VectorQuantizer2", n_e=codes, e_dim=channels, beta=BETA, legacy=False
    )
    found = [Contender("vq", "one code", plain, from_scratch=True)]
    for factor in (1, 4):
        quantizer = _residual(1, factor * codes, channels)
        found.append(Contender(f"ema-vq-{factor}x", "one code", quantizer))
    for levels in ([8, 6, 5], [8, 5, 5, 5]):
        name = "fsq-" + "x".join(map(str, levels))
        quantizer = _library("FSQ", math.prod(levels), channels, levels=levels)
        found.append(Contender(name, "fsq", quantizer))
    for turns in (2, 3, 4, 8):
        for shared in (False, True):
            kind = "shared" if shared else "separate"
            quantizer = _residual(turns, codes, channels, shared_codebook=shared)
            group = f"fixed depth, {kind}"
            found.append(Contender(f"rvq-{turns}-{kind}", group, quantizer, beam=BEAM))
    found += [_rated(f"vq-rate-{n}x", n * codes, channels, 1) for n in (1, 4)]
    found += [_rated(f"fixed-rate-{turns}", codes, channels, turns) for turns in (2, 3, 4)]
    found += _library_contenders(codes, channels)
    dropout = _residual(6, codes, channels, quantize_dropout=True)
    rates = (1, 2, 3, 4, 6)
    found.append(Contender("rvq-dropout", "quantize_dropout", dropout, rates, beam=BEAM))
    return found


def _loops_by_rate(codes: int, channels: int) -> list[Contender]:
    found = []
    for suffix, weight in (("", 0.0), ("-loss", RATE_WEIGHT)):
        linear = partial(_loopy, "LinearResidual", codes, channels, rate_weight=weight)
        one = linear(rate=RATES[2], rate_range=RATE_RANGE)
        lengths = (1.1, 1.5, 2, 3, 4)
        group = "loopy by rate, one checkpoint" + suffix.replace("-", ", ")
        found.append(Contender(f"rate-one{suffix}", group, one, lengths, beam=BEAM))
        group = "loopy by rate, dedicated" + suffix.replace("-", ", ")
        for turns in (2, 4):
            quantizer = linear(rate=RATES[turns])
            found.append(Contender(f"rate-{turns}{suffix}", group, quantizer, beam=BEAM))
    return found


def _loops(codes: int, channels: int) -> list[Contender]:
    linear = partial(_loopy, "LinearResidual")
    one = linear(codes, channels, target_length=2, length_range=(1.0, 6.0))
    rates: tuple[float, ...] = (1, 1.5, 2, 3, 4, 6)
    found = [Contender("loopy-one", "loopy, one checkpoint", one, rates, beam=BEAM)]
    for length in (2, 3, 4):
        quantizer = linear(codes, channels, target_length=length)
        # Also with 15% fewer codes: do these suffice for the PSNR of a fixed number of turns?
        rates = (0.85 * length, length)
        found.append(Contender(f"loopy-{length}", "loopy, dedicated", quantizer, rates, beam=BEAM))
    found += _loops_by_rate(codes, channels)
    for factor in (4, 16):
        quantizer = linear(factor * codes, channels, target_length=2)
        name = f"loopy-2-{factor}x"
        found.append(Contender(name, "loopy, more codes", quantizer, (2,), beam=BEAM))
    for turns in (2, 3, 4, 8):
        # Without the threshold every site takes all turns.
        quantizer = linear(codes, channels, turns, threshold=0.0)
        found.append(Contender(f"fixed-{turns}", "fixed depth, mapped", quantizer, beam=BEAM))
    attract = _loopy("Attract", codes, channels, target_length=2)
    scaled = _loopy("Residual", codes, channels, target_length=2)
    return [
        *found,
        Contender("attract", "loopy Attract", attract),
        Contender("scaled", "loopy, scaled", scaled, (1.7, 2), beam=BEAM),
    ]


def contenders(codes: int, channels: int, beta: float = BETA) -> dict[str, Contender]:
    """Return all contenders by name.

    Args:
        codes: K, number of codes of a codebook.
        channels: D, channels of a latent.
        beta: Weight of the commitment of all that have one.
    """
    found = {}
    for contender in _peers(codes, channels) + _loops(codes, channels):
        block = contender.quantizer
        weights = {name: beta for name in COMMITMENTS if name in block["params"]}
        quantizer = {**block, "params": {**block["params"], **weights}}
        found[contender.name] = replace(contender, quantizer=quantizer)
    return found
