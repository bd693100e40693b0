"""The page draws what its form asks for, seen from outside and from a browser."""

import base64
import io
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image
from support.browser import chromium
from support.models import prior
from support.runs import TinyRuns, call, fails

from scripts.sample_conditional import Server, Studio, Wish

SIDE = 80  # pixels of the examples: 5 x 5 sites for a prior of 2 x 2


@contextmanager
def page(run: Path, *options: str) -> Iterator[str]:
    """Serve a run as the script does; gives the address."""
    from scripts import sample_conditional

    begun: list[Any] = []
    ready = threading.Event()

    class Watched(sample_conditional.Server):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            begun.append(self)
            ready.set()
            super().serve_forever(0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_conditional, "Server", Watched)
        arguments = ("sample_conditional", "-r", run, "--port", 0, "--no_browser", *options)
        thread = threading.Thread(target=call, args=arguments, daemon=True)
        thread.start()
        assert ready.wait(60)
        try:
            yield f"http://127.0.0.1:{begun[0].server_port}"
        finally:
            begun[0].shutdown()
            thread.join()


def rows(address: str, **wish: Any) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{address}?{urlencode(wish)}", timeout=60) as answer:
        return [json.loads(line) for line in answer]


def refused(address: str, host: str | None = None, method: str = "GET", **wish: Any) -> str:
    """Return the status and the message of an answer that refuses a request."""
    headers = {} if host is None else {"Host": host}
    request = urllib.request.Request(f"{address}?{urlencode(wish)}", None, headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    with error.value as answer:
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        return f"{answer.status} {json.loads(answer.read())['error']}"


def decoded(source: str) -> np.ndarray:
    head, _, code = source.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(code))) as picture:
        return np.asarray(picture)


@pytest.fixture
def examples(shared: Path) -> str:
    """A data set with depth, on the command line."""
    root = shared / "data/taming"
    split = f"{{target: taming.data.imagenet.DRINExamples, params: {{size: {SIDE}, root: {root}}}}}"
    return f"data={{target: main.DataModuleFromConfig, params: {{batch_size: 1, test: {split}}}}}"


def test_images_are_drawn_for_depth_maps(tiny_runs: TinyRuns, examples: str) -> None:
    run = tiny_runs.of("drin_transformer.yaml")
    with page(run, "--ignore_base_data", examples) as address:
        (about,) = rows(f"{address}/about")
        assert about["kind"] == "image" and about["condition"] == "depth"
        assert about["grid"] == [2, 2] and about["step"] == 2 and list(about["splits"]) == ["test"]
        (shown,) = rows(f"{address}/example", split="test", index=1)
        assert list(shown) == ["image", "reconstruction", "depth"]
        assert all(decoded(picture).shape == (SIDE, SIDE, 3) for picture in shown.values())
        half = {"split": "test", "index": 1, "every": 4, "known": 0.6, "seed": 3}
        drawn = rows(f"{address}/sample", **half)
        assert drawn[-1]["done"] == drawn[-1]["of"] == 25
        assert len(drawn) > 2 and [row["done"] for row in drawn] == sorted(r["done"] for r in drawn)
        assert drawn == rows(f"{address}/sample", **half)
        assert drawn[-1] != rows(f"{address}/sample", **{**half, "seed": 4})[-1]
        larger = rows(f"{address}/sample", split="test", scale=1.5, every=100)
        assert decoded(larger[-1]["picture"]).shape == (128, 128, 3)  # whole sites of 16 pixels
        error = refused(f"{address}/sample", split="test", index=10**6)
        assert error == "400 there is no example 1000000 of 'test'"
        assert refused(f"{address}/nowhere") == "404 there is no /nowhere"


def test_classes_need_no_data(tiny_runs: TinyRuns) -> None:
    with page(tiny_runs.class_conditional(), "--ignore_base_data") as address:
        (about,) = rows(f"{address}/about")
        assert about["kind"] == "class" and about["classes"] == 10 and about["splits"] == {}
        assert rows(f"{address}/example") == [{}]
        pictures = [rows(f"{address}/sample", label=label)[-1]["picture"] for label in (3, 3, 7)]
        assert pictures[0] == pictures[1] and decoded(pictures[0]).shape == (16, 16, 3)
        error = refused(f"{address}/sample", label=10)
        assert error == "400 there is no class 10: the labels of this prior are 0 to 9"


NUMBERS = [
    *("0", "-1", "1", "0.5", "7", "1e-320", "1e-30", "1e30", "1e308", "1e999", "-1e999", "inf"),
    *("-inf", "nan", "1e-3", "1000", "2147483647", "2147483648", "9223372036854775807"),
    *("9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "1" * 1500, "x", "0x10", " "),
    *("1_0", "\u0661", "\u00b2", "1,5", "1.", "--1", "[]", "True", "None", "\0"),
]


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The page of a prior of 2 x 2 sites without a condition."""
    studio = Studio(prior().eval(), {}, step=0)
    with Server(("127.0.0.1", 0), studio) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", [f.name for f in fields(Wish) if f.name != "split"])
def test_any_number_is_refused_or_used(name: str, served: str) -> None:
    used = []
    for number in NUMBERS if name != "scale" else {*NUMBERS} - {"7"}:  # that would take long
        wish = {"scale": 0.25, "every": 10**6, name: number}
        try:
            (*_, last) = rows(f"{served}/sample", **wish)
        except urllib.error.HTTPError as error:
            with error as answer:
                assert answer.status == 400
                assert f"{name} " in json.loads(answer.read())["error"]
        else:
            assert last["done"] == last["of"] and decoded(last["picture"]).ndim == 3
            used.append(number)
    assert "1" in used and "nan" not in used and "inf" not in used
    assert name != "temperature" or {*used} == {
        "1",
        "0.5",
        "7",
        "1e-3",
        "1000",
        "1_0",
        "\u0661",
        "1.",
    }


@pytest.mark.parametrize(
    ("host", "is_answered"),
    [
        *((host, True) for host in ("localhost", "127.0.0.1:80", "[::1]:8501", "192.168.1.7")),
        *((socket.gethostname(), True), ("LOCALHOST:1", True)),
        *(
            (host, False)
            for host in ("evil.example", "127.0.0.1.evil.example:8501", "", "[", "a b")
        ),
    ],
)
def test_the_page_answers_to_this_machine_alone(host: str, is_answered: bool, served: str) -> None:
    for path in ("/", "/about", "/sample"):
        if is_answered:
            request = urllib.request.Request(f"{served}{path}", headers={"Host": host})
            urllib.request.urlopen(request, timeout=60).close()
        else:
            assert refused(f"{served}{path}", host).startswith(
                "403 this page answers to its address"
            )


def test_requests_that_are_none_are_refused_in_json(served: str) -> None:
    assert refused(f"{served}/sample", seed="1" * 2000).startswith("414 a request may have 2000")
    assert refused(f"{served}/sample", seed="1" * 70000).startswith("414 ")
    assert refused(f"{served}/sample", method="POST").startswith("501 ")
    assert refused(f"{served}/../main.py").startswith("404 ")


def test_large_images_are_refused() -> None:
    image = np.zeros((2048, 2048, 3), np.float32)
    studio = Studio(prior().eval(), {"test": [{"image": image}]}, step=0)
    with pytest.raises(ValueError, match="scale 0.5 makes 512 x 512 sites, more than 65536"):
        studio.show(Wish(split="test", scale=0.5))


def test_a_long_drawing_does_not_block_what_others_ask() -> None:
    studio = Studio(prior().eval(), {}, step=7)
    with Server(("127.0.0.1", 0), studio) as server, studio.busy:  # as while an image is drawn
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        assert rows(f"http://127.0.0.1:{server.server_port}/about")[0]["step"] == 7
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("order", ["Identity", "SpiralIn"])
def test_what_is_known_does_not_change(order: str) -> None:
    params = {"H": 8, "W": 8} if order == "SpiralIn" else {}
    permuter = {"target": f"taming.modules.transformer.permuter.{order}", "params": params}
    image = torch.rand(16, 16, 3).numpy() * 2 - 1
    model = prior(permuter_config=permuter).eval()
    studio = Studio(model, {"test": [{"image": image}]}, step=0)
    reconstruction = decoded(studio.show(Wish(split="test"))["reconstruction"])
    half = Wish(split="test", known=0.5, every=8)
    rows: list[dict[str, Any]] = []
    studio.sample(half, rows.append)
    drawn = [decoded(row["picture"]) for row in rows]
    assert len(drawn) > 1
    assert all((picture[:8] == reconstruction[:8]).all() for picture in drawn)
    assert not (drawn[-1][8:] == reconstruction[8:]).all()


def test_runs_that_the_page_cannot_use(
    tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(
        capsys, "sample_conditional", "-r", tiny_runs.of("imagenet_vqgan.yaml"), "-c", "x.yaml"
    )
    assert "there is no configuration file x.yaml" in error
    run = tiny_runs.of("drin_transformer.yaml")
    error = fails(capsys, "sample_conditional", "-r", run, "--ignore_base_data")
    assert "this prior's condition is an image: name a data set" in error


def test_a_browser_draws_and_completes(tiny_runs: TinyRuns, examples: str, tmp_path: Path) -> None:
    run = tiny_runs.of("drin_transformer.yaml")
    with (
        page(run, "--ignore_base_data", examples) as address,
        chromium(tmp_path / "profile") as tab,
    ):
        tab.open(address)
        tab.wait("document.querySelectorAll('#example img').length == 3")
        assert "given depth; 2 × 2 sites; step 2" in tab.run("return document.body.innerText")
        before = tab.run("return document.querySelector('#example img').src")
        tab.run(
            "const f = document.forms[0]; f.index.value = 2; f.known.value = 0.4;"
            "f.index.dispatchEvent(new Event('change', {bubbles: true}))"
        )
        tab.wait(f"document.querySelector('#example img').src != {json.dumps(before)}")
        tab.click("#go")
        tab.wait("document.body.dataset.state == 'done'")
        assert tab.run("return document.getElementById('count').innerText") == "25 of 25 sites"
        assert tab.run("return document.getElementById('picture').naturalWidth") == SIDE
        assert tab.run("return document.getElementById('save').href").startswith("data:image/png")
        tab.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shot:
            assert len(np.unique(np.asarray(shot.convert("L")))) > 50  # pictures, not a blank page
        tab.run("document.forms[0].temperature.min = ''; document.forms[0].temperature.value = 0")
        tab.click("#go")
        tab.wait("document.getElementById('error').innerText.includes('temperature')")
