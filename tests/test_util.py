"""Helpers: objects from dotted paths, downloads that are whole or absent, path-style lookups."""

import hashlib
import importlib
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler
from typing import ClassVar, NamedTuple

import pytest

from taming.extras import naming_extras
from taming.signatures import parameters_of
from taming.util import (
    KeyNotFoundError,
    WriteError,
    download,
    get_ckpt_path,
    get_obj_from_str,
    instantiate_from_config,
    instantiate_with_sizes,
    md5_hash,
    replacing,
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


class BreaksChunk(Breaks):
    """Announces a chunk of 100 bytes, sends 10 and hangs up."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"64\r\n" + b"x" * 10)
        self.close_connection = True


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
        ("VQModel", "'VQModel' is not a dotted path"),
        (".VQModel", "'.VQModel' is not a dotted path"),
        ("tamin.x.Y", "no module 'tamin.x'; .*'taming'"),
        ("taming.modls.vqgan.VQModel", "taming has no module 'modls'; .*'models'"),
        ("taming.util.Thing", "taming.util has no 'Thing'"),
        ("taming.util.downlod", "taming.util has no 'downlod'; .*'download'"),
        ("taming.run.legacyy", "taming.run has no 'legacyy'; .*'legacy'"),
        ("main.ImageLoger", "main has no 'ImageLoger'; .*'ImageLogger'"),
        ("shop.broken.A", r"broken\.py:2 is not valid Python"),
        ("shop.needy.A", "shop.needy needs the module 'nowhere'"),
    ],
)
def test_wrong_target_paths_are_named(path, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "broken.py").write_text("\nclass A(:")
    (tmp_path / "shop" / "needy.py").write_text("import nowhere.deep")
    with pytest.raises(ValueError, match=message):
        get_obj_from_str(path)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "gradio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"gradio .*pip install 'loopy-taming\[demo\]'"):
        get_obj_from_str("gradio.blocks.Blocks")
    with pytest.raises(ValueError, match="gradio is not installed"), naming_extras():
        importlib.import_module("gradio.themes")
    with pytest.raises(ModuleNotFoundError, match="nowhere"), naming_extras():
        importlib.import_module("nowhere")


def test_instantiate_passes_params_and_lets_arguments_win():
    config = {"target": "builtins.dict", "params": {"a": 1, "b": 2}}
    assert instantiate_from_config(config, b=3) == {"a": 1, "b": 3}
    assert config["params"] == {"a": 1, "b": 2}
    assert instantiate_from_config({"target": "builtins.dict", "params": None}) == {}
    with pytest.raises(ValueError, match=r"'target'.*\['params'\]"):
        instantiate_from_config({"params": {}})
    with pytest.raises(ValueError, match="'target', .*'builtins.dict'"):
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


@pytest.mark.parametrize(
    ("server", "message"), [(Breaks, "10 of 100 bytes"), (BreaksChunk, "IncompleteRead")]
)
def test_interrupted_download_leaves_nothing(tmp_path, server, message):
    target = tmp_path / "cache" / "weights.bin"
    with serve(server) as url, pytest.raises(ConnectionError, match=message):
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
    with pytest.raises(ValueError, match="vgg_lpips; .*'vgg'"):
        get_ckpt_path("vgg", tmp_path)


class Base:
    def __init__(self, width, depth=2, colour="red"):
        self.sizes = width, depth


class Forwarding(Base):
    def __init__(self, label, *args, **kwargs):
        super().__init__(*args, colour="blue", **kwargs)


class Inheriting(Forwarding):
    pass


class Keeping(Base):
    def __init__(self, label, **kwargs):
        super().__init__(3)
        self.rest = kwargs


class Popping(Base):
    def __init__(self, label, **kwargs):
        self.label = kwargs.pop("name", label)
        super().__init__(**kwargs)


class Record(NamedTuple):
    x: int
    y: int = 0


@dataclass
class Settings:
    x: int
    kind: ClassVar[int] = 3
    y: list = field(default_factory=list)
    z: int = field(init=False)


@pytest.mark.parametrize(
    ("target", "names", "required", "is_open"),
    [
        # What the call sets itself is not taken, and *args may carry what the base requires.
        (Forwarding, ["label", "width", "depth"], ["label"], False),
        (Inheriting, ["label", "width", "depth"], ["label"], False),
        (Keeping, ["label"], ["label"], True),
        (Popping, ["label"], ["label"], True),
        (Record, ["x", "y"], ["x"], False),
        (Settings, ["x", "y"], ["x"], False),
        (download, ["url", "local_path", "chunk_size"], ["url", "local_path"], False),
        (lambda a, **others: None, ["a"], ["a"], True),
        (dict, [], [], True),
    ],
)
def test_parameters_are_followed_to_the_bases(target, names, required, is_open):
    found, takes_others = parameters_of(target)
    assert (list(found), takes_others) == (names, is_open)
    assert [name for name, p in found.items() if p.default is p.empty] == required


def test_sizes_are_filled_in_and_must_agree():
    block = {"target": f"{__name__}.Forwarding", "params": {"label": "x"}}
    assert instantiate_with_sizes(block, {"width": 3, "height": 4}).sizes == (3, 2)
    block["params"]["width"] = 5
    with pytest.raises(ValueError, match="Forwarding: width is 5, but .* 3"):
        instantiate_with_sizes(block, {"width": 3})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new/numbers.json"
    with replacing(file) as part:
        part.write_text("[1]")
    message = rf"{file} cannot be saved, \d+ bytes are free .*full"
    for error in (OSError("full"), RuntimeError("full")):
        with pytest.raises(WriteError, match=message), replacing(file) as part:
            part.write_text("[1, 2")
            raise error
    with pytest.raises(KeyboardInterrupt), replacing(file) as part:
        part.write_text("[1, 2")
        raise KeyboardInterrupt
    assert file.read_text() == "[1]" and [*file.parent.iterdir()] == [file]
    below = pytest.raises(WriteError, match=rf"{file}/below.json cannot be saved")
    with below, replacing(file / "below.json"):
        pass


def test_two_writers_of_a_file_do_not_share_their_part(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        assert one != other  # in one process, or in two of one number on two machines
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and [*tmp_path.iterdir()] == [tmp_path / "a"]
