"""A learning rate follows the schedule that the configuration names now."""

from typing import Any

import pytest
from support.models import DDCONFIG, GAN, prior

from taming.models.vqgan import VQModel


def scheduled(kind: str, steps: int) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers of a model whose learning rate rises for so many steps."""
    sizes = {"warm_up_steps": steps, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.0}
    schedule = {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {**sizes, "max_decay_steps": 20},
    }
    model: Any = (
        prior(scheduler_config=schedule)
        if kind == "prior"
        else VQModel(DDCONFIG, GAN, 16, 4, scheduler_config=schedule)
    )
    model.learning_rate = 1e-3
    optimizers, schedulers = model.configure_optimizers()
    return optimizers, [s["scheduler"] if isinstance(s, dict) else s for s in schedulers]


@pytest.mark.parametrize("kind", ["prior", "tokenizer"])
def test_a_schedule_that_is_changed_on_resume_counts_from_the_step_that_was_reached(
    kind: str,
) -> None:
    (before, old), (after, new) = scheduled(kind, 10), scheduled(kind, 5)
    assert len(old) == len(new) == (1 if kind == "prior" else 2)
    for optimizer, scheduler, other, resumed in zip(before, old, after, new, strict=True):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 1 / 10)
        resumed.load_state_dict(scheduler.state_dict())
        other.step()
        resumed.step()
        assert other.param_groups[0]["lr"] == pytest.approx(1e-3 * 2 / 5)
