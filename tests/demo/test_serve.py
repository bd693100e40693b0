"""The page answers to this machine alone, takes no path, and loads nothing from elsewhere."""

import asyncio
import json
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.page import page
from support.runs import TinyRuns

EXAMPLE = Path("taming/demo/example.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page keeps what is uploaded."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def address(tiny_runs: TinyRuns, folder: Path) -> Iterator[str]:
    """The page of a tokenizer, which leaves no file behind."""
    with page(folder, "demo", "-r", tiny_runs.of("demo/loopy_vqgan.yaml")) as address:
        yield address
        assert [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in folder.rglob("*") if path.is_file()]


def ask(address: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
    """Return status, body and headers of an answer."""
    request = urllib.request.Request(address, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def call(address: str, function: int, data: list[Any], session: str = "") -> dict[str, Any]:
    """Call a function of the page as the page does, in a session; return how it ended."""
    session = session or f"s{function}{abs(hash(json.dumps(data)))}"
    body = {"data": data, "fn_index": function, "session_hash": session}
    joined = ask(
        f"{address}/gradio_api/queue/join",
        json.dumps(body).encode(),
        **{"Content-Type": "application/json"},
    )
    if joined[0] != 200:
        return {"success": False, "output": joined[1].decode()}
    with urllib.request.urlopen(
        f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60
    ) as rows:
        for row in rows:
            message = json.loads(row.decode().removeprefix("data:")) if row.strip() else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no answer")


def upload(address: str, path: Path) -> list[str]:
    """Upload a file; return the path that the page then refers to it by."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n' % (
        path.name.encode()
    )
    body += b"Content-Type: image/png\r\n\r\n" + path.read_bytes() + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    status, answer, _ = ask(f"{address}/gradio_api/upload", body, **kind)
    assert status == 200, answer
    return json.loads(answer)


def file(path: Any, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


LOAD, SEE = 0, 1  # numbers of the functions that study a picture, and show it


def look(address: str, payload: dict[str, Any] | None, kind: str = "own") -> list[Any]:
    """Drop a picture on the page of one session; return what is then shown of it."""
    assert call(address, LOAD, [payload, 512, kind], "look")["success"]
    seen = call(address, SEE, [None, None, kind, 0, 0, 0], "look")
    assert seen["success"]
    return seen["output"]["data"]


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
def test_the_page_answers_to_this_machine_alone(host: str, is_answered: bool, address: str) -> None:
    for path in ("/", "/config", "/gradio_api/upload"):
        status, answer, _ = ask(address + path, Host=host)
        assert (status != 403) == is_answered
        assert is_answered or b"this page answers to its address" in answer


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    status, answer, headers = ask(f"{address}/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and b"Loopy tokenizer" in answer
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    config = json.loads(ask(f"{address}/config")[1])
    assert not config["analytics_enabled"]
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert b"http" not in ask(address + path)[1]


def test_no_file_is_served_but_what_was_uploaded(address: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (16, 16)).save(secret)
    for path in (secret, "/etc/passwd", Path(__file__), "pyproject.toml", "../../etc/passwd"):
        for form in (f"file={path}", f"file/{path}", f"proxy={path}"):
            assert ask(f"{address}/gradio_api/{form}")[0] in (400, 403, 404), form
        refused = call(address, LOAD, [file(path), 512, "own"])
        assert not refused["success"], path
    (own,) = upload(address, secret)
    assert ask(f"{address}/gradio_api/file={own}")[1] == secret.read_bytes()
    assert call(address, LOAD, [file(own), 512, "own"])["success"]


def test_the_page_opens_with_a_picture(address: str) -> None:
    config = json.loads(ask(f"{address}/config")[1])
    (shown,) = [
        c["props"]["value"]
        for c in config["components"]
        if c["props"].get("value") and c["props"].get("elem_id") == "photo"
    ]
    assert ask(f"{address}/gradio_api/file={shown['path']}")[1] == EXAMPLE.read_bytes()
    assert config["dependencies"][LOAD]["targets"][0][1] == "load"
    assert call(address, LOAD, [shown, 512, "own"])["success"]


def test_an_address_is_not_fetched(address: str) -> None:
    fetched = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(1.5)

        def wait() -> None:
            try:
                listening.accept()[0].close()
                fetched.set()
            except TimeoutError:
                return

        thread = threading.Thread(target=wait)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        for payload in (file(url), file("a.png", url=url), file(url, url=url)):
            assert not call(address, LOAD, [payload, 512, "own"])["success"]
        thread.join()
    assert not fetched.is_set()


def test_what_is_too_large_is_refused(address: str, tmp_path: Path) -> None:
    from taming.demo.exhibit import MAX_PIXELS
    from taming.demo.serve import MAX_BYTES

    port = int(address.rpartition(":")[2])
    start = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost"
    for head in (f"Content-Length: {MAX_BYTES + 1}", "Content-Length: -1", "Content-Length: x"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"{start}\r\n{head}\r\n\r\n".encode())
            assert client.recv(100).split()[1] in (b"400", b"413")
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    (own,) = upload(address, tmp_path / "bomb.png")
    *_, numbers, _ = look(address, file(own, orig_name="bomb.png"))
    assert f"{side} x {side} pixels exceed" in numbers
    assert str(Path(own).parent) not in numbers


def test_a_file_that_is_no_picture_clears_the_last_and_is_named(
    address: str, tmp_path: Path
) -> None:
    (whole,) = upload(address, EXAMPLE)
    cut = EXAMPLE.read_bytes()[:9000]
    files = {"a.png": b"text", "x.jpg": b"text", "b.svg": b"<svg/>", "c.png": b"", "cut.jpg": cut}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        (own,) = upload(address, tmp_path / name)
        picture, _, numbers, path = look(address, file(whole), "lambda")
        assert picture["path"] and "PSNR" in numbers and path["value"]["data"]
        *pictures, numbers, path = look(address, file(own, orig_name=name), "lambda")
        assert numbers.startswith(f"{name}: ") and "\n" not in numbers
        assert pictures == [None, None] and not any(map(any, path["data"]))
    assert look(address, None)[2] == ""


def test_sigterm_leaves_no_file_behind(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    run = tiny_runs.of("demo/loopy_vqgan.yaml")
    with page(tmp_path, "demo", "-r", run, end=signal.SIGTERM):
        assert [*tmp_path.glob("taming-demo-*/**/*.jpg")]
    assert not [*tmp_path.glob("taming-demo-*")]


def test_a_port_that_is_taken_is_named() -> None:
    pytest.importorskip("gradio")
    from taming.demo.serve import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: Address already in use; --port 0 "):
            listen("127.0.0.1", port)


def test_what_comes_in_pieces_is_cut_off() -> None:
    pytest.importorskip("gradio")
    from taming.demo.serve import MAX_BYTES, Guard

    read, sent = [], []
    pieces = [b"x" * 2**20] * (MAX_BYTES // 2**20 + 9)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
            read.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 200})

    scope = {"type": "http", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(app, "127.0.0.1")(scope, receive, send))
    assert [m["status"] for m in sent if "status" in m] == [413] and sum(read) == MAX_BYTES
    pieces = [b"x"]
    asyncio.run(Guard(app, "127.0.0.1")(scope, receive, send))
    assert sent[-1]["status"] == 200
