"""A prior takes every kind of condition of the original, and shows those that have pictures."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from support.models import GPT, trainer, vqmodel_config
from torch.utils.data import DataLoader

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.dummy_cond_stage import DummyCondStage
from taming.models.sampling import SamplingParams, pictures_of
from taming.models.vqgan import VQSegmentationModel
from taming.util import DataError

BCE = {"target": "taming.modules.losses.segmentation.BCELossWithQuant"}


def segmentation_config(labels: int) -> dict[str, Any]:
    """A tokenizer of maps of so many labels."""
    config = vqmodel_config(labels, n_labels=labels, lossconfig=BCE, image_key="segmentation")
    return config | {"target": "taming.models.vqgan.VQSegmentationModel"}


IMAGES = {"conditioning", "conditioning_rec"}

# Key of the condition -> its stage, the tokens it takes, and the pictures it has.
CONDITIONS = {
    "image": ("__is_first_stage__", 64, IMAGES),
    "depth": (vqmodel_config(1), 64, IMAGES),
    "segmentation": (segmentation_config(5), 64, IMAGES),
    "coord": (
        {
            "target": "taming.modules.misc.coord.CoordStage",
            "params": {"n_embed": 16, "down_factor": 4},
        },
        16,
        IMAGES,
    ),
    "class_label": (
        {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}},
        1,
        set(),
    ),
    "objects_bbox": (
        {
            "target": "taming.models.dummy_cond_stage.DummyCondStage",
            "params": {"conditional_key": "objects_bbox"},
        },
        8,
        {"conditioning"},
    ),
}
every_condition = pytest.mark.parametrize("key", list(CONDITIONS))


def item(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(5, (16, 16), generator=generator)
    return {
        "image": torch.rand(16, 16, 3, generator=generator) * 2 - 1,
        "depth": torch.rand(16, 16, generator=generator) * 2 - 1,
        "segmentation": F.one_hot(labels, 5).double(),
        "coord": torch.arange(256).reshape(16, 16, 1) / 256,
        "class_label": number,
        "objects_bbox": torch.randint(16, (8,), generator=generator),
    }


class Layouts(torch.utils.data.Dataset):
    """Items with layouts, drawn as their first token's share of the vocabulary."""

    def __init__(self) -> None:
        self.conditional_builders = {"objects_bbox": self}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, Any]:
        return item(number)

    def get_textual_label_for_category_no(self, category_no: int) -> str:
        return f"thing {category_no}"

    def plot(self, tokens: torch.Tensor, label: Any, size: tuple[int, int]) -> torch.Tensor:
        assert label(3) == "thing 3" and tokens.shape == (8,)
        return torch.full((3, size[1], size[0]), tokens[0] / 16)


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.datasets = {"train": Layouts()}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.datasets["train"], 2)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.datasets["train"], 2)


def prior(key: str, **kwargs: Any) -> Net2NetTransformer:
    stages = vqmodel_config(), CONDITIONS[key][0]
    return Net2NetTransformer(GPT, *stages, cond_stage_key=key, **kwargs)


@pytest.mark.reported(23)
@every_condition
def test_trains_samples_and_shows(key: str, tmp_path) -> None:
    model, fit = prior(key), trainer(tmp_path)
    fit.fit(model, Data())
    assert fit.global_step == 2
    batch = next(iter(Data().train_dataloader()))
    x, c = model.get_xc(batch)
    assert model.encode_to_c(c)[1].shape == (2, CONDITIONS[key][1])
    logits, target = model.eval()(x, c)
    assert logits.shape == (2, 64, 17) and target.shape == (2, 64)
    pictures = model.log_images(batch, temperature=1.0, lr_interface=True, split="val")
    own = {"inputs", "reconstructions", "samples_half", "samples_nopix", "samples_det"}
    assert set(pictures) == own | CONDITIONS[key][2]
    assert {picture.shape[:2] for picture in pictures.values()} == {(2, 3)}
    if key == "objects_bbox":
        expected = batch[key][:, 0].float()[:, None, None, None] / 16
        assert torch.equal(pictures["conditioning"], expected.expand(2, 3, 16, 16))


def test_layouts_are_drawn_in_the_shape_of_the_images() -> None:
    batch = next(iter(Data().train_dataloader()))
    batch["image"] = batch["image"][:, :, :8]  # (B, 16, 8, 3)
    model = prior("objects_bbox").eval()
    pictures = pictures_of(model, batch, SamplingParams(), {"train": Layouts()})
    assert pictures["conditioning"].shape == pictures["inputs"].shape == (2, 3, 16, 8)
    tokens, stage = batch["objects_bbox"], model.cond_stage_model
    drawn = stage.condition_pictures(tokens, tokens, (10, 12), {"train": Layouts()})
    assert drawn["conditioning"].shape == (2, 3, 10, 12)


def test_layouts_are_not_shown_by_who_cannot_draw_them() -> None:
    batch = next(iter(Data().train_dataloader()))
    assert "conditioning" not in prior("objects_bbox").eval().log_images(batch)


def test_segmentations_are_shown_with_their_likeliest_labels() -> None:
    model = prior("segmentation").eval()
    batch = next(iter(Data().train_dataloader()))
    pictures, stage = model.log_images(batch), model.cond_stage_model
    assert isinstance(stage, VQSegmentationModel)
    rec, _ = stage(model.get_xc(batch)[1])
    shown = stage.to_rgb(F.one_hot(rec.argmax(1), 5).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(pictures["conditioning_rec"], shown)


@pytest.mark.parametrize("count", [5, 3])
def test_a_prior_over_segmentations_shows_them_in_colours(count: int) -> None:
    """Its tokenizer's, whatever the condition's stage, and likeliest labels in place of logits."""
    keys = {"first_stage_key": "segmentation", "cond_stage_key": "image"}
    model = Net2NetTransformer(GPT, segmentation_config(count), vqmodel_config(), **keys).eval()
    batch = next(iter(Data().train_dataloader()))
    batch["segmentation"] = F.one_hot(torch.randint(count, (2, 16, 16)), count).float()
    pictures, stage = model.log_images(batch), model.first_stage_model
    assert {picture.shape for picture in pictures.values()} == {(2, 3, 16, 16)}
    assert torch.equal(pictures["inputs"], stage.to_rgb(model.get_xc(batch)[0]))
    rec, _ = stage(model.get_xc(batch)[0])
    labels = F.one_hot(rec.argmax(1), count).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(pictures["reconstructions"], stage.to_rgb(labels))
    assert torch.equal(pictures["conditioning"], model.get_xc(batch)[1])


def test_images_that_are_their_own_condition_are_read_once() -> None:
    x, c = prior("image").get_xc(next(iter(Data().train_dataloader())))
    assert x.data_ptr() == c.data_ptr()


def test_samples_of_a_grey_tokenizer_are_shown_in_three_channels() -> None:
    grey = vqmodel_config(1)
    model = Net2NetTransformer(GPT, grey, "__is_unconditional__", first_stage_key="depth")
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(model.show(x), x.expand(-1, 3, -1, -1))
    batch = next(iter(Data().train_dataloader()))
    assert {p.shape for p in model.eval().log_images(batch).values()} == {(2, 3, 16, 16)}


def test_pictures_of_whole_numbers_are_refused_as_by_the_tokenizer() -> None:
    model = prior("class_label", first_stage_key="image").eval()
    batch = next(iter(Data().train_dataloader()))
    whole = {"image": batch["image"].round().to(torch.int16)}
    for refuse in (
        lambda: model.get_input("image", whole),
        lambda: model.first_stage_model.get_input(whole, "image"),
    ):
        with pytest.raises(DataError, match="'image', .*int16: expected floats from -1 to 1"):
            refuse()
    assert torch.equal(model.get_input("class_label", batch), batch["class_label"])


def test_the_first_stage_as_condition_stage_is_one_module_under_two_names() -> None:
    model = prior("image")
    assert model.cond_stage_model is model.first_stage_model
    state = model.state_dict()
    names = [key for key in state if key.startswith("first_stage_model.")]
    for name in names:
        other = state[name.replace("first_stage_model", "cond_stage_model")]
        assert other.data_ptr() == state[name].data_ptr()


def test_conditions_may_be_scaled_before_they_are_encoded() -> None:
    model = prior("depth", downsample_cond_size=8).eval()
    x, c = model.get_xc(next(iter(Data().train_dataloader())))
    tokens = model.encode_to_c(c)[1]
    assert tokens.shape == (2, 16)
    small = F.interpolate(c, size=(8, 8))
    assert torch.equal(tokens, prior_tokens(model, small))
    assert model(x, c)[0].shape == (2, 64, 17)


def prior_tokens(model: Net2NetTransformer, c: torch.Tensor) -> torch.Tensor:
    return model.cond_stage_model.encode(c).info.indices.reshape(len(c), -1)


def test_dummy_stage_passes_tokens_through() -> None:
    tokens = torch.randint(16, (2, 8))
    stage = DummyCondStage("objects_bbox").eval()
    quant, loss, (_, _, indices) = stage.encode(tokens)
    assert quant is indices is tokens and loss is None
    assert stage.decode(tokens) is stage.to_rgb(tokens) is tokens
