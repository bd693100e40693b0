"""The convolutional prior: a gated PixelCNN over the codes of a tokenizer.

Axis letters: B images, C channels, H W image, h w grid, T turns, V values of a symbol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taming.checkpoint import load_weights
from taming.models.prior import Prior, TokenizedBatch
from taming.models.sampling import (
    Completion,
    Window,
    condition_in,
)
from taming.modules.pixelcnn.model import PixelCNN
from taming.modules.pixelcnn.site import SiteSymbols
from taming.modules.sequence.notations import RunLengthSequence
from taming.modules.transformer.generate import sample_token
from taming.util import instantiate_from_config


class PixelCNNPrior(Prior):
    """Gated PixelCNN (van den Oord et al. 2016, arXiv:1606.05328) over a frozen tokenizer's codes.

    A site's length is predicted first, then its codes in order; where a site has one code, only
    that. The likelihood is exact, lengths included, and logged in bits. Tokens are counted in the
    tokenizer's own sequence, so that the numbers compare with those of a `Net2NetTransformer`.

    Args:
        first_stage_config: ``{target, params}`` of the tokenizer, a `VQModel`.
        stacks_config: ``{target, params}`` of the `GatedStacks`.
        cond_stage_config: ``{target, params}`` of a `Labelator`, or ``"__is_unconditional__"``.
        ckpt_path: Checkpoint whose weights to start from.
        ignore_keys: Prefixes of keys to leave out of it.
        first_stage_key: Key of the image in a batch.
        cond_stage_key: Key of the class.
        scheduler_config: ``{target, params}`` of a factor of the learning rate by step.
        trust_checkpoint: Also rebuild objects of any class from ``ckpt_path``, which can run any
            code.

    Attributes:
        learning_rate: Set by the caller before training.

    Raises:
        ValueError: The condition is not a class.

    Example:
        >>> sizes = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
        >>> sizes |= {"resolution": 8, "z_channels": 8, "in_channels": 3, "out_ch": 3}
        >>> loss = {"target": "taming.modules.losses.reconstruction.ReconstructionLoss"}
        >>> params = {"ddconfig": sizes | {"double_z": False}, "lossconfig": loss}
        >>> params |= {"n_embed": 16, "embed_dim": 4}
        >>> tokenizer = {"target": "taming.models.vqgan.VQModel", "params": params}
        >>> stacks = {"target": "taming.modules.pixelcnn.stacks.GatedStacks"}
        >>> stacks |= {"params": {"channels": 8, "layers": 2}}
        >>> prior = PixelCNNPrior(tokenizer, stacks).eval()
        >>> prior.sample_codes(torch.tensor([[0], [0]])).shape  # (B, h, w, T)
        torch.Size([2, 4, 4, 1])
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        stacks_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str = "__is_unconditional__",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        first_stage_key: str = "image",
        cond_stage_key: str = "class_label",
        scheduler_config: Mapping[str, Any] | None = None,
        trust_checkpoint: bool = False,
    ) -> None:
        super().__init__(
            first_stage_config,
            cond_stage_config,
            first_stage_key=first_stage_key,
            cond_stage_key=cond_stage_key,
            scheduler_config=scheduler_config,
        )
        n_classes = 1 if self.be_unconditional else self.n_classes
        if n_classes is None:
            raise ValueError(
                "cond_stage_config of a PixelCNNPrior: expected a block whose target is "
                "taming.modules.util.Labelator, or '__is_unconditional__', got "
                f"{cond_stage_config!r}"
            )
        sizes = self.sequence.n_e, self.sequence.max_loops, self.sequence.dummies
        site = SiteSymbols(*sizes, fixed_length=self.sequence.fixed_length)
        if not site.fixed_length:
            self.sequence = RunLengthSequence(*sizes)  # a count, then codes: as its symbols
        self.pixelcnn = PixelCNN(site, n_classes, instantiate_from_config(stacks_config))
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys, trust_checkpoint)

    @property
    def network(self) -> PixelCNN:
        """The PixelCNN."""
        return self.pixelcnn

    # --- codes -> nats ---------------------------------------------------------------------------

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Measure images (B, C, H, W) in [-1, 1] of classes (B,): `measure_nats` of a batch.

        For an unconditional prior, ``c`` is anything (B, ...).
        """
        return self._measure(self.encode_codes(x), self.encode_to_c(c)[1])

    def measure_nats(self, seen: TokenizedBatch) -> tuple[Tensor, Tensor]:
        """Measure -log p (B,) in nats and the number of tokens (B,) of images."""
        return self._measure(seen.codes, seen.condition)

    def _measure(self, codes: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        _, lengths = self.first_stage_model.quantize.sequence.encode(codes)
        return self.pixelcnn.nll(codes, condition[:, 0]), lengths

    # --- prior -> codes --------------------------------------------------------------------------

    def _complete(self, task: Completion) -> Tensor:
        """Sample unknown sites of any grid, without guidance."""
        codes, known, condition, params, _, report = task
        if params.guidance != 1:
            raise ValueError(f"a PixelCNNPrior has no guidance, got {params.guidance}")
        rows = torch.arange(len(codes), device=codes.device)
        symbols = 0  # since the last report

        def keep(sites: int, so_far: Tensor) -> None:
            nonlocal symbols
            report(lambda: sites, so_far.clone, tokens=symbols)
            symbols = 0

        def sample_symbol(logits: Tensor) -> Tensor:
            nonlocal symbols
            symbols += 1
            return sample_token(logits, params, rows)

        labels = condition_in(condition, Window(0, 0, *known.shape))[:, 0]
        return self.pixelcnn.sample(codes, labels, sample_symbol, known, keep)
