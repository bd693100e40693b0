"""Priors over the levels of a VQ-VAE-2 (arXiv:1906.00446, section 3.2), and sampling from all.

The prior of the top level is a `Net2NetTransformer` or `PixelCNNPrior`, unconditional or
class-conditional, whose tokenizer is that `Level`; each other level's is a `LowerLevelPrior`, which
knows of the class what the levels above say of it. `sample_levels` draws from all of them, from the
top down.

Axis letters: B images, C channels, H W image, L tokens. What belongs to one level has an index l;
its stack is z_q of this level and of all above, enlarged to its grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.prior import TokenizedBatch, is_cached
from taming.models.sampling import (
    Prior,
    empty_codes,
    trained_grid,
    whole_condition,
    write_codes,
)
from taming.models.vqvae2 import Level
from taming.modules.transformer.generate import SamplingParams
from taming.modules.util import Labelator, SOSProvider
from taming.util import DataError


class LowerLevelPrior(Net2NetTransformer):
    """Prior over the codes of a level of a `VQVAE2`, given those of all levels above.

    Args:
        transformer_config: See `Net2NetTransformer`.
        first_stage_config: ``{target, params}`` of the `Level`, which is not the top.
        permuter_config: See `Net2NetTransformer`, as all others.

    Raises:
        ValueError: The level is the top, or the parts do not fit each other.
    """

    first_stage_model: Level

    def __init__(
        self,
        transformer_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        permuter_config: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        first_stage_key: str = "image",
        pkeep: float = 1.0,
        sequence_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        trust_checkpoint: bool = False,
        condition_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            transformer_config,
            first_stage_config,
            cond_stage_config="__is_first_stage__",
            permuter_config=permuter_config,
            ckpt_path=ckpt_path,
            ignore_keys=ignore_keys,
            first_stage_key=first_stage_key,
            cond_stage_key=first_stage_key,
            pkeep=pkeep,
            sequence_config=sequence_config,
            scheduler_config=scheduler_config,
            trust_checkpoint=trust_checkpoint,
            condition_dropout=condition_dropout,
        )
        if not isinstance(self.first_stage_model, Level) or not self.first_stage_model.above:
            raise ValueError(
                "LowerLevelPrior needs a taming.models.vqvae2.Level below the top; the top's prior "
                "is taming.models.cond_transformer.Net2NetTransformer"
            )

    @torch.no_grad()
    def tokenize_batch(self, batch: Mapping[str, Any]) -> TokenizedBatch:
        """See `Prior.see`; here, one pass of the tokenizer gives the condition too."""
        if is_cached(batch):
            raise DataError("a token cache holds one level; train this prior from images")
        x, _ = self.get_xc(batch)
        with torch.autocast(x.device.type, enabled=False):
            *above, codes = self.first_stage_model.codes_of(x)
        condition = self.first_stage_model.condition_of(above)
        return TokenizedBatch(
            codes, self.write_tokens(codes), x, *condition, x.shape[2] * x.shape[3]
        )

    @torch.no_grad()
    def encode_to_c(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, C, H, W) by the levels above: their stack, and tokens (B, L)."""
        with torch.autocast(c.device.type, enabled=False):
            *above, _ = self.first_stage_model.codes_of(c)
        return self.first_stage_model.condition_of(above)

    @torch.no_grad()
    def draw_picture(self, index: Tensor, zshape: Sequence[int], quant_c: Tensor) -> Tensor:
        """Turn tokens into images under the stack ``quant_c`` of the levels above."""
        h, w = zshape[2:]
        return self.first_stage_model.decode_under(self.decode_to_codes(index, (h, w)), quant_c)


def sample_levels(
    priors: Sequence[Prior], condition: Tensor, drawing: SamplingParams
) -> tuple[Tensor, ...]:
    """Draw codes from the priors of all levels, each given what was drawn before.

    Args:
        priors: In eval mode, the top level's first.
        condition: (B, 1) int64, the top's: a class, or the start token.
        drawing: How codes are drawn; guidance is that of the priors that were trained for it.

    Returns:
        Codes (B, h_l, w_l, T_l) int64 of each level, the top first, for `VQVAE2.decode_code`.

    Raises:
        ValueError: See `check_priors`; or there is guidance that no prior was trained for.
    """
    check_priors(priors)
    if drawing.guidance != 1 and not any(map(can_be_guided, priors)):
        raise ValueError(
            f"guidance {drawing.guidance} needs a prior that was trained with condition_dropout; "
            "that of no level was"
        )
    drawn: list[Tensor] = []
    for prior in priors:
        level: Any = prior.first_stage_model
        if drawn:
            condition = level.condition_tokens(drawn)
        codes = empty_codes(prior, len(condition), trained_grid(prior))
        own = drawing if can_be_guided(prior) else drawing._replace(guidance=1.0)
        for _ in write_codes(prior, whole_condition(condition), codes, own):
            pass
        drawn.append(codes)
    return tuple(drawn)


def can_be_guided(prior: Prior) -> bool:
    """Return whether a prior was trained with its condition hidden now and then."""
    return isinstance(prior, Net2NetTransformer) and prior.condition_dropout > 0


def check_priors(priors: Sequence[Prior]) -> None:
    """Refuse priors that are not those of all levels of one `VQVAE2`, from the top down.

    Raises:
        ValueError: Says what is wrong.
    """
    stages = [prior.first_stage_model for prior in priors]
    levels = [stage for stage in stages if isinstance(stage, Level)]
    names = levels[0].model.quantize.names if levels else ()
    if len(levels) < len(stages):
        raise ValueError(
            "a prior's tokenizer is not one level of a VQVAE2: draw from it with scripts/sample.py"
        )
    if [level.above for level in levels] != [*range(len(names))]:
        found = [level.model.quantize.names[level.above] for level in levels]
        raise ValueError(
            f"expected the priors of all levels of one VQVAE2 from the top down, {list(names)}, "
            f"got {len(stages)} priors with the levels {found}"
        )
    if not isinstance(priors[0].cond_stage_model, Labelator | SOSProvider):
        raise ValueError("the prior of the top level must be unconditional or class-conditional")
    for name, prior in zip(names[1:], priors[1:], strict=True):
        if not isinstance(prior, LowerLevelPrior):
            raise ValueError(f"the prior of {name!r} must be a LowerLevelPrior, to see those above")
    first, *others = (level.model.quantize.state_dict() for level in levels)
    for name, other in zip(names[1:], others, strict=True):
        if first.keys() != other.keys() or any(not first[k].equal(other[k]) for k in first):
            raise ValueError(f"the prior of {name!r} was trained on another tokenizer's codes")
