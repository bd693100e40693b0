"""Merging follows OmegaConf; every wrong key is named with its file, path and nearest neighbour."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from taming.run.check import check_block, check_experiment
from taming.run.config import load_config
from taming.run.defaults import DEFAULT_CALLBACKS, callback_blocks, merge_block
from taming.run.sources import ConfigError
from taming.util import retrieve


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
        ("a: ${nowhere}", r"x\.yaml: .*'nowhere'"),
        ("a: ???", "x.yaml: .*mandatory.* a"),
        ("lightning: {trainer: {gpus: all}}", "x.yaml: gpus takes"),
    ],
)
def test_unreadable_files_are_named(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config([write("x.yaml", text)])


def test_a_number_is_the_text_that_was_written_where_a_text_is_taken(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    name = write("x.yaml", "model: {target: support.models.ToyModel, params: {monitor: 007}}")
    for dotlist, expected in (
        ([], "007"),
        (["model.params.monitor=12:30"], "12:30"),
        (["model={params: {monitor: 1_000}}"], "1_000"),
        (["model.params.monitor=~/x"], "/home/me/x"),
        (["model.params.monitor=null"], None),
    ):
        config = load_config([name], dotlist)
        check_block(config, "model", config.values["model"])
        assert config.values["model"]["params"]["monitor"] == expected


def test_the_first_file_that_agrees_gave_a_value(write):
    texts = ["a: {b: 1, c: [1]}", "a: {b: 2, c: [1]}", "a: {b: 2, c: [1], d: 3}"]
    files = [write(f"{index}.yaml", text) for index, text in enumerate(texts)]
    config = load_config(files)
    assert [config.origin(f"a.{key}") for key in "bcd"] == ["1.yaml", "0.yaml", "2.yaml"]
    assert OmegaConf.create(config.to_yaml()) == config.values
    assert "  b: 2  # 1.yaml" in config.to_yaml().splitlines()


def test_trials_of_the_command_line_are_kept_apart(write):
    name = write("x.yaml", "lightning: {trainer: {limit_val_batches: 9, max_steps: 1}}")
    flags = {"lightning": {"trainer": {"limit_val_batches": 2, "max_steps": 3}}}
    config = load_config([name], ["lightning.trainer.profiler=simple"], flags)
    assert config.values["lightning"]["trainer"] == {"limit_val_batches": 9, "max_steps": 3}
    assert config.trials == {"limit_val_batches": 2, "profiler": "simple"}


def test_missing_files_are_named():
    with pytest.raises(ConfigError, match=r"no .*file nowhere\.yaml"):
        load_config(["nowhere.yaml"])


def test_broken_override_is_named():
    with pytest.raises(ConfigError, match="command line: .* a"):
        load_config([], ["a={b: "])


def check(write, text, **options):
    """Check the block ``model`` of a file x.yaml; returns it."""
    config = load_config([write("x.yaml", text)])
    check_block(config, "model", config.values["model"], **options)
    return config.values["model"]


@pytest.mark.parametrize(
    "text",
    [
        "model: {target: support.models.ToyModel}",
        "model: {target: support.models.ToyModel, params: {width: 3}}",
        "model: {target: support.models.ToyModel, params: null}",
        "model: {target: builtins.dict, params: {anything: 3}}",
        "model: {target: main.DataModuleFromConfig, params: {batch_size: 1, "
        "train: {target: support.models.ToyData}}}",
    ],
)
def test_right_blocks_pass_unchanged(write, text):
    assert {"model": check(write, text)} == OmegaConf.create(text)


def test_a_whole_float_is_an_int_where_one_is_taken(write):
    data = "{target: support.models.ToyData, params: {size: 4.0}}"
    text = f"model: {{target: support.models.ToyModel, params: {{width: 1e1, monitor: {data}}}}}"
    config = load_config([write("x.yaml", text)])
    with pytest.raises(ConfigError, match="monitor must be str"):
        check_block(config, "model", config.values["model"])
    params = config.values["model"]["params"]
    sizes = [params["width"], params["monitor"]["params"]["size"]]
    assert sizes == [10, 4] and {*map(type, sizes)} == {int}


TOY = "target: support.models.ToyModel"
DATA = "target: main.DataModuleFromConfig, params: {batch_size: 1, train: "


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (f"{{{TOY}, params: {{width: 2.5}}}}", "model.params.width must be int, .* 2.5"),
        (f"{{{TOY}, params: {{width: four}}}}", "model.params.width must be int, .* 'four'"),
        (f"{{{TOY}, params: {{width: }}}}", "model.params.width must be int, .* None"),
        (f"{{{TOY}, params: {{width: [3, 4]}}}}", r"model.params.width must be int, .* \[3, 4\]"),
        (f"{{{TOY}, params: {{monitor: [3]}}}}", r"monitor must be str \| None, .* \[3\]"),
        (f"{{{DATA} 3}}}}", r"model.params.train must be mapping \| None, .* 3"),
        (f"{{{TOY}, params: [1]}}", "model.params must be a mapping"),
        ("3", "model must be a mapping"),
        (
            f"{{{TOY}, params: {{widht: 3}}}}",
            "key model.params.widht: support.models.ToyModel takes no 'widht'; .* 'width'",
        ),
        (f"{{{TOY}, parms: {{width: 3}}}}", "key model.parms; .* 'params'"),
        (
            f"{{{TOY}, params: {{monitor: [{{target: support.models.ToyDat}}]}}}}",
            "model.params.monitor.0.target: support.models has no 'ToyDat'; .* 'ToyData'",
        ),
        (
            f"{{{DATA} {{target: support.models.ToyData, params: {{sice: 3}}}}}}}}",
            "key model.params.train.params.sice: support.models.ToyData takes no 'sice'; .* 'size'",
        ),
        ("{target: main.DataModuleFromConfig}", "model.params lacks batch_size"),
        (
            f"{{{DATA} {{targt: a.B}}}}}}",
            "key model.params.train.targt; .* 'target'",
        ),
        (f"{{{DATA} {{params: {{size: 3}}}}}}}}", "model.params.train has no target .* None"),
        (f"{{{DATA} {{target: 3}}}}}}", "model.params.train has no target .* 3"),
        ("{params: {width: 3}}", "model has no target"),
        ("{target: support.models.GAN}", "support.models.GAN is a dict"),
        ("{target: taming.data}", "taming.data is a module"),
        ("{target: taming.modls.vqgan.VQModel}", "taming has no module 'modls'; .* 'models'"),
    ],
)
def test_wrong_blocks_are_named(write, block, words):
    with pytest.raises(ConfigError, match=f"^x.yaml: .*{words}"):
        check(write, f"model: {block}")


def test_added_arguments_need_not_be_there(write):
    text = "model: {target: main.DataModuleFromConfig}"
    with pytest.raises(ConfigError, match="lacks batch_size"):
        check(write, text)
    assert check(write, text, added=["batch_size"]) == {"target": "main.DataModuleFromConfig"}


class Sized:
    def __init__(self, n_e: int, e_dim: int, decay: float = 0.0) -> None: ...


class Surrounding:
    def __init__(self, quantizer_config: Any = None, other_config: Any = None) -> None: ...


def test_sizes_that_the_surrounding_model_fills_in_need_not_be_there(write):
    block = f"{{target: {__name__}.Sized}}"
    surrounding = f"model: {{target: {__name__}.Surrounding, params: {{"
    check(write, f"{surrounding} quantizer_config: {block}}}}}")
    with pytest.raises(ConfigError, match="other_config.params lacks n_e, e_dim"):
        check(write, f"{surrounding} other_config: {block}}}}}")
    with pytest.raises(ConfigError, match="quantizer_config.params.decay must be float"):
        block = f"{{target: {__name__}.Sized, params: {{decay: x}}}}"
        check(write, f"{surrounding} quantizer_config: {block}}}}}")


def test_splatted_mappings_are_checked(write):
    vqmodel = "model: {{target: taming.models.vqgan.VQModel, params: {{n_embed: 8, embed_dim: 4, "
    vqmodel += "lossconfig: {{target: taming.modules.losses.DummyLoss}}, ddconfig: {{{} }} }} }}"
    ddconfig = "ch: 32, out_ch: 3, ch_mult: [1], num_res_blocks: 1, attn_resolutions: [], "
    ddconfig += "in_channels: 3, resolution: 8, z_channels: 4, double_z: false"
    check(write, vqmodel.format(ddconfig))
    with pytest.raises(ConfigError, match=r"ddconfig\.num_res_block; .*'num_res_blocks'"):
        check(write, vqmodel.format(ddconfig + ", num_res_block: 3"))
    for old, new, words in (
        ("num_res_blocks: 1", "num_res_blocks: -2", r"ddconfig\.num_res_blocks must be at least 0"),
        ("[1]", "'1,2'", r"ddconfig\.ch_mult must be list of int, got '1,2'"),
        ("resolution: 8, ", "", "ddconfig lacks resolution"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(write, vqmodel.format(ddconfig.replace(old, new)))
    with pytest.raises(ConfigError, match="lossconfig.target must name a loss, got .*Identity"):
        other = "taming.modules.transformer.permuter.Identity"
        check(write, vqmodel.format(ddconfig).replace("taming.modules.losses.DummyLoss", other))


def test_the_file_that_set_a_key_last_is_named(write):
    first = write("a.yaml", "model: {target: support.models.ToyModel, params: {widht: 3}}")
    second = write("b.yaml", "model: {params: {width: 4}}")
    config = load_config([first, second])
    with pytest.raises(ConfigError, match=r"a\.yaml: .*model\.params\.widht"):
        check_block(config, "model", config.values["model"])


def test_a_replaced_target_drops_what_the_new_one_does_not_take(write, caplog):
    old = "{target: support.models.ToyModel, params: {width: 3, monitor: x, fail_at: 2}}"
    first = write("a.yaml", f"model: {old}")
    new = "{target: support.models.ToyManualModel, params: {size: 2}}"
    second = write("b.yaml", f"model: {new}")
    swap = "model.target=support.models.ToyDataModule"
    for files, keys in (([first], [swap, "model.params.size=2"]), ([first, second], [swap])):
        config = load_config(files, keys)
        check_block(config, "model", config.values["model"])
        assert config.values["model"]["params"] == {"size": 2}
        (record,) = caplog.records
        assert "ToyDataModule does not take" in record.message
        assert all(word in record.message for word in ("width=3", "monitor='x'", "fail_at=2"))
        caplog.clear()
    # What is given anew, or for the target that stays, is a mistake as before.
    for keys in ([swap, "model.params.width=4"], ["model.target=support.models.ToyModel"]):
        config = load_config([first], [*keys, "model.params.sice=1"])
        with pytest.raises(
            ConfigError, match="command line: unknown key model.params.(width|sice)"
        ):
            check_block(config, "model", config.values["model"])


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Path of a small and complete configuration."""
    monkeypatch.chdir(tmp_path)
    model = {"base_learning_rate": 0.1, "target": "support.models.ToyModel", "params": {"width": 5}}
    data = {"target": "support.models.ToyDataModule"}
    OmegaConf.save(OmegaConf.create({"model": model, "data": data}), tmp_path / "toy.yaml")
    return tmp_path / "toy.yaml"


@pytest.mark.reported(5)
def test_merge_block():
    default = {"target": "a", "params": {"x": 1, "y": 2}}
    assert merge_block(default, None) == default
    assert merge_block(default, {"params": {"y": 3}}) == {"target": "a", "params": {"x": 1, "y": 3}}
    assert merge_block(default, {"target": "b"}) == {"target": "b"}


def test_callbacks_are_merged_replaced_and_removed():
    blocks = callback_blocks(
        {
            "callbacks": {
                "image_logger": {"params": {"max_images": 2}},
                "rng_state": None,
                "mine": {"target": "support.models.X"},
            }
        }
    )
    assert blocks["image_logger"]["target"] == DEFAULT_CALLBACKS["image_logger"]["target"]
    assert blocks["image_logger"]["params"]["max_images"] == 2
    assert set(blocks) == {*DEFAULT_CALLBACKS, "mine"} - {"rng_state"}


@pytest.mark.parametrize(
    "change",
    [
        "lightning.trainer.max_steps=3",
        "lightning.trainer.gpus=2",
        "lightning.logger.target=lightning.pytorch.loggers.WandbLogger",
        "lightning.logger.params.sub_dir=x",
        "lightning.modelcheckpoint.params.every_n_train_steps=5",
        "lightning.callbacks.image_logger.params.batch_frequency=3",
        "lightning.callbacks.image_logger=null",
        "lightning.trainer.profiler={target: lightning.pytorch.profilers.SimpleProfiler}",
        "lightning.trainer.max_time={hours: 2}",
        "lightning.trainer={enable_progress_bar: 0, accumulate_grad_batches: null}",
        "lightning.callbacks.mine={target: lightning.pytorch.callbacks.Timer}",
        "lightning=null",
    ],
)
def test_right_experiments_pass_unchanged(toy, change):
    config, expected = load_config([toy], [change]), load_config([toy], [change])
    check_experiment(config, train=True)
    for name in ("logger", "modelcheckpoint"):  # these are completed
        for values in (config.values, expected.values):
            (values.get("lightning") or {}).pop(name, None)
    for callback, block in ((config.values.get("lightning") or {}).get("callbacks") or {}).items():
        block = block and {"params": {}, **block}
        expected.values["lightning"]["callbacks"][callback] = block and merge_block(
            DEFAULT_CALLBACKS.get(callback, block), block
        )
        config.values["lightning"]["callbacks"][callback] = block
    assert config.values == expected.values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("modle.x=1", "key modle; .*'model'"),
        ("model.base_learning_rate=null", "base_learning_rate must be float, got None"),
        (
            "lightning.trainer.max_step=3",
            "lightning.trainer.max_step: lightning.pytorch.Trainer takes .*'max_steps'",
        ),
        ("lightning.trainer.max_steps=three", "lightning.trainer.max_steps must be int, .*'three'"),
        ("lightning.trainer.max_epochs=1.5", "trainer.max_epochs must be int"),
        ("lightning.trainer.limit_val_batches=all", "trainer.limit_val_batches must be "),
        (
            "lightning.trainer.plugins=[{target: lightning.pytorch.plugins.HalfPrecison}]",
            "plugins.0.target: lightning.pytorch.plugins has no 'HalfPrecison'; .*'HalfPrecision'",
        ),
        ("lightning.callbacks=[rng_state]", r"lightning.callbacks must be .*\['rng_state'\]"),
        ("lightning.callbak.x=3", "lightning.callbak; .*'callbacks'"),
        ("lightning.callbacks.rng_state.param=3", "rng_state.param; .*'params'"),
        ("lightning.callbacks.mine.params.x=3", "lightning.callbacks.mine has no target"),
        (
            "lightning.callbacks.image_logger.params.max_image=3",
            "taming.run.callbacks.ImageLogger takes no 'max_image'; .*'max_images'",
        ),
        ("lightning.callbacks.rng_state=3", "lightning.callbacks.rng_state must be a mapping .*3"),
        ("lightning.logger=[1]", r"lightning.logger must be a mapping .*\[1\]"),
        ("lightning.logger.params=[1]", r"lightning.logger.params must be a mapping, .*\[1\]"),
        ("lightning.logger.param.x=1", "lightning.logger.param; .*'params'"),
        ("lightning.modelcheckpoint.params.save_topk=3", "params.save_topk: .*'save_top_k'"),
        (
            "lightning.logger={target: lightning.pytorch.loggers.CSVLogger, params: {nam: x}}",
            "lightning.logger.params.nam: lightning.pytorch.loggers.CSVLogger takes no 'nam'",
        ),
        ("lightning.trainer.resume_from_checkpoint=no.ckpt", "there is no checkpoint no.ckpt"),
    ],
)
def test_wrong_experiments_are_named(toy, change, message):
    with pytest.raises(ConfigError, match=f"^command line: .*{message}|^toy.yaml: .*{message}"):
        check_experiment(load_config(["toy.yaml"], [change]), train=True)


@pytest.mark.parametrize(
    "path",
    [
        "callbacks.image_logger.params.batch_frequency",
        "callbacks.mine.params.max_bins",
        "modelcheckpoint.params.save_top_k",
        "logger.params.flush_logs_every_n_steps",
        "modelcheckpoint.params.every_n_train_steps",
        "trainer.max_steps",
        "trainer.max_epochs",
    ],
)
def test_whole_floats_become_ints_in_the_lightning_block_too(toy, path):
    targets = [
        "lightning.callbacks.mine.target=taming.run.callbacks.CodebookTelemetry",
        "lightning.logger.target=lightning.pytorch.loggers.CSVLogger",
    ]
    config = load_config([toy], [*targets, f"lightning.{path}=1e3"])
    check_experiment(config, train=True)
    value = retrieve(config.values["lightning"], path, ".")
    assert (value, type(value)) == (1000, int)


def test_a_key_may_be_there_for_interpolations(toy):
    for values in (["${w}"], ["${w}", 5]):  # the latter overrides the former
        sources = [{"model": {"params": {"width": value}}} for value in values]
        files = [toy.with_name(f"{number}.yaml") for number in range(len(sources))]
        for source, file in zip(sources, files, strict=True):
            OmegaConf.save(OmegaConf.create(source), file)
        check_experiment(load_config([toy, *files], ["w=4"]), train=True)
    with pytest.raises(ConfigError, match="unknown key v"):
        check_experiment(load_config([toy], ["v=4", "model.params.width=4"]), True)


def test_both_blocks_are_needed(toy):
    with pytest.raises(ConfigError, match="there is no 'model' block"):
        check_experiment(load_config([]), train=False)


def test_a_learning_rate_is_needed_to_train_alone(toy):
    config = load_config([toy], ["model.base_learning_rate=null"])
    check_experiment(config, train=False)
    with pytest.raises(ConfigError, match="base_learning_rate"):
        check_experiment(config, train=True)
