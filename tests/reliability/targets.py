"""Try to make a saved run do harm: ``python -m tests.reliability.targets``.

Each attempt writes a run whose configuration asks for something that it may not: to build or look
up a target, to be trusted, to write elsewhere, to call a resolver. Then it uses the run as a user
would. An audit hook sees each process, connection, unpickled class and file written outside the
run's folder. Every name of every module that configurations can reach is looked at as well.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch  # noqa: E402
import yaml  # noqa: E402
from reliability.hostile import (  # noqa: E402
    HARMFUL,
    PAYLOAD,
    Attempt,
    attempts,
    base,
    marked,
    put,
    with_block,
)

from main import main  # noqa: E402
from taming.models.vqgan import VQModel  # noqa: E402
from taming.run import trust  # noqa: E402
from taming.run.folder import SavedRun  # noqa: E402

# Parts of the messages that refuse attempts: another mistake must not hide one that is allowed.
REASONS = (
    *("a saved run may", "is not valid YAML", "Recursive interpolation", " has no module "),
    *(" has no '", "may run code when loaded", "names itself", "unknown key evil"),
)
BLOCKS = ("model", "data", "lightning")


class Watch:
    """Records harm while it is on; an audit hook cannot be removed."""

    EVENTS = (
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
        *("pty.spawn", "socket.connect", "socket.bind", "urllib.Request", "webbrowser.open"),
        *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "sqlite3.connect"),
        *("pickle.find_class", "ctypes.dlopen", "code.__new__", "tempfile.mkdtemp"),
    )

    def __init__(self, run: Path) -> None:
        self.run = run  # in which a training may do as it likes
        self.seen: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        first = arguments[0] if arguments else ""
        first = first.decode(errors="replace") if isinstance(first, bytes) else str(first)
        if first.startswith(str(self.run)) or (event == "ctypes.dlopen" and "nvidia" in first):
            return  # torch looks for a GPU
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & {*"wax+"}
        if event in self.EVENTS or writes or (event == "import" and first == "payload"):
            self.seen.append(f"{event} {arguments[:2]}")

    @contextmanager
    def on(self) -> Iterator[list[str]]:
        """Record into a list."""
        self.seen = seen = []
        try:
            yield seen
        finally:
            self.seen = None


def prepare(folder: Path) -> None:
    """Write what attempts name: a module with a payload, pickles, and a run that does harm."""
    (folder / "payload.py").write_text(PAYLOAD)
    (folder / "hubconf.py").write_text(PAYLOAD + "def touch(): pass\n")
    weights = {"state_dict": VQModel(**base()["model"]["params"]).state_dict()}
    torch.save(weights, folder / "weights.ckpt")
    os.environ["TAMING_MARK"] = str(folder / "mark")
    sys.path.append(str(folder))
    payload = importlib.import_module("payload").Payload()
    del sys.modules["payload"]
    torch.save({**weights, "payload": payload}, folder / "payload.ckpt")
    (folder / "mark").unlink()
    popen = {"target": "subprocess.Popen", "params": HARMFUL["subprocess.Popen"]}
    config = with_block("model.params.lossconfig", popen)
    put(config, "data.params.validation", popen)
    write_run(folder / "other", marked(config, folder / "mark"), folder / "weights.ckpt")


def write_run(run: Path, config: dict[str, Any] | str, checkpoint: Path) -> None:
    """Write the folder of a run, in two files as a training does unless it is a text."""
    shutil.rmtree(run, ignore_errors=True)
    (run / "configs").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    os.link(checkpoint, run / "checkpoints/last.ckpt")
    files = {"project": config}
    if isinstance(config, dict):
        files["lightning"] = {"lightning": config.pop("lightning", {})}
    for name, part in files.items():
        text = part if isinstance(part, str) else yaml.safe_dump(part)
        (run / f"configs/2024-01-01T00-00-00-{name}.yaml").write_text(text)


def uses(attempt: Attempt, run: Path) -> dict[str, Callable[[], Any]]:
    """Ways in which a user comes across what an attempt asks for."""
    ways: dict[str, Callable[[], Any]] = {"main": lambda: main(["-r", str(run), "-t"])}
    if attempt.block == "model":
        ways["model"] = lambda: SavedRun.load(run).model()
    elif attempt.block == "data":
        ways["data"] = lambda: SavedRun.load(run).data("validate")
    return ways


def outcome(attempt: Attempt, way: str, folder: Path, watch: Watch) -> str:
    """Make an attempt: ``refused``, or the harm that was done."""
    run, mark = folder / "run", folder / "mark"
    config = attempt.config
    if isinstance(config, str):
        config = config.replace("{mark}", str(mark))
    else:
        config = marked(config, mark)
    checkpoint = folder / ("payload.ckpt" if attempt.kind == "pickles" else "weights.ckpt")
    write_run(run, config, checkpoint)
    found = "not refused"
    path = list(sys.path)
    with watch.on() as seen, redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()):
        try:
            uses(attempt, run)[way]()
        except SystemExit as error:
            found = said.getvalue() if error.code == 2 else f"exit {error.code}"
        except ValueError as error:
            found = str(error)
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
    sys.path[:] = path
    if mark.exists() or "payload" in sys.modules or seen:
        found = f"HARM {seen}"
        sys.modules.pop("payload", None)
        if mark.exists():
            shutil.rmtree(mark) if mark.is_dir() else mark.unlink()
    return "refused" if any(reason in found for reason in REASONS) else found


def names_within_reach(every: int = 1) -> Iterator[tuple[str, str]]:
    """Yield block and dotted path of names in the modules that configurations can reach."""
    modules = []
    for package in ("taming", "torch.nn", "torch.optim", "torchvision.datasets", "torchmetrics"):
        root = importlib.import_module(package)
        modules.append(package)
        for found in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda _: None):
            if "._" not in found.name and found.name.count(".") <= 3:
                modules.append(found.name)
    modules += ["main", "lightning.pytorch", "torch.utils.data", "torchvision.transforms"]
    number = 0
    for name in modules:
        try:
            names = dir(importlib.import_module(name))
        except Exception:  # an optional package is missing
            continue
        for attribute in names:
            number += 1
            if number % every == 0:
                yield from ((block, f"{name}.{attribute}") for block in BLOCKS)


def mutants(number: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield blocks and targets with random changes, which need not be names at all."""
    generator = random.Random(seed)
    whole = [*HARMFUL, "taming.models.vqgan.VQModel", "torch.nn.Linear", "main.ImageLogger"]
    parts = [
        "..",
        " ",
        "\0",
        "/",
        "os.",
        "taming.",
        "main",
        "torch.nn",
        "x" * 300,
        "\n",
        "*",
        "\u0661",
    ]
    parts += ["__class__", "__globals__", "__loader__", "__builtins__", "__main__", "modules.", "."]
    for _ in range(number):
        target = generator.choice(whole)
        for _ in range(generator.randint(1, 3)):
            start = generator.randrange(len(target) + 1)
            end = start + generator.choice((0, 0, 1, 3))
            target = target[:start] + generator.choice(("", *parts)) + target[end:]
        yield generator.choice(BLOCKS), target


def is_defined_in_reach(target: str) -> bool:
    """Return True for a class that is defined in a package of the list, and the two functions."""
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if f"{found.__module__}.{found.__qualname__}" in (
        "taming.run.folder.model_from_run",
        "taming.run.folder.data_from_run",
    ):
        return True
    package = found.__module__.partition(".")[0]
    known = ("taming", "torch", "torchvision", "torchmetrics", "lightning")
    return isinstance(found, type) and package in known


def judged(block: str, target: str) -> str:
    """Return ``refused``, ``allowed``, or ``lost`` for a target that is allowed but must not be."""
    try:
        if not trust._is_allowed(target, block):
            return "refused"
    except ValueError:  # there is none
        return "refused"
    return "allowed" if is_defined_in_reach(target) else "lost"


def try_all(
    folder: Path, chosen: list[Attempt], every: int = 1, seed: int = 0
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Make attempts; return counts by kind and outcome, and a line for each not refused."""
    counts: Counter[tuple[str, str]] = Counter()
    lost = []
    prepare(folder)
    before, watch = Path.cwd(), Watch(folder / "run")
    os.chdir(folder)
    trusted = os.environ.pop(trust.TRUST_VARIABLE, None)
    try:
        write_run(folder / "run", base(), folder / "weights.ckpt")
        SavedRun.load(folder / "run").model()  # nothing but the attempts is wrong
        SavedRun.load(folder / "run").data("validate")
        main(["-r", str(folder / "run"), "--no-test", "true"])
        for attempt in chosen:
            for way in uses(attempt, folder / "run"):
                found = outcome(attempt, way, folder, watch)
                counts[attempt.kind, "refused" if found == "refused" else "lost"] += 1
                if found != "refused":
                    lost.append(f"{attempt.kind}: {attempt.name} by {way}: {found}")
        for kind, block, target in (
            *(("names", *found) for found in names_within_reach(every)),
            *(("mutants", *found) for found in mutants(30_000 // every, seed)),
        ):
            counts[kind, found := judged(block, target)] += 1
            lost += [f"{kind}: {target!r} in {block}"] if found == "lost" else []
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        if trusted is not None:
            os.environ[trust.TRUST_VARIABLE] = trusted
    return counts, lost


def program() -> None:
    """Print the counts; exit with 1 if anything was not refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, help="attempts, chosen at random; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = list(attempts())
    if options.n is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.n, len(chosen)))
    with tempfile.TemporaryDirectory() as folder:
        counts, lost = try_all(Path(folder).resolve(), chosen, seed=options.seed)
    for kind in dict.fromkeys(kind for kind, _ in counts):
        row = {name: counts[kind, name] for name in ("refused", "allowed", "lost")}
        sys.stdout.write(f"{kind:<15}" + "".join(f"{n:>9} {c:>6}" for n, c in row.items()) + "\n")
    sys.stdout.write("".join(f"{line}\n" for line in lost))
    sys.exit(bool(lost))


if __name__ == "__main__":
    program()
