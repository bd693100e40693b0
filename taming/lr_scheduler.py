"""Schedules of one number over training steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR


class LambdaWarmUpCosineScheduler:
    """Linear warm-up, then half a cosine down, then constant: a factor for ``LambdaLR``.

    Args:
        warm_up_steps: Steps of the linear rise from ``lr_start`` to ``lr_max``.
        lr_min: Value at ``max_decay_steps`` and after.
        lr_max: Value at the end of the rise.
        lr_start: Value at step 0.
        max_decay_steps: Step at which the cosine reaches ``lr_min``.
        verbosity_interval: Not used; accepted for the original's configs.

    Example:
        >>> schedule = LambdaWarmUpCosineScheduler(10, 0.0, 1.0, 0.5, max_decay_steps=30)
        >>> [round(schedule(step), 2) for step in (0, 5, 10, 20, 30, 99)]
        [0.5, 0.75, 1.0, 0.5, 0.0, 0.0]
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        self.warm_up_steps = warm_up_steps
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_start = lr_start
        self.max_decay_steps = max_decay_steps

    def schedule(self, n: int) -> float:
        """Return the value at step n."""
        if n < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) * n / self.warm_up_steps
        progress = (n - self.warm_up_steps) / max(self.max_decay_steps - self.warm_up_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.lr_min + (self.lr_max - self.lr_min) * cosine

    def __call__(self, n: int) -> float:
        """Return the value at step n."""
        return self.schedule(n)


def scheduled(optimizer: torch.optim.Optimizer, schedule: Callable[[int], float]) -> LambdaLR:
    """Build a ``LambdaLR`` whose checkpoints hold the step but not the schedule.

    Args:
        optimizer: Optimizer whose learning rate is scaled.
        schedule: Factor of the learning rate by step.
    """
    # LambdaLR saves the attributes of a callable object and restores them in a resumed run, which
    # would undo changes of the configuration. A function has no attributes.
    return LambdaLR(optimizer, lambda step: schedule(step))
