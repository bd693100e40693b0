"""What other programs run gives the codes and pictures of the tokenizer itself, at any size."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from support.codec import fill_tables
from support.models import pictures, tokenizer_of
from support.runs import call, fails

from taming.modules.vqvae import numpy_loop
from taming.tokenizer import Tokenizer

RATES: tuple[dict[str, Any], ...] = ({}, {"threshold": 0.1}, {"max_codes": 100})
LAMBDAS: tuple[dict[str, Any], ...] = ({"rate": 0.0}, {"rate": 0.01}, {"rate": 0.1})


def tables_of(model: Any) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.quantize.loop_tables().items()}


@pytest.mark.parametrize("quantizer", ["residual", "one-turn", "linear", "depth", "attract"])
def test_the_loop_in_numpy_finds_the_codes_of_the_quantizer(quantizer: str) -> None:
    model = tokenizer_of(quantizer)
    fill_tables(model.quantize)
    tables, lengths = tables_of(model), set()
    for x in (pictures(2), pictures(2, 8, 32), pictures(0)):
        z = model.encode_to_prequant(x).numpy()
        for rate in RATES + LAMBDAS * (quantizer != "attract"):
            codes = numpy_loop.encode(z, tables, **rate)
            assert np.array_equal(codes, model.encode_to_codes(x, **rate).numpy())
            lengths |= {*(codes >= 0).sum(axis=-1).flat}
    assert len(lengths) > 1 or quantizer == "one-turn"


def test_a_tokenizer_with_a_rate_of_its_own_encodes_by_it() -> None:
    model, x = tokenizer_of("linear"), pictures(2)
    fill_tables(model.quantize)
    model.quantize.rate = 0.02
    z, tables = model.encode_to_prequant(x).numpy(), tables_of(model)
    codes = numpy_loop.encode(z, tables)
    assert np.array_equal(codes, model.encode_to_codes(x).numpy())
    assert not np.array_equal(codes, numpy_loop.encode(z, tables, rate=0.001))
    assert np.array_equal(
        numpy_loop.encode(z, tables, 0.1), model.encode_to_codes(x, threshold=0.1).numpy()
    )


@pytest.mark.parametrize("quantizer", ["first", "plain", "averages"])
def test_without_a_loop_the_nearest_code_is_found(quantizer: str) -> None:
    model, x = tokenizer_of(quantizer), pictures(2, 8, 32)
    z = model.encode_to_prequant(x).numpy()
    codes = numpy_loop.encode(z, tables_of(model))
    assert np.array_equal(codes, model.encode_to_codes(x).numpy())
    with pytest.raises(ValueError, match="fixed rate"):
        numpy_loop.encode(z, tables_of(model), max_codes=70)


def test_rates_that_mean_nothing_are_refused() -> None:
    model = tokenizer_of("residual")
    z, tables = np.zeros((1, 4, 2, 2)), tables_of(model)
    with pytest.raises(ValueError, match="one rate, got threshold and max_codes"):
        numpy_loop.encode(z, tables, 1.0, 10)
    with pytest.raises(ValueError, match="needs at least 4 codes, got 3"):
        numpy_loop.encode(z, tables, max_codes=3)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        numpy_loop.encode(z, tables, -1)
    with pytest.raises(ValueError, match="rate has no meaning"):
        numpy_loop.encode(z, tables_of(tokenizer_of("attract")), rate=0.1)


def test_graphs_run_elsewhere_at_any_size_and_rate(tmp_path: Path) -> None:
    model = tokenizer_of("residual")
    Tokenizer(model).save_pretrained(tmp_path / "model")
    call("export", "-r", tmp_path / "model", "-o", tmp_path)
    spec = importlib.util.spec_from_file_location("loop", tmp_path / "loop.py")
    assert spec and spec.loader
    spec.loader.exec_module(loop := importlib.util.module_from_spec(spec))
    tables = np.load(tmp_path / "loop.npz")
    graphs = [onnxruntime.InferenceSession(tmp_path / f"{n}.onnx") for n in ("encoder", "decoder")]
    programs = [torch.export.load(tmp_path / f"{n}.pt2").module() for n in ("encoder", "decoder")]
    for size in ((1, 16, 16), (3, 4, 26)):
        x = pictures(*size)
        latents = model.encode_to_prequant(x)
        (z,) = graphs[0].run(None, {"images": x.numpy()})
        np.testing.assert_allclose(z, latents.numpy(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(programs[0](x), latents)
        for rate in ({}, {"max_codes": 80}):
            codes = loop.encode(z, tables, **rate)
            wanted = model.encode_to_codes(x, **rate)
            assert np.array_equal(codes, wanted.numpy())
            (images,) = graphs[1].run(None, {"codes": codes})
            np.testing.assert_allclose(images, model.decode_code(wanted), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(programs[1](wanted), model.decode_code(wanted))


def test_what_cannot_be_exported_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"gumbel": "a GumbelQuantize", "levels": "a Hierarchy", "beam": "not a beam of 2"}
    for quantizer, name in names.items():
        Tokenizer(tokenizer_of(quantizer)).save_pretrained(tmp_path / quantizer)
        error = fails(capsys, "export", "-r", tmp_path / quantizer, "-o", tmp_path / "out")
        assert name in error
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = fails(capsys, "export", "-r", tmp_path, "-o", tmp_path / "out")
    assert "pip install 'loopy-taming[export]', or give --formats pt2" in error
