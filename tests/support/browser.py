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
        found = _send(
            "POST", f"{self.session}/element", {"using": "css selector", "value": selector}
        )
        (element,) = found.values()
        _send("POST", f"{self.session}/element/{element}/click", {})

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
