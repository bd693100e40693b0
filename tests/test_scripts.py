"""What scripts write, for a tokenizer and priors of two steps of training."""

import base64
import io
import json
import math
import shutil
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from support.models import GPT, vqmodel_config
from support.runs import CONFIGS, TRAINER, TinyRuns, call, fails, read_pixels, run_main

import taming
from benchmarks.data import measure_prior
from scripts.reconstruct import ENDINGS, files_of
from taming.checkpoint import load_checkpoint
from taming.data.custom import unique_names
from taming.data.tokens import TokenCache
from taming.demo.__main__ import port
from taming.generator import Generator
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.prior import Prior
from taming.models.sampling import sample_images
from taming.pictures import to_picture
from taming.run.folder import data_from_run, model_from_run

SIDE, TURNS, PIXELS = 4, 5, 16  # of the demo's models at tiny sizes
GAP = 2  # pixels around every picture of a grid


def tiles(path: Path, count: int) -> list[np.ndarray]:
    """The pictures (PIXELS, PIXELS, 3) of a grid of one row."""
    row = read_pixels(path)
    assert row.shape == (PIXELS + 2 * GAP, count * (PIXELS + GAP) + GAP, 3)
    lefts = [GAP + i * (PIXELS + GAP) for i in range(count)]
    return [row[GAP : GAP + PIXELS, left : left + PIXELS] for left in lefts]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a script writes by default is not left in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer(tiny_runs: TinyRuns) -> Path:
    return tiny_runs.of("demo/loopy_vqgan.yaml")


@pytest.fixture
def prior(tiny_runs: TinyRuns) -> Path:
    return tiny_runs.of("demo/loopy_transformer.yaml")


@pytest.fixture
def photo(tiny_runs: TinyRuns) -> Path:
    return tiny_runs.folder / "data/images/0.png"


@pytest.fixture(scope="module")
def evaluations(
    tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What ``evaluate`` says of the demo's tokenizer and prior."""
    folder, numbers = tmp_path_factory.mktemp("evaluations"), {}
    for name, config in (("tokenizer", "loopy_vqgan"), ("prior", "loopy_transformer")):
        output = folder / "new" / f"{name}.json"
        call("evaluate", "-r", tiny_runs.of(f"demo/{config}.yaml"), "-o", output)
        numbers[name] = json.loads(output.read_text())
    return numbers


def test_evaluation_of_a_tokenizer(evaluations: dict[str, dict[str, Any]]) -> None:
    numbers = evaluations["tokenizer"]["rates"]["own"]
    tokens, values = numbers["per_image"]["tokens"], numbers["codes"]
    assert len(tokens) == 4
    lengths, codes = (numbers["histograms"][name] for name in ("lengths", "codes"))
    assert len(lengths) == TURNS + 1 and lengths[0] == 0 and sum(lengths) == 4 * SIDE**2
    slots = sum(turns * count for turns, count in enumerate(lengths))
    assert len(codes) == 16 and sum(codes) == slots
    assert values["mean_length"] == pytest.approx(slots / sum(lengths))
    assert values["usage"] == pytest.approx(sum(map(bool, codes)) / 16)
    # D ends every site of fewer turns than the most.
    ended = sum(count * min(turns + 1, TURNS) for turns, count in enumerate(lengths))
    assert sum(tokens) == ended
    for name in ("perplexity", "never_within_threshold", "relative_threshold"):
        assert math.isfinite(values[name])


def test_evaluation_of_a_prior(evaluations: dict[str, dict[str, Any]]) -> None:
    numbers = evaluations["prior"]["codes"]
    lengths = evaluations["tokenizer"]["rates"]["own"]["per_image"]["tokens"]
    assert evaluations["prior"]["per_image"]["tokens"] == lengths
    bits = numbers["bits_per_token"] * numbers["tokens_per_image"]
    assert numbers["bits_per_image"] == pytest.approx(bits)
    assert numbers["bits_per_token"] == pytest.approx(math.log2(17), rel=0.2)  # untrained


@pytest.mark.parametrize(("options", "size"), [((), (51, 43)), (("--size", 21), (25, 21))])
def test_reconstructions(
    options: tuple[str, ...], size: tuple[int, int], tokenizer: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    with Image.open(photo) as picture:
        shown = picture if options else picture.resize(size)
        shown.save(tmp_path / "whole.jpg")
        shown.save(tmp_path / "folder/odd.png")
    inputs, out = (tmp_path / "whole.jpg", tmp_path / "folder"), tmp_path / "out"
    call("reconstruct", "-r", tokenizer, *inputs, "-o", out, *options)
    numbers = json.loads((out / "reconstructions.json").read_text())
    assert list(numbers) == [str(inputs[0]), str(inputs[1] / "odd.png")]
    width, height = size
    for path, values in numbers.items():
        stem = Path(path).stem
        for name in (stem, f"{stem}_lengths"):
            assert read_pixels(out / f"{name}.png").shape == (height, width, 3)
        compared = read_pixels(out / f"{stem}_compare.png")
        assert compared.shape == (height + 2 * GAP, 3 * (width + GAP) + GAP, 3)
        reconstruction = compared[GAP:-GAP, width + 2 * GAP : 2 * (width + GAP)]
        assert (reconstruction == read_pixels(out / f"{stem}.png")).all()
        turns = values["turns"]
        assert values["size"] == [width, height]
        assert values["sites"] == sum(turns) == -(-width // 4) * -(-height // 4)
        assert values["codes"] == sum(n * c for n, c in enumerate(turns, 1))
        written = sum(min(n + 1, TURNS) * c for n, c in enumerate(turns, 1))  # with every end
        assert values["tokens"] == written
        assert values["bits"] == pytest.approx(written * math.log2(17))
        mean = sum(n * count for n, count in enumerate(turns, 1)) / sum(turns)
        assert values["turns_per_site"] == pytest.approx(mean)
        assert math.isfinite(values["psnr"])


def test_images_that_fail_do_not_stop_the_others(
    tokenizer: Path, prior: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    with Image.open(photo) as picture:
        for name, side in (("a", 32), ("b", 64), ("c", 32), ("d", 32)):
            picture.resize((side, side)).save(images / f"{name}.png")
    (images / "c.png").write_bytes((images / "c.png").read_bytes()[:300])
    limit = ("--max_codes", 64)  # one for each site, but not for those of the second
    error = fails(capsys, "reconstruct", "-r", tokenizer, images, "-o", out, *limit, status=1)
    assert "2 of 4 files failed" in error and "b.png" in error
    done = [str(images / name) for name in ("a.png", "d.png")]
    assert list(json.loads((out / "reconstructions.json").read_text())) == done
    completed = ("--complete", images, "-o", out, "--top_k", 4)
    error = fails(capsys, "sample", "-r", prior, *completed, status=1)
    assert "1 of 4 files failed" in error and "c.png" in error
    assert len(list(out.glob("*_completed.png"))) == 3


def test_results_overwrite_neither_each_other_nor_an_image(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [Path(p) for p in ("x/a.png", "a_lengths.png", "A.jpg", "b.png", "y/b.png")]
    names = unique_names(paths, ENDINGS)
    files = [file.casefold() for name in names for file in files_of(name)]
    assert len(files) == len(set(files)) and names[0] == "a" and names[3:] == ["b", "b_2"]
    for name in ("cat.png", "cat_compare.png"):
        (tmp_path / name).write_bytes(photo.read_bytes())
    error = fails(capsys, "reconstruct", "-r", "photos", tmp_path / "cat.png", "-o", tmp_path)
    assert "cat.png is one of the images: choose another folder with -o" in error
    error = fails(capsys, "extract_segmentation", tmp_path, "--images", tmp_path)
    assert "would be overwritten by its map" in error


def test_a_loop_that_ends_by_rate_reports_no_threshold(
    tiny_runs: TinyRuns, photo: Path, tmp_path: Path
) -> None:
    run = tiny_runs.of("photos.yaml")  # has a rate of its own
    for limit, reported in (((), False), (("--rate", 0.01), False), (("--max_codes", 99999), True)):
        call("reconstruct", "-r", run, photo, "-o", tmp_path, *limit)
        (values,) = json.loads((tmp_path / "reconstructions.json").read_text()).values()
        assert ("threshold" in values) is reported


def test_reconstructions_of_a_tokenizer_without_a_loop(
    tiny_runs: TinyRuns, photo: Path, tmp_path: Path
) -> None:
    call("reconstruct", "-r", tiny_runs.of("custom_vqgan.yaml"), photo, "-o", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"0.png", "0_compare.png", "reconstructions.json"}
    (values,) = json.loads((tmp_path / "reconstructions.json").read_text()).values()
    assert values["size"] == [48, 40] and values["sites"] == 3 * 3  # 16 pixels a side
    assert values["sites"] == values["codes"] == values["tokens"] and values["bits"] == 9 * 4


def test_samples_follow_from_the_seed(prior: Path, tmp_path: Path) -> None:
    names = ["000000.png", "000001.png", "000002.png", "grid.png"]
    pictures: dict[str, list[np.ndarray]] = {}
    for folder, seed, batch in (("first", 5, 2), ("again", 5, 3), ("other", 6, 2)):
        out = tmp_path / folder
        call("sample", "-r", prior, "-n", 3, "--batch_size", batch, "-s", seed, "-o", out)
        assert sorted(path.name for path in out.iterdir()) == names
        pictures[folder] = [read_pixels(out / name).astype(int) for name in names]
    # Another size of the batch may round otherwise.
    distance = {
        k: abs(np.stack(v[:3]) - np.stack(pictures["first"][:3])) for k, v in pictures.items()
    }
    assert distance["again"].max() <= 1 < distance["other"].max(axis=(1, 2, 3)).min()
    single = [read_pixels(tmp_path / "first" / name) for name in names[:3]]
    for one, tile in zip(single, tiles(tmp_path / "first/grid.png", 3), strict=True):
        assert (one == tile).all()


def test_samples_overwrite_nothing_and_go_to_a_folder_of_their_run(
    prior: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("sample", "-r", prior, "-n", 2)
    call("sample", "-r", prior, "-n", 1, "--complete", photo)
    folder = Path("results/samples") / prior.name
    files = {file: file.read_bytes() for file in folder.iterdir()}
    assert len(files) == 2 + 1 + 2
    for more in ((), ("--complete", photo)):
        assert "exists already" in fails(capsys, "sample", "-r", prior, "-n", 1, "-s", 5, *more)
    assert files == {file: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
def test_samples_of_classes(kind: str, tiny_runs: TinyRuns, tmp_path: Path) -> None:
    pixelcnn = kind == "pixelcnn"
    run = tiny_runs.of("pixelcnn_cifar10.yaml") if pixelcnn else tiny_runs.class_conditional()
    call("sample", "-r", run, "-n", 2, "--classes", "3,7", "--top_k", 9, "-o", tmp_path)
    names = sorted(path.name for path in tmp_path.glob("0*.png"))
    assert names == [f"00000{i}_class{c}.png" for i, c in enumerate((3, 3, 7, 7))]
    assert len(tiles(tmp_path / "grid.png", 4)) == 4


@pytest.mark.reported(25)
def test_samples_larger_than_the_trained_grid(prior: Path, tmp_path: Path) -> None:
    call("sample", "-r", prior, "-n", 1, "--grid", "5,7", "-o", tmp_path)
    site = PIXELS // SIDE
    assert read_pixels(tmp_path / "000000.png").shape == (5 * site, 7 * site, 3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``sample.py`` had drawn: codes before and after, the mask, the first image decoded."""
    seen: dict[str, Any] = {"batches": []}

    def sample(
        model: Prior, condition: Any, params: Any, codes: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        seen["given"], seen["known"] = codes.clone(), known
        seen["reconstruction"] = np.asarray(to_picture(model.decode_codes(codes[:1])[0]))
        sample_codes = model.sample_codes

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            seen["drawn"] = sample_codes(*args, **kwargs)
            return seen["drawn"]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "sample_codes", watched)
            images = sample_images(model, condition, params, codes=codes, known=known)
        seen["batches"] = [*seen["batches"], len(codes)]
        return images

    monkeypatch.setattr("taming.generator.sample_images", sample)
    return seen


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_a_completion_keeps_what_is_known(
    rows: int, prior: Path, photo: Path, tmp_path: Path, seen: dict[str, Any]
) -> None:
    known = ("--known", rows / SIDE)
    call("sample", "-r", prior, "--complete", photo, "-n", 3, *known, "-o", tmp_path)

    drawn, given = seen["drawn"], seen["given"]
    assert drawn.shape == (3, SIDE, SIDE, TURNS)
    assert (drawn[:, :rows] == given[:, :rows]).all()
    if rows < SIDE:
        assert not (drawn[:, rows:] == given[:, rows:]).all()
    _, shown, *completed = tiles(tmp_path / "000000_0_completed.png", 2 + 3)
    limit = rows * PIXELS // SIDE
    for image in (shown, *completed):  # although the decoder sees what was drawn
        assert (image[:limit] == seen["reconstruction"][:limit]).all()
    assert (shown[limit:] == 255).all()
    assert len({image.tobytes() for image in completed}) == (3 if rows < SIDE else 1)


def test_a_mask_says_what_is_known(
    prior: Path, photo: Path, tmp_path: Path, seen: dict[str, Any]
) -> None:
    known = np.zeros((SIDE, SIDE), np.uint8)
    known[1:3, 2:] = 255
    Image.fromarray(known).resize((40, 40), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    call("sample", "-r", prior, "--complete", photo, "-n", 2, "--mask", "mask.png", "-o", "out")
    _, shown, *completed = tiles(tmp_path / "out/000000_0_completed.png", 2 + 2)
    inside = known.repeat(PIXELS // SIDE, 0).repeat(PIXELS // SIDE, 1) > 0
    for image in (shown, *completed):
        assert (image[inside] == seen["reconstruction"][inside]).all()
    assert (shown[~inside] == 255).all()
    assert not (completed[0][~inside] == completed[1][~inside]).all()


def test_a_mask_lies_on_its_photo(prior: Path, seen: dict[str, Any]) -> None:
    """A picture that is its own mask is known where all the pixels of a site are bright."""
    pattern = np.zeros((32, 48), np.uint8)  # of which rows 0..32 and columns 8..40 are seen
    pattern[:, 14:36] = 255
    pattern[4:6, 28:30] = 0  # a single pixel of the image, in a site else bright
    Image.fromarray(pattern).save("photo.png")
    own = ("--mask", "photo.png", "-o", "out")
    call("sample", "-r", prior, "--complete", "photo.png", "-n", 1, *own)
    picture, *_ = tiles(Path("out/000000_photo_completed.png"), 2 + 1)
    sites = (picture.min(axis=2) > 127).reshape(SIDE, PIXELS // SIDE, SIDE, PIXELS // SIDE)
    assert seen["known"].tolist() == sites.all(axis=(1, 3)).tolist()
    below = [False, True, True, False]
    assert seen["known"].tolist() == [[False, True, False, False], below, below, below]


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
def test_completions_of_classes(
    kind: str, tiny_runs: TinyRuns, photo: Path, tmp_path: Path, seen: dict[str, Any]
) -> None:
    pixelcnn = kind == "pixelcnn"
    run = tiny_runs.of("pixelcnn_cifar10.yaml") if pixelcnn else tiny_runs.class_conditional()
    call("sample", "-r", run, "--complete", photo, "-n", 2, "--classes", "3,7", "-o", tmp_path)
    half = PIXELS // 2
    _, shown, *completed = tiles(tmp_path / "000000_0_completed.png", 2 + 4)
    assert all((image[:half] == shown[:half]).all() for image in completed)
    assert len({image.tobytes() for image in completed}) == 4


def test_completions_depend_on_seed_and_number_alone(
    prior: Path, photo: Path, tmp_path: Path, seen: dict[str, Any]
) -> None:
    """Neither on the batch, nor on how many there are; and no other image's are overwritten."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(photo.read_bytes())
    rows = {}
    for amount, batch in ((3, 2), (2, 8)):
        out = tmp_path / f"{amount}"
        options = ("-n", amount, "--batch_size", batch, "-o", out)
        call("sample", "-r", prior, "--complete", "a", "b/0.png", *options)
        names = sorted(path.name for path in out.iterdir())
        ends = [*(f"{place:06}" for place in range(amount)), "completed"]
        assert names == [f"00000{number}_0_{end}.png" for number in range(2) for end in ends]
        rows[amount] = [tiles(out / f"00000{n}_0_completed.png", 2 + amount)[2:] for n in range(2)]
        for number, row in enumerate(rows[amount]):
            for place, picture in enumerate(row):
                assert (read_pixels(out / f"00000{number}_0_{place:06}.png") == picture).all()
    assert seen["batches"] == [2, 1, 2, 1, 2, 2]
    for more, fewer in zip(rows[3], rows[2], strict=True):
        for one, other in zip(more, fewer, strict=False):
            assert np.allclose(one, other, atol=1)  # another size of the batch may round otherwise
    assert not np.allclose(rows[2][0][0], rows[2][1][0], atol=1)


@pytest.mark.parametrize("script", ["sample", "sample_hierarchy"])
def test_min_p_cuts_off_all_but_the_likeliest(
    script: str, prior: Path, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    levels = ("vqvae2_top_prior.yaml", "vqvae2_bottom_prior.yaml")
    runs = [prior] if script == "sample" else [tiny_runs.of(name) for name in levels]
    options = ("-n", 1, "--min_p", 1)
    for seed in (1, 2):
        call(script, "-r", *runs, *options, "-s", seed, "-o", tmp_path / str(seed))
    one, other = (read_pixels(tmp_path / f"{seed}/000000.png") for seed in (1, 2))
    assert (one == other).all()


def test_without_guidance_classes_do_not_matter(
    tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_from_run(tiny_runs.class_conditional())
    model.condition_dropout = 0.1  # as if it had been trained so: its last token stands for none
    torch.manual_seed(0)
    with torch.no_grad():  # after two steps, it hardly looks at the class
        for parameter in model.transformer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    monkeypatch.setattr("taming.run.folder.model_from_run", lambda run, **_: model)
    pictures = {}
    for scale, label in product((0, 1, 3), (3, 7)):
        options = ("--guidance", scale, "--classes", label, "-o", tmp_path / f"{scale}_{label}")
        call("sample", "-r", ".", "-n", 1, *options)
        name = f"{scale}_{label}/000000_class{label}.png"
        pictures[scale, label] = (tmp_path / name).read_bytes()
    assert pictures[0, 3] == pictures[0, 7]
    assert len({pictures[0, 3], pictures[1, 3], pictures[1, 7], pictures[3, 3]}) == 4


def test_samples_of_a_grey_tokenizer_are_written(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = Net2NetTransformer(GPT, vqmodel_config(1), "__is_unconditional__").eval()
    monkeypatch.setattr("taming.run.folder.model_from_run", lambda run, **_: grey)
    call("sample", "-r", ".", "-n", 1, "-o", tmp_path)
    picture = read_pixels(tmp_path / "000000.png")
    assert picture.shape == (16, 16, 3) and (picture == picture[..., :1]).all()
    error = fails(capsys, "sample", "-r", ".", "--complete", photo)
    assert "--complete takes photographs, but the tokenizer's images have no colours" in error


def test_tokens_are_computed_once(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("encode", "-r", tokenizer, "-o", "cache", "--passes", 2)
    train, validation = (TokenCache(str(tmp_path / "cache" / s)) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (2 * 8, 4)
    model, images = model_from_run(tokenizer), data_from_run(tokenizer).datasets["validation"]
    for cached, item in zip(validation, images, strict=True):
        x = torch.from_numpy(item["image"]).permute(2, 0, 1)[None]
        tokens, _ = model.quantize.sequence.encode(model.encode(x).info.indices)
        assert cached["tokens"][cached["tokens"] >= 0].tolist() == tokens[0].tolist()
        assert cached["grid"].tolist() == [SIDE, SIDE] and cached["pixels"] == PIXELS**2
    places = [(item["pass_number"], item["image_number"]) for item in train]
    assert places == list(product(range(2), range(8)))
    shutil.rmtree("cache/validation")
    error = fails(capsys, "encode", "-r", tokenizer, "-o", "cache")  # one pass, not two
    assert "cache/train was begun with other data" in error
    assert not Path("cache/validation").exists()
    files = {file: file.read_bytes() for file in Path("cache/train").iterdir()}
    call("encode", "-r", tokenizer, "-o", "cache", "--passes", 2)
    assert len(TokenCache("cache/validation")) == 4
    assert files == {file: file.read_bytes() for file in Path("cache/train").iterdir()}
    error = fails(capsys, "encode", "-r", tokenizer, "-o", "cache", "--splits", "val")
    assert "'val'" in error and "train, validation" in error


def test_an_interrupted_cache_says_how_to_go_on(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taming.scale.encode_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("encode", "-r", tokenizer, "-o", "cache")
    assert "repeat the command to go on" in caplog.text


def test_a_prior_trains_from_cached_tokens(
    tokenizer: Path, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    call("encode", "-r", tokenizer, "-o", "cache")
    config: Any = OmegaConf.load(CONFIGS / "demo/loopy_transformer.yaml")
    for split in ("train", "validation"):
        params = {"path": str(tmp_path / "cache" / split)}
        config.data.params[split] = {"target": "taming.data.tokens.TokenCache", "params": params}
    OmegaConf.save(config, "cached.yaml")
    sizes = [o for o in tiny_runs.overrides["demo/loopy_transformer.yaml"] if "data." not in o]
    stage = f"model.params.first_stage_config.params.run={tokenizer}"
    start = ("-b", "cached.yaml", "-t", "-n", "cached", "--max_steps=2")
    run_main(tmp_path, *start, *TRAINER, *sizes, stage)
    (run,) = (tmp_path / "logs").glob("*_cached")
    assert list(run.glob("images/val/samples_half_*.png"))
    assert model_from_run(run).first_stage_key == "image"  # and goes on from images, if need be
    with pytest.raises(ValueError, match="trained from a token cache"):
        measure_prior(str(run), "cache/train", repeats=2)


def test_a_prior_trains_from_pictures_of_different_sizes(
    tokenizer: Path, tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, size in enumerate([(16, 16), (16, 12), (12, 16)] * 2):
        path = tmp_path / f"photos/{number}.png"
        path.parent.mkdir(exist_ok=True)
        read = Image.open(tiny_runs.folder / f"data/images/{number}.png")
        read.resize(size).save(path)
    call("encode", "-r", tokenizer, "-o", "cache", "--data", "photos", "--device", "cpu")
    config: Any = OmegaConf.load(CONFIGS / "demo/loopy_transformer.yaml")
    cache = {"target": "taming.data.tokens.TokenCache", "params": {"path": "cache"}}
    config.data.params.train = config.data.params.validation = cache
    OmegaConf.save(config, "cached.yaml")
    sizes = [o for o in tiny_runs.overrides["demo/loopy_transformer.yaml"] if "data." not in o]
    stage = f"model.params.first_stage_config.params.run={tokenizer}"
    start = ("-b", "cached.yaml", "-t", "-n", "cached", "--max_epochs=1", "--no-test")
    run_main(tmp_path, *start, *TRAINER, "--limit_train_batches=1.0", *sizes, stage)
    (run,) = (tmp_path / "logs").glob("*_cached")
    checkpoint = load_checkpoint(run / "checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 3  # batches of two, each of one grid


class Sources(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_report_is_one_file(
    evaluations: dict[str, dict[str, Any]],
    tokenizer: Path,
    prior: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, numbers in evaluations.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(numbers))
    call("reconstruct", "-r", tokenizer, photo, "-o", tmp_path / "reconstructions")
    call("sample", "-r", prior, "-n", 2, "-o", tmp_path / "samples")
    assert "*_completed.png" in fails(capsys, "report", tmp_path)
    where = ("-n", 1, "-o", tmp_path / "completions")
    call("sample", "-r", prior, "--complete", photo, *where)
    call("report", tmp_path)

    text = (tmp_path / "report.html").read_text()
    page = Sources()
    page.feed(text)
    assert not page.tags & {"link", "script", "iframe", "object"}
    assert "://" not in text and "url(" not in text and "@import" not in text
    shown = []
    for source in page.sources:
        head, _, code = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(code))) as picture:
            picture.load()
            shown.append(picture.size)
    files = ("reconstructions/0_compare", "samples/grid", "completions/000000_0_completed")
    sizes = [read_pixels(tmp_path / f"{file}.png").shape[1::-1] for file in files]
    assert shown == [sizes[0], (1080, 360), *sizes[1:]]
    assert f"{evaluations['tokenizer']['rates']['own']['quality']['PSNR']:.2f} dB" in text
    assert f"{evaluations['prior']['codes']['bits_per_token']:.2f}" in text


@pytest.mark.parametrize("script", ["reconstruct", "sample", "evaluate"])
def test_a_run_must_exist(
    script: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [photo] if script == "reconstruct" else []
    assert "does not exist" in fails(capsys, script, "-r", tmp_path / "nowhere", *more)
    assert f"{tmp_path} is not a run" in fails(capsys, script, "-r", tmp_path, *more)


@pytest.mark.parametrize("script", ["reconstruct", "sample", "evaluate"])
def test_a_device_must_exist(
    script: str, tokenizer: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [photo] if script == "reconstruct" else []
    error = fails(capsys, script, "-r", tokenizer, *more, "--device", "cuda:99")
    assert "device 'cuda:99' cannot be used here" in error


def test_models_are_not_mixed_up(
    tokenizer: Path,
    prior: Path,
    photo: Path,
    tiny_runs: TinyRuns,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = fails(capsys, "sample", "-r", tokenizer)
    assert f"{tokenizer} holds a VQModel, not a prior" in error
    error = fails(capsys, "sample", "-r", prior, "-o", photo)
    assert f"{photo} is a file, but results go into a folder" in error
    error = fails(capsys, "reconstruct", "-r", prior, photo)
    assert f"{prior} holds a Net2NetTransformer, not a tokenizer" in error
    depth = tiny_runs.of("imagenetdepth_vqgan.yaml")
    error = fails(capsys, "reconstruct", "-r", depth, photo)
    assert "a tokenizer of 1 channels" in error
    error = fails(capsys, "reconstruct", "-r", tokenizer, photo, "-o", photo)
    assert f"{photo} is a file, but results go into a folder" in error
    error = fails(capsys, "reconstruct", "-r", tokenizer, photo, "-s", "-5")
    assert "--size must be at least 1, got -5" in error
    level = tiny_runs.of("vqvae2_bottom_prior.yaml")
    error = fails(capsys, "sample_fast", "-r", level, "--classes", "1")
    assert "one level of a VQ-VAE-2: use scripts/sample_hierarchy.py" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "3"], "--classes 3: this prior is unconditional"),
        (["-n", "0"], "--num_samples and --batch_size must be at least 1"),
        (["--known", "1.5"], "--known must be in [0, 1], got 1.5"),
        (["--mask", __file__], "say what is known of images: give them by --complete"),
        (["--mask", __file__, "--known", "0.3"], "give --known or --mask, not both"),
        (["--grid", "4x4"], "--grid expects rows,columns such as 16,16, got '4x4'"),
        (["--grid", "0,4"], "--grid expects rows,columns such as 16,16, got '0,4'"),
        (["--temperature", "-1"], "temperature"),
        (["--top_p", "2"], "top_p"),
        (["--complete", "nowhere.png"], "there is no file or folder nowhere.png"),
    ],
)
def test_mistakes_about_samples(
    options: list[str], message: str, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "sample", "-r", prior, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "class-conditional: give --classes, such as 3,7"),
        (["--complete", __file__], "class-conditional: give --classes, such as 3,7"),
        (["--classes", "3", "--guidance", "2"], "guidance 2.0 needs a prior that was trained with"),
        (["--classes", "cat"], "expected class labels such as 3,7, got 'cat'"),
        (["--classes", "3,10"], "there is no class 10: the labels of this prior are 0 to 9"),
    ],
)
def test_mistakes_about_classes(
    options: list[str], message: str, tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "sample", "-r", tiny_runs.class_conditional(), *options)


def test_images_that_cannot_be_used_are_named(
    tokenizer: Path,
    prior: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (30, 3)).save("small.png")
    Image.fromarray(read_pixels(photo)).save("cut.jpg")
    Path("cut.jpg").write_bytes(Path("cut.jpg").read_bytes()[:-200])
    (tmp_path / "empty").mkdir()
    call("reconstruct", "-r", tokenizer, "small.png", "-o", "out")  # smaller than a site
    assert read_pixels(Path("out/small.png")).shape == (3, 30, 3)
    assert "cut.jpg" in fails(capsys, "reconstruct", "-r", tokenizer, "cut.jpg", status=1)
    error = fails(capsys, "reconstruct", "-r", tokenizer, photo, "--max_codes", 1, status=1)
    assert f"{photo}: an image of " in error and "sites needs at least" in error
    error = fails(capsys, "reconstruct", "-r", tokenizer, photo, "--target_bits", 1, status=1)
    assert f"{photo}: target_bits 1.0 is less than the " in error
    assert "cut.jpg" in fails(capsys, "sample", "-r", prior, "--complete", "cut.jpg", status=1)
    assert "in or below empty" in fails(capsys, "reconstruct", "-r", tokenizer, "empty")
    assert "nowhere" in fails(capsys, "reconstruct", "-r", tokenizer, "nowhere")


def test_samples_are_saved_as_they_come(
    tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(generator: Generator, *arguments: Any, **options: Any) -> Any:
        if options["first"] >= 4:
            raise KeyboardInterrupt
        return sample(generator, *arguments, **options)

    run, sample = tiny_runs.class_conditional(), Generator.sample
    wanted = taming.load(run).sample(3, label=[3, 7], seed=5)  # type: ignore[union-attr]
    monkeypatch.setattr(Generator, "sample", stopped)
    options = ("-n", 3, "--classes", "3,7", "-s", 5, "--batch_size", 2, "-o", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        call("sample", "-r", run, *options)
    names = [f"00000{number}_class{label}.png" for number, label in enumerate((3, 3, 3, 7))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, picture in zip(names, wanted, strict=False):
        assert abs(read_pixels(tmp_path / name).astype(int) - np.asarray(picture)).max() <= 1


def test_mistakes_end_in_one_line(
    tiny_runs: TinyRuns,
    prior: Path,
    evaluations: dict[str, dict[str, Any]],
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = fails(capsys, "quantize_colours", photo, "--size", 0)
    assert "size must be at least 1, got 0" in error
    error = fails(capsys, "extract_segmentation", "out", "--images", photo)
    assert f"{photo} is a file: name the folder of the images" in error
    stream = "{target: torch.utils.data.datapipes.iter.IterableWrapper, params: {iterable: [1]}}"
    data = f"data={{target: main.DataModuleFromConfig, params: {{batch_size: 1, train: {stream}}}}}"
    error = fails(capsys, "make_samples", "-r", prior, "-o", "out", "--ignore_base_data", data)
    assert "--split train: it is a stream" in error
    (tmp_path / "prior.json").write_text(json.dumps(evaluations["prior"]))
    for numbers in (evaluations["prior"], [], {"rates": {"own": {"codes": {}}}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(numbers))
        error = fails(capsys, "report", tmp_path)
        assert "must be what taming evaluate saves of a loopy tokenizer" in error
    for number in ("70000", "-1", "x"):
        with pytest.raises(ValueError):
            port(number)
    assert port("65535") == 65535
