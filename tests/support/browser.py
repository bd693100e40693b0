"""A headless Chromium, driven through WebDriver (https://www.w3.org/TR/webdriver2/)."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--window-size=1100,800",
]


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self.session = session

    def open(self, address: str) -> None:
        _send("POST", f"{self.session}/url", {"url": address})

    def run(self, script: str) -> Any:
        """Return what a piece of JavaScript, the body of a function, returns."""
        return _send("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until an expression of JavaScript is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, (
                f"{condition}: {self.run('return document.body.innerText')}"
            )
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        self._of(selector, "click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into an element; into an input of files, that is to choose the file of a path."""
        self._of(selector, "value", {"text": text})

    def drag(self, selector: str, *places: tuple[float, float]) -> None:
        """Press at the first place, release at the last: shares of width and height from 0 to 1."""
        x, y, width, height = self.run(
            f"const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x, b.y, b.width, b.height]"
        )
        moves: list[dict[str, Any]] = [
            {"type": "pointerMove", "x": round(x + u * width), "y": round(y + v * height)}
            for u, v in places
        ]
        button = {"button": 0}
        down, up = {"type": "pointerDown", **button}, {"type": "pointerUp", **button}
        self._act("pointer", [moves[0], down, *moves[1:], up])

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, where the focus is."""
        self._act("key", [{"type": t, "value": k} for k in keys for t in ("keyDown", "keyUp")])

    def resize(self, width: int, height: int) -> None:
        _send("POST", f"{self.session}/window/rect", {"width": width, "height": height})

    def _of(self, selector: str, action: str, content: dict[str, Any]) -> None:
        query = {"using": "css selector", "value": selector}
        (element,) = _send("POST", f"{self.session}/element", query).values()
        _send("POST", f"{self.session}/element/{element}/{action}", content)

    def _act(self, kind: str, actions: list[dict[str, Any]]) -> None:
        source = {"type": kind, "id": kind, "actions": actions}
        _send("POST", f"{self.session}/actions", {"actions": [source]})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(_send("GET", f"{self.session}/screenshot")))


def _send(method: str, address: str, content: dict[str, Any] | None = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(
        address, data, {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=90) as response:
        return json.load(response)["value"]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start a browser with a new profile; skips where there is none."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    log = profile.with_name("chromedriver.log")
    with log.open("w") as file:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=file, stderr=file)
    try:
        while not (found := re.search(r"started successfully on port (\d+)", log.read_text())):
            assert driver.poll() is None, log.read_text()
            time.sleep(0.05)
        address = f"http://127.0.0.1:{found[1]}/session"
        arguments = [*OPTIONS, f"--user-data-dir={profile}"]
        wanted = {"binary": shutil.which("chromium"), "args": arguments}
        capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": wanted}}}
        session = f"{address}/{_send('POST', address, capabilities)['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _send("DELETE", session)
    finally:
        driver.terminate()
        driver.wait(10)
