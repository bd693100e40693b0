"""Configurations of saved runs that ask for too much, for `reliability.targets`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from support.models import vqmodel_config

# Targets with params that would create the file {mark}, fetch an address or run other code.
HARMFUL: dict[str, dict[str, Any]] = {
    "subprocess.Popen": {"args": ["touch", "{mark}"]},
    "subprocess.run": {"args": ["touch", "{mark}"]},
    "subprocess.call": {"args": ["touch", "{mark}"]},
    "subprocess.check_output": {"args": ["touch", "{mark}"]},
    "subprocess.getoutput": {"cmd": "touch {mark}"},
    "os.system": {"command": "touch {mark}"},
    "os.popen": {"cmd": "touch {mark}"},
    "os.mkdir": {"path": "{mark}"},
    "os.makedirs": {"name": "{mark}"},
    "os.execv": {"path": "/bin/touch", "argv": ["touch", "{mark}"]},
    "os.posix_spawn": {"path": "/bin/touch", "argv": ["touch", "{mark}"], "env": {}},
    "posix.system": {"command": "touch {mark}"},
    "pty.spawn": {"argv": ["touch", "{mark}"]},
    "asyncio.create_subprocess_shell": {"cmd": "touch {mark}"},
    "multiprocessing.Process": {},
    "builtins.open": {"file": "{mark}", "mode": "w"},
    "builtins.eval": {"source": "open('{mark}', 'w')"},
    "builtins.exec": {"source": "open('{mark}', 'w')"},
    "builtins.__import__": {"name": "antigravity"},
    "builtins.dict": {},
    "builtins.type": {},
    "builtins.getattr": {},
    "io.open": {"file": "{mark}", "mode": "w"},
    "io.FileIO": {"file": "{mark}", "mode": "w"},
    "codecs.open": {"filename": "{mark}", "mode": "w"},
    "pathlib.Path": {},
    "tempfile.mkdtemp": {"dir": "."},
    "tempfile.NamedTemporaryFile": {"delete": False},
    "shutil.copy": {"src": "/etc/hosts", "dst": "{mark}"},
    "shutil.copytree": {"src": ".", "dst": "{mark}"},
    "shutil.rmtree": {"path": "{mark}"},
    "shutil.make_archive": {"base_name": "{mark}", "format": "zip"},
    "zipfile.ZipFile": {"file": "{mark}", "mode": "w"},
    "tarfile.open": {"name": "{mark}", "mode": "w"},
    "sqlite3.connect": {"database": "{mark}"},
    "shelve.open": {"filename": "{mark}"},
    "dbm.open": {"file": "{mark}", "flag": "c"},
    "logging.FileHandler": {"filename": "{mark}"},
    "logging.config.dictConfig": {"config": {"version": 1}},
    "runpy.run_path": {"path_name": "payload.py"},
    "runpy.run_module": {"mod_name": "payload"},
    "importlib.import_module": {"name": "payload"},
    "code.interact": {},
    "pdb.run": {"statement": "open('{mark}', 'w')"},
    "timeit.timeit": {"stmt": "open('{mark}', 'w')", "number": 1},
    "cProfile.run": {"statement": "open('{mark}', 'w')"},
    "trace.Trace": {},
    "doctest.testfile": {"filename": "payload.py"},
    "webbrowser.open": {"url": "http://127.0.0.1:9"},
    "urllib.request.urlopen": {"url": "http://127.0.0.1:9"},
    "urllib.request.urlretrieve": {"url": "http://127.0.0.1:9", "filename": "{mark}"},
    "socket.create_connection": {"address": ["127.0.0.1", 9]},
    "http.client.HTTPConnection": {"host": "127.0.0.1"},
    "http.server.HTTPServer": {},
    "smtplib.SMTP": {"host": "127.0.0.1", "port": 9},
    "ftplib.FTP": {"host": "127.0.0.1"},
    "ctypes.CDLL": {"name": "libc.so.6"},
    "pickle.loads": {"data": "payload"},
    "pickle.load": {},
    "marshal.loads": {},
    "functools.partial": {"func": "os.system"},
    "functools.reduce": {},
    "operator.methodcaller": {"name": "system"},
    "types.FunctionType": {},
    "signal.alarm": {"seconds": 1},
    "sys.exit": {},
    "os._exit": {"status": 3},
    "os.abort": {},
    "atexit.register": {"func": "os.system"},
    "threading.Thread": {},
    "antigravity.webbrowser": {},
    "this.s": {},
    "payload.Payload": {},
    "numpy.load": {"file": "payload.npy", "allow_pickle": True},
    "numpy.save": {"file": "{mark}", "arr": [0]},
    "numpy.fromfile": {"file": "/etc/hosts"},
    "numpy.memmap": {"filename": "{mark}", "mode": "w+", "shape": 4},
    "yaml.unsafe_load": {"stream": "!!python/object/apply:os.system ['touch {mark}']"},
    "yaml.load": {"stream": "!!python/object/apply:os.system ['touch {mark}']"},
    "omegaconf.OmegaConf": {},
    "PIL.Image.open": {"fp": "/etc/hosts"},
    "pandas.read_pickle": {"filepath_or_buffer": "payload.pkl"},
    "torch.load": {"f": "payload.ckpt", "weights_only": False},
    "torch.save": {"obj": 1, "f": "{mark}"},
    "torch.hub.load": {"repo_or_dir": ".", "model": "touch", "source": "local"},
    "torch.hub.download_url_to_file": {"url": "http://127.0.0.1:9", "dst": "{mark}"},
    "torch.hub.load_state_dict_from_url": {"url": "http://127.0.0.1:9/x"},
    "torch.jit.load": {"f": "payload.ckpt"},
    "torch.package.PackageImporter": {"file_or_buffer": "payload.ckpt"},
    "torch.utils.cpp_extension.load": {"name": "x", "sources": ["payload.cpp"]},
    "torch.utils.cpp_extension.load_inline": {"name": "x", "cpp_sources": ["int x;"]},
    "torch.ops.load_library": {"path": "payload.so"},
    "torch.classes.load_library": {"path": "payload.so"},
    "torch.utils.collect_env.run": {"command": ["touch", "{mark}"]},
    "torch.utils.data.DataLoader": {"dataset": [0], "num_workers": 1},
    "torch.utils.tensorboard.SummaryWriter": {"log_dir": "{mark}"},
    "torch.multiprocessing.spawn": {"fn": "os.system"},
    "torch.distributed.run.main": {"args": ["payload.py"]},
    "torch.distributed.init_process_group": {"init_method": "tcp://127.0.0.1:9"},
    "torch.profiler.tensorboard_trace_handler": {"dir_name": "{mark}"},
    "torch.serialization.add_safe_globals": {"safe_globals": ["os.system"]},
    "torchvision.datasets.utils.download_url": {"url": "http://127.0.0.1:9", "root": "{mark}"},
    "torchvision.datasets.LSUN": {"root": ".", "classes": ["church_train"]},
    "torchvision.datasets.DatasetFolder": {"root": ".", "loader": "os.system"},
    "torchvision.io.write_file": {"filename": "{mark}", "data": [0]},
    "torchmetrics.image.FrechetInceptionDistance": {"feature_extractor_weights_path": "x.ckpt"},
    "torchmetrics.image.LearnedPerceptualImagePatchSimilarity": {},
    "torchmetrics.text.BERTScore": {"model_name_or_path": "."},
    "torchmetrics.multimodal.CLIPScore": {"model_name_or_path": "."},
    "lightning.pytorch.cli.LightningCLI": {"args": []},
    "lightning.pytorch.Trainer": {"default_root_dir": "{mark}"},
    "lightning.pytorch.LightningModule.load_from_checkpoint": {"checkpoint_path": "payload.ckpt"},
    "lightning.pytorch.callbacks.LambdaCallback": {"setup": "os.system"},
    "lightning.pytorch.callbacks.LearningRateFinder": {},
    "lightning.pytorch.callbacks.OnExceptionCheckpoint": {"dirpath": "{mark}"},
    "lightning.pytorch.loggers.WandbLogger": {"save_dir": "{mark}"},
    "lightning.pytorch.loggers.MLFlowLogger": {"tracking_uri": "file:{mark}"},
    "lightning.pytorch.loggers.CometLogger": {"api_key": "x"},
    "lightning.pytorch.plugins.io.AsyncCheckpointIO": {},
    "lightning.pytorch.plugins.environments.SLURMEnvironment": {},
    "lightning.pytorch.profilers.PyTorchProfiler": {"dirpath": "{mark}"},
    "lightning.pytorch.strategies.DeepSpeedStrategy": {},
    "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher": {},
    "lightning.fabric.utilities.cloud_io._load": {"path_or_url": "payload.ckpt"},
    "main.main": {"argv": ["--help"]},
    "main.load": {},
    "main.os": {},
    "main.os.system": {"command": "touch {mark}"},
    "main.sys.exit": {},
    "main.get_obj_from_str": {"string": "payload.Payload"},
    "main.instantiate_from_config": {"config": {"target": "os.abort"}},
    "taming.load": {"run": "."},
    "taming.util.importlib": {},
    "taming.util.importlib.import_module": {"name": "payload"},
    "taming.util.get_obj_from_str": {"string": "payload.Payload"},
    "taming.util.instantiate_from_config": {"config": {"target": "os.abort"}},
    "taming.util.instantiate_with_sizes": {"config": {"target": "os.abort"}, "sizes": {}},
    "taming.util.download": {"url": "file:///etc/hosts", "local_path": "{mark}"},
    "taming.downloads.load_network": {"hub": ".", "entry": "touch"},
    "taming.util.get_ckpt_path": {"name": "vgg_lpips", "root": "{mark}"},
    "taming.util.os.system": {"command": "touch {mark}"},
    "taming.checkpoint.load_checkpoint": {"path": "payload.ckpt", "trust_checkpoint": True},
    "taming.checkpoint.pickle": {},
    "taming.checkpoint.partial": {"func": "os.system"},
    "taming.pictures.save_picture": {"image": [0], "path": "{mark}"},
    "taming.data.token_files.save_file": {"file": "{mark}", "info": ["a", 1, 1], "columns": {}},
    "taming.data.token_files.seal": {"folder": "{mark}"},
    "taming.data.imagenet_base.download": {"url": "file:///etc/hosts", "local_path": "{mark}"},
    "taming.run.cli.run": {"program": "os.abort"},
    "taming.run.folder.SavedRun": {},
    "taming.run.rundir.RunDir": {"path": "{mark}"},
    "taming.run.checkpoints.SafeCheckpointIO": {"trust_checkpoint": True},
    "taming.run.trainer.fit": {},
    "taming.experiment.get_obj_from_str": {"string": "payload.Payload"},
    "taming.loading.load": {"run": "."},
    "support.models.ToyModel": {},
}

PAYLOAD = """
import os
class Payload:
    def __init__(self, *args, **kwargs): pass
    def __reduce__(self): return os.system, ("touch " + os.environ["TAMING_MARK"],)
open(os.environ["TAMING_MARK"], "w").close()
"""

PHOTOS = {
    "target": "main.DataModuleFromConfig",
    "params": {
        "batch_size": 1,
        "num_workers": 0,
        "validation": {
            "target": "taming.data.photos.PhotosValidation",
            "params": {"size": 16, "scales": [1.0]},
        },
    },
}


def base() -> dict[str, Any]:
    """A configuration in which nothing is wrong."""
    model = {"base_learning_rate": 1e-4, **vqmodel_config()}
    return {"model": copy.deepcopy(model), "data": copy.deepcopy(PHOTOS), "lightning": {}}


# Key paths where a block is put; 0 is the first item of a list.
PLACES = (
    *("model", "model.params.lossconfig", "model.params.quantizer_config"),
    *("model.params.ddconfig", "model.params.scheduler_config", "model.params.monitor"),
    *("model.params.quantizer_config.params.transform_config", "model.params.ignore_keys.0"),
    *("model.params.lossconfig.params.deep.deeper.0.deepest", "model.params.lossconfig.params"),
    *("data", "data.params.train", "data.params.validation", "data.params.test"),
    *("data.params.validation.params.scales.0", "data.params.validation.params.transform"),
    *("lightning.logger", "lightning.modelcheckpoint", "lightning.callbacks.own"),
    *("lightning.callbacks.image_logger", "lightning.trainer.plugins.0"),
    *("lightning.trainer.profiler", "lightning.trainer.strategy", "lightning.trainer.logger"),
    *("lightning.trainer.callbacks.0", "lightning.callbacks.own.params.nested"),
)


class Attempt(NamedTuple):
    """A configuration that asks for too much."""

    kind: str
    name: str
    block: str  # that asks
    config: dict[str, Any] | str  # a text of YAML where it is not plain


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Put a value at a key path; a number is a position in a list."""
    *above, last = path.split(".")
    for key in above:
        following = config.get(key) if isinstance(config, dict) else None
        if not isinstance(following, dict):
            following = {}
        if isinstance(config, dict):
            config[key] = following
        config = following
    config[last] = value


def listed(value: Any) -> Any:
    """Turn mappings with the key "0" into lists."""
    if not isinstance(value, Mapping):
        return value
    items = {key: listed(item) for key, item in value.items()}
    return [items["0"]] if set(items) == {"0"} else items


def marked(value: Any, mark: Path) -> Any:
    """Fill in the file that must not appear."""
    if isinstance(value, Mapping):
        return {key: marked(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item, mark) for item in value]
    return value.replace("{mark}", str(mark)) if isinstance(value, str) else value


def with_block(path: str, block: Any) -> dict[str, Any]:
    """The harmless configuration with a block at a key path."""
    config = base()
    put(config, path, copy.deepcopy(block))
    config["model"].setdefault("base_learning_rate", 1e-4)
    return listed(config)


def attempts() -> Iterator[Attempt]:
    """Yield all attempts."""
    for target, params in HARMFUL.items():
        for place in ("model", "model.params.lossconfig", "data.params.validation"):
            block = {"target": target, "params": params}
            yield Attempt("targets", target, place.split(".")[0], with_block(place, block))
        block = {"target": target, "params": params}
        yield Attempt("targets", target, "lightning", with_block("lightning.callbacks.own", block))
    popen = {"target": "subprocess.Popen", "params": HARMFUL["subprocess.Popen"]}
    for place in PLACES:
        yield Attempt("places", place, place.split(".")[0], with_block(place, popen))
        short = {"target": "os.abort"}
        yield Attempt("places", place, place.split(".")[0], with_block(place, short))
    yield from _attempts_in_yaml()
    yield from _attempts_at_trust()
    for path, value in OUTSIDE:
        yield Attempt("paths", f"{path}={value}", "lightning", with_block(path, value))


OUTSIDE = [
    (f"lightning.{path}", value)
    for path in (
        "modelcheckpoint.params.dirpath",
        "modelcheckpoint.params.filename",
        "trainer.default_root_dir",
        "callbacks.setup_callback.params.cfgdir",
        "callbacks.image_logger.params.logdir",
        "callbacks.last_checkpoint.params.ckptdir",
        "logger.params.save_dir",
        "logger.params.name",
        "logger.params.version",
        "logger.params.filename_suffix",
    )
    for value in ("{mark}", "../../outside", "a/../../../b", "~/outside", "s3://bucket/x")
]


def _attempts_in_yaml() -> Iterator[Attempt]:
    tail = yaml.safe_dump(base())
    tagged = {
        "apply": "!!python/object/apply:os.system ['touch {mark}']",
        "new": "!!python/object/new:os.system ['touch {mark}']",
        "name": "!!python/name:os.system",
        "module": "!!python/module:payload",
        "object": "!!python/object:payload.Payload {}",
        "tuple": "!!python/tuple [1]",
        "own": "!payload x",
    }
    for name, text in tagged.items():
        yield Attempt("tags", name, "model", f"x: {text}\n{tail}")
    bomb = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    yield Attempt("bombs", "aliases", "model", bomb + tail)
    yield Attempt("bombs", "an alias of itself", "model", f"x: &x {{y: *x}}\n{tail}")
    yield Attempt("bombs", "depth", "model", f"x: {'[' * 5000}{']' * 5000}\n{tail}")
    yield Attempt("bombs", "interpolations", "model", f"x: ${{y}}\ny: ${{x}}\n{tail}")
    yield from _attempts_at_resolvers()
    yield from _attempts_by_reference()


def _attempts_at_resolvers() -> Iterator[Attempt]:
    resolvers = {
        "oc.env": "${oc.env:HOME}",
        "oc.env with a default": "${oc.env:NOTHING,x}",
        "oc.decode": "${oc.decode:'{target: os.abort}'}",
        "oc.create": "${oc.create:{target: os.abort}}",
        "oc.select": "${oc.select:model}",
        "one of the program": "${eval:\"open('{mark}','w')\"}",
        "inside text": "a/${oc.env:HOME}/b",
        "spaces": "${ oc.env : HOME }",
        "a name put together": "${${first}.${second}:HOME}",
        "an argument put together": "${oc.env:${home}}",
    }
    names = "first: oc\nsecond: env\nhome: HOME\n"
    for name, text in resolvers.items():
        config = base()
        config["model"]["params"]["monitor"] = text
        yield Attempt("resolvers", name, "model", names + yaml.safe_dump(config))
    escaped = yaml.safe_dump(base()).replace(
        "target: taming.models", "x: 1\n  target: taming.models"
    )
    escaped = escaped.replace("x: 1", 'monitor: "\\x24{oc.env:HOME}"')
    yield Attempt("resolvers", "escaped", "model", escaped)


def _attempts_by_reference() -> Iterator[Attempt]:
    for name, text in {
        "a target": "evil: os.abort\n{base}",
        "a block": "evil: {target: os.abort}\n{base}",
    }.items():
        config = base()
        value = "${evil}"
        config["model"]["params"]["lossconfig"] = {"target": value} if name == "a target" else value
        text = text.replace("{base}", yaml.safe_dump(config))
        yield Attempt("interpolations", name, "model", text)
    hidden = "evil: &evil {target: os.abort}\n" + yaml.safe_dump(
        with_block("model.params.lossconfig", "EVIL")
    ).replace("EVIL", "*evil")
    yield Attempt("interpolations", "an anchor", "model", hidden)
    merged = yaml.safe_dump(with_block("model.params.lossconfig", "EVIL"))
    merged = merged.replace("EVIL", "{<<: {target: os.abort}}")
    yield Attempt("interpolations", "a merge key", "model", merged)


def _attempts_at_trust() -> Iterator[Attempt]:
    loader = "taming.run.folder.model_from_run"
    named = {"target": loader, "params": {"run": "other"}}
    trusting = {"target": loader, "params": {"run": "other", "trust_config": True}}
    for name, block in (("another run", named), ("another run, trusted", trusting)):
        for place in ("model", "model.params.lossconfig"):
            yield Attempt("chains", f"{name} as {place}", "model", with_block(place, block))
    of_data = {"target": "taming.run.folder.data_from_run", "params": {"run": "other"}}
    yield Attempt("chains", "data of another run", "data", with_block("data", of_data))
    itself = {"target": loader, "params": {"run": "run"}}
    yield Attempt("chains", "itself", "model", with_block("model", itself))
    for path in ("data.params.trust_checkpoint", "data.params.validation.params.trust_config"):
        yield Attempt("trust", path, "data", with_block(path, True))
    plugin = {
        "target": "taming.run.checkpoints.SafeCheckpointIO",
        "params": {"trust_checkpoint": True},
    }
    config = with_block("lightning.trainer.plugins.0", plugin)
    yield Attempt("trust", "a plugin", "lightning", config)
    for name in ("category_allow_list_target", "category_mapping_target"):
        for value in (
            "payload.Payload",
            "os.environ",
            "taming.data.open_images_helper.annotations",
        ):
            scenes = {
                "target": "taming.data.annotated_objects_open_images.AnnotatedObjectsOpenImages",
                "params": {name: value},
            }
            config = with_block("data.params.validation", scenes)
            yield Attempt("look-ups", f"{name}={value}", "data", config)
    # The checkpoint of the run holds a pickle that creates the mark.
    config = with_block("model.params.trust_checkpoint", True)
    yield Attempt("pickles", "trust_checkpoint", "model", config)
    yield Attempt("pickles", "plain", "model", base())
