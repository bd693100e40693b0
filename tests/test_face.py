"""The face: pictures of any kind to codes and back; samples, completions and bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import TinyRuns

import taming
from taming.demo.exhibit import Exhibit
from taming.generator import Generator
from taming.models.vqgan import VQModel, VQSegmentationModel
from taming.pictures import to_tensor
from taming.run.folder import model_from_run
from taming.tokenizer import Codes, Tokenizer

RUNS = ("vqgan", "transformer")
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


def test_a_name_that_the_face_lacks_is_an_error() -> None:
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


def test_any_layout_of_an_array_is_the_same_image() -> None:
    array = colours(12, 20)
    wanted = to_tensor(array)
    still = array.copy()
    still.setflags(write=False)
    floats = (array / 127.5 - 1).astype(np.float32)
    for picture in (still, array[::-1, ::-1].copy()[::-1, ::-1], np.asfortranarray(array)):
        assert torch.equal(to_tensor(picture), wanted)
    assert torch.equal(to_tensor(floats.astype(">f4")), to_tensor(floats))


@pytest.mark.parametrize(
    ("picture", "names"),
    [
        ("nowhere.png", r"nowhere\.png: cannot be decoded as an image: it does not exist"),
        (np.zeros((4, 4, 3), np.int64), "uint8 or uint16.*int64"),
        (np.full((4, 4, 3), 3.0), r"\[-1, 1\].* 3"),
        (np.full((4, 4, 3), np.nan), r"\[-1, 1\].* nan"),
        (np.zeros((4, 4, 2), np.uint8), "3 channels, got 2"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(H, W, C\).*\(1, 4, 4, 3\)"),
        (__file__, "cannot be decoded"),
        (np.array([["a", "b"]]), "numbers.*<U1"),
        (np.zeros((4, 0, 3), np.uint8), r"\(4, 0, 3\)"),
        ([np.zeros((4, 4, 3), np.uint8)], "one picture, .* got a list"),
        (None, "one picture, .* got a NoneType"),
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


def test_several_pictures_may_be_a_list_or_one_array(tokenizer: Tokenizer) -> None:
    x = torch.from_numpy(np.stack([colours() for _ in range(3)])).movedim(-1, 1)  # (3, 3, H, W)
    listed = tokenizer.encode(list(x))
    for several in (x, tuple(x), x.movedim(1, -1).numpy()):
        found = tokenizer.encode(several)
        assert all(torch.equal(a.indices, b.indices) for a, b in zip(found, listed, strict=True))
    assert tokenizer.encode([]) == [] and tokenizer.decode([]) == []


def test_what_is_no_codes_is_refused(tokenizer: Tokenizer) -> None:
    codes: Any = tokenizer.encode(colours())
    for strange in (codes.indices, "a.npz", Path("a.npz"), b"codes", None, 3):
        for given in (strange, [codes, strange]):
            with pytest.raises(ValueError, match=f"expected Codes.*a {type(strange).__name__}"):
                tokenizer.decode(given)
    height, width = (sites * tokenizer.model.factor for sites in codes.indices.shape[:2])
    assert tokenizer.decode(Codes(codes.indices, (height, width))).size == (width, height)
    for size in ((height + 1, width), (height, width + 1)):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels decode to {height}x"):
            tokenizer.decode(Codes(codes.indices, size))


def test_a_batch_has_at_least_one_picture(tokenizer: Tokenizer, generator: Generator) -> None:
    for face in (tokenizer, generator):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            type(face)(face.model, batch_size=0)


def test_codes_that_were_saved_decode_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    codes = tokenizer.encode(colours(33, 20))
    codes.save(tmp_path / "codes.npz")
    again = tokenizer.decode(Codes.load(tmp_path / "codes.npz"))
    assert np.array_equal(np.asarray(again), np.asarray(tokenizer.decode(codes)))


def test_grey_pictures(tiny_runs: TinyRuns) -> None:
    tokenizer = taming.load(tiny_runs.of("imagenetdepth_vqgan.yaml"))
    assert isinstance(tokenizer, Tokenizer) and tokenizer.channels == 1
    side = 2 * tokenizer.model.factor
    array = colours(side, side)
    codes = tokenizer.encode([Image.fromarray(array), array[..., 0]])
    decoded = np.asarray(tokenizer.decode(codes[1]))
    assert decoded.shape == (side, side, 3) and (decoded == decoded[..., :1]).all()
    with pytest.raises(ValueError, match="1 channels, got 3"):
        tokenizer.encode(array)


def test_label_maps_are_no_pictures() -> None:
    sizes = {"double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 5, "out_ch": 5}
    sizes |= {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": []}
    loss = {"target": "taming.modules.losses.DummyLoss"}
    with pytest.raises(ValueError, match="VQSegmentationModel"):
        Tokenizer(VQSegmentationModel(5, sizes, loss, n_embed=8, embed_dim=4))
    with pytest.raises(ValueError, match="Linear"):
        Tokenizer(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_half_precision(tiny_runs: TinyRuns) -> None:
    model: VQModel = model_from_run(tiny_runs.of("custom_vqgan.yaml")).bfloat16()
    tokenizer = Tokenizer(model)
    codes = tokenizer.encode(colours(32, 32))
    assert tokenizer.decode(codes).size == (32, 32)


def test_the_rate_can_be_set(tokenizer: Tokenizer) -> None:
    picture = colours(64, 64)
    sites = tokenizer.encode(picture).lengths.numel()
    few, many = (tokenizer.encode(picture, max_codes=n) for n in (sites, 2 * sites))
    assert len(few) == sites and sites < len(many) <= 2 * sites
    with pytest.raises(ValueError, match=f"{sites} .*got {sites - 1}"):
        tokenizer.encode(picture, max_codes=sites - 1)


def test_bits_are_those_of_the_tables_and_within_a_target(tokenizer: Tokenizer) -> None:
    picture = colours(64, 64)
    codes = [tokenizer.encode(picture, rate=rate) for rate in (0.0, 0.02, 1e9)]
    bits = [own.bits for own in codes]
    for own in codes:
        assert own.bits == float(tokenizer.model.bits_of(own.indices[None]))
    assert bits[0] > bits[1] > bits[2]
    limited = tokenizer.encode([picture, picture[:32]], target_bits=bits[1])
    assert all(bits[1] >= own.bits > 0 for own in limited)
    with pytest.raises(ValueError, match="the cheapest codes for image 0"):
        tokenizer.encode(picture, target_bits=bits[2] - 1)


def test_without_tables_bits_are_those_of_the_tokens() -> None:
    sizes = {"double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3}
    sizes |= {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": []}
    loss = {"target": "taming.modules.losses.DummyLoss"}
    tokenizer = Tokenizer(VQModel(sizes, loss, n_embed=8, embed_dim=4))
    codes = tokenizer.encode(colours(33, 20))
    assert codes.bits == len(codes) * 3 and codes.bpp == codes.bits / (33 * 20)


def test_codes_of_several_levels(tiny_runs: TinyRuns) -> None:
    tokenizer = taming.load(tiny_runs.of("vqvae2_cifar10.yaml"))
    assert isinstance(tokenizer, Tokenizer)
    codes = tokenizer.encode([colours(17, 40), colours()])
    assert all(isinstance(own, Codes) and len(own.levels) == 2 for own in codes)
    assert [p.size for p in tokenizer.decode(codes)] == [(40, 17), (16, 16)]
    wide = codes[0].levels[0].repeat_interleave(2, 0).repeat_interleave(2, 1)  # the top alone
    mixed = [codes[0], Codes((wide,), (17, 40))]
    alone = [tokenizer.decode(own) for own in mixed]
    for a, b in zip(tokenizer.decode(mixed), alone, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_a_callers_model_stays_trainable_and_no_graph_is_built(tiny_runs: TinyRuns) -> None:
    models = [model_from_run(tiny_runs.of(f"loopy_{kind}.yaml")) for kind in RUNS]
    wanted = [[p.requires_grad for p in model.parameters()] for model in models]
    tokenizer, generator = Tokenizer(models[0]), Generator(models[1])

    def refuse_graphs(module: torch.nn.Module, given: object) -> None:
        assert not torch.is_grad_enabled()

    picture, none = colours(), np.zeros(generator.model.grid, bool)
    with torch.nn.modules.module.register_module_forward_pre_hook(refuse_graphs):
        tokenizer.decode(tokenizer.encode(picture, target_psnr=10.0))
        tokenizer.decompress(tokenizer.compress(picture, bpp=20))
        generator.sample(), generator.complete(picture, none), generator.bits(picture)
    assert [[p.requires_grad for p in model.parameters()] for model in models] == wanted
    assert any(wanted[0]) and any(wanted[1])
    for kind in RUNS:
        loaded = taming.load(tiny_runs.of(f"loopy_{kind}.yaml")).model
        assert not any(p.requires_grad for p in loaded.parameters())


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


def test_several_classes_at_once(tiny_runs: TinyRuns) -> None:
    generator = taming.load(tiny_runs.of("cifar10_transformer.yaml"))
    assert isinstance(generator, Generator)
    both = generator.sample(2, label=[3, 7], seed=4)
    alone = generator.sample(2, label=7, seed=4, first=2)  # the second class's numbers
    for a, b in zip(both[2:], alone, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b)).max() <= 1
    pictures = [colours(), colours()]
    each = generator.bits(pictures, label=[1, 2])
    apart = [generator.bits(p, label=n)[0] for p, n in zip(pictures, (1, 2), strict=True)]
    # A code in a near tie may be another one in a batch of another size.
    assert each == pytest.approx(apart, rel=1e-2) and generator.bits([], label=1) == []
    with pytest.raises(ValueError, match="2 labels for 3"):
        generator.bits([*pictures, colours()], label=[1, 2])


def test_pixelcnn_priors(tiny_runs: TinyRuns) -> None:
    generator = taming.load(tiny_runs.of("pixelcnn_cifar10.yaml"))
    assert isinstance(generator, Generator)
    assert len(generator.sample(2, label=3, seed=1, top_k=5)) == 2
    assert generator.bits(colours(), label=3)[0] > 0
    known = torch.ones(generator.model.grid, dtype=torch.bool)
    (whole,) = generator.complete(colours(), known, label=3)
    assert whole.size == (SIDE, SIDE)


def test_a_context_model_comes_with_its_tokenizer(tiny_runs: TinyRuns) -> None:
    tokenizer = taming.load(tiny_runs.of("photos_context.yaml"))
    plain = taming.load(tiny_runs.of("photos.yaml"))
    assert isinstance(tokenizer, Tokenizer) and isinstance(plain, Tokenizer)
    assert plain.context is None and tokenizer.model.fingerprint() == plain.model.fingerprint()
    picture = colours(50, 70)
    codes = tokenizer.encode(picture, max_codes=30)
    data = tokenizer.compress(picture, max_codes=30)
    assert data == tokenizer.compress(picture, max_codes=30, entropy="context")
    decoded = [np.asarray(tokenizer.decompress(data)), np.asarray(tokenizer.decode(codes))]
    assert np.array_equal(*decoded)
    assert tokenizer.decompress(data, turns=1).size == (70, 50)
    with pytest.raises(ValueError, match="no context model"):
        plain.decompress(data)


def test_levels_are_sampled_and_measured_together(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    runs = [tiny_runs.of(f"vqvae2_{level}_prior.yaml") for level in ("top", "bottom")]
    generator = taming.load(runs)
    assert isinstance(generator, Generator)
    three, two = generator.sample(3, seed=1), generator.sample(2, seed=1)
    assert np.abs(np.asarray(three[0], int) - np.asarray(two[0])).max() <= 1
    top = taming.load(runs[0])
    assert isinstance(top, Generator) and top.bits(colours())[0] > 0
    picture = colours()
    assert generator.bits(picture)[0] > top.bits(picture)[0]
    for tokenizer in (generator.tokenizer, top.tokenizer):
        codes = tokenizer.encode(picture)
        assert len(codes.levels) == 2 and tokenizer.tile == 768
        decoded = tokenizer.decompress(tokenizer.compress(picture))
        assert np.array_equal(np.asarray(decoded), np.asarray(tokenizer.decode(codes)))
    with pytest.raises(ValueError, match="only sample"):
        generator.complete(picture, picture)
    with pytest.raises(ValueError, match="only sample"):
        generator.sample(grid=(4, 4))
    with pytest.raises(ValueError, match="one level of a VQ-VAE-2"):
        taming.load(runs[1])
    with pytest.raises(ValueError, match="with all levels, got a Level"):
        Tokenizer(top.model.first_stage_model)
    assert Exhibit.load(str(runs[0]), torch.device("cpu")).tokenizer.model is not top.model
    generator.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the page shows one prior"):
        Exhibit.load(str(tmp_path), torch.device("cpu"))


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
    sites = np.zeros((h, w), bool)
    sites[: h // 2] = True
    assert torch.equal(generator.known_sites(mask), torch.from_numpy(sites))
    assert torch.equal(generator.known_sites(sites), torch.from_numpy(sites))
    assert not generator.known_sites(np.zeros_like(mask)).any()
    ones = mask // 255
    for kind in (ones, torch.from_numpy(ones), Image.fromarray(ones), ones.astype(np.uint16)):
        with pytest.raises(ValueError, match="use 0 and 255, or bool"):
            generator.known_sites(kind)
    assert torch.equal(generator.known_sites(ones > 0), torch.from_numpy(sites))


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


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_there_is_not_is_refused_first(device: str, tokenizer: Tokenizer) -> None:
    for place in (lambda: taming.load("no/such/run", device), lambda: tokenizer.to(device)):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            place()


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        taming.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("encode", "max_code", "max_codes"),
        ("compress", "bbp", "bpp"),
        ("compress", "target_pnsr", "target_psnr"),
        ("sample", "top_kk", "top_k"),
        ("complete", "temprature", "temperature"),
    ],
)
def test_a_misspelt_keyword_is_told_the_nearest(
    name: str, wrong: str, right: str, tokenizer: Tokenizer, generator: Generator
) -> None:
    call = getattr(tokenizer if hasattr(tokenizer, name) else generator, name)
    with pytest.raises(TypeError, match=rf"{name}\(\) takes no '{wrong}'; .* '{right}'\?"):
        call(None, **{wrong: 1})
    for function, keyword in ((taming.load, "tokeniser"), (taming.evaluate, "top_pp")):
        with pytest.raises(TypeError, match=rf"takes no '{keyword}'; did you mean"):
            wrong_keyword: Any = {keyword: 1}
            function("no/such/run", **wrong_keyword)
