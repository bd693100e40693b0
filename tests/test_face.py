"""The face: pictures of any kind to codes and back; samples, completions and bits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import TinyRuns

import taming
from taming.generator import Generator
from taming.pictures import to_tensor
from taming.tokenizer import Codes, Tokenizer

SIDE = 16  # pixels of an image of the tiny runs
RNG = np.random.default_rng(5)


def colours(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tokenizer(tiny_runs: TinyRuns) -> Tokenizer:
    loaded = taming.load(tiny_runs.of("loopy_vqgan.yaml"))
    assert isinstance(loaded, Tokenizer)
    return loaded


@pytest.fixture(scope="module")
def generator(tiny_runs: TinyRuns) -> Generator:
    loaded = taming.load(tiny_runs.of("loopy_transformer.yaml"))
    assert isinstance(loaded, Generator)
    return loaded


def test_importing_the_face_imports_no_torch() -> None:
    program = "import sys, taming; assert 'torch' not in sys.modules; taming.Tokenizer"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="Tokeniser"):
        taming.Tokeniser  # noqa: B018


def test_every_kind_of_picture_is_the_same_image(tmp_path: Path) -> None:
    array = colours(12, 20)
    image = Image.fromarray(array)
    image.save(tmp_path / "x.png")
    tensor = torch.from_numpy(array).movedim(-1, 0)
    wanted = tensor.float() / 127.5 - 1
    floats = wanted.movedim(0, -1).numpy()
    for picture in (array, image, str(tmp_path / "x.png"), tmp_path / "x.png", tensor, floats):
        torch.testing.assert_close(to_tensor(picture), wanted, rtol=0, atol=1e-6)
    grey = Image.fromarray(array[..., 0])
    assert to_tensor(grey).shape == (3, 12, 20) and to_tensor(grey, 1).shape == (1, 12, 20)
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    torch.testing.assert_close(to_tensor(deep, 1), to_tensor(grey, 1))
    torch.testing.assert_close(
        to_tensor(array[..., 0].astype(np.uint16) * 257, 1), to_tensor(grey, 1)
    )


@pytest.mark.parametrize(
    ("picture", "names"),
    [
        ("nowhere.png", r"nowhere\.png.*No such file"),
        (np.zeros((4, 4, 3), np.int64), "uint8 or uint16.*int64"),
        (np.full((4, 4, 3), 3.0), r"\[-1, 1\].* 3"),
        (np.full((4, 4, 3), np.nan), r"\[-1, 1\].* nan"),
        (np.zeros((4, 4, 2), np.uint8), "3 channels, got 2"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(H, W, C\).*\(1, 4, 4, 3\)"),
        (__file__, "cannot be decoded"),
    ],
)
def test_what_is_not_a_picture_is_refused(picture: object, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        to_tensor(picture)  # type: ignore[arg-type]


def test_pictures_of_any_sizes_become_codes_and_come_back(tokenizer: Tokenizer) -> None:
    sizes = [(16, 16), (33, 20), (16, 16), (1, 50)]
    pictures = [colours(*size) for size in sizes]
    codes = tokenizer.encode(pictures)
    assert [own.size for own in codes] == sizes
    again = tokenizer.decode(codes)
    assert [(p.height, p.width) for p in again] == sizes
    for picture, own, decoded in zip(pictures, codes, again, strict=True):
        alone = tokenizer.encode(picture)
        assert torch.equal(alone.indices, own.indices)
        assert len(own) == int(own.lengths.sum()) == int((own.indices >= 0).sum())
        assert np.abs(np.asarray(tokenizer.decode(alone), int) - np.asarray(decoded)).max() <= 1


def test_codes_are_those_of_the_model(tokenizer: Tokenizer) -> None:
    picture = colours(32, 32)
    x = to_tensor(picture)[None]
    torch.testing.assert_close(
        tokenizer.encode(picture).indices, tokenizer.model.encode_to_codes(x)[0]
    )


def test_the_rate_can_be_set(tokenizer: Tokenizer) -> None:
    picture = colours(64, 64)
    sites = tokenizer.encode(picture).lengths.numel()
    few, many = (tokenizer.encode(picture, max_codes=n) for n in (sites, 2 * sites))
    assert len(few) == sites and sites < len(many) <= 2 * sites
    with pytest.raises(ValueError, match=f"{sites} .*got {sites - 1}"):
        tokenizer.encode(picture, max_codes=sites - 1)


def test_codes_of_several_levels(tiny_runs: TinyRuns) -> None:
    tokenizer = taming.load(tiny_runs.of("vqvae2_cifar10.yaml"))
    assert isinstance(tokenizer, Tokenizer)
    codes = tokenizer.encode([colours(17, 40), colours()])
    assert all(isinstance(own, Codes) and len(own.levels) == 2 for own in codes)
    assert [p.size for p in tokenizer.decode(codes)] == [(40, 17), (16, 16)]


def test_samples_are_of_a_seed(generator: Generator) -> None:
    three, two = generator.sample(3, seed=1, top_p=0.9), generator.sample(2, seed=1, top_p=0.9)
    for a, b in zip(three, two, strict=False):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    other = generator.sample(2, seed=2, top_p=0.9)
    assert not np.array_equal(np.asarray(two[0]), np.asarray(other[0]))
    with pytest.raises(ValueError, match="unconditional.*label"):
        generator.sample(1, label=3)
    with pytest.raises(ValueError, match="temperature.*0"):
        generator.sample(1, temperature=0)


def test_classes_of_a_conditional_prior(tiny_runs: TinyRuns) -> None:
    generator = taming.load(tiny_runs.of("cifar10_transformer.yaml"))
    assert isinstance(generator, Generator)
    assert len(generator.sample(2, label=3)) == 2
    for label in (None, 10, -1):
        with pytest.raises(ValueError, match="label from 0 to 9"):
            generator.sample(1, label=label)
    assert generator.bits(colours(), label=1) != generator.bits(colours(), label=2)


def test_completions_keep_what_is_known(generator: Generator) -> None:
    h, w = generator.model.grid
    factor = generator.model.first_stage_model.factor
    picture = colours(h * factor, w * factor)
    mask = np.zeros((h * factor, w * factor), np.uint8)
    mask[: h // 2 * factor] = 255
    reconstruction = np.asarray(
        generator.tokenizer.decode(generator.tokenizer.encode(picture)), int
    )
    for completed in generator.complete(picture, mask, n=2):
        known = np.abs(np.asarray(completed) - reconstruction)[: h // 2 * factor]
        assert completed.size == (w * factor, h * factor) and known.max() <= 1


def test_bits_are_the_priors_likelihood(generator: Generator) -> None:
    h, w = generator.model.grid
    factor = generator.model.first_stage_model.factor
    pictures = [colours(h * factor, w * factor) for _ in range(3)]
    together = generator.bits(pictures)
    assert together == pytest.approx([generator.bits(p)[0] for p in pictures], rel=1e-4)
    tokens = generator.model.codes_to_tokens(
        generator.model.encode_codes(to_tensor(pictures[0])[None])
    )
    uniform = tokens.shape[1] * np.log2(generator.model.sequence.vocab_size)
    assert 0 < together[0] < 1.5 * uniform


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        taming.load(tmp_path / "nothing")
