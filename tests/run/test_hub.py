"""Models go to the hub and come back, by its own client; where they cannot, one line says why."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.hub import Hub, serving
from support.models import tokenizer_of

from taming.tokenizer import Tokenizer

constants = pytest.importorskip("huggingface_hub.constants")
NAME = "someone/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client takes for the real one, whose addresses it fixed when imported."""
    with serving(Hub()) as served:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        address = template.replace(constants.ENDPOINT, served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield served


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_of("residual"))


def test_a_pushed_model_is_pulled_bit_for_bit(hub: Hub, tokenizer: Tokenizer) -> None:
    assert tokenizer.push_to_hub(NAME).startswith(hub.url)
    assert sorted(hub.files(NAME)) == ["README.md", "config.yaml", "model.safetensors"]
    again = Tokenizer.from_pretrained(NAME)
    weights, wanted = again.model.state_dict(), tokenizer.model.state_dict()
    assert all(torch.equal(weights[key], wanted[key]) for key in weights)
    Tokenizer.from_pretrained(NAME).push_to_hub("another")  # of whoever is logged in
    assert hub.files("someone/another").keys() == hub.files(NAME).keys()
    assert b"# tiny" in hub.files(NAME)["README.md"]


def test_a_second_push_is_one_commit_and_leaves_the_card(hub: Hub, tokenizer: Tokenizer) -> None:
    tokenizer.push_to_hub(NAME)
    hub.files(NAME)["README.md"] = b"written by hand"
    before = dict(hub.files(NAME))
    with torch.no_grad():
        tokenizer.model.quant_conv.bias.add_(1)
    tokenizer.push_to_hub(NAME, "float16", private=True, message="halved")
    assert len(hub.commits[NAME]) == 3  # the empty one too
    assert hub.files(NAME)["README.md"] == b"written by hand"
    assert len(hub.files(NAME)["model.safetensors"]) < len(before["model.safetensors"])
    bias = Tokenizer.from_pretrained(NAME).model.quant_conv.bias
    torch.testing.assert_close(bias, tokenizer.model.quant_conv.bias, rtol=1e-3, atol=1e-3)


def test_without_a_network_the_cache_serves_and_otherwise_a_folder_is_asked_for(
    hub: Hub, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.push_to_hub(NAME)
    Tokenizer.from_pretrained(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    assert Tokenizer.from_pretrained(NAME).channels == 3
    remedy = "download the repository elsewhere and give the path of its folder$"
    for call in (Tokenizer.from_pretrained, tokenizer.push_to_hub):
        with pytest.raises(ConnectionError, match=f"someone/other.*{remedy}") as error:
            call("someone/other")
        assert "\n" not in str(error.value)
    assert len(hub.requests) == count
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    with pytest.raises(ConnectionError, match=f"someone/other.*{remedy}"):
        Tokenizer.from_pretrained("someone/other")


def test_what_the_hub_does_not_have_is_named(hub: Hub, tokenizer: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="no model someone/none, or it is private"):
        Tokenizer.from_pretrained("someone/none")
    tokenizer.push_to_hub(NAME)
    with pytest.raises(FileNotFoundError, match=f"{NAME} has no such revision"):
        Tokenizer.from_pretrained(NAME, revision="v2")
    del hub.files(NAME)["model.safetensors"]
    hub.commits[NAME].append(hub.files(NAME))
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        Tokenizer.from_pretrained(NAME)


def test_only_a_name_with_an_owner_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    for name in ("tiny", "logs/some/run", tmp_path / "none", "../x"):
        with pytest.raises(FileNotFoundError, match="does not exist, and no model of this name"):
            Tokenizer.from_pretrained(name)
    assert not hub.requests


def test_the_missing_client_is_named_with_its_command(
    hub: Hub, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (Tokenizer.from_pretrained, tokenizer.push_to_hub):
        with pytest.raises(ValueError, match=r"pip install 'loopy-taming\[hub\]'"):
            call(NAME)
