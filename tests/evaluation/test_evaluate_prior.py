"""Numbers of a prior: bits of images, and generated pictures against them."""

import math

import pytest
import torch
from PIL import Image
from support.models import pictures, prior

import taming
from taming.decoding import pil_to_tensor
from taming.evaluation import networks
from taming.evaluation.images import of_pictures
from taming.evaluation.measures import FrechetDistance, precision_and_recall
from taming.evaluation.prior import evaluate_prior
from taming.generator import Generator
from taming.pictures import to_levels

CPU = torch.device("cpu")
CLASSES = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 3}}


@pytest.fixture(scope="module")
def network():
    """The VGG16 of ST-LPIPS, which can see the pictures of the tests when they are enlarged."""
    measure = networks.shift_tolerant(CPU)
    enlarge = torch.nn.Upsample(scale_factor=2)
    return networks.Measure(
        "ST-LPIPS",
        {"network": "VGG16"},
        lambda x: measure.see(enlarge(x)),
        vectors=measure.vectors,
        distance="Frechet distance",
    )


def test_bits_are_the_generators(without_networks):
    model = prior().eval()
    images = [*pictures(5)]
    found = taming.evaluate(model, images, batch_size=2).numbers
    wanted = Generator(model).bits(images)
    assert found["per_image"]["bits"] == pytest.approx(wanted, rel=1e-4)
    tokens = found["per_image"]["tokens"]
    numbers = found["codes"]
    assert numbers["bits_per_image"] == pytest.approx(sum(wanted) / 5, rel=1e-4)
    assert numbers["bits_per_token"] == pytest.approx(sum(wanted) / sum(tokens), rel=1e-4)
    assert numbers["bits_per_pixel"] == pytest.approx(sum(wanted) / (5 * 256), rel=1e-4)
    raw = sum(tokens) / 5 * math.log2(model.sequence.vocab_size)
    assert numbers["raw_bits_per_image"] == pytest.approx(raw)
    assert found["kind"] == "prior" and found["quality"] == {} == found["missing"]


def test_generated_pictures_are_compared_with_the_images(network):
    model = prior().eval()
    images, missing = [*pictures(6)], {}
    about = of_pictures(images, "image", 3)
    numbers, shown = evaluate_prior([model], about, [network], missing, 5, 2, seed=3, top_k=4)
    made = [
        p
        for first, n in ((0, 2), (2, 2), (4, 1))
        for p in Generator(model).sample(n, seed=3, first=first, top_k=4)
    ]
    assert [picture.tobytes() for picture in shown] == [picture.tobytes() for picture in made]
    given = network.vectors(network.see(to_levels(torch.stack(images))))
    vectors = network.vectors(network.see(torch.stack([pil_to_tensor(p) for p in made])))
    distance = FrechetDistance()
    distance.update(given, real=True)
    distance.update(vectors, real=False)
    quality = numbers["quality"]
    assert quality["Frechet distance"] == pytest.approx(distance.compute(), rel=1e-3)
    wanted = precision_and_recall(vectors, given)
    assert (quality["precision (VGG16)"], quality["recall (VGG16)"]) == wanted
    assert numbers["protocol"]["generated"] == {"pictures": 5, "seed": 3, "top_k": 4}
    assert not missing


def test_few_pictures_leave_out_what_needs_more(network):
    missing: dict[str, str] = {}
    images = of_pictures([*pictures(1)], "image", 3)
    numbers, _ = evaluate_prior([prior().eval()], images, [network], missing, 2)
    assert numbers["quality"] == {}
    assert "two pictures" in missing["Frechet distance"]
    assert "more than 3 pictures" in missing["precision (VGG16), recall (VGG16)"]


def test_classes_come_from_folders_and_are_generated_in_turn(tmp_path, without_networks):
    model = prior(cond_stage_config=CLASSES, cond_stage_key="class_label").eval()
    for number in range(4):
        folder = tmp_path / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        Image.effect_noise((20, 18), 60).convert("RGB").save(folder / f"{number}.png")
    found = taming.evaluate(model, tmp_path, generated=4)
    assert found.numbers["protocol"]["crop"] == "square of 16 pixels at the centre"
    labels = [0, 0, 1, 2]  # the files in order: a/0, a/3, b/1, c/2
    files = sorted(tmp_path.rglob("*.png"))
    wanted = Generator(model).bits([str(file) for file in files], labels)
    assert found.numbers["per_image"]["bits"] == pytest.approx(wanted, rel=0.05)
    assert [example.group for example in found.examples] == ["generated"]
    (tmp_path / "c/2.png").rename(tmp_path / "a/2.png")
    (tmp_path / "c").rmdir()
    with pytest.raises(ValueError, match="conditional on 3 classes, and .* has 2: give a folder"):
        taming.evaluate(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": [2]}, "codes are the rate of a tokenizer, but this is a prior: omit codes"),
        ({"top_k": 3}, "top_k: of generated pictures, so give generated as well"),
        ({"generated": 1, "top_p": 2.0}, "top_p"),
    ],
)
def test_mistakes(options, message, without_networks):
    with pytest.raises(ValueError, match=message):
        taming.evaluate(prior(), [*pictures(1)], **options)


def test_a_prior_in_training_is_measured_without_dropout(without_networks):
    model, images = prior(gpt={"resid_pdrop": 0.5}), [*pictures(3)]
    wanted = taming.evaluate(model.eval(), images).numbers["per_image"]
    assert taming.evaluate(model.train(), images).numbers["per_image"] == wanted
