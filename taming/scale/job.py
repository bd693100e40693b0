"""A cache to write: its plan, its shards, and what makes it complete.

One shard of the input becomes one file, which appears under its name when it is whole. A worker
holds a lock while it computes a shard, and the lock of one that died is free; so the work goes on
with any number of workers, and even a shard that is computed twice has one file.

Axis letters: C channels, H W picture, h w grid, T turns, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taming.coding import encode_images
from taming.data.token_files import (
    CHECKSUMS,
    OWN,
    PLAN,
    RESERVED,
    UNREADABLE,
    CacheInfo,
    list_files,
    name_of,
    open_file,
    save_file,
    seal,
)
from taming.models.vqgan import VQModel
from taming.modules.tiling import set_tile
from taming.run.lock import held
from taming.scale.sources import Sample, Source, groups_of
from taming.util import DataError, IncompleteError, WriteError, replacing

REPORT = "report.json"
POLL = 0.5  # seconds between two looks at shards that others hold

Progress = Callable[[int], None]  # called with the number of pictures that were done


class Report(NamedTuple):
    """A complete cache.

    Attributes:
        pictures: Number of pictures in it.
        tokens: Number of their tokens.
        unreadable: (key, reason) of the pictures that could not be encoded.
    """

    pictures: int
    tokens: int
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class Job:
    """A cache to write. It is sent to other processes by pickle.

    Attributes:
        load: Builds the model, in evaluation mode.
        source: The pictures.
        output: Folder of the cache.
        fingerprint: That of the model.
        rate: At most one rate, as of the model's ``encode``.
        on_error: "skip" pictures that cannot be encoded, or "raise" an error that names the first.
        batch_size: Largest number of pictures of one size that go through the model together.
        tile: Side of the tiles of larger pictures, as of a `Tokenizer`.
        threads: Number of threads of a process that read pictures.
    """

    load: Callable[[], VQModel]
    source: Source
    output: Path
    fingerprint: str
    rate: Mapping[str, float] = field(default_factory=dict)
    on_error: str = "skip"
    batch_size: int = 16
    tile: int | None = None
    threads: int = 1

    # --- the plan ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Save the plan, or check that it is the one that the folder was begun with.

        Raises:
            ValueError: The folder holds something else.
            WriteError: The plan cannot be saved.
        """
        path = self.output / PLAN
        there = self.output.iterdir() if self.output.is_dir() else ()
        others = self.output.is_file() or not all(f.match(f"{PLAN}.*.part") for f in there)
        if not path.exists():  # looked at last: another process may begin meanwhile
            if others:
                raise ValueError(
                    f"{self.output} already holds a token cache or other files; remove it or name "
                    "another folder"
                )
            with replacing(path) as part:
                part.write_text(json.dumps(self._plan(), indent=1))
        begun, plan = json.loads(path.read_text()), self._plan()
        for name in [name for name in plan if begun.get(name) != plan[name]][:1]:
            what = f"another {name}, {_in_words(begun.get(name))}, not {_in_words(plan[name])}"
            raise ValueError(
                f"{self.output} was begun with {'other data' if name == 'data' else what}: repeat "
                "the command that began it, or name another folder"
            )

    def _plan(self) -> dict[str, Any]:
        return {
            "tokenizer": self.fingerprint,
            "rate": dict(self.rate),
            "tile": self.tile,
            "batch_size": self.batch_size,
            "data": hashlib.sha256(self.source.identity.encode("utf-8", "replace")).hexdigest(),
            "number of shards": self.source.shards,
        }

    def file(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.output / name_of(shard)

    def lock(self, name: str) -> Path:
        """Return the file by which a worker holds a shard."""
        return self.output / f".{name}.lock"

    def missing(self) -> list[int]:
        """List the shards that are not done."""
        done = {file.name for file in list_files(self.output)}
        return [shard for shard in range(self.source.shards) if name_of(shard) not in done]

    def is_complete(self) -> bool:
        """Return True if the cache is complete."""
        return (self.output / CHECKSUMS).exists()

    # --- the work ---------------------------------------------------------------------------------

    def work(self, device: str, rank: int, workers: int, progress: Progress) -> None:
        """Compute shards until all are done: every ``workers``-th first, then those of others.

        Raises:
            ValueError: A picture cannot be encoded and ``on_error`` is "raise", or the rate cannot.
            WriteError: A file cannot be saved.
        """
        model = cache(lambda: self.model(device))
        while missing := self.missing():
            mine = [shard for shard in missing if shard % workers == rank]
            others = [shard for shard in reversed(missing) if shard % workers != rank]
            if not any([self.compute(shard, model, progress) for shard in chain(mine, others)]):
                time.sleep(POLL)  # the holders of the rest may die

    def compute(self, shard: int, model: Callable[[], VQModel], progress: Progress) -> bool:
        """Compute a shard; return False if it is done or another process has it.

        Raises:
            ValueError: As for `work`.
            WriteError: The file cannot be saved.
        """
        with self._claim(shard) as is_mine:
            if is_mine:
                self._encode(shard, model(), progress)
        return is_mine

    @contextmanager
    def _claim(self, shard: int) -> Iterator[bool]:
        """Hold a shard; yield True unless it is done or another process has it."""
        file = self.file(shard)
        if file.exists():
            yield False
            return
        with held(self.lock(f"{shard:05}")) as owner:
            if owner is not None:
                yield False
                return
            for part in self.output.glob(f"{file.name}.*.part"):  # of a process that died
                part.unlink(missing_ok=True)
            yield not file.exists()

    def model(self, device: str) -> VQModel:
        """Load the model on a device."""
        model = self.load().to(device).requires_grad_(False)
        set_tile(model, self.tile)
        return model

    def _encode(self, shard: int, model: VQModel, progress: Progress) -> None:
        columns: dict[str, list[Any]] = {name: [] for name in OWN}
        unreadable: list[tuple[str, str]] = []
        for samples in groups_of(self.source, shard, self.threads):
            good = self._checked(samples, model, unreadable)
            codes = encode_images(model, [x for _, x in good], self.batch_size, **self.rate)
            for (sample, _), own in zip(good, codes, strict=True):
                tokens = model.quantize.sequence.encode(own.levels[0][None])[0][0]  # (L,)
                if taken := RESERVED & sample.labels.keys():
                    raise ValueError(
                        f"the key {min(taken)!r} is reserved in a token cache: rename it in the "
                        "data set"
                    )
                place = (tokens.numpy(), sample.key, *own.size)
                _append(columns, {**dict(zip(OWN, place, strict=True)), **sample.labels})
            progress(len(samples))
        info = CacheInfo(self.fingerprint, model.quantize.sequence.vocab_size, model.factor)
        try:
            save_file(self.file(shard), info, columns, unreadable)
        except WriteError:
            if not self.file(shard).exists():  # else another process took this one for dead
                raise

    def _checked(
        self, samples: list[Sample], model: VQModel, unreadable: list[tuple[str, str]]
    ) -> list[tuple[Sample, Tensor]]:
        """Return the pictures that can be encoded, as (C, H, W); list the others."""
        good = []
        for sample in samples:
            error = sample.error or self._misfit(sample, model)
            if not error:
                good.append((sample, _image_of(sample, model, self.source.image_key)))
            elif self.on_error == "raise":
                raise DataError(error)
            else:
                unreadable.append((sample.key, error))
        return good

    def _misfit(self, sample: Sample, model: VQModel) -> str:
        """Return the reason why a picture cannot have the rate, or nothing."""
        height, width = sample.image.shape[:2]
        sites = -(-height // model.factor) * -(-width // model.factor)
        if sites <= self.rate.get("max_codes", sites):
            return ""
        return f"{sample.key}: {sites} sites need more than max_codes {self.rate['max_codes']}"

    # --- the end ----------------------------------------------------------------------------------

    def finish(self) -> Report:
        """Save report and checksums once all shards are done, in one of the processes.

        Raises:
            ValueError: No picture could be encoded, or the labels of two shards do not agree.
            WriteError: A file cannot be saved.
        """
        while not self.is_complete():
            with held(self.lock("finish")) as owner:
                if owner is None and not self.is_complete():
                    self._seal()
            if owner is not None:
                time.sleep(POLL)
        about = json.loads((self.output / REPORT).read_text())
        return Report(about["pictures"], about["tokens"], [(k, e) for k, e in about["unreadable"]])

    def _seal(self) -> None:
        for pattern in ("*.part", ".[0-9]*.lock"):  # of processes that died
            for left in self.output.glob(pattern):
                left.unlink(missing_ok=True)
        pictures, tokens, unreadable = 0, 0, []
        for file in list_files(self.output):
            table = open_file(file).read_all()
            pictures += table.num_rows
            tokens += sum(len(chunk.flatten()) for chunk in table["tokens"].chunks)
            unreadable += json.loads(table.schema.metadata[UNREADABLE])
        if not pictures:
            first = f"; the first, {unreadable[0][0]}: {unreadable[0][1]}" if unreadable else ""
            raise IncompleteError(f"none of the {len(unreadable)} pictures could be encoded{first}")
        with replacing(self.output / REPORT) as part:
            about = Report(pictures, tokens, unreadable)._asdict()
            part.write_text(json.dumps(about, indent=1))
        seal(self.output)


def _in_words(value: Any) -> str:
    """Return an entry of a plan as a user would write it, such as ``max_codes 400``."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {own}" for name, own in value.items())
    return str(value or "none")


def _image_of(sample: Sample, model: VQModel, key: str) -> Tensor:
    image = torch.as_tensor(sample.image)[None]
    return model.get_input({key: image}, key)[0]


def _append(columns: dict[str, list[Any]], row: Mapping[str, Any]) -> None:
    """Append a row; all rows have the labels of the first."""
    if not columns["key"]:
        columns |= {name: [] for name in row}
    if row.keys() != columns.keys():
        other = min(row.keys() ^ columns.keys())
        raise ValueError(f"{row['key']}: the label {other!r} is missing in some pictures")
    for name, value in row.items():
        columns[name].append(value)
