"""The prior: a transformer over the token sequences of a tokenizer.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, L tokens, V vocabulary,
N tokens of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.checkpoint import load_weights
from taming.models.fit import (
    check_condition,
    check_depths,
    check_grid,
    check_lengths,
    check_tokens,
)
from taming.models.prior import Grid, Prior, TokenizedBatch, decayed_adamw, is_cached
from taming.modules.transformer.generate import (
    SamplingParams,
    filter_logits,
    grammatical,
    sample_tokens,
)
from taming.modules.transformer.gpt import GPT
from taming.modules.transformer.permuter import Identity, Permuter
from taming.modules.transformer.two_level import TwoLevelGPT
from taming.modules.util import Labelator, SOSProvider
from taming.util import instantiate_from_config

__all__ = ["Grid", "Net2NetTransformer"]


class Net2NetTransformer(Prior):
    """Autoregressive prior over the tokens of a frozen tokenizer (arXiv:2012.09841, section 3.2).

    Each image is one sequence after its condition's tokens. Sequences may differ in length; the
    tokenizer's grammar says where each token belongs and which tokens cannot come next.

    Args:
        transformer_config: ``{target, params}`` of a `GPT` or a `TwoLevelGPT`.
        first_stage_config: Of the tokenizer, a `VQModel`.
        cond_stage_config: Of what turns the condition into tokens; or ``"__is_first_stage__"``, or
            ``"__is_unconditional__"``.
        permuter_config: Order of the sites; None for raster order.
        ckpt_path: Checkpoint whose weights to start from.
        ignore_keys: Prefixes of keys to leave out of it.
        first_stage_key: Key of the image in a batch.
        cond_stage_key: Key of the condition.
        downsample_cond_size: Side to which pictures of conditions are scaled before encoding; -1
            for none.
        pkeep: Probability that an input token is kept in training; others become random. Of the
            original's 0 and less, none is kept.
        sos_token: Token that stands for no condition.
        unconditional: Ignore any condition.
        sequence_config: ``{target, params}`` of the `TokenSequence`; None for the tokenizer's own.
        scheduler_config: ``{target, params}`` of a factor of the learning rate by step.
        trust_checkpoint: See `load_checkpoint`, for ``ckpt_path``.
        condition_dropout: Probability that an image's condition is hidden in training, which makes
            classifier-free guidance possible (arXiv:2207.12598). What hides it is the last token of
            the transformer's vocabulary, which must be one larger for that.

    Attributes:
        learning_rate: Set by the caller before training.

    Raises:
        ValueError: The parts do not fit each other.
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
    ) -> None:
        super().__init__(
            first_stage_config,
            cond_stage_config,
            permuter_config,
            sequence_config,
            first_stage_key,
            cond_stage_key,
            downsample_cond_size,
            sos_token,
            unconditional,
        )
        self.learning_rate = 4.5e-6
        self.pkeep = pkeep
        self.condition_dropout = condition_dropout
        self.transformer: GPT | TwoLevelGPT = instantiate_from_config(transformer_config)
        self._check_fit()
        if self.transformer.uses_sites and not isinstance(self.permuter, Identity):
            self.transformer.site_order = self.permuter.forward_shuffle_idx
        self.schedule = (
            None if scheduler_config is None else instantiate_from_config(scheduler_config)
        )
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys, trust_checkpoint)

    def _check_fit(self) -> None:
        """Refuse a transformer that the tokens of images or conditions do not fit."""
        config, sequence, hidden = self.transformer.config, self.sequence, self.condition_dropout
        if not 0 <= hidden < 1 or (hidden and self.be_unconditional):
            raise ValueError(
                f"condition_dropout must be in [0, 1), and 0 without a condition, got {hidden}"
            )
        if self.pkeep > 1:
            raise ValueError(f"pkeep is a probability, at most 1, got {self.pkeep}")
        check_condition(self.cond_stage_model)
        check_tokens(config, sequence, self.cond_stage_model, spare=hidden > 0)
        check_depths(config, sequence)
        if isinstance(self.cond_stage_model, Labelator | SOSProvider):  # of one token
            shape = config.site_shape or (0, 0)
            sites = shape[0] * shape[1]
            if isinstance(self.permuter, Permuter):
                sites = len(self.permuter.forward_shuffle_idx)
            check_lengths(self.transformer, sequence, 1, sites)

    # --- training --------------------------------------------------------------------------------

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each token of the images from those before it.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            c: Their conditions.

        Returns:
            logits (B, L, V), -inf where the grammar forbids a token and 0 after the end; targets
            (B, L) int64, -1 after each sequence's end.
        """
        quant_z, tokens = self.encode_to_z(x)
        _, condition = self.encode_to_c(c)
        logits = self.predict(tokens, condition, (quant_z.shape[2], quant_z.shape[3]))
        padded = logits.new_zeros(*tokens.shape, logits.shape[-1])
        return padded.masked_scatter((tokens >= 0)[..., None], logits), tokens

    def predict(self, tokens: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        """Predict the tokens (B, L) of images after those of conditions (B, Lc).

        Returns:
            (N, V) logits of the tokens that there are, -inf where the grammar forbids or does not
            know one.
        """
        check_grid(self.transformer.config, grid)
        check_lengths(self.transformer, self.sequence, condition.shape[1], grid[0] * grid[1])
        states, present = self.sequence.states(tokens), tokens >= 0
        inputs = torch.where(present, self._corrupt(tokens), tokens)
        logits = self.transformer.predict(self._hide(condition), inputs, states, grid)
        if self.sequence.restricted or logits.shape[-1] > self.sequence.vocab_size:
            logits = grammatical(logits, self.sequence.allowed(states)[present])
        return logits

    def likelihood(self, seen: TokenizedBatch) -> tuple[Tensor, Tensor]:
        """See `Prior.likelihood`."""
        nats = self.nll(seen.tokens, seen.condition, seen.grid)
        return nats, (seen.tokens >= 0).sum(dim=1)

    def nll(self, tokens: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        """Return -log p (B,) of the tokens of images: exact, lengths included; nats, float32."""
        present = tokens >= 0
        logits = self.predict(tokens, condition, grid).float()
        nats = F.cross_entropy(logits, tokens[present], reduction="none")
        image = present.nonzero()[:, 0]
        return nats.new_zeros(len(tokens)).index_add(0, image, nats)

    def _corrupt(self, tokens: Tensor) -> Tensor:
        """Replace tokens by random ones, each with probability 1 - pkeep, while training."""
        if not self.training or self.pkeep >= 1:
            return tokens
        keep = torch.rand(tokens.shape, device=tokens.device) < self.pkeep
        return torch.where(keep, tokens, torch.randint_like(tokens, self.sequence.vocab_size))

    def _hide(self, condition: Tensor) -> Tensor:
        """Hide the conditions of some images while training, each with condition_dropout."""
        if not self.training or self.condition_dropout == 0:
            return condition
        hidden = torch.rand(len(condition), 1, device=condition.device) < self.condition_dropout
        return torch.where(hidden, self.hidden_condition(condition), condition)

    def hidden_condition(self, condition: Tensor) -> Tensor:
        """Return what stands for hidden conditions, like ``condition``.

        Raises:
            ValueError: A condition has that token itself.
        """
        token = self.transformer.config.vocab_size - 1
        if (condition >= token).any():
            raise ValueError(
                f"conditions have the token {int(condition.max())}, but with condition_dropout "
                f"the last of the transformer's vocab_size {token + 1} must be free"
            )
        return torch.full_like(condition, token)

    def configure_optimizers(self) -> Any:
        """AdamW with weight decay on the matrices of linear layers only."""
        return decayed_adamw(self.transformer, (nn.Linear,), self.learning_rate, self.schedule)

    # --- sampling --------------------------------------------------------------------------------

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
        """Continue token sequences; `taming.models.sampling.write_codes` can do more.

        Args:
            x: (B, L0) int64 beginnings, -1 after the end of shorter ones; L0 may be 0.
            c: (B, Lc) int64 tokens of the conditions.
            steps: Most tokens to add; None until every site is written.
            temperature: See `filter_logits`, as ``top_k`` and ``top_p``.
            sample: Draw from the distribution; False takes the likeliest token.
            top_k: Draw among the likeliest k.
            callback: Called with the number of tokens drawn after each one.
            top_p: Draw among the likeliest that together have this probability.
            grid: (h, w) of the image; may be left out where ``steps`` says how many codes to add.

        Returns:
            (B, L) int64, beginnings included.

        Raises:
            ValueError: Nothing says where to stop, or a value is out of range.
        """
        if grid is None:
            if steps is None or self.sequence.restricted or self.transformer.uses_sites:
                raise ValueError("sample needs the grid (h, w) of the image to be written")
            grid = (1, x.shape[1] + steps)
        drawing = SamplingParams(temperature, top_k, top_p, greedy=not sample)
        return sample_tokens(
            self.transformer, c, self.sequence, grid, drawing, x, steps=steps, callback=callback
        )

    def top_k_logits(self, logits: Tensor, k: int) -> Tensor:
        """Keep the k largest logits (..., V), -inf elsewhere."""
        return filter_logits(logits, top_k=k)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], temperature: float = 1.0, top_k: int = 100, **unused: Any
    ) -> dict[str, Tensor]:
        """Pictures of a batch: what is known, half of it completed, and new images.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1], for at most 4 images.
        """
        batch = {k: v[:4].to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        seen = self.tokenize_batch(batch)
        zshape = (len(seen.codes), self.first_stage_model.quantize.e_dim, *seen.grid)
        half = self.first_sites(seen.tokens, seen.grid[0] * seen.grid[1] // 2)
        nothing = seen.tokens[:, :0]

        def draw(known: Tensor, sample: bool = True) -> Tensor:
            where = {"grid": seen.grid, "top_k": top_k}
            return self.sample(known, seen.condition, None, temperature, sample, **where)

        sequences = {
            "reconstructions": seen.tokens,
            "samples_half": draw(half),
            "samples_nopix": draw(nothing),
            "samples_det": draw(nothing, sample=False),
        }
        pictures = {k: self.draw_picture(v, zshape, seen.quant_c) for k, v in sequences.items()}
        if not is_cached(batch):
            pictures = {"inputs": self.get_input(self.first_stage_key, batch)} | pictures
        shown = {name: self.show(picture) for name, picture in pictures.items()}
        return shown | self.show_condition(seen, shown["reconstructions"])
