"""Numbers of a tokenizer equal direct computations, whatever batches, order and rates there are."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import every_quantizer, tokenizer_of

import taming
from taming import Tokenizer
from taming.evaluation import measures
from taming.evaluation.examples import choose
from taming.evaluation.images import Digest, by_shape, of_pictures
from taming.evaluation.measures import FrechetDistance, pixel_measures
from taming.evaluation.tokenizer import evaluate_tokenizer
from taming.modules.sequence.grammar import TokenSequence
from taming.pictures import to_levels

FLAT = ("plain", "gumbel", "residual", "attract")  # one level of codes
SOME = (*FLAT, "beam", "levels", "loopy-levels")


def photos(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Smooth pictures of sizes (width, height)."""
    coarse = np.random.default_rng(1).integers(0, 256, (len(sizes), 5, 6, 3), dtype=np.uint8)
    blurred = Image.Resampling.BICUBIC
    return [Image.fromarray(c).resize(size, blurred) for c, size in zip(coarse, sizes, strict=True)]


PHOTOS = photos((24, 20), (23, 21), (24, 20), (32, 18), (23, 21), (24, 20), (16, 16))


def measured(
    quantizer: str, pictures: Any = PHOTOS, codes: tuple[float, ...] = (), batch_size: int = 4
) -> dict[str, Any]:
    """What pixels and codes give, without any network."""
    tokenizer = Tokenizer(tokenizer_of(quantizer), batch_size)
    images, missing = of_pictures(pictures, "image", 3), {}
    return evaluate_tokenizer(tokenizer, images, pixel_measures(), missing, codes) | {
        "missing": missing
    }


def flat(values: Any) -> Any:
    """Numbers of one rate, for `pytest.approx`."""
    blocks = ("quality", "codes")
    return {f"{block}/{name}": n for block in blocks for name, n in values[block].items()}


@pytest.mark.parametrize("quantizer", ["residual", "plain", "levels"])
def test_quality_is_that_of_the_pictures_that_the_face_decodes(quantizer):
    tokenizer = Tokenizer(tokenizer_of(quantizer))
    decoded = tokenizer.decode(tokenizer.encode(PHOTOS))
    pairs = [np.stack([x, y]).astype(float) for x, y in zip(PHOTOS, decoded, strict=True)]
    psnr = [20 * math.log10(255) - 10 * math.log10(((x - y) ** 2).mean()) for x, y in pairs]
    found = measured(quantizer)["rates"]["own"]
    assert found["per_image"]["PSNR"] == pytest.approx(psnr, rel=1e-4)
    assert found["quality"]["PSNR"] == pytest.approx(sum(psnr) / len(psnr), rel=1e-4)


@pytest.mark.parametrize("pixels", [1 << 20, 1000, 1])
def test_similarities_are_torchmetrics_whatever_is_seen_together(pixels, monkeypatch):
    from torchmetrics.functional import image as theirs

    monkeypatch.setattr(measures, "_PIXELS", pixels)
    x = torch.stack([torch.from_numpy(np.array(p)) for p in photos((179, 198), (179, 198))])
    x = x.movedim(-1, 1).float()
    y = (x + torch.randn(x.shape) * torch.tensor([3, 30])[:, None, None, None]).clamp(0, 255)
    _, ssim, ms_ssim = (m.compare for m in pixel_measures())
    options = {"data_range": 255.0, "reduction": "none"}
    wanted = theirs.structural_similarity_index_measure(y, x, **options)
    torch.testing.assert_close(ssim(x, y), wanted, rtol=1e-5, atol=0)
    wanted = theirs.multiscale_structural_similarity_index_measure(y, x, **options)
    torch.testing.assert_close(ms_ssim(x, y), wanted, rtol=1e-5, atol=0)


def test_similarity_is_skimages():
    from skimage.metrics import structural_similarity

    tokenizer = Tokenizer(tokenizer_of("residual"))
    decoded = tokenizer.decode(tokenizer.encode(PHOTOS))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    whole = [
        structural_similarity(
            np.asarray(x), np.asarray(y), channel_axis=2, data_range=255, **window
        )
        for x, y in zip(PHOTOS, decoded, strict=True)
    ]
    found = measured("residual")["rates"]["own"]["quality"]["SSIM"]
    assert found == pytest.approx(sum(whole) / len(whole), abs=0.02)  # edges are cut otherwise


def test_equal_pictures_have_the_largest_values():
    x = to_levels(torch.rand(2, 3, 180, 180) * 2 - 1).float()
    values = {m.name: m.compare(x, x).tolist() for m in pixel_measures() if m.compare}
    assert values == {"PSNR": [100.0] * 2, "SSIM": [1.0] * 2, "MS-SSIM": [1.0] * 2}


@pytest.mark.parametrize("quantizer", SOME)
def test_batches_and_order_change_no_number(quantizer):
    one = measured(quantizer, batch_size=1)
    order = [4, 2, 0, 6, 5, 3, 1]
    other = measured(quantizer, [PHOTOS[i] for i in order], batch_size=3)
    assert flat(other["rates"]["own"]) == pytest.approx(flat(one["rates"]["own"]), rel=1e-3)
    assert other["rates"]["own"]["histograms"] == one["rates"]["own"]["histograms"]
    assert other["protocol"] == one["protocol"]
    for name, values in one["rates"]["own"]["per_image"].items():
        moved = other["rates"]["own"]["per_image"][name]
        assert moved == pytest.approx([values[i] for i in order], abs=1e-3), name


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_picture_too_small_for_a_measure_is_left_out_of_it_alone(batch_size):
    small, tiny = photos((24, 20), (5, 7))
    found = measured("residual", [*PHOTOS, tiny, small], batch_size=batch_size)
    wanted = measured("residual", [*PHOTOS, small], batch_size=batch_size)
    values, others = (n["rates"]["own"]["per_image"]["SSIM"] for n in (found, wanted))
    place = len(PHOTOS)
    assert values[place] is None
    assert values[:place] + values[place + 1 :] == pytest.approx(others, abs=1e-3)
    means = [n["rates"]["own"]["quality"]["SSIM"] for n in (found, wanted)]
    assert means[0] == pytest.approx(means[1], abs=1e-3)
    assert found["left_out"].keys() == {"SSIM"} and not wanted["left_out"]
    assert found["left_out"]["SSIM"].startswith(f"1 of {place + 2} pictures; it takes pictures of")
    assert found["missing"].keys() == wanted["missing"].keys() == {"MS-SSIM"}


@pytest.mark.parametrize("quantizer", FLAT)
def test_use_of_the_codebook_is_counted_over_the_whole_set(quantizer):
    tokenizer = Tokenizer(tokenizer_of(quantizer))
    quantize = tokenizer.model.quantize
    codes = [code.indices.flatten() for code in tokenizer.encode(PHOTOS)]
    every = torch.cat(codes)
    counts = torch.bincount(every[(every >= 0) & (every < quantize.n_e)], minlength=quantize.n_e)
    share = (counts / counts.sum())[counts > 0].double()
    found = measured(quantizer)["rates"]["own"]
    assert found["histograms"]["codes"] == counts.tolist()
    assert found["codes"]["usage"] == pytest.approx(float((counts > 0).double().mean()))
    assert found["codes"]["perplexity"] == pytest.approx(float((-share * share.log()).sum().exp()))
    assert found["codes"]["codes_per_image"] == pytest.approx(int((every >= 0).sum()) / len(PHOTOS))


@every_quantizer
def test_bits_are_those_of_the_tokens(quantizer):
    tokenizer = Tokenizer(tokenizer_of(quantizer))
    levels: list[TokenSequence] = [q.sequence for q in tokenizer.model.levels.values()]
    bits, tokens = [], []
    for codes in tokenizer.encode(PHOTOS):
        each = [int(s.encode(c[None])[1]) for s, c in zip(levels, codes.levels, strict=True)]
        tokens.append(sum(each))
        bits.append(sum(n * math.log2(s.vocab_size) for n, s in zip(each, levels, strict=True)))
    found = measured(quantizer)["rates"]["own"]
    assert found["per_image"]["tokens"] == tokens
    assert found["per_image"]["bits"] == pytest.approx(bits)
    pixels = sum(width * height for width, height in (photo.size for photo in PHOTOS))
    assert found["codes"]["bits_per_pixel"] == pytest.approx(sum(bits) / pixels)


@pytest.mark.parametrize("quantizer", ["residual", "beam", "attract"])
def test_several_rates_in_one_pass_are_those_of_passes_of_their_own(quantizer):
    rates = (1.5, 3.0)
    pictures = PHOTOS[:4]
    together = measured(quantizer, pictures, rates)["rates"]
    assert list(together) == ["own", "1.5", "3"]
    tokenizer = Tokenizer(tokenizer_of(quantizer))
    for rate in rates:
        alone = measured(quantizer, pictures, (rate,))["rates"][f"{rate:g}"]
        assert together[f"{rate:g}"] == alone
        most = [math.floor(rate * -(-p.width // 2) * -(-p.height // 2)) for p in pictures]
        codes = [tokenizer.encode(p, max_codes=m) for p, m in zip(pictures, most, strict=True)]
        mean = sum(map(len, codes)) / len(pictures)
        assert alone["codes"]["codes_per_image"] == pytest.approx(mean)
        assert alone["codes"]["mean_length"] <= rate


def test_the_hash_is_of_the_pixels_and_not_of_their_order():
    def hashed(*images: torch.Tensor) -> str:
        digest = Digest()
        for image in images:
            digest.update(image[None])
        return digest.about()["sha256"]

    a, b = to_levels(torch.rand(2, 3, 4, 6))
    changed = b.clone()
    changed[1, 2, 3] ^= 1
    assert hashed(a, b) == hashed(b, a) != hashed(a, changed)
    assert hashed(a) != hashed(a, a) != hashed(a, b)
    assert hashed(a.reshape(3, 6, 4)) != hashed(a)


def test_groups_hold_every_picture_once_and_few_wait():
    sizes = [(1 + n % 7, 2 + n % 3) for n in range(60)]
    images = ((str(n), torch.full((1, *size), n)) for n, size in enumerate(sizes))
    seen: list[int] = []
    for positions, names, x in by_shape(images, 2):
        assert len(x) <= 2 and names == [str(p) for p in positions]
        assert x[:, 0, 0, 0].tolist() == positions
        assert {sizes[p] for p in positions} == {(x.shape[2], x.shape[3])}
        seen += positions
    assert sorted(seen) == list(range(60))


def test_frechet_distance_is_the_formula_in_any_batches():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 5)), generator.normal(size=(30, 5)) * 1.5 + 0.3
    cx, cy = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(cx)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cy @ root)).sum()
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * cross
    for size in (7, 40):
        distance = FrechetDistance()
        for part in torch.from_numpy(x).split(size):
            distance.update(part, real=True)
        assert distance.compute() is None
        for part in torch.from_numpy(y).split(size):
            distance.update(part, real=False)
        assert distance.compute() == pytest.approx(wanted)


def test_a_measure_that_sees_no_picture_is_missing():
    ms_ssim = pixel_measures()[2]
    assert not ms_ssim.refusal((1, 3, 176, 180)) and ms_ssim.refusal((1, 3, 176, 175))
    small = measured("plain", photos((8, 9), (12, 10)))
    assert set(small["rates"]["own"]["quality"]) == {"PSNR"}
    assert set(small["rates"]["own"]["per_image"]) == {"PSNR", "tokens", "bits"}
    assert "at least 11 pixels a side; one has 8x9" in small["missing"]["SSIM"]
    assert "176" in small["missing"]["MS-SSIM"] and not small["left_out"]


def test_examples_are_best_median_and_worst():
    values = [3.0, 9.0, 1.0, 7.0, 5.0, 8.0, 2.0]
    assert choose(values, 1) == {1: "best", 2: "worst", 4: "median"}
    assert choose(values, 2) == {
        **{1: "best", 5: "best", 2: "worst", 6: "worst", 3: "median", 4: "median"}
    }
    assert choose(values[:1], 3) == {0: "best"}
    few = choose(values[:4], 3)
    assert sorted(few) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": [0.5]}, r"codes must be mean numbers of codes in \[1, 3\], got 0.5"),
        ({"codes": [math.nan]}, "got nan"),
        ({"generated": 4}, "only a prior generates pictures"),
        ({"top_k": 4}, "only a prior generates pictures"),
        ({"generated": -1}, "generated must be at least 0, got -1"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"size": 8}, "size crops the files of a folder, list or Parquet file"),
        ({"data": None}, "a model that is loaded has no validation set: give data"),
        ({"data": []}, "no images to evaluate on"),
        ({"data": "nowhere"}, "there is no folder, list of images or Parquet file nowhere"),
    ],
)
def test_mistakes(options, message, without_networks):
    tokenizer = Tokenizer(tokenizer_of("residual"))
    with pytest.raises((ValueError, OSError), match=message):
        taming.evaluate(tokenizer, **{"data": PHOTOS, **options})


def test_a_fixed_rate_has_no_other(without_networks):
    with pytest.raises(ValueError, match="VectorQuantizer2 has a fixed rate: omit codes"):
        taming.evaluate(Tokenizer(tokenizer_of("plain")), PHOTOS, codes=[1])
    with pytest.raises(ValueError, match="a Tokenizer takes a tokenizer"):
        taming.evaluate(torch.nn.Linear(2, 2), PHOTOS)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["array", "tensor", "pil"])
def test_one_picture_is_one(kind, without_networks):
    array = np.asarray(PHOTOS[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    one: Any = {"array": array, "tensor": tensor, "pil": PHOTOS[0]}[kind]
    found = taming.evaluate(Tokenizer(tokenizer_of("plain")), one).numbers["protocol"]
    assert found["images"] == 1 and found["resolution"] == "24x20"


def test_the_size_of_batches_is_that_asked_for(without_networks, monkeypatch):
    seen = []
    tokenizer = Tokenizer(tokenizer_of("plain"), batch_size=1)
    encode = tokenizer.model.encode_to_prequant
    watched = lambda x: seen.append(len(x)) or encode(x)  # noqa: E731
    monkeypatch.setattr(tokenizer.model, "encode_to_prequant", watched)
    taming.evaluate(tokenizer, [PHOTOS[0]] * 5, batch_size=3)
    assert seen == [3, 2]
