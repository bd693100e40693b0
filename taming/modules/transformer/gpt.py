"""The decoder-only transformer of the priors, with the original's parameters and logits.

Axis letters: B sequences, R rows (sequences that get a token now), L tokens, P cached tokens,
C channels, V vocabulary, N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.transformer.backbone import Backbone, init_weights
from taming.modules.transformer.cache import KVCache
from taming.modules.transformer.ragged import length_groups, token_numbers
from taming.modules.transformer.writing import Beginning, Turn, Writer
from taming.modules.vqvae.grammar import GrammarState


class GPT(Backbone):
    """Decoder-only transformer (Radford et al. 2019) over tokens.

    Args:
        vocab_size: V.
        block_size: Longest sequence, conditions included.
        tied_head: Predict tokens with the weights that embed them (Press and Wolf 2017,
            arXiv:1608.05859).
        **sizes: Further fields of `GPTConfig`.
    """

    def __init__(
        self, vocab_size: int, block_size: int, *, tied_head: bool = False, **sizes: Any
    ) -> None:
        super().__init__(vocab_size, block_size, **sizes)
        self.head = nn.Linear(self.config.n_embd, vocab_size, bias=False)
        init_weights(self.head)
        if tied_head:
            self.head.weight = self.tok_emb.weight  # type: ignore[assignment]

    def forward(
        self,
        idx: Tensor,
        embeddings: Tensor | None = None,
        targets: Tensor | None = None,
        sites: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the token after each token.

        Args:
            idx: (B, L) int64 tokens, which follow the cached ones.
            embeddings: (B, E, C) put before the tokens.
            targets: (B, E + L) int64 for a loss; -1 does not count.
            sites: See `features`, as ``cache``.
            cache: Keys and values of the tokens before; extended by these.

        Returns:
            logits (B, E + L, V) and the mean cross-entropy in nats, None without targets.

        Raises:
            ValueError: The sequence is longer than ``block_size``.
        """
        x = self.tok_emb(idx)
        if embeddings is not None:
            x = torch.cat([embeddings, x], dim=1)
        logits = self.head(self.features(x, sites, cache))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def predict(
        self, condition: Tensor, tokens: Tensor, states: GrammarState, grid: tuple[int, int]
    ) -> Tensor:
        """Predict each token of sequences of different lengths from those before it.

        Sequences of about the same length go through together, each seeing only itself.

        Args:
            condition: (B, L) int64, at least one token before each sequence.
            tokens: (B, L) int64, -1 after each sequence's end.
            states: Of shape (B, L), where each token stands.
            grid: (h, w) of the image.

        Returns:
            (N, V) logits of the tokens that there are, one sequence after the other.
        """
        present, before = tokens >= 0, condition.shape[1] - 1
        lengths, sites = present.sum(dim=1), self.places(states, grid) * present[..., None]
        inputs = torch.cat([condition, tokens.clamp(min=0)], dim=1)
        parts, numbers = [], []
        for rows in length_groups(lengths):
            longest = int(lengths[rows[0]])
            x = self.tok_emb(inputs[rows, : before + longest])
            kept = present[rows, :longest]
            parts.append(self.features(x, sites[rows, :longest])[:, before:][kept])
            numbers.append(token_numbers(lengths, rows, longest)[kept])
        return self.head(torch.cat(parts)[torch.cat(numbers).argsort()])

    def inputs_of(self, sites: int, site_tokens: int) -> int:
        """Return how many inputs an image of so many sites, of up to so many tokens, becomes."""
        return sites * site_tokens

    def write(self, beginning: Beginning) -> Writer:
        """Start to write sequences."""
        return TokenWriter(self, beginning)

    @torch.no_grad()
    def forward_with_past(
        self,
        idx: Tensor,
        embeddings: Tensor | None = None,
        targets: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
        past_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Predict after tokens whose past is passed in and out, as the original did.

        `forward` with a cache needs no copy of the past.

        Args:
            idx: See `forward`, as ``embeddings`` and ``targets``.
            past: What earlier calls returned third, in order.
            past_length: P, tokens in ``past``; there to be checked, and may be left out.

        Returns:
            logits, loss, and keys and values of these tokens (layers, 2, B, heads, L, C / heads).

        Raises:
            ValueError: ``past`` holds another number of tokens than ``past_length``, adaptive norms
                would have to know the first of them, or ``site_shape`` or ``rotary`` their places.
        """
        if self.modulate is not None or self.uses_sites:
            raise ValueError(
                "forward_with_past cannot serve adaptive_norm, site_shape or rotary; use forward's "
                "cache"
            )
        cache = self.new_cache()
        if past is not None:
            for layer, pair in enumerate(torch.cat(list(past), dim=-2)):
                cache.extend(layer, *pair)
            cache.length = sum(part.shape[-2] for part in past)
        start = cache.length
        if past_length is not None and past is not None and past_length != start:
            raise ValueError(f"past_length is {past_length}, but past holds {start} tokens")
        logits, loss = self(idx, embeddings, targets, cache=cache)
        new = slice(start, cache.length)
        present = [
            torch.stack([key[:, :, new], value[:, :, new]])
            for key, value in zip(cache.keys, cache.values, strict=True)
        ]
        return logits, loss, torch.stack(present)


class TokenWriter(Writer):
    """Writes sequences that advance together, token by token, with one cache.

    Args:
        model: The transformer, in eval mode.
        beginning: What is known; read at once as far as it goes in all sequences.
    """

    def __init__(self, model: GPT, beginning: Beginning) -> None:
        self.model = model
        self.grid = beginning.grid
        self.cache = model.new_cache()
        known = int((beginning.tokens >= 0).sum(dim=1).min())
        self.taken = torch.full_like(beginning.rows, known)
        inputs = torch.cat([beginning.condition, beginning.tokens[:, :known]], dim=1)
        states = GrammarState(*(field[:, : known + 1] for field in beginning.states))
        self.turn = self._read(beginning.rows, inputs, states)

    def _read(self, rows: Tensor, inputs: Tensor, states: GrammarState) -> Turn:
        """Read tokens (R, L), the last of which stand before those of ``states``."""
        x = self.model.tok_emb(inputs)
        hidden = self.model.features(x, self.model.places(states, self.grid), self.cache)
        return Turn(rows, self.model.head(hidden[:, -1]))

    def advance(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        """See `Writer.advance`."""
        if len(rows) < len(self.turn.rows):
            self.cache.keep(torch.searchsorted(self.turn.rows, rows))
        self.turn = self._read(rows, tokens[:, None], GrammarState(*(f[:, None] for f in states)))


class CodeGPT(GPT):
    """A `GPT` whose inputs are vectors (B, L, in_channels), such as codes, rather than tokens.

    Args:
        vocab_size: V, number of tokens it predicts.
        block_size: Longest sequence.
        in_channels: Channels of an input vector.
        **sizes: Further fields of `GPTConfig`.
    """

    def __init__(self, vocab_size: int, block_size: int, in_channels: int, **sizes: Any) -> None:
        super().__init__(vocab_size, block_size, tied_head=False, **sizes)
        self.tok_emb = nn.Linear(in_channels, self.config.n_embd)
        init_weights(self.tok_emb)
