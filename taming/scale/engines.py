"""Ways to start the workers of a job: on this machine, by a launcher's ranks, or by Ray.

Every worker computes on one device, on a CPU with one thread, so that all give the same codes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm import tqdm

from taming.models.vqgan import VQModel
from taming.scale.job import POLL, Job, Progress
from taming.util import DataError, WriteError, cores, usable_device

Devices = int | str | Sequence[str] | None

# Names of a process's number and of their count: of torchrun and of Slurm.
_RANKS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
_WORTH = 64  # pictures for which another process is started unasked
_IN_FLIGHT = 2  # tasks of Ray for each of its workers


def devices_of(devices: Devices) -> list[str]:
    """Name the device of each worker of this machine.

    Args:
        devices: None for all GPUs, or a process for each core if there are none; a number of
            either; "cpu" or "cuda" for all of that kind; or a list of names.

    Raises:
        ValueError: There are not as many GPUs, the number is not positive, or the list is empty.
    """
    gpus = 0 if devices == "cpu" else torch.cuda.device_count()
    if not isinstance(devices, int | str | None):
        if not devices:
            raise ValueError("devices is an empty list: name some, or leave it out")
        return [str(usable_device(name)) for name in devices]
    if isinstance(devices, str) and devices not in ("cpu", "cuda"):
        return [str(usable_device(devices))]
    if devices == "cuda" and not gpus:
        raise ValueError("devices='cuda', but there is no GPU here")
    number = devices if isinstance(devices, int) else gpus or cores()
    if number < 1 or number > (gpus or number):
        raise ValueError(f"devices must be 1 to {gpus or cores()} here, got {number}")
    return [f"cuda:{i}" for i in range(number)] if gpus else ["cpu"] * number


def check_devices(engine: str, devices: Devices) -> None:
    """Refuse devices that an engine cannot choose, since its launcher has placed its processes.

    Raises:
        ValueError: The engine is another than "local", and they are not all of a kind; or as for
            `devices_of`.
    """
    if engine != "local" and devices not in (None, "cpu", "cuda"):
        raise ValueError(
            f"engine {engine!r} takes the devices 'cpu', 'cuda' or None, for its launcher starts "
            f"the processes; got {devices!r}"
        )
    if engine != "ray":  # whose tasks run on other machines
        devices_of(devices)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, which gives the same numbers wherever it runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with isolate_rng():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _bar(job: Job, is_shown: bool) -> Iterator[Any]:
    """Show the pictures done, of those that are left, the rate, and the time left."""
    missing, total = len(job.missing()), job.source.pictures
    if total is not None:
        total = round(total * missing / max(job.source.shards, 1))
    with tqdm(total=total, unit="picture", disable=not is_shown, smoothing=0.05) as bar:
        yield bar


# --- this machine ---------------------------------------------------------------------------------


def run_local(job: Job, devices: Devices, is_shown: bool) -> None:
    """Start a process for each device of this machine; work here if there is one.

    Raises:
        ValueError: This is such a process, which runs the program's file before it works.
        ChildProcessError: The processes died.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError(
            "the processes of engine 'local' import the program's file: call encode_shards under "
            "if __name__ == '__main__':, or with devices=1"
        )
    names = devices_of(devices)[: max(len(job.missing()), 1)]
    if devices is None and job.source.pictures is not None:  # a start takes seconds
        names = names[: max(job.source.pictures // _WORTH, 1)]
    with _bar(job, is_shown) as bar:
        if len(names) == 1:
            with _one_thread():
                job.work(names[0], 0, 1, bar.update)
            return
        while missing := len(job.missing()):
            _run_round(job, names, bar.update)
            if len(job.missing()) == missing:
                raise ChildProcessError(f"the workers died, and {missing} shards are not done")


def _run_round(job: Job, names: Sequence[str], progress: Progress) -> None:
    """Run a process for each device until all have ended, or one has raised an error."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads, and CUDA
    processes, pipes = [], {}
    for rank, name in enumerate(names):
        ours, theirs = context.Pipe(duplex=False)
        target = (job, name, rank, len(names), theirs, os.getpid())
        processes.append(context.Process(target=_serve, args=target, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[ours] = rank
    try:
        while pipes:
            for pipe in wait(list(pipes)):
                try:
                    message = pipe.recv()  # type: ignore[union-attr]
                except EOFError:  # it has ended, or died
                    del pipes[pipe]  # type: ignore[arg-type]
                    continue
                if isinstance(message, Exception):
                    raise message
                progress(message)
    finally:
        for process in processes:
            if pipes:
                process.terminate()
            process.join()


def _serve(job: Job, device: str, rank: int, workers: int, pipe: Connection, parent: int) -> None:
    """Work in a process of its own; send numbers of pictures, and an error."""

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process

    def progress(pictures: int) -> None:
        if os.getppid() != parent:  # which was killed, or a new start would find its locks held
            os._exit(1)
        pipe.send(pictures)

    try:
        with _one_thread():
            job.work(device, rank, workers, progress)
    except ValueError as error:
        pipe.send(DataError(str(error)))
    except OSError as error:
        pipe.send(WriteError(str(error)))


# --- launchers ------------------------------------------------------------------------------------


def run_rank(launcher: str, job: Job, devices: Devices, is_shown: bool) -> None:
    """Work as one of the processes that a launcher has started.

    Raises:
        ValueError: The launcher's variables are not set.
    """
    names = _RANKS[launcher]
    try:
        rank, workers, local = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"engine {launcher!r} needs the variables {', '.join(names)}: start the program by "
            f"{'torchrun' if launcher == 'torchrun' else 'srun'}"
        ) from error
    found = devices_of(devices)
    device = found[local % len(found)]
    with _bar(job, is_shown and rank == 0) as bar, _one_thread():
        job.work(device, rank, workers, bar.update)


# --- Ray ------------------------------------------------------------------------------------------


def run_ray(job: Job, devices: Devices, is_shown: bool) -> None:
    """Start a task of Ray for each shard, on the cluster that RAY_ADDRESS names or a new one here.

    Raises:
        ValueError: The package ray is missing, or a GPU that is asked for.
    """
    try:
        import ray as library  # type: ignore
    except ImportError as error:
        raise ValueError("engine 'ray' needs ray: pip install 'loopy-taming[ray]'") from error
    ray: Any = library
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    resources = ray.cluster_resources()
    kind = "GPU" if devices != "cpu" and resources.get("GPU", 0) else "CPU"
    if devices == "cuda" and kind == "CPU":
        raise ValueError("devices='cuda', but the cluster of Ray has no GPU")
    task = ray.remote(max_retries=-1, **{f"num_{kind.lower()}s": 1})(_compute)
    shared, device = ray.put(job), "cuda" if kind == "GPU" else "cpu"
    most = _IN_FLIGHT * max(int(resources[kind]), 1)
    with _bar(job, is_shown) as bar:
        while missing := job.missing():
            running: list[Any] = []
            while missing or running:
                while missing and len(running) < most:
                    running.append(task.remote(shared, missing.pop(0), device))
                done, running = ray.wait(running)
                try:
                    bar.update(sum(ray.get(done)))
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    raise cause if isinstance(cause, ValueError | OSError) else error from None


@cache
def _models(fingerprint: str, device: str) -> list[VQModel]:
    """Return the list that keeps the model of a process of Ray from task to task."""
    return []


def _compute(job: Job, shard: int, device: str) -> int:
    """Compute a shard, unless it is done or another process has it; return its pictures."""
    models, counts = _models(job.fingerprint, device), list[int]()

    def model() -> VQModel:
        if not models:
            models.append(job.model(device))
        return models[0]

    with _one_thread():
        if not job.compute(shard, model, counts.append):
            time.sleep(POLL)
    return sum(counts)


Engine = Callable[[Job, Devices, bool], None]

ENGINES: dict[str, Engine] = {
    "local": run_local,
    "torchrun": partial(run_rank, "torchrun"),
    "slurm": partial(run_rank, "slurm"),
    "ray": run_ray,
}
