"""LPIPS: agreement with the reference package, where its weights come from, and its gradients."""

import hashlib
import urllib.error
from pathlib import Path

import lpips as reference_package
import pytest
import torch

from taming.downloads import PUBLISHED
from taming.modules.losses import lpips
from taming.modules.losses.lpips import LPIPS

HEADS = Path(reference_package.__file__).parent / "weights/v0.1/vgg.pth"


@pytest.fixture(scope="module")
def vgg_path(tmp_path_factory):
    """A file in the format of torchvision's VGG16, random, scaled to keep features alive."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in lpips.VGG16().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        fan_in = value[0].numel() if value.ndim > 1 else 1e4
        weights["features." + name.partition(".")[2]] = noise * (2 / fan_in) ** 0.5
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**weights, "classifier.0.bias": torch.zeros(1)}, path)
    return str(path)


@pytest.fixture(scope="module")
def loss(vgg_path):
    return LPIPS(weights=str(HEADS), vgg_weights=vgg_path).fetch_weights()


def images(*shape):
    return torch.rand(2, *shape) * 2 - 1


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision.models")
def test_agrees_with_the_reference_package(loss):
    reference = reference_package.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    reference.net.load_state_dict(loss.net.state_dict())
    for mine, theirs in zip(loss.heads, reference.lins, strict=True):
        assert torch.equal(mine.model[-1].weight, theirs.model[-1].weight)
    x, y = images(2, 3, 40, 48)
    torch.testing.assert_close(loss(x, y), reference(x, y), rtol=1e-5, atol=1e-6)


def test_is_the_same_in_both_modes_frozen_and_zero_on_equal_images(loss):
    x, y = images(1, 3, 32, 32)
    assert torch.equal(loss.train()(x, y), loss.eval()(x, y))
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert loss(x, x).item() == 0


@pytest.mark.reported(12)
def test_vanishing_features_have_finite_gradients_and_others_length_one():
    """A bare root gives NaN where all channels are 0, infinity where their squares underflow."""
    features = torch.zeros(3, 8, 1, 1)
    features[1], features[2] = 1e-30, torch.rand(8, 1, 1) + 0.1
    features.requires_grad_()
    normal = lpips.normalize(features)
    assert normal[0].norm() == 0 and normal[2].norm().item() == pytest.approx(1)
    normal.sum().backward()
    assert torch.isfinite(features.grad).all()


def test_grey_images_count_as_three_equal_channels(loss):
    x, y = images(1, 1, 32, 32)
    expected = loss(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1))
    torch.testing.assert_close(loss(x, y), expected)
    with pytest.raises(ValueError, match="got 4; perceptual_weight: 0 "):
        loss(*images(1, 4, 32, 32))


def test_use_dropout_only_names_the_weights(vgg_path, loss):
    other = LPIPS(use_dropout=False, weights=str(HEADS), vgg_weights=vgg_path).fetch_weights()
    assert "lin0.model.1.weight" in loss.state_dict()
    assert "lin0.model.0.weight" in other.state_dict()
    x, y = images(1, 3, 32, 32)
    assert torch.equal(loss(x, y), other(x, y))


@pytest.mark.reported(25)
def test_environment_names_the_files(monkeypatch, vgg_path, loss):
    monkeypatch.setenv("TAMING_LPIPS", str(HEADS))
    monkeypatch.setenv("TAMING_VGG16", vgg_path)
    found = LPIPS().fetch_weights().state_dict()
    assert all(torch.equal(found[key], value) for key, value in loss.state_dict().items())
    x, y = images(1, 3, 32, 32)
    assert torch.equal(LPIPS()(x, y), loss(x, y))  # nobody asked it to fetch anything


def test_without_pretraining_nothing_is_fetched(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("fetched")

    for name in ("get_ckpt_path", "load_file", "fetch_vgg16"):
        monkeypatch.setattr(lpips, name, fail)
    assert set(LPIPS(pretrained=False).fetch_weights().state_dict()) >= {"lin4.model.1.weight"}


@pytest.mark.reported(25)
def test_weights_from_a_checkpoint_are_not_downloaded(monkeypatch, loss):
    def fail(*args, **kwargs):
        raise AssertionError("nothing should be fetched")

    for name in ("get_ckpt_path", "load_file", "fetch_vgg16"):
        monkeypatch.setattr(lpips, name, fail)
    other = LPIPS()
    other.load_state_dict(loss.state_dict())
    other.fetch_weights()
    x, y = images(1, 3, 32, 32)
    assert torch.equal(loss(x, y), other(x, y))


def test_heads_are_downloaded_once_and_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    _, name, md5 = PUBLISHED["vgg_lpips"]
    monkeypatch.setitem(PUBLISHED, "vgg_lpips", (HEADS.as_uri(), name, md5))
    path = lpips.fetch_heads()
    assert path.read_bytes() == HEADS.read_bytes()
    monkeypatch.setitem(PUBLISHED, "vgg_lpips", ("file:///does/not/exist", name, md5))
    assert lpips.fetch_heads() == path
    path.write_bytes(b"half a file")
    with pytest.raises(ConnectionError, match="TAMING_LPIPS.*perceptual_weight: 0") as caught:
        lpips.fetch_heads()
    assert str(path) in str(caught.value)
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"another file")
    monkeypatch.setitem(PUBLISHED, "vgg_lpips", (wrong.as_uri(), name, md5))
    with pytest.raises(ValueError, match=hashlib.md5(b"another file").hexdigest()):
        lpips.fetch_heads()


def test_unreachable_vgg_names_the_address_and_the_path(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(ConnectionError, match="TAMING_VGG16.*perceptual_weight: 0") as caught:
        lpips.fetch_vgg16()
    assert str(tmp_path / "checkpoints" / "vgg16-397923af.pth") in str(caught.value)
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in str(caught.value)


def test_files_that_are_missing_or_others_are_named(tmp_path, vgg_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        LPIPS(weights="nowhere.pth").fetch_weights()
    with pytest.raises(ValueError, match="lin0.model.1.weight is missing"):
        LPIPS(weights=vgg_path).fetch_weights()
    with pytest.raises(ValueError, match="features.0.bias is missing"):
        LPIPS(weights=str(HEADS), vgg_weights=str(HEADS)).fetch_weights()


def test_vgg_equals_torchvisions():
    from torchvision.models import vgg16

    with torch.device("meta"):
        expected = vgg16(weights=None).features.state_dict()
        found = lpips.VGG16().state_dict()
    assert {k.partition(".")[2]: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in expected.items()
    }
