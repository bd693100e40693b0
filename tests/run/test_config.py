"""Merging follows OmegaConf; every wrong key is named with its file, path and nearest neighbour."""

import pytest
from omegaconf import OmegaConf

from taming.run.config import ConfigError, check_block, load_config


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / name).write_text(text)
        return name

    return write


def test_merges_from_left_to_right_then_overrides_then_dotlist(write):
    first = write("a.yaml", "x: 1\ny: {p: 1, q: [1, 2]}\nz: ${y.p}\n")
    second = write("b.yaml", "y: {p: 2, q: [3]}\nw: 1\n")
    dotlist = ["w=3", "data={target: support.models.ToyData, params: {size: 4}}", "y.new=1e-4"]
    config = load_config([first, second], dotlist, {"w": 2, "v": 2})
    assert config.values == {
        "x": 1,
        "y": {"p": 2, "q": [3], "new": 1e-4},
        "z": 2,
        "w": 3,
        "v": 2,
        "data": {"target": "support.models.ToyData", "params": {"size": 4}},
    }
    origins = [config.origin(path) for path in ("x", "y.p", "y.q.0", "w", "v", "y.p.deeper")]
    assert origins == ["a.yaml", "b.yaml", "b.yaml", "command line", "command line", "b.yaml"]


def test_equals_omegaconf(write):
    texts = ["a: {b: {c: 1, d: 2}}", "a: {b: {d: 3}, e: null}", "a: {b: null}"]
    files = [write(f"{index}.yaml", text) for index, text in enumerate(texts)]
    expected = OmegaConf.merge(*map(OmegaConf.create, texts))
    assert load_config(files).values == OmegaConf.to_container(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb: 2", r"x\.yaml:\d is not valid YAML"),
        ("a: 1\na: 2", "x.yaml"),
        ("- 1\n- 2", "x.yaml must hold a mapping"),
        ("a: ${nowhere}", r"x\.yaml: Interpolation key 'nowhere' not found"),
        ("a: ???", "x.yaml: Missing mandatory value: a"),
        ("lightning: {trainer: {gpus: all}}", "x.yaml: gpus takes"),
    ],
)
def test_unreadable_files_are_named(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config([write("x.yaml", text)])


def test_missing_files_are_named():
    with pytest.raises(ConfigError, match=r"no configuration file nowhere\.yaml"):
        load_config(["nowhere.yaml"])


def test_broken_override_is_named():
    with pytest.raises(ConfigError, match="command line: cannot read a"):
        load_config([], ["a={b: "])


def check(write, text, **options):
    config = load_config([write("x.yaml", text)])
    check_block(config, "model", config.values["model"], **options)


@pytest.mark.parametrize(
    "text",
    [
        "model: {target: support.models.ToyModel}",
        "model: {target: support.models.ToyModel, params: {width: 3}}",
        "model: {target: support.models.ToyModel, params: null}",
        "model: {target: math.sin, params: {anything: 3}}",
        "model: {target: main.DataModuleFromConfig, params: {batch_size: 1, train: {size: 5}}}",
        "model: {target: main.DataModuleFromConfig, params: {batch_size: 1, "
        "train: {target: support.models.ToyData}}}",
    ],
)
def test_right_blocks_pass(write, text):
    check(write, text)


def test_a_whole_float_is_an_int_where_one_is_taken(write):
    data = "{target: support.models.ToyData, params: {size: 4.0}}"
    text = f"model: {{target: support.models.ToyModel, params: {{width: 1e1, monitor: {data}}}}}"
    config = load_config([write("x.yaml", text)])
    with pytest.raises(ConfigError, match="monitor must be str"):
        check_block(config, "model", config.values["model"])
    params = config.values["model"]["params"]
    sizes = [params["width"], params["monitor"]["params"]["size"]]
    assert sizes == [10, 4] and {*map(type, sizes)} == {int}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {target: support.models.ToyModel, params: {width: 2.5}}",
            "x.yaml: model.params.width must be int, got 2.5",
        ),
        (
            "model: {target: support.models.ToyModel, params: {widht: 3}}",
            "x.yaml: unknown key model.params.widht: support.models.ToyModel takes no 'widht'; "
            "did you mean 'width'?",
        ),
        (
            "model: {target: support.models.ToyModel, parms: {width: 3}}",
            "x.yaml: unknown key model.parms; did you mean 'params'?",
        ),
        (
            "model: {target: support.models.ToyModel, "
            "params: {monitor: [{target: support.models.ToyDat}]}}",
            "x.yaml: model.params.monitor.0.target: support.models has no 'ToyDat'; "
            "did you mean 'ToyData'?",
        ),
        (
            "model: {target: main.DataModuleFromConfig, params: {batch_size: 1, "
            "train: {target: support.models.ToyData, params: {sice: 3}}}}",
            "x.yaml: unknown key model.params.train.params.sice: support.models.ToyData takes no "
            "'sice'; did you mean 'size'?",
        ),
        (
            "model: {target: main.DataModuleFromConfig}",
            "x.yaml: model.params lacks batch_size, which main.DataModuleFromConfig needs",
        ),
        (
            "model: {target: support.models.ToyModel, params: {width: four}}",
            "x.yaml: model.params.width must be int, got 'four'",
        ),
        (
            "model: {target: support.models.ToyModel, params: {width: }}",
            "x.yaml: model.params.width must be int, got None",
        ),
        (
            "model: {target: support.models.ToyModel, params: {width: [3, 4]}}",
            "x.yaml: model.params.width must be int, got [3, 4]",
        ),
        (
            "model: {target: support.models.ToyModel, params: {monitor: 3}}",
            "x.yaml: model.params.monitor must be str | None, got 3",
        ),
        (
            "model: {target: main.DataModuleFromConfig, params: {batch_size: 1, "
            "train: {targt: support.models.ToyData}}}",
            "x.yaml: unknown key model.params.train.targt; did you mean 'target'?",
        ),
        (
            "model: {target: main.DataModuleFromConfig, params: {batch_size: 1, "
            "train: {params: {size: 3}}}}",
            "x.yaml: model.params.train has no target (a path like 'main.Name'), got None",
        ),
        (
            "model: {target: main.DataModuleFromConfig, params: {batch_size: 1, "
            "train: {target: 3}}}",
            "x.yaml: model.params.train has no target (a path like 'main.Name'), got 3",
        ),
        (
            "model: {target: main.DataModuleFromConfig, params: {batch_size: 1, train: 3}}",
            "x.yaml: model.params.train must be mapping | None, got 3",
        ),
        ("model: {params: {width: 3}}", "x.yaml: model has no target"),
        ("model: 3", "x.yaml: model must be a mapping"),
        (
            "model: {target: support.models.ToyModel, params: [1]}",
            "x.yaml: model.params must be a mapping",
        ),
    ],
)
def test_wrong_blocks_are_named(write, text, message):
    with pytest.raises(ConfigError) as raised:
        check(write, text)
    assert str(raised.value).startswith(message)


def test_injected_arguments_need_not_be_there(write):
    text = "model: {target: main.DataModuleFromConfig}"
    check(write, text, injected=["batch_size"])


def test_splatted_mappings_are_checked(write):
    vqmodel = "model: {{target: taming.models.vqgan.VQModel, params: {{n_embed: 8, embed_dim: 4, "
    vqmodel += "lossconfig: {{target: taming.modules.losses.DummyLoss}}, ddconfig: {{{} }} }} }}"
    ddconfig = "ch: 32, out_ch: 3, ch_mult: [1], num_res_blocks: 1, attn_resolutions: [], "
    ddconfig += "in_channels: 3, resolution: 8, z_channels: 4, double_z: false"
    check(write, vqmodel.format(ddconfig))
    with pytest.raises(
        ConfigError, match=r"ddconfig\.num_res_block; did you mean 'num_res_blocks'"
    ):
        check(write, vqmodel.format(ddconfig + ", num_res_block: 3"))


def test_the_file_that_set_a_key_last_is_named(write):
    first = write("a.yaml", "model: {target: support.models.ToyModel, params: {width: 3}}")
    second = write("b.yaml", "model: {target: support.models.ToyData}")
    config = load_config([first, second])
    with pytest.raises(ConfigError, match=r"a\.yaml: unknown key model\.params\.width"):
        check_block(config, "model", config.values["model"])
