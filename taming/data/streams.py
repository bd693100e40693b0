"""Data set over WebDataset tars, Parquet files and data sets of the hub, as a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset

from taming.data.crops import SquareCrop
from taming.data.loader import ORDER, random_words
from taming.data.preprocessing import error_context
from taming.data.rows import Decoder, columns_of, open_stream
from taming.decoding import Colour
from taming.util import DataError

logger = logging.getLogger(__name__)


class StreamedImages(IterableDataset[dict[str, Any]]):
    """Pictures of WebDataset tars, Parquet files or a data set of the hub, read as a stream.

    Every loader process of every training process reads shards of its own; if there are fewer
    shards than these, several share one and take every n-th row of it. In training, shards are
    shuffled, and rows in blocks, by the seed and the epoch alone. A resumed run goes on with the
    row that it had reached, after reading the rows of its block again, which are not decoded.

    Items have ``image``, (H, W, C) float32 in [-1, 1], and the numbers, texts and vectors (as
    tensors) of the row; an integer ``label`` or ``cls`` is ``class_label``.

    Args:
        data: A file, URL or folder of ``.tar`` or ``.parquet`` files, or several; or the name of a
            data set of the hub.
        split: Split of a data set of the hub.
        name: Configuration of a data set of the hub.
        size: Side of the square crops in pixels; None keeps images whole.
        random_crop: Crop at random instead of at the centre.
        random_flip: Mirror images with probability 1/2.
        length: Number of items of an epoch, over all processes: each gives as many, and repeats
            its rows if need be. By default, an epoch is every row once. Several training processes
            need it, since their shards may differ in length.
        block: Number of rows that are shuffled together.
        image_column: Column of encoded pictures; None takes the only one.
        columns: Columns of numbers, vectors and texts to take; None takes all.
        on_error: "raise" a `DataError` that names a row whose picture cannot be read or whose label
            has no value, or "skip" it with a warning.
        channels: C, channels of the images, as for `decode_image`.
        background: Colour under what is transparent, as for `decode_image`.
        max_pixels: Refuse larger pictures, as `decode_image` does.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: The data cannot be opened, or an option is out of range.
    """

    is_sharded = True

    def __init__(
        self,
        data: str | Sequence[str],
        split: str = "train",
        name: str | None = None,
        *,
        size: int | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        length: int | None = None,
        block: int = 1000,
        image_column: str | None = None,
        columns: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        channels: int = 3,
        background: Colour = "white",
        max_pixels: int | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if block < 1 or (length is not None and length < 1):
            raise ValueError(f"block and length must be at least 1, got {block} and {length}")
        self.length, self.block, self.on_error = length, block, on_error
        self.decode = Decoder(
            SquareCrop(size, random_crop, random_flip), channels, background, max_pixels
        )
        self.stream = open_stream(data, split, name)
        self.columns = columns_of(self.stream, image_column, str(data), columns)
        self.skipped = 0
        self.begin(None, 0, 0, 1)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("StreamedImages has no length unless it is stated")
        return self.length

    def begin(self, seed: int | None, epoch: int, lane: int, lanes: int) -> None:
        """Set the part to read, and the seed and the epoch of its order.

        Args:
            seed: Non-negative seed; None keeps the order of the data.
            epoch: Number of the epoch.
            lane: Number of this reader.
            lanes: Number of readers, which share all rows.
        """
        self._seed, self._epoch, self._lane, self._lanes = seed, epoch, lane, lanes
        # Times through the lane's units, unit, the shard's state before its block, number of the
        # block and of its rows that are done; and the items that the lane has given.
        self._state = {"round": 0, "unit": 0, "before": None, "block": 0, "done": 0, "given": 0}

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last item."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position in the next iteration."""
        self._state = dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        quota = None if self.length is None else self.length // self._lanes
        if quota is not None and quota <= self._state["given"]:
            return
        for item in self._items(quota is not None):
            self._state["given"] += 1
            yield item
            if self._state["given"] == quota:
                return

    def _items(self, is_repeated: bool) -> Iterator[dict[str, Any]]:
        """Yield decoded items, and keep the position of the next row in the state."""
        state, units = self._state, self._units()
        while True:
            given, is_whole = state["given"], state["before"] is None and not state["unit"]
            while state["unit"] < len(units):
                for row in self._rows(*units[state["unit"]]):
                    yield from self._decoded(row)
                state.update(unit=state["unit"] + 1, before=None, block=0, done=0)
            if not is_repeated:
                return
            if is_whole and state["given"] == given:
                raise DataError(f"reader {self._lane} of {self._lanes} of a stream has no pictures")
            state.update(round=state["round"] + 1, unit=0)

    def _units(self) -> list[tuple[int, int, int]]:
        """Return what the lane reads: (shard, part, parts), rows ``[part::parts]`` of a shard."""
        shards = self.stream.num_shards
        parts = -(-self._lanes // shards)
        units = [(shard, part, parts) for shard in range(shards) for part in range(parts)]
        order = self._permutation(len(units), 0)
        return [units[number] for number in order[self._lane :: self._lanes]]

    def _permutation(self, length: int, *key: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(length)
        words = random_words(self._seed, ORDER, self._epoch, *key)
        return np.random.default_rng(words).permutation(length)

    def _rows(self, shard: int, part: int, parts: int) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of a unit from the state on, and move the state beyond each."""
        state = self._state
        stream = self.stream.shard(self.stream.num_shards, shard)
        if state["before"] is not None:
            stream.load_state_dict(state["before"])
        # Not by iter(): in a loader process, the library would divide the shard itself.
        blocks = stream.iter(self.block * parts)
        while True:
            state["before"] = stream.state_dict()
            read = next(blocks, None)
            if read is None:
                return
            places = range(len(read[self.columns.image]))[part::parts]
            order = self._permutation(len(places), 1, shard, part, state["round"], state["block"])
            for number in order[state["done"] :]:
                state["done"] += 1
                place = places[number]
                own = f"of row {state['block'] * self.block * parts + place} of shard {shard}"
                yield {"__key__": own} | {name: values[place] for name, values in read.items()}
            state.update(block=state["block"] + 1, done=0)

    def _decoded(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the item of a row, or nothing if it is skipped."""
        try:
            with error_context(f"image {(key := str(row['__key__']))}"):
                labels = self.columns.values_of(row)
            image = self.decode(row[self.columns.image], key)
        except DataError as error:
            if self.on_error == "raise":
                raise
            self.skipped += 1
            logger.warning("skipped %d pictures so far; the latest: %s", self.skipped, error)
            return
        yield {**labels, "image": image}
