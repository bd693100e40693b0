"""Priors over the levels of a VQ-VAE-2 (arXiv:1906.00446, section 3.2), and sampling from all.

The prior of the top level is a `Net2NetTransformer` or `PixelCNNPrior`, unconditional or
class-conditional, whose tokenizer is that `Level`. The prior of each other level is a
`LowerLevelPrior`, given the codes of the levels above in place of the class. `sample_levels`
samples from all of them, from the top down.

Axis letters: B images, C channels, H W image, L tokens. An index l marks what belongs to one level;
its stack is z_q of this level and of all above, enlarged to its grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.prior import Prior, TokenizedBatch, is_cached
from taming.models.vqvae2 import Level
from taming.modules.transformer.generate import DEFAULT_SAMPLING, SamplingParams
from taming.util import DataError


class LowerLevelPrior(Net2NetTransformer):
    """Prior over the codes of a level of a `VQVAE2`, given those of all levels above.

    Args:
        transformer_config: ``{target, params}`` of a `PriorNetwork`, such as `GPT`.
        first_stage_config: ``{target, params}`` of the `Level`, which is not the top.
        first_stage_key: Key of the image in a batch.
        **kwargs: Other arguments of `Net2NetTransformer`, except those of a condition.

    Raises:
        ValueError: The level is the top, or the parts do not fit each other.

    Example:
        >>> between = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
        >>> sizes = between | {"resolution": 16, "z_channels": 8, "in_channels": 3, "out_ch": 3}
        >>> ema = {"target": "taming.modules.vqvae.quantize.EMAVectorQuantizer"}
        >>> ema |= {"params": {"n_embed": 16, "embedding_dim": 4, "beta": 0.25}}
        >>> levels = {"target": "taming.modules.vqvae.hierarchy.Hierarchy"}
        >>> levels |= {"params": {"quantizers": {"top": ema, "bottom": ema}}}
        >>> levels["params"]["ddconfig"] = between | {"resolution": 8}
        >>> loss = {"target": "taming.modules.losses.reconstruction.ReconstructionLoss"}
        >>> params = {"ddconfig": sizes | {"double_z": False}, "lossconfig": loss}
        >>> params |= {"n_embed": 32, "embed_dim": 8, "quantizer_config": levels}
        >>> model = {"target": "taming.models.vqvae2.VQVAE2", "params": params}
        >>> level = {"target": "taming.models.vqvae2.Level"}
        >>> level |= {"params": {"model_config": model, "level": "bottom"}}
        >>> gpt = {"target": "taming.modules.transformer.gpt.GPT", "params": {"n_embd": 8}}
        >>> prior = LowerLevelPrior(gpt, level).eval()
        >>> batch = prior.tokenize_batch({"image": torch.zeros(2, 16, 16, 3)})
        >>> batch.condition.shape, batch.codes.shape  # all codes of the top; (B, h, w, T)
        (torch.Size([2, 16]), torch.Size([2, 8, 8, 1]))
    """

    first_stage_model: Level

    def __init__(
        self,
        transformer_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        first_stage_key: str = "image",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            transformer_config,
            first_stage_config,
            cond_stage_config="__is_first_stage__",
            first_stage_key=first_stage_key,
            cond_stage_key=first_stage_key,
            downsample_cond_size=-1,
            sos_token=0,
            unconditional=False,
            **kwargs,
        )
        if not getattr(self.first_stage_model, "above", 0):
            raise ValueError(
                "LowerLevelPrior needs a taming.models.vqvae2.Level below the top; the top's prior "
                "is taming.models.cond_transformer.Net2NetTransformer"
            )

    @torch.no_grad()
    def tokenize_batch(self, batch: Mapping[str, Any]) -> TokenizedBatch:
        """Encode a batch of images, and their condition in the same pass of the tokenizer."""
        if is_cached(batch):
            raise DataError("a token cache holds one level; train this prior from images")
        x, _ = self.get_xc(batch)
        with torch.autocast(x.device.type, enabled=False):
            *above, codes = self.first_stage_model.codes_of(x)
        condition = self.first_stage_model.condition_of(above)
        tokens, pixels = self.codes_to_tokens(codes), x.shape[2] * x.shape[3]
        return TokenizedBatch(codes, tokens, x, *condition, pixels)

    @torch.no_grad()
    def encode_to_c(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, C, H, W) by the levels above: their stack, and tokens (B, L)."""
        with torch.autocast(c.device.type, enabled=False):
            *above, _ = self.first_stage_model.codes_of(c)
        return self.first_stage_model.condition_of(above)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, quant_c: Tensor | None = None) -> Tensor:
        """Decode codes (B, h_l, w_l, T_l) under the stack ``quant_c`` of the levels above."""
        if quant_c is None:
            return super().decode_codes(codes)
        return self.first_stage_model.decode_under(codes, quant_c)


def sample_levels(
    priors: Sequence[Prior], condition: Tensor, params: SamplingParams = DEFAULT_SAMPLING
) -> tuple[Tensor, ...]:
    """Sample codes from the priors of all levels, each given the levels above.

    Args:
        priors: In eval mode, the top level's first.
        condition: (B, 1) int64, of the top: a class, or the start token.
        params: How tokens are sampled; guidance applies to the priors trained for it.

    Returns:
        Codes (B, h_l, w_l, T_l) int64 of each level, the top first, for `VQVAE2.decode_code`.

    Raises:
        ValueError: The priors do not belong together (see `check_priors`), or none of them was
            trained for guidance.
    """
    check_priors(priors)
    if params.guidance != 1 and not any(prior.condition_dropout > 0 for prior in priors):
        raise ValueError(
            f"guidance {params.guidance} needs a prior that was trained with condition_dropout; "
            "that of no level was"
        )
    sampled: list[Tensor] = []
    for prior in priors:
        if sampled:
            condition = prior.first_stage_model.condition_tokens(sampled)
        own = params if prior.condition_dropout > 0 else replace(params, guidance=1.0)
        sampled.append(prior.sample_codes(condition, own))
    return tuple(sampled)


def check_priors(priors: Sequence[Prior]) -> None:
    """Refuse priors that are not those of all levels of one `VQVAE2`, from the top down.

    Raises:
        ValueError: Names what does not fit.
    """
    levels = [prior.first_stage_model for prior in priors]
    if not all(hasattr(level, "above") for level in levels):
        raise ValueError(
            "a prior's tokenizer is not one level of a VQVAE2: sample from it alone, with one run"
        )
    names = levels[0].model.quantize.names
    if [level.above for level in levels] != [*range(len(names))]:
        found = [level.model.quantize.names[level.above] for level in levels]
        raise ValueError(
            f"expected the priors of all levels of one VQVAE2 from the top down, {list(names)}, "
            f"got {len(priors)} priors with the levels {found}"
        )
    if not priors[0].be_unconditional and priors[0].n_classes is None:
        raise ValueError("the prior of the top level must be unconditional or class-conditional")
    first, *others = (level.model.quantize.state_dict() for level in levels)
    for name, prior, other in zip(names[1:], priors[1:], others, strict=True):
        if prior.cond_stage_model is not prior.first_stage_model:
            raise ValueError(f"the prior of {name!r} must be a LowerLevelPrior, to see those above")
        if first.keys() != other.keys() or any(not first[k].equal(other[k]) for k in first):
            raise ValueError(f"the prior of {name!r} was trained on another tokenizer's codes")
