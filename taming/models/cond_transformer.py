"""The prior: a transformer over the token sequences of a tokenizer.

Read with `taming.models.prior`, which turns batches into tokens and codes into images.

Axis letters: B images, C channels, H W image, h w grid, S = h w sites, T turns, L tokens,
V vocabulary, N tokens of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.checkpoint import load_weights
from taming.models.conditions import UNCONDITIONAL
from taming.models.prior import Prior, TokenizedBatch
from taming.models.sampling import (
    Completion,
    Grid,
    Report,
    Stretch,
    condition_in,
    stretches,
    unknown_range,
)
from taming.models.sizes import build_network, check_inputs
from taming.modules.transformer.generate import GenerationState, SamplingParams, generate
from taming.modules.transformer.logits import filter_logits, mask_logits
from taming.modules.transformer.network import PriorNetwork
from taming.modules.util import checks_values

__all__ = ["Grid", "Net2NetTransformer"]


class Net2NetTransformer(Prior):
    """Autoregressive prior over the tokens of a frozen tokenizer (arXiv:2012.09841, section 3.2).

    Each image is one sequence after its condition's tokens. Sequences may differ in length; the
    tokenizer's grammar determines where each token belongs and which tokens may come next.

    The transformer's ``vocab_size``, ``block_size`` and ``site_shape`` follow from tokenizer and
    condition where they are left out; ``site_shape: true`` asks for the tokenizer's where it would
    otherwise be off. Larger sizes may be stated.

    Args:
        transformer_config: ``{target, params}`` of a `PriorNetwork`, such as `GPT`.
        first_stage_config: ``{target, params}`` of the tokenizer, a `VQModel`.
        cond_stage_config: ``{target, params}`` of a `ConditionStage`; or ``"__is_first_stage__"``,
            or ``"__is_unconditional__"``.
        permuter_config: ``{target, params}`` of a `Permuter`, the order of the sites; None for
            raster order.
        ckpt_path: Checkpoint whose weights to start from.
        ignore_keys: Prefixes of keys to leave out of it.
        first_stage_key: Key of the image in a batch.
        cond_stage_key: Key of the condition.
        downsample_cond_size: Side in pixels to which images are scaled as conditions; -1 for none.
        pkeep: Probability that an input token is kept in training; others become random. 0 and
            less keep none, as in the original.
        sos_token: Token that stands for no condition.
        unconditional: Ignore any condition.
        sequence_config: ``{target, params}`` of the `TokenSequence`; None for the tokenizer's own.
        scheduler_config: ``{target, params}`` of a factor of the learning rate by step.
        trust_checkpoint: Also rebuild objects of any class from ``ckpt_path``, which can run any
            code.
        condition_dropout: Probability that an image's condition is hidden in training, which makes
            classifier-free guidance possible (arXiv:2207.12598). The last token of the vocabulary
            stands for it.
        compile: Compile the transformer's blocks for training, when they are first used.

    Attributes:
        learning_rate: Set by the caller before training.

    Raises:
        ValueError: The parts do not fit each other.

    Example:
        >>> sizes = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
        >>> sizes |= {"resolution": 8, "z_channels": 8, "in_channels": 3, "out_ch": 3}
        >>> loss = {"target": "taming.modules.losses.reconstruction.ReconstructionLoss"}
        >>> params = {"ddconfig": sizes | {"double_z": False}, "lossconfig": loss}
        >>> params |= {"n_embed": 16, "embed_dim": 4}
        >>> tokenizer = {"target": "taming.models.vqgan.VQModel", "params": params}
        >>> gpt = {"target": "taming.modules.transformer.gpt.GPT", "params": {"n_embd": 8}}
        >>> prior = Net2NetTransformer(gpt, tokenizer, "__is_unconditional__").eval()
        >>> prior.sample_codes(torch.tensor([[0], [0]])).shape  # (B, h, w, T)
        torch.Size([2, 4, 4, 1])
    """

    def __init__(
        self,
        transformer_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        permuter_config: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        first_stage_key: str = "image",
        cond_stage_key: str = "depth",
        downsample_cond_size: int = -1,
        pkeep: float = 1.0,
        sos_token: int = 0,
        unconditional: bool = False,
        sequence_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        trust_checkpoint: bool = False,
        condition_dropout: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(
            first_stage_config,
            UNCONDITIONAL if unconditional else cond_stage_config,
            first_stage_key=first_stage_key,
            cond_stage_key=cond_stage_key,
            permuter_config=permuter_config,
            sequence_config=sequence_config,
            scheduler_config=scheduler_config,
            downsample_cond_size=downsample_cond_size,
            sos_token=sos_token,
        )
        if not 0 <= condition_dropout < 1 or (condition_dropout and self.be_unconditional):
            raise ValueError(
                "condition_dropout must be in [0, 1), and 0 without a condition, got "
                f"{condition_dropout}"
            )
        if pkeep > 1:
            raise ValueError(f"pkeep is a probability, at most 1, got {pkeep}")
        self.pkeep = pkeep
        self.condition_dropout = condition_dropout
        self.transformer = build_network(transformer_config, self)
        if compile:
            self.transformer.compile_blocks()
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys, trust_checkpoint)

    @property
    def network(self) -> PriorNetwork:
        """The transformer."""
        return self.transformer

    @property
    def grid(self) -> Grid:
        """Rows and columns of sites trained on: of the tables of places, or of the tokenizer."""
        shape = self.transformer.site_shape
        return super().grid if shape is None else (shape[0], shape[1])

    # --- tokens -> logits -> nats ----------------------------------------------------------------

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each token of the images from those before it.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            c: (B, ...) their conditions, as the condition stage takes them.

        Returns:
            logits (B, L, V), -inf where the grammar forbids a token and 0 after the end; targets
            (B, L) int64, -1 after each sequence's end.
        """
        codes = self.encode_codes(x)
        tokens, (_, condition) = self.codes_to_tokens(codes), self.encode_to_c(c)
        logits = self.predict(tokens, condition, (codes.shape[1], codes.shape[2]))
        padded = logits.new_zeros(*tokens.shape, logits.shape[-1])
        return padded.masked_scatter((tokens >= 0)[..., None], logits), tokens

    def predict(self, tokens: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        """Predict the tokens (B, L) of images after those of conditions (B, Lc).

        Returns:
            (N, V) logits of the tokens present, -inf for tokens that the grammar does not allow.
        """
        check_inputs(self.transformer, self.sequence, condition.shape[1], grid)
        if len(tokens) == 0:
            return tokens.new_empty(0, self.transformer.vocab_size, dtype=torch.float32)
        states, present = self.sequence.states(tokens), tokens >= 0
        inputs = torch.where(present, self._corrupt(tokens), tokens)
        logits = self.transformer.predict(self._hide(condition), inputs, states, grid)
        if self.sequence.restricted or logits.shape[-1] > self.sequence.vocab_size:
            logits = mask_logits(logits, self.sequence.allowed(states)[present])
        return logits

    def measure_nats(self, seen: TokenizedBatch) -> tuple[Tensor, Tensor]:
        """Measure -log p (B,) in nats and the number of tokens (B,) of images."""
        nats = self.nll(seen.tokens, seen.condition, seen.grid)
        return nats, (seen.tokens >= 0).sum(dim=1)

    def nll(self, tokens: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        """Return the exact -log p (B,) of images' tokens, lengths included; nats, float32."""
        present = tokens >= 0
        logits = self.predict(tokens, condition, grid).float()
        nats = F.cross_entropy(logits, tokens[present], reduction="none")
        image = present.nonzero()[:, 0]  # (N,), the image of each token
        return nats.new_zeros(len(tokens)).index_add(0, image, nats)

    def _corrupt(self, tokens: Tensor) -> Tensor:
        """Replace tokens by random ones, each with probability 1 - pkeep, while training."""
        if not self.training or self.pkeep >= 1:
            return tokens
        keep = torch.rand_like(tokens, dtype=torch.float32) < self.pkeep
        return torch.where(keep, tokens, torch.randint_like(tokens, self.sequence.vocab_size))

    def _hide(self, condition: Tensor) -> Tensor:
        """Hide the conditions of some images while training, each with condition_dropout."""
        if not self.training or self.condition_dropout == 0:
            return condition
        chance = torch.rand_like(condition[:, :1], dtype=torch.float32)
        hidden = self.hidden_condition(condition)
        return torch.where(chance < self.condition_dropout, hidden, condition)

    def hidden_condition(self, condition: Tensor) -> Tensor:
        """Return tokens (B, L) that stand for no condition, of the shape of conditions (B, L).

        Raises:
            ValueError: A condition contains that token.
        """
        token = self.transformer.vocab_size - 1
        unknown = self.cond_stage_model.condition_vocab_size is None  # else, it was checked
        if (unknown or checks_values(condition)) and (condition >= token).any():
            raise ValueError(
                f"conditions have the token {int(condition.max())}, but with condition_dropout "
                f"the last of the transformer's vocab_size {token + 1} must be free"
            )
        return torch.full_like(condition, token)

    # --- prior -> codes --------------------------------------------------------------------------

    def _complete(self, task: Completion) -> Tensor:
        """Sample unknown sites in the prior's order, window by window."""
        codes, known, condition, params, window, report = task
        grid = codes.shape[1], codes.shape[2]
        size = self.window_size(grid, window)
        kept = self.permuter(known.flatten()[None])[0]  # (S,), like all below in the prior's order
        ordered = self.permuter(codes.flatten(1, 2))  # (B, S, T)
        for stretch in stretches(grid, size, unknown_range(kept)):
            window_here, sites, before = stretch
            end = before + len(sites)
            seen = window_here.cut(ordered.unflatten(1, grid)).flatten(1, 2)  # (B, window, T)
            tokens = self._generate(
                condition_in(condition, window_here),
                params,
                size,
                prefix=self.sequence.encode(seen[:, None, :end])[0],
                known=F.pad(kept[sites.start : sites.stop], (before, 0), value=True),  # (end,)
                sites=end,
                callback=partial(self._report, report, ordered, stretch, grid),
            )
            sampled = self.sequence.decode(tokens, (1, end))  # (B, 1, end, T)
            ordered[:, sites.start : sites.stop] = sampled[:, 0, before:]
        return self.permuter(ordered, reverse=True).unflatten(1, grid)

    def _report(
        self, report: Report, ordered: Tensor, stretch: Stretch, grid: Grid, state: GenerationState
    ) -> None:
        """Report a token; finished sites and codes are only computed if asked for."""
        start, before = stretch.sites.start, stretch.before

        def decode() -> Tensor:
            codes = ordered.clone()
            if (done := state.finished_sites()) > before:
                finished = self.sequence.decode(state.tokens_of(done), (1, done))  # (B, 1, done, T)
                codes[:, start : start + done - before] = finished[:, 0, before:]
            return self.permuter(codes, reverse=True).unflatten(1, grid)

        report(lambda: start + max(state.finished_sites() - before, 0), decode)

    def _generate(
        self, condition: Tensor, params: SamplingParams, size: Grid, **progress: Any
    ) -> Tensor:
        """Continue sequences in a window (h, w); see `generate`."""
        try:  # before anything is sampled
            check_inputs(self.transformer, self.sequence, condition.shape[1], size)
        except ValueError as error:
            raise ValueError(
                f"a window of {size[0]}x{size[1]} sites is too large: {error}; a prior without a "
                "site_shape that was trained on smaller images needs their grid, as by --grid"
            ) from error
        without = self.hidden_condition(condition) if self.condition_dropout else None
        network, sequence = self.transformer, self.sequence
        return generate(network, condition, sequence, size, params, without=without, **progress)

    def window_size(self, grid: Grid, window: Grid | None = None) -> Grid:
        """Return the size (h, w) of the window for a grid: the grid's own if that is smaller.

        Raises:
            ValueError: The grid needs a moving window, but the sites are not in raster order.
        """
        (h, w), (height, width) = grid, window or self.grid
        size = min(h, height), min(w, width)
        if size != grid and self.permuter.order is not None:
            raise ValueError(
                f"a grid of {h}x{w} sites is larger than the {height}x{width} that the prior was "
                f"trained for, and its permuter {type(self.permuter).__name__} has no larger one"
            )
        return size

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        c: Tensor,
        steps: int | None = None,
        temperature: float = 1.0,
        sample: bool = False,
        top_k: int | None = None,
        callback: Callable[[int], None] | None = None,
        top_p: float | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """Continue token sequences; the original's, of which `sample_codes` does more.

        Args:
            x: (B, L0) int64 beginnings, -1 after the end of shorter ones; L0 may be 0.
            c: (B, Lc) int64 tokens of the conditions.
            steps: Most tokens to add; None until every site is sampled.
            temperature: Divides the logits; above 0.
            sample: Sample from the distribution; False takes the likeliest token.
            top_k: Sample among the k likeliest.
            callback: Called with the number of tokens sampled so far, after each one.
            top_p: Sample among the likeliest that together have this probability.
            grid: (h, w) of the image; may be left out where ``steps`` sets the number of codes.

        Returns:
            (B, L) int64, beginnings included.

        Raises:
            ValueError: Neither grid nor steps determine the end, or a value is out of range.
        """
        if grid is None:
            if steps is None or self.sequence.restricted or self.transformer.uses_sites:
                raise ValueError("sample needs the grid (h, w) of the image")
            grid = (1, x.shape[1] + steps)
        report = None if callback is None else lambda state: callback(state.sampled)
        params = SamplingParams(temperature, top_k, top_p, greedy=not sample)
        network, sequence = self.transformer, self.sequence
        return generate(network, c, sequence, grid, params, x, steps=steps, callback=report)

    def top_k_logits(self, logits: Tensor, k: int) -> Tensor:
        """Keep the k largest logits (..., V), -inf elsewhere."""
        return filter_logits(logits, top_k=k)
