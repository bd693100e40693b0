"""Two processes on the CPU train as one would, and agree with each other."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from support.models import GAN, hierarchy_config, prior, vqmodel_config
from support.runs import CONFIGS, TRAINER, TinyRuns, overrides
from torch import Tensor, nn

from taming.models.vqgan import VQModel
from taming.modules.vqvae.base import Quantizer
from taming.modules.vqvae.quantize import LoopyVectorQuantizer
from taming.run.checkpoints import LastCheckpoint
from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]
QUANTIZERS = "taming.modules.vqvae.quantize"
TRANSFORMS = "taming.modules.vqvae.transforms"
K, D, T, STEPS = 12, 4, 3, 20
ATTRACT = {"target": f"{TRANSFORMS}.Attract", "params": {"step": 0.4}}
LINEAR = {"target": f"{TRANSFORMS}.LinearResidual", "params": {"max_loops": T, "e_dim": D}}
BEAM = {"target": f"{TRANSFORMS}.Residual", "params": {"beam": 2, "depth_embedding": True}}
# Loopy quantizers that draw nothing at random: what two processes do with halves of a batch, one
# does with all of it. The threshold leaves a different number of searches to each process.
EXACT: dict[str, dict[str, Any]] = {
    "ema": {"ema_decay": 0.8, "threshold": 0.5},
    "ema_linear": {"ema_decay": 0.8, "threshold": 0.5, "transform_config": LINEAR},
    "ema_target_length": {"ema_decay": 0.8, "target_length": 1.7},
    "ema_attract": {"ema_decay": 0.8, "threshold": 0.3, "transform_config": ATTRACT},
    "gradient": {"threshold": 0.5},
    "gradient_legacy": {"threshold": 0.5, "legacy": True},
    "gradient_linear": {"threshold": 0.5, "transform_config": LINEAR},
    "gradient_beam": {"threshold": 0.5, "transform_config": BEAM},
    "gradient_attract": {"target_length": 1.5, "transform_config": ATTRACT},
}
for _params in EXACT.values():
    _params |= {"start_batches": 0, "revive_below": 0.0}
# K-means, revival and thresholds draw at random: the processes still agree.
RANDOM: dict[str, dict[str, Any]] = {
    "random_ema": {"ema_decay": 0.8, "target_length": 1.7, "length_range": (1.0, 2.0)},
    "random_gradient": {"target_length": 1.7, "length_range": (1.0, 2.0)},
    "random_rate": {"ema_decay": 0.8, "target_length": 1.7, "rate_range": (1e-3, 1e-1)},
    "random_own_rate": {"rate": 0.02, "rate_weight": 0.5},
}
for _params in RANDOM.values():
    _params |= {"start_batches": 2, "revive_below": 0.9}
LOOPY = EXACT | RANDOM
# The original's quantizers, and levels of quantizers.
OTHERS: dict[str, dict[str, Any]] = {
    "vq": {"target": f"{QUANTIZERS}.VectorQuantizer", "params": {"n_e": K, "e_dim": D}},
    "vq2": {"target": f"{QUANTIZERS}.VectorQuantizer2", "params": {"n_e": K, "e_dim": D}},
    "original_ema": {
        "target": f"{QUANTIZERS}.EMAVectorQuantizer",
        "params": {"n_embed": K, "embedding_dim": D, "decay": 0.8},
    },
    "gumbel": {
        "target": f"{QUANTIZERS}.GumbelQuantize",
        "params": {"num_hiddens": D, "embedding_dim": D, "n_embed": K, "kl_weight": 0.1},
    },
    "levels": hierarchy_config("ema", "flat"),
    "loopy_levels": hierarchy_config("loopy", "loopy"),
}
for _name in ("vq", "vq2", "original_ema"):
    OTHERS[_name]["params"]["beta"] = 0.25
Result = dict[str, dict[str, Tensor]]


def descend(
    parameters: list[nn.Parameter], loss: Tensor, world_size: int, rate: float = 0.1
) -> None:
    """Step down the gradient of a loss, averaged as DistributedDataParallel does."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            if world_size > 1:
                dist.all_reduce(gradient)
            parameter.data -= rate * gradient / world_size


@contextmanager
def double_precision() -> Iterator[None]:
    """Compute in float64, in which no latent is so close to two codes that rounding decides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@contextmanager
def shared_noise(rank: int, world_size: int) -> Iterator[None]:
    """Let Gumbel noise be drawn for the whole batch, of which each rank takes its share."""
    generator = torch.Generator().manual_seed(5)

    def gumbel_softmax(logits: Tensor, tau: float, hard: bool, dim: int) -> Tensor:
        whole = torch.rand(len(logits) * world_size, *logits.shape[1:], generator=generator)
        noise = -(-whole.chunk(world_size)[rank].log()).log()
        soft = ((logits + noise) / tau).softmax(dim)
        best = F.one_hot(soft.argmax(dim), logits.shape[dim]).movedim(-1, dim).to(soft)
        return best - soft.detach() + soft if hard else soft

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "gumbel_softmax", gumbel_softmax)
        yield


def build(case: str) -> Quantizer:
    """Build the quantizer of a case, with codes that are spread out."""
    torch.manual_seed(3)
    if case in OTHERS:
        return instantiate_from_config(OTHERS[case]).train()
    quantizer = LoopyVectorQuantizer(K, D, max_loops=T, **LOOPY[case]).train()
    quantizer.embedding._place(torch.arange(K), torch.randn(K, D))
    return quantizer


def learn(case: str, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """Train an autoencoder on this rank's share of some batches; returns all that it learned."""
    quantizer = build(case)
    side = 4 if case.endswith("levels") else 3
    encoder, decoder = nn.Conv2d(3, getattr(quantizer, "num_hiddens", quantizer.e_dim), 1), None
    decoder = nn.Conv2d(quantizer.e_dim, 3, 1)
    metrics = quantizer.codebook_metrics()
    parts = nn.ModuleDict({"quantizer": quantizer, "encoder": encoder, "decoder": decoder})
    parameters = [p for p in parts.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(7 + rank)
    with shared_noise(rank, world_size):
        for _ in range(STEPS):
            x = torch.randn(8, 3, side, side, generator=generator).chunk(world_size)[rank]
            z = encoder(x)
            output = quantizer(z)
            metrics.update(z, output)
            loss = (decoder(output.z_q) - x).square().mean() + output.loss
            # At higher rates, the deep networks between levels amplify the last digits.
            descend(parameters, loss, world_size, 0.001 if quantizer.names else 0.1)
    measured = {f"metrics.{name}": value for name, value in metrics.compute().items()}
    return {k: v.detach() for k, v in parts.state_dict().items()} | measured


def learn_gan(rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """Train a whole VQGAN, its discriminator and the adaptive weight included."""
    torch.manual_seed(3)
    loss = {**GAN, "params": {**GAN["params"], "disc_start": 0}}
    quantizer = {"target": f"{QUANTIZERS}.LoopyVectorQuantizer"}
    quantizer["params"] = {"max_loops": T, **EXACT["gradient"]}
    model = VQModel(**vqmodel_config(lossconfig=loss, quantizer_config=quantizer)["params"]).train()
    discriminator = list(model.loss.discriminator.parameters())
    generator = [p for p in model.parameters() if all(p is not d for d in discriminator)]
    images = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = (torch.rand(4, 3, 8, 8, generator=images) * 2 - 1).chunk(world_size)[rank]
        _, quantized, x_rec = model.reconstruct(x)
        for index, parameters in enumerate((generator, discriminator)):
            value, _ = model.compute_loss(x, quantized, x_rec, index, "train")
            descend([p for p in parameters if p.requires_grad], value, world_size)
    return {k: v.detach() for k, v in model.state_dict().items()}


def learn_prior(rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """Train a prior over sequences whose lengths differ."""
    torch.manual_seed(3)
    model = prior()
    parameters = list(model.network.parameters())
    images = torch.Generator().manual_seed(1)
    model.log = lambda *_, **__: None  # needs a Trainer
    for _ in range(3):
        x = (torch.rand(4, 16, 16, 3, generator=images) * 2 - 1).chunk(world_size)[rank]
        descend(parameters, model.training_step({"image": x}, 0), world_size)
    return {k: v.detach() for k, v in model.network.state_dict().items()}


MODELS = {"gan": learn_gan, "prior": learn_prior}


def learn_case(case: str, *rank: int) -> dict[str, Tensor]:
    """Learn a case, alone or given the rank and the number of processes."""
    with double_precision():
        return MODELS[case](*rank) if case in MODELS else learn(case, *rank)


def work(rank: int, folder: Path) -> None:
    """Learn every case as one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)
    cases = (*LOOPY, *OTHERS, *MODELS)
    torch.save({case: learn_case(case, rank, 2) for case in cases}, folder / f"{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """The states that each of two processes has learned, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", [*LOOPY, *OTHERS, *MODELS])
def test_processes_agree(case: str, ranks: list[Result]) -> None:
    first, second = (rank[case] for rank in ranks)
    if case in LOOPY:
        assert first["quantizer.embedding.steps"] == STEPS
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.reported(20)
@pytest.mark.parametrize("case", [*EXACT, *OTHERS, *MODELS])
def test_two_processes_are_one(case: str, ranks: list[Result]) -> None:
    torch.testing.assert_close(ranks[0][case], learn_case(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LOOPY)
def test_all_that_can_be_learned_was(case: str, ranks: list[Result]) -> None:
    with double_precision():
        before = build(case).state_dict()
    learned = {n for n, v in before.items() if not v.equal(ranks[0][case][f"quantizer.{n}"])}
    constant = set() if "target_length" in LOOPY[case] else {"threshold"}
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


def arguments_of(config: str, *overrides: str) -> list[str]:
    """Arguments that train a tiny version of a shipped configuration for two steps."""
    return [
        *("-t", "-b", str(CONFIGS / config), *TRAINER, "--max_steps", "2", *overrides),
        "lightning.callbacks.agree.target=run.test_ddp.RanksAgree",
    ]


def environment() -> dict[str, str]:
    """Environment of a run that belongs to no other."""
    inherited = {k: v for k, v in os.environ.items() if k != "TAMING_RUN"}  # of other tests
    return {**inherited, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"}


def load_last(folder: Path) -> dict[str, Any]:
    """Load the last checkpoint of the only run in a folder."""
    (run,) = (folder / "logs").iterdir()
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    return saved


VQGAN = "demo/loopy_vqgan.yaml"
PRIORS = [
    *("cifar10_transformer.yaml", "cifar10_two_level_transformer.yaml", "pixelcnn_cifar10.yaml")
]


def test_main_starts_processes(tmp_path: Path) -> None:
    decay = "model.params.quantizer_config.params.ema_decay=null"
    arguments = arguments_of(VQGAN, *overrides(tmp_path)[VQGAN], decay)
    result = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments, "--devices", "2", "--strategy", "ddp"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert load_last(tmp_path)["state_dict"]["quantize.embedding.steps"] == 2
    assert list(tmp_path.glob("logs/*/images/val/lengths_*.png"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_runs: TinyRuns) -> dict[str, Path]:
    """Folders of runs on two nodes, by configuration: of torchrun, one process on each."""
    folder = tmp_path_factory.mktemp("nodes")
    jobs = {VQGAN: arguments_of(VQGAN, *overrides(folder)[VQGAN])}
    for config in PRIORS:
        jobs[config] = arguments_of(config, *tiny_runs.overrides[config], *tiny_runs.stages(config))
    folders = {config: folder / str(number) for number, config in enumerate(jobs)}
    nodes = ["--num_nodes", "2", "--devices", "1"]
    listed = [(str(folders[config]), [*arguments, *nodes]) for config, arguments in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(listed))
    for place in folders.values():
        place.mkdir()
    with socket.socket() as listener:  # a port on which nobody listens
        listener.bind(("127.0.0.1", 0))
        rendezvous = ["--master_addr", "127.0.0.1", "--master_port"]
        rendezvous.append(str(listener.getsockname()[1]))
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", *rendezvous),
                *("--node_rank", str(rank), str(ROOT / "tests/support/several.py")),
                str(folder / "jobs.json"),
            ],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folders


def test_two_nodes_write_one_run(trained: dict[str, Path]) -> None:
    assert load_last(trained[VQGAN])["state_dict"]["quantize.embedding.steps"] == 2
    assert list(trained[VQGAN].glob("logs/*/images/val/lengths_*.png"))


@pytest.mark.parametrize("config", PRIORS)
def test_main_trains_a_prior(config: str, trained: dict[str, Path], tiny_runs: TinyRuns) -> None:
    saved = load_last(trained[config])
    before = torch.load(tiny_runs.of(config) / "checkpoints/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == before["state_dict"].keys()
    assert list(trained[config].glob("logs/*/images/val/samples_nopix_*.png"))
