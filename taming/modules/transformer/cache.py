"""Keys and values of the tokens that a transformer has read, so that it reads each only once.

Axis letters: B sequences, L tokens, P cached tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the tokens so far, in memory that is taken once.

    Attributes:
        size: Most tokens that fit.
        keys: One (B, heads, size, C / heads) tensor per layer, made when its first keys come.
        values: Likewise.
        length: P, tokens that are in.
        first: (B, C), the first input of each sequence, which adaptive norms look at.
    """

    size: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0
    first: Tensor | None = None

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values (B, heads, L, C / heads) of new tokens of one layer.

        Returns:
            Those of all P + L tokens.
        """
        if layer == len(self.keys):
            batch, heads, _, channels = key.shape
            self.keys.append(key.new_empty(batch, heads, self.size, channels))
            self.values.append(value.new_empty(batch, heads, self.size, channels))
        # Those of sequences that were not kept stay behind the others.
        keys, values = self.keys[layer][: len(key)], self.values[layer][: len(value)]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but those numbered ``rows``, (R,) int64; they move to the front."""
        for part in (*self.keys, *self.values):
            part[: len(rows), :, : self.length] = part[rows, :, : self.length]
        if self.first is not None:
            self.first = self.first[rows]

    def clear(self) -> None:
        """Forget all tokens; the memory serves as many sequences again, or fewer."""
        self.length, self.first = 0, None
