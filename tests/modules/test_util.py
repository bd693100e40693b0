"""Small modules: conditions as tokens, ActNorm, and the search for non-finite values."""

import pytest
import torch
from torch import nn

from taming.modules import util
from taming.modules.batches import images_of
from taming.modules.util import ActNorm, Labelator, SOSProvider, count_params, first_non_finite
from taming.util import DataError


def test_labelator_gives_one_token_per_label():
    labels = torch.tensor([3, 0, 7])
    quant, loss, (perplexity, encodings, indices) = Labelator(n_classes=10).encode(labels)
    assert torch.equal(indices, torch.tensor([[3], [0], [7]]))
    assert torch.equal(quant, indices)
    assert loss is perplexity is encodings is None
    assert torch.equal(Labelator(10, quantize_interface=False).encode(labels), indices)


def test_sos_provider_gives_the_start_token_whatever_the_batch():
    batch = torch.randn(2, 3, 4, 4)
    _, _, (_, _, indices) = SOSProvider(sos_token=5).encode(batch)
    assert torch.equal(indices, torch.tensor([[5], [5]]))
    assert torch.equal(SOSProvider(5, quantize_interface=False).encode(batch), indices)


def test_count_params_counts_frozen_ones_too():
    assert count_params(nn.Linear(3, 2).requires_grad_(False)) == 8


def test_actnorm_normalises_its_first_batch_and_then_stays():
    norm, x = ActNorm(3), 5 * torch.randn(4, 3, 6, 6) + 2
    torch.testing.assert_close(norm.eval()(x), x)
    y = norm.train()(x)
    torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(dim=(0, 2, 3)), torch.ones(3))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    norm(torch.randn(4, 3, 6, 6))
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    assert before["initialized"].dtype == torch.uint8


def test_actnorm_starts_from_the_batch_of_all_ranks(monkeypatch):
    x, other = torch.randn(2, 4, 3, 6, 6)
    monkeypatch.setattr(util, "rows_of_all_ranks", lambda rows: torch.cat([rows, other]))
    norm = ActNorm(3)
    norm(x)
    monkeypatch.undo()
    alone = ActNorm(3)
    alone(torch.cat([x, other]))
    torch.testing.assert_close(norm.state_dict(), alone.state_dict())


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))

    def forward(self, x):
        y = self.body(x)
        return {"y": (y, [1 / (x - x)])} if self.training else {"y": (y, [x])}


def test_first_non_finite_names_the_innermost_module():
    module, x = Outer().eval(), torch.randn(3, 2)
    assert first_non_finite(module, x) is None
    with torch.no_grad():
        module.body[1][1].weight.fill_(torch.inf)
    assert first_non_finite(module, x) == "body.1.1"
    with torch.no_grad():
        module.body[0].bias[0] = torch.nan
    assert first_non_finite(module, x) == "body.0"


def test_first_non_finite_names_the_class_where_no_submodule_is_to_blame():
    assert first_non_finite(Outer().train(), torch.randn(3, 2)) == "Outer"


def test_first_non_finite_ends_before_later_modules_fail_and_leaves_no_hook():
    class Checked(nn.Module):
        def forward(self, x):
            if not x.isfinite().all():
                raise ValueError("non-finite latents")
            return x

    linear = nn.Linear(2, 2)
    module = nn.Sequential(linear, Checked())
    with torch.no_grad():
        linear.weight.fill_(torch.nan)
    assert first_non_finite(module, torch.randn(1, 2)) == "0"
    with pytest.raises(ValueError, match="non-finite latents"):
        module(torch.randn(1, 2))
    assert not linear._forward_hooks


GREY, RGB, LABELS = (1, (-1.0, 1.0)), (3, (-1.0, 1.0)), (5, (0.0, 1.0))


@pytest.mark.parametrize(
    ("image", "model", "names"),
    [
        (torch.zeros(2, 3, 8, 8), RGB, r"\(2, 3, 8, 8\), channels first: .*\(B, H, W, 3\)"),
        (torch.zeros(2, 1, 8, 8), GREY, r"\(2, 1, 8, 8\), channels first: .*\(B, H, W, 1\)"),
        (torch.zeros(2, 8, 8, 1), RGB, r"is \(2, 8, 8, 1\): .*ddconfig.in_channels of 3"),
        (torch.zeros(2, 8, 8, 4), RGB, r"is \(2, 8, 8, 4\): .*ddconfig.in_channels of 3"),
        (torch.zeros(2, 8, 8, 3), GREY, r"is \(2, 8, 8, 3\): .*ddconfig.in_channels of 1"),
        (torch.zeros(2, 8, 8), RGB, r"is \(2, 8, 8\): .*\(B, H, W, 3\)"),
        (torch.zeros(8, 3), RGB, r"is \(8, 3\): "),
        (torch.zeros(2, 0, 8, 3), RGB, r"is \(2, 0, 8, 3\): "),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), RGB, r"uint8: .*-1 to 1; .*127.5"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.int64), RGB, "int64: .*-1 to 1"),
        (torch.zeros(2, 8, 8, 5, dtype=torch.complex64), LABELS, "complex64: "),
        (torch.arange(384).view(2, 8, 8, 3) / 1.5, RGB, "from 0 to 255.3: expected -1 to 1"),
        (torch.full((2, 8, 8, 5), -1), LABELS, "from -1 to -1: expected 0 to 1"),
        (torch.full((2, 8, 8, 3), torch.nan), RGB, "from nan to nan"),
        ([1, 2], RGB, "is a list, not a tensor"),
    ],
)
def test_images_of_another_form_are_refused_by_what_is_wrong(image, model, names: str) -> None:
    with pytest.raises(DataError, match=f"'picture', its key,.*{names}"):
        images_of({"picture": image}, "picture", "its key", *model)


def test_images_of_the_model_s_form_stay_as_they_are() -> None:
    for shape, model in (((2, 4, 6, 3), RGB), ((2, 4, 6, 1), GREY), ((0, 4, 6, 3), RGB)):
        x = torch.rand(shape) * 2.2 - 1.1  # resampling may overshoot
        assert images_of({"x": x}, "x", "its key", *model) is x
    assert images_of({"x": torch.ones(2, 4, 6)}, "x", "its key", *GREY).shape == (2, 4, 6, 1)
    whole = torch.eye(5, dtype=torch.int64)[torch.zeros(2, 4, 6).long()]
    assert images_of({"x": whole}, "x", "its key", *LABELS) is whole


def test_labels_are_whole_numbers_one_for_each_image() -> None:
    stage = Labelator(10)
    for labels in (torch.zeros(2, 10).long(), torch.tensor([0.5, 1.0]), torch.tensor([3, 10])):
        with pytest.raises(ValueError, match="labels"):
            stage.encode(labels)
    assert stage.encode(torch.tensor([[3], [7]]))[0].tolist() == [[3], [7]]
