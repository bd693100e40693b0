"""Laws of tokenizers with every quantizer and transform: half precision, graphs, accelerators."""

import copy
import logging
from functools import partial

import pytest
import torch
from reliability.codes import try_codes
from support.models import every_quantizer, pictures, tokenizer_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

# Largest difference of images decoded from the same codes by a model in half precision and one in
# float32, and the share of codes that both give, which borderline sites and those below them lower.
CLOSE = {torch.float16: (0.01, 0.8), torch.bfloat16: (0.1, 0.5)}


def leaves(nested) -> list[Tensor]:
    return [nested] if isinstance(nested, Tensor) else [part for n in nested for part in leaves(n)]


@pytest.fixture(autouse=True)
def no_trace_log(monkeypatch) -> None:
    """Keep pytest from capturing what torch records of each graph, which takes seconds."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


class Part(nn.Module):
    """A method of a model as a module."""

    def __init__(self, model, call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x):
        return self.call(self.model, x)


def decode(model, codes):
    return model.decode_code(codes)


def encode(model, x):
    z_q, loss, (_, _, indices) = model.encode(x)
    return z_q, loss, indices


def quantize(model, z):
    z_q, loss, (_, _, indices) = model.quantize(z)
    return z_q, loss, indices


def look_up(model, codes):
    grid = (codes if isinstance(codes, Tensor) else codes[0]).shape[:3]
    return model.quantize.get_codebook_entry(codes, (*grid, model.quantize.e_dim))


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@every_quantizer
def test_half_precision_encodes_and_decodes(quantizer: str, dtype) -> None:
    model, whole, x = tokenizer_of(quantizer).to(dtype), tokenizer_of(quantizer), pictures(2)
    codes, z_q = model.encode_to_codes(x), model.encode(x.to(dtype)).z_q
    decoded = model.decode_code(codes)
    assert torch.equal(decoded, model.decode(z_q)) and decoded.dtype == z_q.dtype == dtype
    atol, share = CLOSE[dtype]
    torch.testing.assert_close(decoded.float(), whole.decode_code(codes), rtol=0, atol=atol)
    same = [a == b for a, b in zip(*map(leaves, (codes, whole.encode_to_codes(x))), strict=True)]
    assert all(level.float().mean() > share for level in same)
    if model.quantize.variable_rate:
        for rate in ({"threshold": 0.2}, {"max_codes": 100}, {"target_psnr": 6.0}):
            assert model.encode_to_codes(x, **rate).shape == codes.shape
    if model.quantize.variable_rate and not model.quantize.transform.dummies:
        for rate in ({"rate": 0.02}, {"target_bits": 400.0}):
            assert model.encode_to_codes(x, **rate).shape == codes.shape
    metrics = model.quantize.codebook_metrics()
    metrics.update(model.encode_to_prequant(x), model.encode(x))
    assert all(value.float().isfinite().all() for value in metrics.compute().values())


@every_quantizer
def test_no_images_have_no_codes_at_any_rate(quantizer: str) -> None:
    model, x = tokenizer_of(quantizer), pictures(0)
    rates = [{}]
    if model.quantize.variable_rate:
        rates += [{"threshold": 0.2}, {"max_codes": 100}, {"target_psnr": 6.0}]
        rates += [{"rate": 0.02}, {"target_bits": 400.0}] * (not model.quantize.sequence.dummies)
    for rate in rates:
        codes = model.encode_to_codes(x, **rate)
        assert all(level.shape[0] == 0 and level.ndim == 4 for level in leaves(codes))
        assert model.decode_code(codes).shape == x.shape and len(model.bits_of(codes)) == 0


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@every_quantizer
def test_distances_are_float32_in_half_precision(quantizer: str, dtype) -> None:
    model = tokenizer_of(quantizer).to(dtype)
    levels = model.levels.values()
    for half, whole in zip(levels, copy.deepcopy(model).float().levels.values(), strict=True):
        z = torch.randn(2, half.e_dim, 8, 8).to(dtype)
        assert torch.equal(half(z).info.indices, whole(z.float()).info.indices)
        torch.testing.assert_close(half(z).loss, whole(z.float()).loss)


def check_graph(part: Part, given, other) -> None:
    """Export a part with a batch of 3; its graph gives the same as the part for a batch of 5."""
    sizes = [{0: torch.export.Dim("images", min=2, max=64)} for _ in leaves(given)]
    shapes = (sizes[0] if isinstance(given, Tensor) else tuple(sizes),)
    graph = torch.export.export(part, (given,), dynamic_shapes=shapes).module()
    found, wanted = leaves(graph(other)), leaves(part(other))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_whole_model_is_a_graph() -> None:
    x, more = pictures(3), pictures(5)
    check_graph(Part(tokenizer_of("plain"), encode), x, more)


@pytest.mark.parametrize("quantizer", ["averages", "gumbel", "linear", "attract"])
def test_every_quantizer_is_a_graph(quantizer: str) -> None:
    model = tokenizer_of(quantizer)
    z, more = torch.randn(3, 4, 4, 4), torch.randn(5, 4, 4, 4)
    check_graph(Part(model, quantize), z, more)
    codes = (
        model.quantize(latents).info.indices.reshape(len(latents), 4, 4, -1)
        for latents in (z, more)
    )
    check_graph(Part(model, look_up), *codes)


def test_quantizing_and_decoding_compile_to_one_graph() -> None:
    for quantizer, call in (("plain", quantize), ("plain", decode), ("linear", look_up)):
        model, z = tokenizer_of(quantizer), torch.randn(2, 4, 4, 4)
        given = z if call is quantize else model.quantize(z).info.indices.reshape(2, 4, 4, -1)
        torch.compiler.reset()
        compiled = torch.compile(part := Part(model, call), backend="eager", fullgraph=True)
        found, wanted = leaves(compiled(given)), leaves(part(given))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@every_quantizer
def test_a_gpu_need_not_wait_for_values(quantizer: str) -> None:
    """A fake tensor has none, so that looking at one is an error."""
    model = tokenizer_of(quantizer)
    codes, state = leaves(model.encode_to_codes(pictures(2))), Part(model, decode).state_dict()
    given = [(decode, codes if model.quantize.names else codes[0])]
    if quantizer in ("first", "plain", "averages", "gumbel", "attract", "levels"):
        given.append((lambda m, x: m.encode(x).z_q, pictures(2)))  # other searches end early
    for call, x in given:
        with FakeTensorMode() as mode:
            on_gpu = partial(tree_map, lambda v: mode.from_tensor(v).to("cuda"))
            result = torch.func.functional_call(Part(model, call), on_gpu(state), (on_gpu(x),))
        assert result.device.type == "cuda"


@pytest.mark.parametrize("quantizer", ["plain", "gumbel", "linear", "attract"])
def test_codes_that_a_graph_cannot_refuse_become_nan(quantizer: str) -> None:
    model = tokenizer_of(quantizer)
    codes = model.encode_to_codes(pictures(1))
    part = Part(model.quantize, lambda q, codes: q.get_codebook_entry(codes, (1, 8, 8, 4)))
    graph = torch.export.export(part, (codes,)).module()
    wrong = codes.clone()
    wrong[0, 2, 3] = 99
    z_q, clean = graph(wrong)[0], graph(codes)[0]
    assert z_q[:, 2, 3].isnan().all() and z_q.isnan().sum() == 4
    assert torch.equal(torch.where(z_q.isnan(), clean, z_q), clean)


@every_quantizer
def test_an_empty_batch_has_no_codes_and_no_images(quantizer: str) -> None:
    model, none = tokenizer_of(quantizer), pictures(0)
    codes = model.encode_to_codes(none)
    assert all(own.shape[0] == 0 for own in leaves(codes))
    assert model.decode_code(codes).shape == none.shape


@every_quantizer
def test_any_codes_decode_or_are_refused(quantizer: str) -> None:
    """`reliability.codes` tries more of them."""
    assert set(try_codes(quantizer, n=150, seed=1)) == {"refused", "decoded"}


@every_quantizer
def test_each_quantizer_answers_for_tables_and_rates(quantizer: str) -> None:
    for own in tokenizer_of(quantizer).levels.values():
        assert (own.entropy is not None) == own.variable_rate
        assert any("entropy" in name for name in own.state_dict()) == own.variable_rate
        assert own.rate_range is own.length_range is None  # it was given none
        assert not {"entropy", "rate_range", "length_range"} & own.identity().keys()
