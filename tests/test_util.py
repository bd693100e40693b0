"""Helpers: objects from dotted paths, downloads that are whole or absent, path-style lookups."""

import hashlib
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler

import pytest

from taming.util import (
    KeyNotFoundError,
    download,
    get_ckpt_path,
    get_obj_from_str,
    instantiate_from_config,
    instantiate_with_sizes,
    md5_hash,
    parameters_of,
    retrieve,
)


@contextmanager
def serve(handler):
    """Serve on this machine and give the address."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Breaks(BaseHTTPRequestHandler):
    """Promises 100 bytes, sends 10 and hangs up."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path):
    """Web address of the folder ``remote``, which holds the file ``weights.bin``."""
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 1000)
    with serve(partial(QuietFiles, directory=str(folder))) as url:
        yield url


def test_target_paths_name_objects():
    assert get_obj_from_str("taming.util.md5_hash") is md5_hash
    assert get_obj_from_str("hashlib.md5", reload=False) is hashlib.md5


@pytest.mark.parametrize(
    "path, message",
    [
        ("VQModel", "no dotted path"),
        ("taming.nowhere.Thing", "does not import"),
        ("taming.util.Thing", "has no 'Thing'"),
    ],
)
def test_wrong_target_paths_are_named(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        get_obj_from_str(path)
    assert path in str(caught.value)


def test_instantiate_passes_params_and_lets_arguments_win():
    config = {"target": "builtins.dict", "params": {"a": 1, "b": 2}}
    assert instantiate_from_config(config, b=3) == {"a": 1, "b": 3}
    assert config["params"] == {"a": 1, "b": 2}
    assert instantiate_from_config({"target": "builtins.dict", "params": None}) == {}
    with pytest.raises(ValueError, match=r"'target'.*\['params'\]"):
        instantiate_from_config({"params": {}})
    with pytest.raises(ValueError, match="a block with a 'target', got 'builtins.dict'"):
        instantiate_from_config("builtins.dict")


def test_md5_is_that_of_the_whole_file(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"abc" * (1 << 19))
    assert md5_hash(path) == hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("over", ["http", "file"])
def test_download_copies_the_file(tmp_path, address, over):
    source = tmp_path / "remote" / "weights.bin"
    target = tmp_path / "cache" / "deep" / "weights.bin"
    download(source.as_uri() if over == "file" else f"{address}/weights.bin", target)
    assert target.read_bytes() == source.read_bytes()
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.reported(25)
@pytest.mark.parametrize("name", ["absent.bin", None])
def test_failed_download_says_what_to_fetch_and_where_to_put_it(tmp_path, address, name):
    url = f"{address}/{name}" if name else (tmp_path / "nowhere").as_uri()
    target = tmp_path / "cache" / "weights.bin"
    with pytest.raises(ConnectionError) as caught:
        download(url, target)
    if name:
        caught.value.__cause__.close()  # an HTTPError holds the open connection
    assert url in str(caught.value) and str(target) in str(caught.value)
    assert list(target.parent.iterdir()) == []


def test_interrupted_download_leaves_nothing(tmp_path):
    target = tmp_path / "cache" / "weights.bin"
    with serve(Breaks) as url, pytest.raises(ConnectionError, match="10 of 100 bytes"):
        download(f"{url}/weights.bin", target)
    assert list(target.parent.iterdir()) == []


def test_retrieve_walks_mappings_and_sequences():
    config = {"model": {"layers": [{"ch": 32}, {"ch": 64}]}, "none": None}
    assert retrieve(config, "model/layers/1/ch") == 64
    assert retrieve(config, "model.layers.0", splitval=".") == {"ch": 32}
    assert retrieve(config, "none") is None


@pytest.mark.parametrize("key", ["model/depth", "model/layers/7", "model/layers/x", "model/ch/y"])
def test_retrieve_names_what_is_missing_or_gives_the_default(key):
    config = {"model": {"layers": [1, 2], "ch": 32}}
    with pytest.raises(KeyNotFoundError, match="not found"):
        retrieve(config, key)
    assert retrieve(config, key, default=5) == 5


def test_published_weights_need_a_known_name(tmp_path) -> None:
    with pytest.raises(ValueError, match="published weights are vgg_lpips; got 'vgg'"):
        get_ckpt_path("vgg", tmp_path)


class Base:
    def __init__(self, width, depth=2, **others):
        self.sizes = width, depth, others


class Forwarding(Base):
    def __init__(self, label, **kwargs):
        super().__init__(**kwargs)


def test_parameters_are_followed_to_the_base():
    found, is_open = parameters_of(Forwarding)
    assert list(found) == ["label", "width", "depth"] and is_open
    required = [p.name for p in found.values() if p.default is p.empty]
    assert required == ["label"]
    found, is_open = parameters_of(hashlib.sha256)
    assert is_open or "string" in found


def test_sizes_are_filled_in_and_must_agree():
    block = {"target": f"{__name__}.Forwarding", "params": {"label": "x"}}
    assert instantiate_with_sizes(block, {"width": 3, "height": 4}).sizes == (3, 2, {})
    block["params"]["width"] = 5
    with pytest.raises(ValueError, match="Forwarding: width is 5, but .* 3"):
        instantiate_with_sizes(block, {"width": 3})
