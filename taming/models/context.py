"""The context model: a network that sends how likely codes are, for small files.

Axis letters: B images, C channels, H W image, h w grid, S = h w sites, T turns, N sites sent
together, V values of a symbol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taming.checkpoint import load_weights
from taming.models.conditions import UNCONDITIONAL
from taming.models.prior import Prior, TokenizedBatch
from taming.models.sampling import Completion
from taming.modules.context import ContextNetwork
from taming.modules.transformer.generate import sample_token
from taming.modules.vqvae.rate import check_ranges, rates_between
from taming.util import instantiate_with_sizes


class ContextPrior(Prior):
    """A `ContextNetwork` over the codes of a frozen tokenizer, trained at all of its rates.

    `taming.load` gives the tokenizer of its run with the network as `Tokenizer.context`, under
    which ``compress`` writes the smallest files. In training, the rate of each image is sampled
    from ``length_range`` or ``rate_range``; in validation, those of a batch are spread evenly.

    Args:
        first_stage_config: ``{target, params}`` of the tokenizer, a `VQModel`.
        context_config: ``{target, params}`` of the `ContextNetwork`; K, T and whether all
            sites take T turns follow from the tokenizer.
        length_range: Mean lengths of images, two bounds in [1, T].
        rate_range: Instead: lambdas of images, two bounds. With neither, the rates that the
            tokenizer was trained with, or mean lengths in [1, T]; none matter at a fixed rate.
        ckpt_path: Checkpoint whose weights to start from.
        ignore_keys: Prefixes of keys to leave out of it.
        first_stage_key: Key of the image in a batch.
        scheduler_config: ``{target, params}`` of a factor of the learning rate by step.
        trust_checkpoint: Also rebuild objects of any class from ``ckpt_path``, which can run any
            code.

    Attributes:
        context: The network.
        learning_rate: Set by the caller before training.

    Raises:
        ValueError: A bound is out of range, or the codes of a site are dummies but for the last.

    Example:
        >>> sizes = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
        >>> sizes |= {"resolution": 8, "z_channels": 8, "in_channels": 3, "out_ch": 3}
        >>> loss = {"target": "taming.modules.losses.reconstruction.ReconstructionLoss"}
        >>> params = {"ddconfig": sizes | {"double_z": False}, "lossconfig": loss}
        >>> params |= {"n_embed": 16, "embed_dim": 4}
        >>> tokenizer = {"target": "taming.models.vqgan.VQModel", "params": params}
        >>> network = {"target": "taming.modules.context.ContextNetwork"}
        >>> network |= {"params": {"channels": 8, "hidden": 16}}
        >>> prior = ContextPrior(tokenizer, network).eval()
        >>> seen = prior.tokenize_batch({"image": torch.zeros(2, 8, 8, 3)})
        >>> nats, lengths = prior.measure_nats(seen)
        >>> nats.shape, lengths.tolist()
        (torch.Size([2]), [16, 16])
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        context_config: Mapping[str, Any],
        length_range: Sequence[float] | None = None,
        rate_range: Sequence[float] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        first_stage_key: str = "image",
        scheduler_config: Mapping[str, Any] | None = None,
        trust_checkpoint: bool = False,
    ) -> None:
        super().__init__(
            first_stage_config,
            UNCONDITIONAL,
            first_stage_key=first_stage_key,
            cond_stage_key=first_stage_key,
            scheduler_config=scheduler_config,
        )
        if self.first_stage_model.whole is not self.first_stage_model:
            raise ValueError("a context model takes the codes of a whole tokenizer, not of a level")
        quantizer, turns = self.first_stage_model.quantize, self.sequence.max_loops
        if self.sequence.dummies:
            raise ValueError(
                "a context model takes codes of which each turn writes one; the transform of this "
                "tokenizer's quantizer writes dummies, which only the last turn explains"
            )
        if length_range is None and rate_range is None:
            rate_range, length_range = quantizer.rate_range, quantizer.length_range
        check_ranges(length_range, rate_range, turns)
        self.rates = {"length_range": length_range, "rate_range": rate_range}
        if not any(self.rates.values()):
            self.rates["length_range"] = (1.0, float(turns))
        sizes = {"n_codes": self.sequence.n_e, "max_loops": turns}
        sizes["fixed_length"] = self.sequence.fixed_length
        self.context: ContextNetwork = instantiate_with_sizes(context_config, sizes)
        tables = quantizer.entropy
        if tables is not None and tables.learned:  # what a context only has to refine
            with torch.no_grad():
                self.context.shares.copy_(-math.log(2) * tables.code_bits())
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys, trust_checkpoint)

    @property
    def network(self) -> ContextNetwork:
        """The network."""
        return self.context

    # --- codes -> nats ---------------------------------------------------------------------------

    def encode_codes(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1], each at a rate of its own: (B, h, w, T) int64."""
        model: Any = self.first_stage_model
        if not model.quantize.variable_rate:
            return super().encode_codes(x)
        images, sites = len(x), x.shape[2] * x.shape[3] // model.factor**2
        share = (torch.arange(images, dtype=torch.float32, device=x.device) + 0.5) / images
        if self.training:
            share = torch.rand_like(share)
        rates = rates_between(share, sites, **self.rates)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return model.encode_to_codes(x, **rates)

    def measure_nats(self, seen: TokenizedBatch) -> tuple[Tensor, Tensor]:
        """Measure -log p (B,) in nats and the number of tokens (B,) of images."""
        return self.context.nats(seen.codes), (seen.tokens >= 0).sum(dim=1)

    # --- prior -> codes --------------------------------------------------------------------------

    def _complete(self, task: Completion) -> Tensor:
        """Sample unknown sites of any grid, without guidance."""
        codes, known, _, params, _, report = task
        if params.guidance != 1:
            raise ValueError(f"a ContextPrior has no guidance, got {params.guidance}")
        symbols = torch.where(codes < 0, self.context.n_codes, codes)
        symbols = torch.where(known[..., None], symbols, -1)
        sampled = self.empty_codes(len(codes), (known.shape[0], known.shape[1]))

        def send(logits: Tensor, wanted: Tensor, image: Tensor) -> Tensor:
            return torch.where(wanted < 0, sample_token(logits, params, image), wanted)

        for turn, sent in enumerate(self.context.walk(symbols, send)):
            sampled[..., turn] = torch.where(sent < self.context.n_codes, sent, -1)
            finished = known.numel() if turn + 1 == self.context.max_loops else 0
            report(lambda finished=finished: finished, sampled.clone, tokens=int((~known).sum()))
        return sampled
