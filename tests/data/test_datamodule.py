"""Data modules: each data set is built once, and each split has the right loader."""

import os
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from taming.data.datamodule import DataModuleFromConfig, WrappedDataset

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

built: list[int] = []


class Numbers(Dataset):
    """The numbers 0 to length - 1; keeps a record of how often it was built."""

    def __init__(self, length):
        built.append(length)
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(range(self.length)[index])])


class Sum(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        self.seen += batch.flatten().tolist()
        return (self.weight * batch).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def block(length):
    return {"target": f"{__name__}.Numbers", "params": {"length": length}}


@pytest.fixture
def trainer(tmp_path):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


@pytest.fixture(autouse=True)
def nothing_built():
    built.clear()


few_workers = pytest.mark.filterwarnings("ignore:.*does not have many workers")
few_batches = pytest.mark.filterwarnings("ignore:The number of training batches")


@few_workers
@few_batches
def test_fit_validate_and_test_build_every_set_once_and_see_every_item(trainer):
    config = {"train": block(5), "validation": block(3), "test": block(2)}
    data = DataModuleFromConfig(2, **OmegaConf.create(config), num_workers=0)
    model = Sum()
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    trainer.test(model, data, verbose=False)
    assert built == [5, 3, 2]
    assert sorted(model.seen) == [0, 1, 2, 3, 4]
    assert list(data.datasets) == ["train", "validation", "test"]


@few_workers
@few_batches
def test_a_stage_builds_what_it_needs(trainer):
    data = DataModuleFromConfig(2, block(5), block(3), block(2), num_workers=0)
    trainer.test(Sum(), data, verbose=False)
    assert built == [2]
    trainer.validate(Sum(), data, verbose=False)
    assert built == [2, 3]
    trainer.fit(Sum(), data)
    assert built == [2, 3, 5]


@few_workers
@few_batches
def test_fit_needs_no_validation_split(trainer):
    with pytest.warns(UserWarning, match="val_dataloader"):
        trainer.fit(Sum(), DataModuleFromConfig(2, train=block(4), num_workers=0))
    assert trainer.global_step == 2


def test_only_training_is_shuffled():
    data = DataModuleFromConfig(2, block(5), block(3), block(20), num_workers=0)
    data.setup()
    assert [batch.flatten().tolist() for batch in data.val_dataloader()] == [[0, 1], [2]]
    assert len(data.val_dataloader()) == 2
    assert torch.cat(list(data.test_dataloader())).flatten().tolist() == list(range(20))
    assert sorted(torch.cat(list(data.train_dataloader())).flatten().tolist()) == [0, 1, 2, 3, 4]


def test_a_resumed_run_keeps_its_seed():
    torch.manual_seed(3)
    data = DataModuleFromConfig(2, block(9), num_workers=0)
    torch.manual_seed(4)
    other = DataModuleFromConfig(2, block(9), num_workers=0)
    for module in (data, other):
        module.setup()
    orders = [torch.cat(list(m.train_dataloader())).flatten().tolist() for m in (data, other)]
    other.load_state_dict(data.state_dict())
    assert torch.cat(list(other.train_dataloader())).flatten().tolist() == orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@few_workers
@few_batches
def test_nothing_is_shuffled_where_batches_are_to_be_learned_by_heart(tmp_path):
    options = {"limit_train_batches": 1.0, "overfit_batches": 2, "max_epochs": 2}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, **options, **quiet)
    model = Sum()
    trainer.fit(model, DataModuleFromConfig(2, block(9), block(9), num_workers=0))
    assert model.seen == [0, 1, 2, 3] * 2


def test_workers_give_the_same_batches():
    batches = []
    for workers in (0, 2):
        data = DataModuleFromConfig(2, validation=block(5), num_workers=workers)
        data.setup()
        loader = data.val_dataloader()
        batches.append([batch.tolist() for batch in loader])
    assert batches[0] == batches[1]


@pytest.mark.parametrize("batch_size", [1, 10**6])
def test_default_workers_fit_the_batch_and_the_machine(batch_size, monkeypatch):
    data = DataModuleFromConfig(batch_size, train=block(1))
    assert data.num_workers == min(2 * batch_size, CPUS)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 5, 6}, raising=False)
    assert DataModuleFromConfig(batch_size, train=block(1)).num_workers == min(2 * batch_size, 3)


def test_wrapping_makes_a_data_set_of_anything_indexable():
    data = DataModuleFromConfig(
        2, validation={"target": "builtins.list", "params": {}}, num_workers=0, wrap=True
    )
    with pytest.raises(ValueError, match="validation data set builtins.list is empty"):
        data.setup()
    data = DataModuleFromConfig(2, validation=block(3), num_workers=0, wrap=True)
    data.setup()
    assert isinstance(data.datasets["validation"], WrappedDataset)
    assert len(WrappedDataset([7, 8])) == 2
    assert WrappedDataset([7, 8])[1] == 8


def test_an_empty_data_set_is_named():
    data = DataModuleFromConfig(2, block(3), validation=block(0), num_workers=0)
    with pytest.raises(ValueError, match="validation data set .*Numbers is empty"):
        data.setup()


def test_fit_without_a_training_split_names_the_missing_block(trainer):
    with pytest.raises(ValueError, match="data.params.train"):
        trainer.fit(Sum(), DataModuleFromConfig(2, validation=block(3), num_workers=0))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="train, validation, test"):
        DataModuleFromConfig(2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DataModuleFromConfig(0, block(1))
    with pytest.raises(ValueError, match="num_workers must be 0 or more, got -1"):
        DataModuleFromConfig(1, block(1), num_workers=-1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_model_looks_at_a_batch_before_it_is_on_a_gpu(device: str) -> None:
    seen: list[object] = []
    data = DataModuleFromConfig(batch_size=1, train={"target": "x"})
    model = SimpleNamespace(device=torch.device(device), check_batch=seen.append)
    data.trainer = SimpleNamespace(lightning_module=model)  # type: ignore[assignment]
    assert data.on_before_batch_transfer("batch", 0) == "batch"
    assert seen == (["batch"] if device == "cuda" else [])
