"""A training that goes wrong is named once, with what to change, and a good one is left alone."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.models import ToyDataModule, ToyModel, trainer

from taming.run.advice import SYMPTOMS, Advice

GOOD = {
    "train/usage": 0.9,
    "val/usage": 0.01,  # of few pictures
    "val/never_within_threshold": 0.2,
    "val/mean_length": 2.0,
    "val/relative_threshold": 0.3,
    "val/disc_factor": 1.0,
    "val/disc_loss": 0.8,
}
BAD = {
    "collapse": {"train/usage": 0.02},
    "endless": {"val/never_within_threshold": 0.99, "val/mean_length": 3.9},
    "idle": {"val/mean_length": 1.001},
    "discriminator": {"val/disc_loss": 0.01},
}


def look(advice: Advice, metrics: dict[str, float], **state: Any) -> None:
    """Let it see the numbers of an epoch that ends with a validation."""
    state = {"sanity_checking": False, "is_global_zero": True, **state}
    seen: Any = SimpleNamespace(callback_metrics=metrics, **state)
    advice.on_validation_end(seen, None)  # type: ignore[arg-type]
    advice.on_train_epoch_start(seen, None)  # type: ignore[arg-type]


def test_there_is_a_case_of_each() -> None:
    assert {*BAD} == {*SYMPTOMS}


@pytest.mark.parametrize("name", [*BAD])
def test_what_lasts_is_named_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    advice = Advice()
    for metrics in (GOOD, GOOD | BAD[name], GOOD, GOOD | BAD[name]):
        look(advice, metrics)
    assert not caplog.records
    for _ in range(3):
        look(advice, GOOD | BAD[name])
    (record,) = caplog.records
    assert record.message == SYMPTOMS[name].text.format_map(
        {key.partition("/")[2]: value for key, value in (GOOD | BAD[name]).items()}
        | {"usage": BAD[name].get("train/usage", 0)}
    )
    look(advice, GOOD)
    look(advice, GOOD | BAD[name])
    look(advice, GOOD | BAD[name])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", [*BAD])
def test_other_processes_and_sanity_checks_are_silent(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for state in ({"is_global_zero": False}, {"sanity_checking": True}):
        advice = Advice()
        for _ in range(3):
            look(advice, {k: v for k, v in (GOOD | BAD[name]).items() if k[0] == "v"}, **state)
    assert not caplog.records


def test_levels_are_looked_at_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    advice = Advice()
    for _ in range(2):
        look(advice, {"train/top_usage": 0.01, "train/bottom_usage": 0.9, "train/loss": 1.0})
    (record,) = caplog.records
    assert record.message.startswith("level top: only 1.0% of the codes are in use")


def test_numbers_of_other_models_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    advice = Advice()
    for _ in range(3):
        look(advice, {})
        look(advice, {"val/loss": 0.0, "val/mean_length": 1.0, "val/disc_loss": 0.0})
    assert not caplog.records


def test_a_training_is_looked_at_when_its_numbers_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(ToyModel):
        def on_train_epoch_end(self) -> None:
            self.log("train/usage", 0.01)

        def on_validation_epoch_end(self) -> None:
            self.log_dict({"val/never_within_threshold": 1.0, "val/mean_length": 4.0})

    for epochs in (1, 2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "taming.advice"):
            trainer(tmp_path, max_epochs=epochs, callbacks=[Advice()]).fit(Wrong(), ToyDataModule())
        own = [r.message for r in caplog.records if r.name == "taming.advice"]
        assert len(own) == 2 * (epochs - 1)
