"""Sampling for the page: what was asked for, what is known stays, and nobody waits in vain."""

import threading
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import prior

from taming.demo.following import Send, followed
from taming.demo.studio import RANGES, Step, Studio, Wish, painted_sites
from taming.generator import Generator

CLASSES = {
    "cond_stage_config": {
        "target": "taming.models.conditions.ClassCondition",
        "params": {"n_classes": 4},
    },
    "cond_stage_key": "class_label",
}


def last(studio: Studio, *start: Any, **wish: Any) -> Step:
    return [*studio.sample(Wish(**wish), *start)][-1]


def pixels(step: Step) -> np.ndarray:
    return np.asarray(step.picture)


def photo(side: int = 16) -> Image.Image:
    noise = np.random.default_rng(5).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("wish", [{}, {"seed": 3, "temperature": 0.5}, {"top_k": 2}])
def test_a_sample_is_the_generators(wish: dict[str, Any]) -> None:
    model = prior().eval()
    (expected,) = Generator(model).sample(1, **{"seed": 0, "top_k": 100, **wish})
    steps = [*Studio(model).sample(Wish(every=8, **wish))]
    assert len(steps) > 2 and [s.done for s in steps] == sorted(s.done for s in steps)
    assert steps[-1].done == steps[-1].of == 64
    assert (pixels(steps[-1]) == np.asarray(expected)).all()


@pytest.mark.parametrize("order", ["Identity", "SpiralIn"])
def test_what_is_known_does_not_change(order: str) -> None:
    params = {"H": 8, "W": 8} if order == "SpiralIn" else {}
    permuter = {"target": f"taming.modules.transformer.permuter.{order}", "params": params}
    studio = Studio(prior(permuter_config=permuter).eval())
    with torch.no_grad():
        x = studio.fitted(photo(), 1.0)
        x_rec = studio.model.decode_codes(studio.model.encode_codes(x))
    from taming.pictures import to_picture

    reconstruction = np.asarray(to_picture(x_rec[0]))
    painted = Image.new("L", (16, 16))
    painted.paste(255, (5, 9, 12, 11))  # touches sites 2 to 5 of rows 4 and 5
    steps = [*studio.sample(Wish(every=2), photo(), painted)]
    assert len(steps) > 1 and steps[-1].of == 64
    known = np.ones((16, 16), bool)
    known[8:12, 4:12] = False
    for step in steps:
        assert (pixels(step)[known] == reconstruction[known]).all()
    assert not (pixels(steps[-1])[~known] == reconstruction[~known]).all()
    half = last(studio, photo(), known=0.5)
    assert (pixels(half)[:8] == reconstruction[:8]).all()
    assert not (pixels(half)[8:] == reconstruction[8:]).all()
    with pytest.raises(ValueError, match="nothing is to be sampled: paint over a part"):
        studio.sample(Wish(), photo())


def test_a_site_is_painted_if_any_of_its_pixels_is() -> None:
    generator = np.random.default_rng(0)
    for grid in ((4, 4), (2, 8)):
        mask = generator.random((32, 64)) < 0.01
        sites = painted_sites(Image.fromarray(mask.astype(np.uint8) * 255), grid)
        height, width = 32 // grid[0], 64 // grid[1]
        blocks = mask.reshape(grid[0], height, grid[1], width).any(axis=(1, 3))
        assert (sites.numpy() == blocks).all() and 0 < blocks.sum() < blocks.size


def test_a_picture_keeps_its_shape_in_whole_sites() -> None:
    studio = Studio(prior().eval())
    for size, scale, expected in (
        ((32, 16), 1, (8, 16)),
        ((16, 40), 1, (20, 8)),
        ((300, 300), 0.5, (4, 4)),
        ((5, 5), 2, (16, 16)),
    ):
        image = studio.fitted(photo().resize(size), scale)
        assert image.shape == (1, 3, 2 * expected[0], 2 * expected[1])
    larger = last(studio, scale=1.5, every=10**6)  # through a sliding window
    assert larger.of == 144 and larger.picture.size == (24, 24)
    with pytest.raises(ValueError, match="8 makes 64 x 12800 sites, more than 65536"):
        studio.fitted(photo().resize((1600, 8)), 8)


def test_large_examples_are_refused() -> None:
    image = np.zeros((2048, 2048, 3), np.float32)
    studio = Studio(prior().eval(), {"test": [{"image": image}]})
    with pytest.raises(ValueError, match="scale 0.5 makes 512 x 512 sites, more than 65536"):
        studio.example("test", 0, 0.5)
    for split, index in (("test", 1), ("test", -1), ("train", 0)):
        with pytest.raises(ValueError, match=f"there is no example {index} of '{split}'"):
            studio.example(split, index)


@pytest.mark.parametrize("name", [own.name for own in fields(Wish)])
@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 1, 0.5, 7, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), 1e-3, 1000),
        *(2**31, 2**53, 2**63, -(2**63), 10**400, None, "1", "x", [], {}, [1], b"1", True, 1j),
    ],
)
def test_any_value_is_refused_or_in_range(name: str, value: Any) -> None:
    try:
        wish = Wish(**{name: value})
    except ValueError as error:
        assert str(error).startswith(f"{name} must be ") and len(str(error)) < 200
    else:
        least, most = RANGES[name]
        assert isinstance(value, (int, float)) and least <= getattr(wish, name) <= most


def test_what_is_sent_is_followed_and_an_error_reaches_the_reader() -> None:
    def work(send: Send[int]) -> None:
        send(1)
        raise ValueError("no more")

    rows = followed(work)
    assert next(rows) == 1
    with pytest.raises(ValueError, match="no more"):
        next(rows)


def test_work_ends_when_nobody_follows_it() -> None:
    ended = threading.Event()

    def work(send: Send[int]) -> None:
        try:
            while True:
                send(1)
        finally:
            ended.set()

    rows = followed(work)
    assert next(rows) == 1
    rows.close()  # type: ignore[attr-defined]
    assert ended.is_set()
    steps = Studio(prior().eval()).sample(Wish(every=1))
    next(steps)
    before = threading.active_count()
    steps.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before - 1
