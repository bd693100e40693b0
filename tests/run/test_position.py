"""Training continues from any checkpoint, of whichever hook, as if it had not been stopped."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import IterableDataset

from taming.data.datamodule import DataModuleFromConfig
from taming.run.checkpoints import RngState, SafeCheckpointIO
from taming.run.epoch_values import EpochValues


class Numbers(torch.utils.data.Dataset):
    """Six numbers, each with noise."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor([index + float(torch.rand(()))])


class Stream(IterableDataset):
    """The same without a length."""

    def __iter__(self):
        yield from map(Numbers().__getitem__, range(6))


class Model(pl.LightningModule):
    """A weight, and a loss with noise."""

    def __init__(self, plateau=False):
        super().__init__()
        self.plateau = plateau
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch * torch.rand(())).mean()
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.weight * batch * torch.rand(())).mean().detach())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        if not self.plateau:
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return [optimizer], [{"scheduler": plateau, "monitor": "train/loss_epoch"}]


class Lines(Logger):
    """Keep what is logged."""

    name = version = "lines"

    def __init__(self):
        super().__init__()
        self.lines: dict[tuple[str, int | None], float] = {}

    def log_metrics(self, metrics, step=None):
        self.lines |= {(name, step): value for name, value in metrics.items()}

    def log_hyperparams(self, *args, **kwargs):
        pass


class Watch(pl.Callback):
    """Keep what happens, and save a checkpoint in every hook.

    Attributes:
        events: What has happened.
        saved: File -> number of the events before its checkpoint.
    """

    def __init__(self, folder=None):
        self.folder = folder
        self.events: list[Any] = []
        self.saved: dict[Any, int] = {}
        self.begin = 0  # of a validation

    def happen(self, trainer, *what):
        self.events.append((*what, trainer.current_epoch, trainer.global_step))

    def save(self, trainer, hook, before):
        if self.folder is not None and not trainer.sanity_checking:
            file = self.folder / f"{len(self.saved):02} {hook}.ckpt"
            trainer.save_checkpoint(file)
            self.saved[file] = before

    def on_train_epoch_start(self, trainer, *args):
        self.save(trainer, "on_train_epoch_start", len(self.events))
        self.happen(trainer, "epoch")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.happen(trainer, "batch", batch_idx, batch.tolist(), module.weight.item())
        self.save(trainer, "on_train_batch_end", len(self.events))

    def on_validation_start(self, trainer, *args):
        self.begin = len(self.events)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *args):
        if not trainer.sanity_checking:
            self.happen(trainer, "validation", batch_idx, batch.tolist())
            self.save(trainer, "on_validation_batch_end", self.begin)

    def on_validation_end(self, trainer, *args):
        self.save(trainer, "on_validation_end", len(self.events))

    def on_train_epoch_end(self, trainer, *args):
        self.happen(trainer, "end of epoch")
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.save(trainer, "on_train_epoch_end", len(self.events))

    def on_train_end(self, trainer, *args):
        self.save(trainer, "on_train_end", len(self.events))


def train(watch, stream=False, validate=True, plateau=False, seed=1, ckpt_path=None, **options):
    pl.seed_everything(seed, verbose=False)
    data = {"target": f"{__name__}.{'Stream' if stream else 'Numbers'}"}
    module = DataModuleFromConfig(2, data, data if validate else None, num_workers=0)
    logger, model = Lines(), Model(plateau)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, **options},
        logger=logger,
        callbacks=[RngState(), EpochValues(), watch],
        plugins=[SafeCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=module, ckpt_path=ckpt_path, weights_only=bool(ckpt_path) or None)
    return logger.lines, model.weight.item(), trainer.optimizers[0].param_groups[0]["lr"]


def saved_step(file):
    return torch.load(file, weights_only=True)["global_step"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*`val_dataloader`")
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "plateau": True},
        {"max_steps": 6},
        {"max_steps": 6, "validate": False},
        {"max_epochs": 2, "validate": False, "limit_train_batches": 2},
        {"max_epochs": 2, "val_check_interval": 2},
        {"max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None},
        {"max_epochs": 2, "stream": True},
        {"max_epochs": 2, "accumulate_grad_batches": 3},
    ],
    ids=str,
)
def test_training_continues_from_every_checkpoint(tmp_path, options):
    whole = Watch(tmp_path)
    lines, *state = train(whole, **options)
    assert len(whole.saved) > 8
    last = list(whole.saved)[-1]
    for file, before in whole.saved.items():
        if "accumulate_grad_batches" in options and "batch_end" in file.name:
            continue  # accumulated gradients are not saved: LastCheckpoint waits for the step
        if "plateau" in options and "epoch_end" in file.name:
            continue  # before the schedule's step: LastCheckpoint saves after it
        if options.get("max_steps") == saved_step(file) and file != last:
            continue  # Lightning ends at once: LastCheckpoint waits for the validation
        rest = Watch()
        others, *end = train(rest, seed=2, ckpt_path=file, **options)
        assert rest.events == whole.events[before:], file
        assert others.items() <= lines.items(), file
        assert file == last or end == state, file


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_training_that_was_stopped_within_an_epoch_continues_it(tmp_path):
    whole, first, second = Watch(), Watch(tmp_path), Watch()
    _, *state = train(whole, max_steps=6)
    train(first, max_steps=4)
    last = list(first.saved)[-1]
    _, *end = train(second, ckpt_path=last, max_steps=6)
    assert first.events[:-1] + second.events == whole.events  # but for the early end of an epoch
    assert end == state


def test_ranks_draw_of_their_own_while_they_train_and_together_otherwise() -> None:
    state = RngState()
    fitting = {"current_epoch": 1, "state": SimpleNamespace(fn=TrainerFn.FITTING)}
    progress = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(processed=2)))
    fitting["fit_loop"] = SimpleNamespace(epoch_loop=progress)
    drawn: dict[str, list[float]] = {"batch": [], "epoch": [], "validation": []}
    for rank in range(3):
        trainer: Any = SimpleNamespace(global_rank=rank, **fitting)
        state.on_train_epoch_start(trainer, Model())
        drawn["epoch"].append(float(torch.rand(())))
        state.on_train_batch_start(trainer, Model(), None, 5)
        drawn["batch"].append(float(torch.rand(())))
        state.on_validation_start(trainer, Model())
        drawn["validation"].append(float(torch.rand(())))
    different = {name: len(set(values)) for name, values in drawn.items()}
    assert different == {"batch": 3, "epoch": 1, "validation": 1}
