"""The optimizer of the priors, and the schedules of all learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def scheduled(optimizer: torch.optim.Optimizer, schedule: Callable[[int], float]) -> LambdaLR:
    """Let a learning rate follow a schedule, also one that a run is resumed with.

    Args:
        optimizer: Its learning rate is what is scaled.
        schedule: Factor of the learning rate by step.

    Returns:
        What is to be stepped; its state holds the step, not the schedule.
    """
    # LambdaLR puts the attributes of a callable object into checkpoints, and from there back into
    # the new one, which would undo what the configuration says now. A function has none.
    return LambdaLR(optimizer, lambda step: schedule(step))


def decayed_adamw(
    network: nn.Module,
    decayed: tuple[type[nn.Module], ...],
    learning_rate: float,
    schedule: Callable[[int], float] | None,
) -> Any:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) that keeps only some weights small.

    Args:
        network: What to train.
        decayed: Kinds of layers on whose weights there is a decay of 0.01.
        learning_rate: Of all parameters.
        schedule: Factor of the learning rate by step; None for none.

    Returns:
        What ``configure_optimizers`` of a Lightning module may return.
    """
    names = {
        f"{name}.weight" for name, module in network.named_modules() if isinstance(module, decayed)
    }
    parameters = dict(sorted(network.named_parameters()))
    groups = [
        {"params": [p for n, p in parameters.items() if n in names], "weight_decay": 0.01},
        {"params": [p for n, p in parameters.items() if n not in names], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    if schedule is None:
        return optimizer
    scheduler = scheduled(optimizer, schedule)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
