"""Pictures of what a prior is given: images, maps and layouts; a class, for one, has none.

Axis letters: B images, C channels, H W image, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor

from taming.models.dummy_cond_stage import DummyCondStage
from taming.models.vqgan import VQModel
from taming.modules.util import AbstractEncoder


@runtime_checkable
class LayoutData(Protocol):
    """A data set of layouts.

    Attributes:
        conditional_builders: What writes layouts as tokens, and draws them, by batch key.
    """

    conditional_builders: Mapping[str, Any]

    def get_textual_label_for_category_no(self, category_no: int) -> str:
        """Name a category."""
        ...


@runtime_checkable
class HasDatasets(Protocol):
    """A data module that shows its data sets, by split."""

    datasets: Mapping[str, Any]


def image_pictures(stage: Any, c: Tensor, quant_c: Tensor) -> dict[str, Tensor]:
    """Show conditions (B, C, H, W) and what their stage keeps of them.

    Args:
        stage: Condition stage.
        c: Conditions.
        quant_c: What ``stage.encode`` made of them.

    Returns:
        Name -> (B, C, H, W).
    """
    rec = stage.decode(quant_c)
    if isinstance(stage, VQModel):
        rec = stage.as_input(rec)
    return {"conditioning": c, "conditioning_rec": rec}


def layout_pictures(
    trainer: pl.Trainer, key: str, tokens: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    """Draw layouts (B, L), if the training data can.

    Args:
        trainer: Has the data.
        key: Key of the layouts in a batch.
        tokens: The layouts.
        size: (W, H) in pixels.

    Returns:
        Name -> (B, 3, H, W) in [-1, 1]; empty where no data set knows how to draw them.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    for dataset in data.datasets.values() if isinstance(data, HasDatasets) else ():
        if isinstance(dataset, LayoutData):
            plot = dataset.conditional_builders[key].plot
            label = dataset.get_textual_label_for_category_no
            drawn = [plot(layout, label, size) for layout in tokens.cpu()]
            return {"conditioning": torch.stack(drawn).to(tokens.device)}
    return {}


def condition_pictures(
    stage: Any,
    key: str,
    c: Tensor,
    quant_c: Tensor,
    size: tuple[int, int],
    trainer: pl.Trainer | None,
) -> dict[str, Tensor]:
    """Show conditions, if they have pictures.

    Args:
        stage: Condition stage.
        key: Key of the conditions in a batch.
        c: Conditions.
        quant_c: What ``stage.encode`` made of them.
        size: (W, H) of the images, in pixels.
        trainer: Has the data that can draw layouts; None if there is none.

    Returns:
        Name -> (B, C, H, W).
    """
    if isinstance(stage, DummyCondStage):
        return {} if trainer is None else layout_pictures(trainer, key, c, size)
    if isinstance(stage, AbstractEncoder) or c.ndim != 4:  # a label, or nothing at all
        return {}
    return image_pictures(stage, c, quant_c)
