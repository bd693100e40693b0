"""The page in a browser: load, drop, drag, click, sample, complete, keys and a narrow window."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import Browser, chromium
from support.page import page
from support.runs import TinyRuns

SHOWN = "[...document.querySelectorAll('%s')].map(e => e.innerText).join('|')"
SLIDER = "#rate input[type=range]"
HOME, RIGHT = "\ue011", "\ue014"


def text(tab: Browser, selector: str) -> str:
    return tab.run(f"return {SHOWN % selector}")


def changes(tab: Browser, selector: str, before: str) -> str:
    """Wait until the text of elements is another than before; return it."""
    tab.wait(f"{SHOWN % selector} != {json.dumps(before)}")
    return text(tab, selector)


def until(tab: Browser, condition: str, action: Callable[[], None]) -> None:
    """Act until a condition holds: what arrives meanwhile may move what is clicked."""
    for _ in range(8):
        action()
        with contextlib.suppress(AssertionError):
            tab.wait(condition, 8)
            return
    tab.wait(condition, 8)


def choose(tab: Browser, name: str) -> None:
    """Open a tab of the page."""
    tab.run(
        "[...document.querySelectorAll('button[role=tab]')]"
        f".find(e => e.innerText == {json.dumps(name)}).click()"
    )


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    Image.fromarray(noise).resize((80, 48)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.skipif(
    "TAMING_BROWSER" not in os.environ,
    reason="its waits are too short for a busy machine: set TAMING_BROWSER=1 to drive the page",
)
def test_two_runs_are_looked_at(tiny_runs: TinyRuns, tmp_path: Path, photo: Path) -> None:
    runs = map(tiny_runs.of, ("demo/loopy_transformer.yaml", "cifar10_transformer.yaml"))
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    with chromium(tmp_path / "profile") as tab, page(uploads, "demo", "-r", *runs) as address:
        tab.open(address)
        example = changes(tab, ".numbers p", "")
        assert example.count("451 × 300 pixels") == 2
        tab.click("#photo button[aria-label='Remove Image']")
        tab.wait("document.querySelector('#photo input[type=file]')")
        tab.type("#photo input[type=file]", str(photo))
        tab.wait(f"({SHOWN % '.numbers p'}).includes('80 × 48 pixels')")
        numbers = text(tab, ".numbers p")
        assert numbers.count("80 × 48 pixels") == 2 and numbers.count("PSNR") == 2
        outside = "performance.getEntriesByType('resource').filter(e => e.name.startsWith('http'))"
        outside += ".filter(e => !e.name.startsWith(location.origin)).map(e => e.name)"
        assert tab.run(f"return {outside}") == []

        tab.click("#kind label:nth-of-type(2)")  # codes
        tab.wait(f"document.querySelector('{SLIDER}')?.offsetParent")
        numbers = changes(tab, ".numbers p", numbers)
        tab.drag(SLIDER, (0.3, 0.5), (0.6, 0.5), (1.0, 0.5))
        tab.wait(f"({SHOWN % '.numbers p'}).match(/5.00 of a site.*6.00 of a site/s)")
        clicked = "document.querySelector('#x input').value > 60"
        until(tab, clicked, lambda: tab.drag(".shown img", (0.9, 0.9)))
        paths = text(tab, ".path")
        assert "row" in paths

        def step() -> None:
            tab.run(f"document.querySelector('{SLIDER}').focus()")
            tab.press(HOME, RIGHT)  # to the fewest codes, and a step on

        until(tab, f"({SHOWN % '.numbers p'}).match(/1.0. of a site.*1.0. of a site/s)", step)
        tab.run("document.querySelector('.shown').scrollIntoView()")
        tab.screenshot(tmp_path / "compress.png")

        choose(tab, "Sample")
        tab.wait("document.querySelector('#go')?.offsetParent")
        tab.click("#go")
        tab.wait(f"({SHOWN % '.done p'}).match(/16 of 16 sites.16 of 16 sites/)")
        tab.type("#editor input[type=file]", str(photo))
        tab.wait("document.querySelector('#editor canvas')")
        tab.drag("#editor canvas", (0.4, 0.5), (0.5, 0.5), (0.6, 0.6))
        tab.click("#go")
        tab.wait(f"({SHOWN % '.done p'}).match(/(\\d+) of \\1 sites.(\\d+) of \\2 sites/)")
        tab.resize(420, 800)
        assert tab.run("return document.documentElement.scrollWidth <= window.innerWidth")
        tab.screenshot(tmp_path / "narrow.png")
        for name in ("compress", "narrow"):
            with Image.open(tmp_path / f"{name}.png") as shot:
                assert len(np.unique(np.asarray(shot.convert("L")))) > 50  # not a blank page
