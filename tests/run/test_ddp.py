"""Two processes on the CPU train as one would, and agree with each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.runs import CONFIGS, TRAINER, TinyRuns, overrides
from torch import Tensor

from taming.models.vqgan import VQModel
from taming.modules.vqvae.quantize import LoopyVectorQuantizer
from taming.run.checkpoints import LastCheckpoint

ROOT = Path(__file__).resolve().parents[2]
K, D, T, STEPS = 12, 4, 3, 4
ATTRACT = {"target": "taming.modules.vqvae.transforms.Attract", "params": {"step": 0.4}}
LINEAR = {
    "target": "taming.modules.vqvae.transforms.LinearResidual",
    "params": {"max_loops": T, "e_dim": D},
}
# Nothing is drawn at random: what two processes do with halves of a batch, one does with all of it.
EXACT: dict[str, dict[str, Any]] = {
    "ema": {"ema_decay": 0.8, "threshold": 0.5},
    "ema_linear": {"ema_decay": 0.8, "threshold": 0.5, "transform_config": LINEAR},
    "ema_target_length": {"ema_decay": 0.8, "target_length": 1.7},
    "ema_attract": {"ema_decay": 0.8, "threshold": 0.3, "transform_config": ATTRACT},
    # The loss is a mean over searches; at a fixed depth, every process has equally many.
    "gradient": {"threshold": 0.0},
}
for _params in EXACT.values():
    _params |= {"start_batches": 0, "revive_below": 0.0}
# K-means, revival and thresholds draw at random: the processes still agree.
RANDOM: dict[str, dict[str, Any]] = {
    "random_ema": {"ema_decay": 0.8, "target_length": 1.7, "length_range": (1.0, 2.0)},
    "random_gradient": {"target_length": 1.7, "length_range": (1.0, 2.0)},
}
for _params in RANDOM.values():
    _params |= {"start_batches": 2, "revive_below": 0.9}
CASES = EXACT | RANDOM
Result = dict[str, dict[str, Tensor]]


def learn(params: dict[str, Any], rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """Train a quantizer on this rank's share of some batches; returns all that it has learned."""
    generator = torch.Generator().manual_seed(1)
    quantizer = LoopyVectorQuantizer(K, D, max_loops=T, **params).train()
    codebook = torch.randn(K, D, generator=generator)
    quantizer.embedding._place(torch.arange(K), codebook)
    metrics = quantizer.codebook_metrics()
    torch.manual_seed(7 + rank)
    for _ in range(STEPS):
        z = torch.randn(8, D, 3, 3, generator=generator).chunk(world_size)[rank]
        output = quantizer(z)
        metrics.update(z, output)
        weight = quantizer.embedding.weight
        if weight.requires_grad:
            (gradient,) = torch.autograd.grad(output.loss, weight)
            if world_size > 1:  # as DistributedDataParallel does
                dist.all_reduce(gradient)
            weight.data -= 0.5 * gradient / world_size
    measured = {f"metrics.{name}": value for name, value in metrics.compute().items()}
    return {**quantizer.state_dict(), **measured}


def work(rank: int, folder: Path) -> None:
    """Learn every case as one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.save({name: learn(params, rank, 2) for name, params in CASES.items()}, folder / f"{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """The states that each of two processes has learned, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_processes_agree(case: str, ranks: list[Result]) -> None:
    first, second = (rank[case] for rank in ranks)
    assert first["embedding.steps"] == STEPS
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.reported(20)
@pytest.mark.parametrize("case", EXACT)
def test_two_processes_are_one(case: str, ranks: list[Result]) -> None:
    torch.testing.assert_close(ranks[0][case], learn(EXACT[case]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_all_that_can_be_learned_was(case: str, ranks: list[Result]) -> None:
    params = {**CASES[case], "start_batches": 0, "revive_below": 0.0}
    before = LoopyVectorQuantizer(K, D, max_loops=T, **params).state_dict()
    learned = {name for name, value in before.items() if not value.equal(ranks[0][case][name])}
    constant = {"threshold"} if "threshold" in params else set()
    assert learned == set(before) - constant


class RanksAgree(pl.Callback):
    """Raises if parameters, the quantizer's state or the last checkpoint's path differ."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert trainer.world_size == 2
        (last,) = (c for c in trainer.callbacks if isinstance(c, LastCheckpoint))
        if last.path != trainer.strategy.broadcast(last.path):
            raise ValueError(f"{last.path} is not where the first process writes")
        state = dict(pl_module.named_parameters())
        if isinstance(pl_module, VQModel):
            state |= {f"quantize.{k}": v for k, v in pl_module.quantize.state_dict().items()}
        for name, value in state.items():
            values = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(values, value.detach().contiguous())
            if not values[0].equal(values[1]):
                raise ValueError(f"{name} differs between processes")


def train_on_two(folder: Path, config: str, *overrides: str) -> dict[str, Any]:
    """Train a tiny version of a shipped configuration for two steps; returns its checkpoint."""
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "main.py"), "-t", "-b", str(CONFIGS / config), *TRAINER),
            *("--devices", "2", "--strategy", "ddp", "--max_steps", "2", *overrides),
            "lightning.callbacks.agree.target=run.test_ddp.RanksAgree",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (checkpoint,) = folder.glob("logs/*/checkpoints/last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 2
    return saved


@pytest.mark.parametrize("ema_decay", ["0.95", "null"])
def test_main_trains_a_loopy_vqgan(ema_decay: str, tmp_path: Path) -> None:
    config = "demo/loopy_vqgan.yaml"
    decay = f"model.params.quantizer_config.params.ema_decay={ema_decay}"
    saved = train_on_two(tmp_path, config, *overrides(tmp_path)[config], decay)
    assert saved["state_dict"]["quantize.embedding.steps"] == 2
    assert list(tmp_path.glob("logs/*/images/val/lengths_*.png"))


@pytest.mark.parametrize(
    "config",
    ["cifar10_transformer.yaml", "cifar10_two_level_transformer.yaml", "pixelcnn_cifar10.yaml"],
)
def test_main_trains_a_prior(config: str, tmp_path: Path, tiny_runs: TinyRuns) -> None:
    saved = train_on_two(tmp_path, config, *tiny_runs.overrides[config], *tiny_runs.stages(config))
    before = torch.load(tiny_runs.of(config) / "checkpoints/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == before["state_dict"].keys()
    assert list(tmp_path.glob("logs/*/images/val/samples_nopix_*.png"))


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_nodes_write_one_run(tmp_path: Path) -> None:
    """Under torchrun, whose processes are not Lightning's children."""
    config = "demo/loopy_vqgan.yaml"
    rendezvous = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k != "TAMING_RUN"}  # of other tests
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", *rendezvous),
                *("--node_rank", str(rank), str(ROOT / "main.py"), "-t", "-b"),
                *(str(CONFIGS / config), *TRAINER, "--num_nodes", "2", "--devices", "1"),
                *("--max_steps", "2", *overrides(tmp_path)[config]),
                "lightning.callbacks.agree.target=run.test_ddp.RanksAgree",
            ],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(errors)
    (run,) = (tmp_path / "logs").iterdir()
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
