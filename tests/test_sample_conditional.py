"""The original's page: its command opens the demo's, with the data that it is given."""

from pathlib import Path
from typing import Any

import pytest
from support.runs import TinyRuns, call, fails

SIDE = 80  # pixels of the examples: 5 x 5 sites for a prior of 2 x 2


@pytest.fixture
def examples(shared: Path) -> str:
    """A data set with depth, on the command line."""
    root = shared / "data/taming"
    split = f"{{target: taming.data.imagenet.DRINExamples, params: {{size: {SIDE}, root: {root}}}}}"
    return f"data={{target: main.DataModuleFromConfig, params: {{batch_size: 1, test: {split}}}}}"


def opened(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    """Return what the command puts on the page."""
    serve = pytest.importorskip("gradio") and __import__("taming.demo.serve").demo.serve
    served: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda exhibits, *_: served.extend(exhibits))
    call("sample_conditional", *arguments)
    (exhibit,) = served
    return exhibit


def sample(studio: Any, *start: Any, **wish: Any) -> list[Any]:
    from taming.demo.studio import Wish

    return [*studio.sample(Wish(**wish), *start)]


def test_images_are_sampled_for_depth_maps(
    tiny_runs: TinyRuns, examples: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_runs.of("drin_transformer.yaml")
    exhibit = opened(monkeypatch, "-r", run, "--ignore_base_data", examples)
    studio, example = exhibit.studio, ("test", 1)
    assert studio.kind == "image" and exhibit.name == f"{run.name}, step 2"
    assert studio.title == "given depth, trained on 2 × 2 sites" and [*studio.datasets] == ["test"]
    shown = studio.show(studio.example(*example))
    assert list(shown) == ["image", "reconstruction", "depth"]
    assert all(picture.size == (SIDE, SIDE) for picture in shown.values())
    half: dict[str, Any] = {"every": 4, "known": 0.6, "seed": 3}
    steps = sample(studio, None, None, example, **half)
    assert steps[-1].done == steps[-1].of == 25
    assert len(steps) > 2 and [s.done for s in steps] == sorted(s.done for s in steps)
    again = sample(studio, None, None, example, **half)
    assert [s.picture.tobytes() for s in steps] == [s.picture.tobytes() for s in again]
    other = sample(studio, None, None, example, **{**half, "seed": 4})
    assert other[-1].picture.tobytes() != steps[-1].picture.tobytes()
    larger = sample(studio, None, None, example, scale=1.5, known=0.0, every=100)
    assert larger[-1].picture.size == (128, 128)  # whole sites of 16 pixels
    with pytest.raises(ValueError, match="there is no example 1000000 of 'test'"):
        sample(studio, None, None, ("test", 10**6))


def test_classes_need_no_data(tiny_runs: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_runs.class_conditional()
    studio = opened(monkeypatch, "-r", run, "--ignore_base_data").studio
    assert studio.kind == "class" and not studio.datasets
    pictures = [sample(studio, label=label)[-1].picture for label in (3, 3, 7)]
    assert pictures[0].tobytes() == pictures[1].tobytes() and pictures[0].size == (16, 16)
    with pytest.raises(ValueError, match="no class 10: the labels of this prior are 0 to 9"):
        sample(studio, label=10)


def test_runs_that_the_page_cannot_use(
    tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    tokenizer = tiny_runs.of("imagenet_vqgan.yaml")
    error = fails(capsys, "sample_conditional", "-r", tokenizer, "-c", "x.yaml")
    assert "there is no configuration file x.yaml" in error
    run = tiny_runs.of("drin_transformer.yaml")
    error = fails(capsys, "sample_conditional", "-r", run, "--ignore_base_data")
    assert "this prior's condition is an image: name a data set" in error
