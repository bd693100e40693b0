"""Manual optimization of a generator and, if there is one, of a discriminator.

Lightning leaves the steps of two optimizers to the model, and with them gradient accumulation and
clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from taming.lr_scheduler import scheduled
from taming.models.module import Model
from taming.modules.util import first_non_finite
from taming.util import NonFiniteError, instantiate_from_config

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer


class ManualOptimization(Model):
    """Accumulate, clip and step by hand; ``global_step`` counts the generator's steps only.

    Subclasses return `adam` from ``configure_optimizers`` and call `backward_and_step` for each
    optimizer in ``training_step``.

    Args:
        betas: Coefficients of both Adam optimizers.
        scheduler_config: ``{target, params}`` of a factor of both learning rates by step; None
            keeps them constant.

    Attributes:
        learning_rate: Set by the caller before training.
        accumulate_grad_batches: Batches per optimizer step.
        gradient_clip_val: Largest gradient norm or value; None does not clip.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
    """

    def __init__(
        self, betas: tuple[float, float], scheduler_config: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate = 4.5e-6
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.gradient_clip_algorithm = "norm"
        self.betas = betas
        self.schedule: Callable[[int], float] | None = (
            None if scheduler_config is None else instantiate_from_config(scheduler_config)
        )

    def adam(
        self, generator: Iterable[nn.Parameter], discriminator: nn.Module | None
    ) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
        """Build an Adam optimizer for each network and a schedule for each optimizer.

        Args:
            generator: Parameters of the generator, in the order of its optimizer state.
            discriminator: The other network, or None.

        Raises:
            ValueError: The discriminator's gradients would be accumulated at a changing scale.
        """
        groups = [[parameter for parameter in generator if parameter.requires_grad]]
        if discriminator is not None:
            groups.append(list(discriminator.parameters()))
            if self.accumulate_grad_batches > 1 and self.trainer.precision == "16-mixed":
                raise ValueError(
                    "with precision 16-mixed, accumulate_grad_batches would sum the "
                    "discriminator's gradients at different scales: train with bf16-mixed, or "
                    "without accumulation"
                )
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(group, self.learning_rate, betas=self.betas) for group in groups
        ]
        if self.schedule is None:
            return optimizers, []
        return optimizers, [scheduled(optimizer, self.schedule) for optimizer in optimizers]

    def optimizer_list(self) -> list[LightningOptimizer]:
        """Return the generator's optimizer and, if there is one, the discriminator's."""
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def backward_and_step(
        self, optimizer: LightningOptimizer, loss: Tensor, batch_idx: int
    ) -> None:
        """Run the backward pass and, once enough batches are accumulated, a step.

        A loss without gradient, of a discriminator that does not train yet, moves its schedule
        alone; Adam then counts from the first step with gradients.
        """
        if loss.requires_grad:
            self.manual_backward(loss / self.accumulate_grad_batches)
        if (batch_idx + 1) % self.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        inner = optimizer.optimizer
        if not loss.requires_grad:
            inner.step()  # changes nothing without gradients, but the schedule waits for it
        elif optimizer is self.optimizer_list()[0]:
            optimizer.step()
        else:
            # The Trainer counts the steps of its wrapped optimizers. Bypassing the wrapper, with
            # precision and hooks as usual, keeps global_step, max_steps, schedules and file names
            # counting generator steps.
            self.trainer.strategy.optimizer_step(inner, lambda: None, model=self)
        optimizer.zero_grad()
        schedulers: Any = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler.optimizer is inner:
                scheduler.step()

    @contextmanager
    def locating_non_finite(self, *inputs: Any) -> Iterator[None]:
        """Add the step and the first module whose output is not finite to a `NonFiniteError`.

        Args:
            *inputs: Arguments of ``forward`` with which to look for the module.
        """
        try:
            yield
        except NonFiniteError as error:
            self.eval()  # the second pass must not train anything
            culprit = first_non_finite(self, *inputs) or "the loss"
            raise NonFiniteError(
                f"{error} at step {self.global_step}; the first module whose output is not finite "
                f"is {culprit}"
            ) from error

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients; Lightning calls this after it has undone any loss scaling."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def on_validation_model_zero_grad(self) -> None:
        """Keep accumulated gradients; by default, Lightning drops them before validation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make loggers count generator steps; Lightning counts batches here."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step
