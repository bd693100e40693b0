"""The decoder-only transformer of the priors, with the original's parameters and logits.

Axis letters: B sequences, R rows (the sequences that get a token now), S sites, L tokens, P cached
tokens, E embeddings given, C channels, V vocabulary, N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.sequence.grammar import GrammarState
from taming.modules.transformer.backbone import Backbone, init_weights
from taming.modules.transformer.blocks import (
    KVCache,
)
from taming.modules.transformer.network import IncrementalDecoder, Prompt

WASTE = 0.1  # largest share of padding in a batch of sequences


def length_groups(lengths: Tensor, waste: float = WASTE) -> list[Tensor]:
    """Group sequences of about the same length, so that at most ``waste`` of a group is padding.

    Returns the row numbers of each group, the longest of the lengths (B,) first.
    """
    groups: list[list[int]] = []
    total = longest = 0
    for length, row in sorted(
        zip(lengths.tolist(), range(len(lengths)), strict=True), reverse=True
    ):
        if not groups or total + length < (1 - waste) * longest * (len(groups[-1]) + 1):
            groups.append([])
            total, longest = 0, length
        groups[-1].append(row)
        total += length
    return [torch.tensor(group, device=lengths.device) for group in groups]


def in_groups(
    lengths: Tensor, groups: Iterable[Tensor], features: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Compute features (N, C) of all tokens, sequence by sequence, group by group.

    Args:
        lengths: (B,) int64.
        groups: Row numbers of each group, the longest sequence first.
        features: Maps row numbers (R,) and the longest length L to (R, L, C).
    """
    first, parts, numbers = lengths.cumsum(dim=0) - lengths, [], []
    for rows in groups:
        place = torch.arange(int(lengths[rows[0]]), device=lengths.device)  # (L,)
        present = place < lengths[rows, None]  # (R, L)
        parts.append(features(rows, len(place))[present])
        numbers.append((first[rows, None] + place)[present])
    return torch.cat(parts)[torch.cat(numbers).argsort()]


class GPT(Backbone):
    """Decoder-only transformer (Radford et al. 2019) over tokens.

    Args:
        vocab_size: V.
        block_size: Longest sequence, conditions included.
        tied_head: Predict tokens with the weights that embed them (Press and Wolf 2017,
            arXiv:1608.05859).
        **sizes: Further fields of `GPTConfig`.

    Example:
        >>> gpt, tokens = GPT(vocab_size=9, block_size=8).eval(), torch.tensor([[3, 1, 4, 1]])
        >>> cache = gpt.new_cache()
        >>> parts = [gpt(token, cache=cache)[0] for token in tokens.split(1, dim=1)]
        >>> torch.allclose(torch.cat(parts, dim=1), gpt(tokens)[0], atol=1e-5)
        True
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
            sites: (B, S, 3) int64, place of the token that follows each of the last S inputs.
            cache: Keys and values of the tokens before; extended by these.

        Returns:
            logits (B, E + L, V) and the mean cross-entropy in nats, None without targets.

        Raises:
            ValueError: The sequence is longer than ``block_size``, or places are needed.
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
        """Predict each token from those before it (see `PriorNetwork.predict`).

        Sequences of about the same length go through together, each attending to itself alone.
        """
        present, before = tokens >= 0, condition.shape[1] - 1
        lengths, sites = present.sum(dim=1), self.places(states, grid) * present[..., None]
        inputs = torch.cat([condition, tokens.clamp(min=0)], dim=1)

        def features(rows: Tensor, longest: int) -> Tensor:
            x = self.tok_emb(inputs[rows, : before + longest])
            return self.features(x, sites[rows, :longest])[:, before:]

        return self.head(in_groups(lengths, length_groups(lengths), features))

    def decoder(self, grid: tuple[int, int]) -> IncrementalDecoder:
        """Return a decoder with a cache of its own."""
        return GPTDecoder(self, grid)

    @torch.no_grad()
    def forward_with_past(
        self,
        idx: Tensor,
        embeddings: Tensor | None = None,
        targets: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
        past_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Predict as `forward`, with the past passed in and out; the original's, which copies it.

        Args:
            idx: (B, L) int64 tokens, which follow those of ``past``.
            embeddings: (B, E, C) put before the tokens.
            targets: (B, E + L) int64 for a loss; -1 does not count.
            past: The third results of earlier calls, in order.
            past_length: P, tokens in ``past``; None leaves it unchecked.

        Returns:
            logits, loss, and keys and values of these tokens (layers, 2, B, heads, L, C / heads).

        Raises:
            ValueError: ``past`` holds another number of tokens, or lacks what the model needs.
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


class GPTDecoder(IncrementalDecoder):
    """Decodes sequences that advance together, token by token, with one cache.

    Args:
        model: The transformer, in eval mode.
        grid: (h, w) of the image.
    """

    def __init__(self, model: GPT, grid: tuple[int, int]) -> None:
        self.model = model
        self.grid = grid
        self.cache = model.decoding_cache()

    def prefill(self, prompt: Prompt) -> Tensor:
        """Read the tokens that are known in all sequences."""
        known = int((prompt.tokens >= 0).sum(dim=1).min())
        inputs = torch.cat([prompt.condition, prompt.tokens[:, :known]], dim=1)
        states = GrammarState(*(field[:, : known + 1] for field in prompt.states))
        self._read(prompt.rows, inputs, states)
        return torch.full_like(prompt.rows, known)

    def _read(self, rows: Tensor, inputs: Tensor, states: GrammarState) -> None:
        """Read tokens (R, L); ``states`` are those of the tokens after the last of them."""
        x = self.model.tok_emb(inputs)
        places = self.model.places(states, self.grid) if self.model.uses_sites else None
        hidden = self.model.features(x, places, self.cache, last=True)
        self.rows, self.logits = rows, self.model.head(hidden[:, -1])

    def step(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        """Read one token of each sequence; drop finished sequences from the cache."""
        if len(rows) < len(self.rows):
            self.cache.keep(torch.searchsorted(self.rows, rows))
        self._read(rows, tokens[:, None], GrammarState(*(f[:, None] for f in states)))
