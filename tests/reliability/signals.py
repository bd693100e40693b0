"""Send signals to runs at random moments: do they end, with the right status, and lose nothing?

    python -m tests.reliability.signals --n 60

Each run trains a toy through ``main.py`` on one or two processes. A sequence of signals meets it
while it starts or while it trains, validates and saves.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 30.0  # seconds within which all processes must have ended
KINDS = ("TERM", "INT", "INT INT", "USR1 TERM", "KILL")
STATUS = {"TERM": {143, -15}, "INT": {130, -2}, "KILL": {1, 143, -9}}


@dataclass
class Plan:
    """Attributes: what is sent, to whom, when, and to how many processes.

    Attributes:
        kind: One of `KINDS`.
        target: ``group``, or the rank of one process.
        processes: Processes of the run.
        workers: Loader processes of each of them.
        moment: Seconds after the first checkpoint; None: the run has only begun.
        delay: Seconds after the start, if there is no moment.
    """

    kind: str
    target: str | int
    processes: int
    workers: int
    moment: float | None
    delay: float = 0.0

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        """Draw a plan."""
        processes, kind = rng.choice([1, 2, 2]), rng.choice(KINDS)
        targets: list[str | int] = ["group", *range(processes)]
        target = rng.choice(targets[kind == "KILL" :])
        moment = rng.uniform(0, 1.5) if rng.random() < 0.75 or kind == "USR1 TERM" else None
        return cls(kind, target, processes, rng.choice([0, 1]), moment, rng.uniform(0.5, 12))


def write_config(folder: Path, plan: Plan) -> Path:
    """Write the configuration of a run that never ends."""
    data = {"target": "support.models.ToyData", "params": {"size": 64}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    config: dict[str, Any] = {
        "model": {"base_learning_rate": 0.01, "target": "support.models.ToyModel"},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                **{"batch_size": 2, "num_workers": plan.workers, "train": data, "validation": data}
            },
        },
        "lightning": {
            "trainer": {"accelerator": "cpu", "devices": plan.processes, "max_epochs": -1, **quiet},
            "callbacks": {"last_checkpoint": {"params": {"every_n_train_steps": 20}}},
        },
    }
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def group_of(leader: int) -> list[int]:
    """Return the live processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended
            continue
        if int(group) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def process_of(leader: int, rank: int) -> int | None:
    """Return the process of a rank, if it is there."""
    if rank == 0:
        return leader
    for child in Path(f"/proc/{leader}/task/{leader}/children").read_text().split():
        if b"LOCAL_RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    return None


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    """Return True once the condition holds, False if it does not within some seconds."""
    latest = time.monotonic() + seconds
    while time.monotonic() < latest:
        if condition():
            return True
        time.sleep(0.05)
    return False


def start(folder: Path, plan: Plan, *arguments: str) -> subprocess.Popen[Any]:
    """Start the run in a group of its own, as a terminal would."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {k: v for k, v in os.environ.items() if k != "TAMING_RUN"}
    environment |= {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONFAULTHANDLER": "1"}
    with open(folder / "stderr", "w") as errors:
        return subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "main.py"), "-t", "--no-test", *arguments),
                *("-b", str(write_config(folder, plan))),
            ],
            cwd=folder,
            env=environment,
            stderr=errors,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def send(run: subprocess.Popen[Any], plan: Plan) -> None:
    """Send the signals of a plan."""
    for number, name in enumerate(plan.kind.split()):
        if number:
            time.sleep(0.5 if name == "INT" else 2.5)
        code = signal.Signals[f"SIG{name}"]
        try:
            if plan.target == "group":
                os.killpg(run.pid, code)
            elif pid := process_of(run.pid, int(plan.target)):
                os.kill(pid, code)
            else:  # it has not been started yet
                os.kill(run.pid, code)
        except (ProcessLookupError, FileNotFoundError):
            return  # ended already


def play(folder: Path, plan: Plan) -> dict[str, Any]:
    """Play one sequence; returns seconds to the end, the status, and what is wrong."""
    import torch

    run = start(folder, plan)
    wrong: list[str] = []
    if plan.moment is None:
        time.sleep(plan.delay)
    elif not wait_for(lambda: [*folder.glob("logs/*/checkpoints/last.ckpt")], 90):
        wrong.append("never began")
    else:
        time.sleep(plan.moment)
    had_checkpoint = bool([*folder.glob("logs/*/checkpoints/last.ckpt")])
    sent = time.time()
    send(run, plan)
    has_ended = wait_for(lambda: run.poll() is not None and not group_of(run.pid), LIMIT)
    seconds, status = time.time() - sent, run.poll()
    if not has_ended:
        wrong.append("did not end")
        os.killpg(run.pid, signal.SIGABRT)  # shows where it hangs
        time.sleep(2)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    errors = (folder / "stderr").read_text()
    if has_ended and status not in STATUS[plan.kind.split()[-1]]:
        wrong.append(f"status {status}")
    if "Traceback" in errors and "main.py" in errors:
        wrong.append("traceback")
    checkpoints = [*folder.glob("logs/*/checkpoints/*.ckpt")]
    for file in checkpoints:
        if torch.load(file, weights_only=True)["global_step"] < 1:
            wrong.append(f"{file.name} is of no use")
    last = [file for file in checkpoints if file.name == "last.ckpt"]
    if had_checkpoint and not last:
        wrong.append("last.ckpt is lost")
    # The times of files are those of the system's last tick.
    was_saved = last and last[0].stat().st_mtime > sent - 0.01
    if had_checkpoint and plan.kind in ("TERM", "INT") and not was_saved:
        wrong.append("nothing saved at the end")
    if had_checkpoint and plan.kind == "KILL" and plan.processes == 2:
        if not any(file.name == "interrupted.ckpt" for file in checkpoints):
            wrong.append("no interrupted.ckpt")
        if f"process {plan.target} (pid" not in errors:
            wrong.append("nobody names it")
    return {"seconds": seconds, "status": status, "wrong": wrong, "errors": errors}


def main() -> None:
    """Play random sequences and count; exit with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=60, help="sequences")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    rows: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for _ in range(options.n):
        plan = Plan.draw(rng)
        with tempfile.TemporaryDirectory() as folder:
            result = play(Path(folder), plan)
        if result["wrong"]:
            sys.stdout.write(f"{plan}: {result['wrong']}\n{result['errors'][-9000:]}\n")
            sys.stdout.flush()
        target = "group" if plan.target == "group" else "one"
        rows[plan.kind, target, plan.processes].append(result)
    sys.stdout.write("signals    to     processes  sent  right  longest end\n")
    for (kind, target, processes), results in sorted(rows.items()):
        right = sum(not result["wrong"] for result in results)
        longest = max(result["seconds"] for result in results)
        sys.stdout.write(
            f"{kind:10} {target:6} {processes:9} {len(results):5} {right:6} {longest:10.1f} s\n"
        )
    everything = [result for results in rows.values() for result in results]
    lost = sum(bool(result["wrong"]) for result in everything)
    sys.stdout.write(f"{len(everything)} sequences, {lost} wrong\n")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
