"""Lightning data module over data sets from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import Dataset

from taming.data.loader import Loader, is_stream, length_of
from taming.data.stream_loader import make_loader
from taming.util import cores, instantiate_from_config

# Stage -> the splits that it needs; other stages need all, since a test may follow a fit.
_SPLITS_OF = {"validate": ("validation",), "test": ("test",)}


class Indexable(Protocol):
    """Object with a length and items by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class WrappedDataset(Dataset[Any]):
    """Data set over any object with a length and items by index."""

    def __init__(self, dataset: Indexable) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, idx: int) -> Any:
        return self.data[idx]


class DataModuleFromConfig(pl.LightningDataModule):
    """Data loaders over data sets given as ``{target, params}`` blocks.

    Order and random numbers follow from the seed that torch was last given; see `Loader`. A resumed
    run keeps the seed that it began with, and reads on from the batch that it had reached.

    Args:
        batch_size: Items per batch and process.
        train: Block of the training set; its items are shuffled.
        validation: Block of the validation set.
        test: Block of the test set.
        wrap: Wrap the data sets in `WrappedDataset`.
        num_workers: Number of loader processes; by default two per item of a batch, at most one
            per CPU that this process may use.

    Attributes:
        datasets: Split name -> data set, for the splits that ``setup`` has built.
        seed: Seed of order and random numbers.

    Raises:
        ValueError: ``batch_size`` or ``num_workers`` is out of range, or no split is given.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        splits = {"train": train, "validation": validation, "test": test}
        self.dataset_configs = {name: c for name, c in splits.items() if c is not None}
        if not self.dataset_configs:
            raise ValueError(f"data needs at least one of the blocks {', '.join(splits)}")
        self.batch_size = batch_size
        self.wrap = wrap
        default_workers = min(2 * batch_size, cores())
        self.num_workers = default_workers if num_workers is None else num_workers
        self.seed = torch.initial_seed()  # that seed_everything has set
        self.datasets: dict[str, Any] = {}
        # Lightning skips a loop only if its dataloader method is not defined.
        if validation is not None:
            self.val_dataloader = partial(self._loader, "validation")
        if test is not None:
            self.test_dataloader = partial(self._loader, "test")

    def prepare_data(self) -> None:
        """Build the data sets on one process per node, so that it alone downloads files."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets that a stage needs, each only once.

        Args:
            stage: "validate" and "test" need one data set; "fit" and None need all.

        Raises:
            ValueError: A data set is empty.
        """
        for name in _SPLITS_OF.get(stage or "", self.dataset_configs):
            if name in self.dataset_configs and name not in self.datasets:
                self.datasets[name] = self._build(name)

    def _build(self, split: str) -> Any:
        block = self.dataset_configs[split]
        dataset = instantiate_from_config(block)
        if length_of(dataset) == 0:
            raise ValueError(f"the {split} data set {block['target']} is empty")
        return WrappedDataset(dataset) if self.wrap and not is_stream(dataset) else dataset

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Let the model look at a batch before it is on a GPU, which would wait for that."""
        model = self.trainer and self.trainer.lightning_module
        check = getattr(model, "check_batch", None)
        if check and model and model.device.type != "cpu":  # on a CPU, each step looks itself
            check(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, which a resumed run keeps."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the run that is resumed."""
        self.seed = state_dict["seed"]

    def train_dataloader(self) -> Loader:
        """Return shuffled batches of the training set, from where training is."""
        if "train" not in self.datasets:
            raise ValueError("training needs a data.params.train block with target and params")
        trainer: Any = self.trainer
        if trainer is None:
            return self._loader("train", shuffle=True)
        self.seed = trainer.strategy.broadcast(self.seed)  # or processes might differ in the order
        shuffle = not trainer.overfit_batches
        return self._loader("train", shuffle=shuffle, position=self._position)

    def _position(self) -> tuple[int, int] | None:
        """Return the epoch and the number of its batches that are done, None after the last."""
        if self.trainer is None or self.trainer.state.status == TrainerStatus.FINISHED:
            return 0, 0
        loop: Any = self.trainer.fit_loop
        if loop.epoch_loop._num_ready_batches_reached():
            return None
        batches = loop.epoch_loop.batch_progress
        return loop.epoch_progress.current.processed, batches.current.processed

    def _loader(self, split: str, **options: Any) -> Loader:
        options = {"seed": self.seed, "share": self._share(), **options}
        return make_loader(self.datasets[split], self.batch_size, self.num_workers, **options)

    def _share(self) -> tuple[int, int]:
        """Return the number of this process and of all that share the data."""
        trainer = self.trainer
        if trainer is None or not trainer._accelerator_connector.use_distributed_sampler:
            return 0, 1
        processes = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return processes["rank"], processes["num_replicas"]
