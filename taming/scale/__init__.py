"""Encode any number of pictures with a tokenizer into a token cache, on any number of machines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from taming.models.vqgan import VQModel
from taming.modules.vqvae.rate import one_rate
from taming.run.folder import SavedRun
from taming.scale.engines import ENGINES, Devices, check_devices, devices_of
from taming.scale.job import Job, Report
from taming.scale.sources import Source
from taming.scale.tables import open_source
from taming.signatures import naming_nearest
from taming.util import at_least, cores, nearest

__all__ = ["Report", "Source", "encode_shards", "open_source"]


@naming_nearest(open_source)
def encode_shards(
    run: str | Path | SavedRun,
    input: str | Sequence[str] | Source,
    output: str | Path,
    *,
    engine: Literal["local", "torchrun", "slurm", "ray"] = "local",
    devices: Devices = None,
    max_codes: int | None = None,
    target_psnr: float | None = None,
    threshold: float | None = None,
    rate: float | None = None,
    on_error: Literal["skip", "raise"] = "skip",
    batch_size: int = 16,
    tile: int | None = 768,
    progress: bool = False,
    trust_config: bool = False,
    **data: Any,
) -> Report:
    """Encode pictures into a token cache, from where an earlier call has stopped.

    The input is divided into shards, and each becomes one file of the cache, which appears when it
    is whole. Any process may be killed: the next call, or the processes that are left, do what is
    missing. ``report.json`` in the output names the pictures that could not be encoded.

    Args:
        run: Run of a tokenizer, or one of its checkpoints.
        input: The pictures, as for `open_source`.
        output: Folder of the cache. All processes must reach it by this name.
        engine: "local": processes of this machine. "torchrun" and "slurm": this process is one of
            those that the launcher started, each with its own call. "ray": tasks on a cluster.
        devices: None for all GPUs, or else a process for each core; a number of them; "cpu" or
            "cuda". For "local", a list of names or one as well; others take no number either.
        max_codes: Largest number of codes of a picture.
        target_psnr: PSNR in dB to reach with as few codes as possible.
        threshold: Distance at which a loop ends, in the space of the latents.
        rate: lambda >= 0, the worth of a bit (see `Tokenizer.encode`).
        on_error: "skip" pictures that cannot be encoded and report them, or "raise" an error that
            names the first.
        batch_size: Largest number of pictures of one size that go through the model together.
        tile: Side of the tiles of larger pictures, as of a `Tokenizer`; None for none.
        progress: Show progress, rate and time left.
        trust_config: Build whatever the run's configuration names, which may run any code.
        **data: Options of `open_source`, such as ``size``, ``labels`` and ``shard_size``.

    Returns:
        Numbers of the complete cache, of earlier calls too.

    Raises:
        FileNotFoundError: The run or the input does not exist.
        ValueError: The run is of no tokenizer with one grid, an option is wrong, the output holds
            something else, or a picture cannot be encoded and ``on_error`` is "raise".

    Example:
        >>> from taming.scale import encode_shards
        >>> if __name__ == "__main__":  # for the processes that it starts import a script
        ...     encode_shards("logs/<run>", "photos", "cache/photos")  # doctest: +SKIP
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}{nearest(engine, ENGINES)}")
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}")
    at_least(1, batch_size=batch_size, tile=tile)
    check_devices(engine, devices)
    saved = run if isinstance(run, SavedRun) else SavedRun.load(run, trust_config=trust_config)
    rates = {"max_codes": max_codes, "target_psnr": target_psnr, "threshold": threshold}
    chosen = one_rate(rates | {"rate": rate})
    model = saved.model()
    _check(model, saved, chosen)
    is_named = isinstance(input, (str, Path)) or not hasattr(input, "read")
    source: Any = input
    if is_named:
        names = str(input) if isinstance(input, (str, Path)) else [str(name) for name in source]
        source = open_source(names, channels=model.channels, **data)
    elif data:
        raise ValueError(f"{', '.join(data)}: of pictures that a name finds, and a Source is given")
    workers = len(devices_of(devices)) if engine == "local" else 1
    job = Job(
        partial(_load, saved),
        source,
        Path(output).expanduser(),
        model.fingerprint(),
        chosen,
        on_error,
        batch_size,
        tile,
        threads=max(cores() // workers, 1),
    )
    del model
    job.begin()
    if not job.is_complete():
        ENGINES[engine](job, devices, progress)
    return job.finish()


def _load(saved: SavedRun) -> VQModel:
    return saved.model()


def _check(model: Any, saved: SavedRun, rate: dict[str, float]) -> None:
    """Refuse a model that has no codes of one grid, and a rate that it does not have."""
    if not isinstance(model, VQModel) or len(model.levels) > 1:
        raise ValueError(
            f"{saved.folder} holds a {type(model).__name__}, not a VQModel of one level"
        )
    model.check_rate(rate)
    for name, value in rate.items():
        if not value > 0 and (name, value) != ("rate", 0):
            raise ValueError(f"{name} must be above 0, got {value}")
