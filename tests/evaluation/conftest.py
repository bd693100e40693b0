"""Networks of the tests: what would be downloaded is named as missing."""

import pytest


@pytest.fixture
def without_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not there, and nothing to download."""
    monkeypatch.setenv("TAMING_LPIPS", "/nowhere/heads.pth")
    monkeypatch.setenv("TAMING_INCEPTION", "/nowhere/inception.pth")
    missing = "taming.evaluation.networks.SHIFT_TOLERANT"
    monkeypatch.setattr(missing, "nowhere/vgg.pth")
