"""The quantizers that are measured against each other, and the rates at which each is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

QUANTIZE = "taming.modules.vqvae.quantize"
TRANSFORMS = {
    "Attract": "taming.modules.vqvae.transforms.Attract",
    "Residual": "taming.modules.vqvae.transforms.Residual",
    "LinearResidual": "taming.modules.vqvae.transforms.LinearResidual",
    "Orbit": "taming.modules.vqvae.orbit.Orbit",
}
MAX_LOOPS = 8
BEAM = 4
BETA = 0.05  # of all commitment losses; with the usual 0.25, all lose up to 1 dB in short trainings


@dataclass(frozen=True)
class Contender:
    """A quantizer in the race.

    Attributes:
        name: Short name, unique.
        group: Contenders of one group are one line of the plot.
        quantizer: ``{target, params}``.
        lengths: Mean turns per site at which the trained model is measured; None measures it once,
            at its only rate.
        beam: Width of the search once it is trained; None where each turn takes the nearest code.
        from_scratch: Train it for as many steps in all, but on codes from the first step on: codes
            that start near zero and learn by gradient cannot follow latents that are there already.
    """

    name: str
    group: str
    quantizer: Mapping[str, Any]
    lengths: tuple[float, ...] | None = field(default=None)
    beam: int | None = None
    from_scratch: bool = False


def _block(target: str, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": params}


def _transform(name: str, depth: int, channels: int) -> dict[str, Any]:
    sizes = {
        "Attract": {"step": 0.5},
        "Residual": {"max_loops": depth},
        "LinearResidual": {"max_loops": depth, "e_dim": channels},
        "Orbit": {"max_loops": depth, "e_dim": channels},
    }
    embedding = {"depth_embedding": (depth, channels)}
    return _block(TRANSFORMS[name], **sizes[name], **embedding)


def _loopy(
    transform: str, codes: int, channels: int, depth: int = MAX_LOOPS, **params: Any
) -> dict[str, Any]:
    return _block(
        f"{QUANTIZE}.LoopyVectorQuantizer",
        n_e=codes,
        e_dim=channels,
        max_loops=depth,
        beta=BETA,
        ema_decay=0.95,
        revive_below=0.25,
        transform_config=_transform(transform, depth, channels),
        **params,
    )


def _residual(depth: int, codes: int, channels: int, **params: Any) -> dict[str, Any]:
    sizes = {"n_e": codes, "e_dim": channels, "depth": depth}
    return _block("race.peers.ResidualVQ", **sizes, commitment_weight=BETA, **params)


def contenders(codes: int, channels: int) -> dict[str, Contender]:
    """Return every contender by name, for K codes and D channels."""
    one_rate = [
        Contender(
            "vq",
            "one code",
            _block(
                f"{QUANTIZE}.VectorQuantizer2",
                n_e=codes,
                e_dim=channels,
                beta=BETA,
                legacy=False,
            ),
            from_scratch=True,
        )
    ]
    for factor in (1, 4):
        one_rate.append(
            Contender(
                f"ema-vq-{factor}x",
                "one code",
                _residual(1, factor * codes, channels),
            )
        )
    for levels in ([8, 6, 5], [8, 5, 5, 5]):
        name = "fsq-" + "x".join(map(str, levels))
        one_rate.append(
            Contender(name, "fsq", _block("race.peers.FSQ", levels=levels, e_dim=channels))
        )
    for depth in (2, 3, 4, 8):
        for shared in (False, True):
            kind = "shared" if shared else "separate"
            quantizer = _residual(depth, codes, channels, shared_codebook=shared)
            one_rate.append(
                Contender(f"rvq-{depth}-{kind}", f"fixed depth, {kind}", quantizer, beam=BEAM)
            )
        # The loop without its threshold: every site takes all turns.
        own = _loopy("LinearResidual", codes, channels, depth, threshold=0.0)
        one_rate.append(Contender(f"fixed-{depth}", "fixed depth, mapped", own, beam=BEAM))
    one_rate += [
        # Each site takes the best of four turns: as many vectors as ema-vq-4x has.
        Contender("orbit", "loopy Orbit", _loopy("Orbit", codes, channels, 4, threshold=0.0)),
        Contender("attract", "loopy Attract", _loopy("Attract", codes, channels, target_length=2)),
        Contender("scaled", "loopy, scaled", _loopy("Residual", codes, channels, target_length=2)),
    ]
    dropout = _residual(6, codes, channels, quantize_dropout=True)
    many_rates = [
        Contender("rvq-dropout", "quantize_dropout", dropout, (1, 2, 3, 4, 6), beam=BEAM),
        Contender(
            "loopy-one",
            "loopy, one checkpoint",
            _loopy("LinearResidual", codes, channels, target_length=2, length_range=(1.0, 6.0)),
            (1, 1.5, 2, 3, 4, 6),
            beam=BEAM,
        ),
    ]
    for length in (2, 3, 4):
        quantizer = _loopy("LinearResidual", codes, channels, target_length=length)
        # Also with 15% fewer tokens: what a fixed depth of as many turns reaches, and no more?
        rates = (0.85 * length, length)
        many_rates.append(
            Contender(f"loopy-{length}", "loopy, dedicated", quantizer, rates, beam=BEAM)
        )
    for factor in (4, 16):
        quantizer = _loopy("LinearResidual", factor * codes, channels, target_length=2)
        many_rates.append(
            Contender(f"loopy-2-{factor}x", "loopy, more codes", quantizer, (2,), beam=BEAM)
        )
    return {contender.name: contender for contender in one_rate + many_rates}
