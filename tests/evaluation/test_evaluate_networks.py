"""Feature networks: their files, what they see, and what is said of those that are missing."""

import importlib.metadata
import sys
from pathlib import Path
from urllib.error import URLError

import lpips as reference_package
import pytest
import torch
from skimage import data
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import FrechetInceptionDistance

from taming.downloads import file_hash
from taming.evaluation import networks
from taming.evaluation.evaluate import Evaluation
from taming.evaluation.measures import FrechetDistance, precision_and_recall
from taming.modules.losses import st_lpips
from taming.modules.losses.lpips import LPIPS, VGG16
from taming.pictures import from_levels

CPU = torch.device("cpu")
HEADS = Path(reference_package.__file__).parent / "weights/v0.1/vgg.pth"


def levels(count: int, height: int = 24, width: int = 20, channels: int = 3) -> torch.Tensor:
    """Noise (B, C, H, W) uint8."""
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


@pytest.fixture(scope="module")
def shift_tolerant():
    return networks.shift_tolerant(CPU)


def test_st_lpips_sees_noise_that_changes_fewer_pixels_than_a_shift(shift_tolerant):
    photo = torch.from_numpy(data.astronaut()[:260:4, :260:4].copy()).permute(2, 0, 1)[None]
    image, shifted = photo[..., :64, :64], photo[..., 1:, 1:]
    noisy = (image + 12 * torch.randn(image.shape)).clamp(0, 255).to(torch.uint8)
    seen = [shift_tolerant.see(other) for other in (image, shifted, noisy)]
    same, shift, noise = (float(shift_tolerant.compare(seen[0], other)) for other in seen)
    errors = [(image.float() - other).square().mean() for other in (shifted, noisy)]
    assert same == 0 < shift < noise and errors[0] > errors[1]


def test_st_lpips_compares_sets_by_the_mean_of_the_last_features(shift_tolerant):
    x, y = levels(6), levels(5)
    distance = FrechetDistance()
    for images, real in ((x, True), (y, False)):
        distance.update(shift_tolerant.vectors(shift_tolerant.see(images)), real)

    class Network(torch.nn.Module):
        num_features = 512

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen = shift_tolerant.see(images)
            return seen[-1].mean(dim=(2, 3)).double()

    direct = FrechetInceptionDistance(Network())
    direct.update(x, real=True)
    direct.update(y, real=False)
    assert distance.compute() == pytest.approx(float(direct.compute()), rel=1e-3)


def test_files_are_named_with_their_hash_and_grey_counts_as_three_channels(shift_tolerant):
    assert shift_tolerant.about["sha256"].startswith("44597da6")
    assert shift_tolerant.about["file"] == "vgg_shift_tolerant.pth"
    grey = levels(1, channels=1)
    seen = (shift_tolerant.see(images)[-1] for images in (grey, grey.expand(-1, 3, -1, -1)))
    assert torch.equal(*seen)
    assert "1 or 3 channels" in shift_tolerant.refusal((1, 4, 24, 24))
    assert "at least 18 pixels" in shift_tolerant.refusal((1, 3, 24, 17))
    assert shift_tolerant.see(levels(1, 18, 18))[-1].shape == (1, 512, 3, 3)


def test_lpips_is_that_of_the_loss(tmp_path, monkeypatch):
    vgg = VGG16().state_dict()
    names = {name: f"features.{name.partition('.')[2]}" for name in vgg}
    torch.save({names[name]: value for name, value in vgg.items()}, tmp_path / "vgg16.pth")
    monkeypatch.setenv("TAMING_LPIPS", str(HEADS))
    monkeypatch.setenv("TAMING_VGG16", str(tmp_path / "vgg16.pth"))
    measure, x, y = networks.lpips(CPU), levels(2), levels(2)
    wanted = LPIPS()(from_levels(x), from_levels(y)).flatten()
    assert measure.compare is not None and measure.vectors is None
    torch.testing.assert_close(measure.compare(measure.see(x), measure.see(y)), wanted)
    assert measure.about["sha256"] == file_hash(tmp_path / "vgg16.pth", "sha256")
    assert measure.about["heads"]["file"] == "vgg.pth"


def test_inception_is_torch_fidelitys_with_the_file_that_is_named(tmp_path, monkeypatch):
    module = feature_extractor_inceptionv3
    with pytest.MonkeyPatch.context() as patch:  # random weights, in the form of the original's
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, s: None)
        original = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    file = tmp_path / "inception.pth"
    torch.save(original.state_dict(), file)
    monkeypatch.setenv("TAMING_INCEPTION", str(file))
    measure, x = networks.inception(CPU, "r"), levels(1)
    assert (measure.name, measure.distance) == ("rFID", "rFID")
    assert measure.about["sha256"] == file_hash(file, "sha256")
    assert measure.vectors is not None
    torch.testing.assert_close(measure.vectors(measure.see(x)), original(x)[0])
    torch.save({"code": LPIPS}, file)
    with pytest.raises(ValueError, match=r"inception.pth does not hold weights alone"):
        networks.inception(CPU, "r")


def test_what_is_missing_is_named_with_place_and_remedy(tmp_path, monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("TAMING_LPIPS", "TAMING_VGG16", "TAMING_INCEPTION"):
        monkeypatch.delenv(name, raising=False)
    measures, missing = networks.all_measures(CPU, "r")
    assert [m.name for m in measures] == ["PSNR", "SSIM", "MS-SSIM", "ST-LPIPS"]
    for name, place, variable in (
        ("LPIPS", "hub/taming/vgg.pth", "TAMING_LPIPS"),
        ("rFID", f"hub/checkpoints/{networks.INCEPTION}", "TAMING_INCEPTION"),
    ):
        assert str(tmp_path / place) in missing[name] and variable in missing[name]
        assert "\n" not in missing[name] and "perceptual_weight" not in missing[name]


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(st_lpips, "distribution", absent)
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setenv("TAMING_LPIPS", "/nowhere/heads.pth")
    measures, missing = networks.all_measures(CPU, "g")
    assert not measures
    assert missing == {
        f"ST-LPIPS, {networks.FRECHET}": "stlpips-pytorch is not installed: pip install "
        "'loopy-taming[eval]'",
        "gFID": "torch_fidelity is not installed: pip install 'loopy-taming[eval]'",
    }


def test_precision_and_recall_tell_quality_from_variety():
    real = torch.randn(60, 4)
    narrow = real[:1] + 0.01 * torch.randn(60, 4)  # all near one real picture
    assert precision_and_recall(real, real) == (1.0, 1.0)
    precision, recall = precision_and_recall(narrow, real)
    assert precision > 0.9 and recall < 0.2
    assert precision_and_recall(real + 100, real) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 3 pictures"):
        precision_and_recall(real[:3], real)


def test_the_table_names_place_and_remedy_of_missing_weights(monkeypatch):
    def build(device):
        raise ConnectionError("cannot download https://weights.example; put it at /there")

    monkeypatch.setattr(networks, "lpips", build)
    monkeypatch.setattr(networks, "inception", lambda device, kind: build(device))
    _, missing = networks.all_measures(CPU, "r")
    numbers = {"quality": {}, "codes": {}, "missing": missing, "left_out": {}, "unreadable": []}
    table = Evaluation(numbers, []).table()
    named = "not measured: LPIPS: cannot download https://weights.example; put it at /there\n"
    assert named in table
