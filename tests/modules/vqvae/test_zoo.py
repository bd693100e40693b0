"""Laws of the quantizers of vector-quantize-pytorch, with the recipes' options and others."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.models import images, pictures, trainer, vqmodel_config
from torch import Tensor, nn

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.context import ContextPrior
from taming.models.pixelcnn import PixelCNNPrior
from taming.models.vqgan import VQModel
from taming.modules.vqvae import zoo
from taming.modules.vqvae.base import code_perplexity
from taming.modules.vqvae.zoo import PARTS, LibraryQuantizer
from taming.util import instantiate_from_config

TARGET = "taming.modules.vqvae.zoo.LibraryQuantizer"
K, D = 16, 4


def of_recipe(path: Path) -> dict[str, Any]:
    """Parameters of a recipe's quantizer, with 16 codes."""
    config = yaml.safe_load(path.read_text())["model"]["params"]["quantizer_config"]
    assert config["target"] == TARGET
    small = {"levels": [4, 4], "codebook_dim": 3}
    return {**config["params"], **{k: v for k, v in small.items() if k in config["params"]}}


RECIPES = {
    path.stem: of_recipe(path)
    for path in sorted((Path(__file__).resolve().parents[3] / "configs/zoo").glob("*.yaml"))
}
FURTHER = {
    "heads": {"name": "VectorQuantize", "heads": 2, "codebook_dim": 2},
    "own-heads": {
        **{"name": "VectorQuantize", "heads": 2, "codebook_dim": 2},
        "separate_codebook_per_head": True,
    },
    "gradient": {"name": "VectorQuantize", "learnable_codebook": True, "ema_update": False},
    "dropout": {**RECIPES["residual_vq"], "quantize_dropout": True},
    "shared": {**RECIPES["grouped_residual_vq"], "shared_codebook": True},
    "beam": {**RECIPES["residual_vq"], "num_quantizers": 2, "beam_size": 2},
    "implicit": {
        **{"name": "ResidualVQ", "num_quantizers": 2, "rotation_trick": False},
        "implicit_neural_codebook": True,
    },
    "two-fsq": {"name": "FSQ", "levels": [4, 4], "num_codebooks": 2},
    "two-lfq": {"name": "LFQ", "num_codebooks": 2},
    "residual-sim": {"name": "ResidualSimVQ", "num_quantizers": 2, "rotation_trick": False},
    "residual-lfq": {"name": "ResidualLFQ", "num_quantizers": 2},
    "grouped-fsq": {
        **{"name": "GroupedResidualFSQ", "levels": [4, 4], "groups": 2},
        "num_quantizers": 2,
    },
    "grouped-lfq": {"name": "GroupedResidualLFQ", "groups": 2, "num_quantizers": 2},
}
KINDS = RECIPES | FURTHER
every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_recipe = pytest.mark.parametrize("kind", list(RECIPES))


def quantizer(kind: str, steps: int = 3) -> LibraryQuantizer:
    """A quantizer of K codes in eval mode that has seen a few batches."""
    torch.manual_seed(0)
    built = LibraryQuantizer(n_e=K, e_dim=D, **KINDS[kind]).train()
    for _ in range(steps):
        built(torch.randn(4, D, 5, 6))
    return built.eval().requires_grad_(False)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def model(kind: str, **params: Any) -> VQModel:
    torch.manual_seed(0)
    block = {"target": TARGET, "params": KINDS[kind]}
    return instantiate_from_config(vqmodel_config(quantizer_config=block, **params))


def test_every_class_of_the_library_is_tested() -> None:
    assert {params["name"] for params in KINDS.values()} == set(PARTS)


@every_kind
def test_codes_decode_to_exactly_what_they_were_encoded_from(kind: str) -> None:
    built, z = quantizer(kind), torch.randn(3, D, 5, 6)
    z_q, loss, (perplexity, _, codes) = built(z)
    turns = built.sequence.max_loops
    assert codes.shape == (3, 5, 6, turns) and codes.min() >= 0 and codes.max() < K
    assert z_q.shape == z.shape and z_q.is_contiguous() and loss.ndim == 0
    assert 1 <= perplexity <= K
    for indices, shape in (
        (codes, None),
        (codes.int(), (3, 5, 6, D)),
        (codes.flatten(), (3, 5, 6, D)),
    ):
        assert torch.equal(built.get_codebook_entry(indices, shape), z_q)
    flat = built.get_codebook_entry(codes.flatten(0, 2))
    assert torch.equal(flat, z_q.permute(0, 2, 3, 1).flatten(0, 2))
    tokens, lengths = built.sequence.encode(codes)
    assert lengths.tolist() == [30 * turns] * 3 and built.sequence.vocab_size == K
    assert torch.equal(built.sequence.decode(tokens, (5, 6)), codes)


@every_kind
def test_codes_of_an_image_do_not_depend_on_the_others(kind: str) -> None:
    built, z = quantizer(kind), torch.randn(4, D, 3, 3)
    codes = built(z).info.indices
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(built(z[order]).info.indices, codes[order])
    assert torch.equal(built(z[1:2]).info.indices, codes[1:2])
    none = built(z[:0])
    assert none.z_q.shape == (0, D, 3, 3) and none.info.indices.shape == (0, *codes.shape[1:])
    assert built.get_codebook_entry(none.info.indices).shape == (0, D, 3, 3)


@every_kind
def test_evaluation_changes_nothing(kind: str) -> None:
    for steps in (0, 2):  # before k-means and after it
        built = quantizer(kind, steps)
        before, z = state_of(built), torch.randn(2, D, 4, 4)
        assert torch.equal(built(z).info.indices, built(z).info.indices)
        assert_same_state(built, before)
        built.train()(z)
        averages = KINDS[kind]["name"].endswith(("VectorQuantize", "ResidualVQ"))
        same = all(torch.equal(v, before[k]) for k, v in built.state_dict().items())
        assert same != (averages and kind not in ("gradient", "implicit"))


@every_kind
def test_half_precision_encodes_and_decodes(kind: str) -> None:
    built, z = quantizer(kind), torch.randn(2, D, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = built(z)
        assert torch.equal(built.get_codebook_entry(found.info.indices), found.z_q)
    assert torch.equal(found.info.indices, built(z).info.indices)
    half = quantizer(kind).half()
    found = half(z.half())
    assert found.z_q.dtype == torch.float16
    assert torch.equal(half.get_codebook_entry(found.info.indices), found.z_q)
    assert torch.equal(found.info.indices, half.float()(z.half().float()).info.indices)
    with pytest.raises(ValueError, match="bf16-mixed"):
        half.half().train()(z.half())


@every_kind
def test_every_codebook_is_counted(kind: str) -> None:
    built, z = quantizer(kind), torch.randn(3, D, 5, 6)
    found = built(z)
    metrics = built.codebook_metrics()
    metrics.update(z, found)
    values = metrics.compute()
    books = found.info.indices.flatten(0, 2).chunk(built.codebooks, dim=1)
    usage = sum(len(book.unique()) for book in books) / (built.codebooks * K)
    perplexity = torch.stack([code_perplexity(book, K) for book in books]).mean()
    torch.testing.assert_close(values["usage"], torch.tensor(usage))
    torch.testing.assert_close(values["perplexity"], perplexity)
    torch.testing.assert_close(found.info.perplexity, perplexity)
    assert values["codes"].sum() == found.info.indices.numel()
    assert values["mean_length"] == built.sequence.max_loops


def test_codebooks_follow_the_codes_of_a_site() -> None:
    books = {kind: quantizer(kind, 0).codebooks for kind in KINDS}
    assert (books["heads"], books["own-heads"]) == (1, 2)
    assert (books["residual_vq"], books["shared"]) == (4, 2)


@pytest.mark.parametrize("kind", ["residual_vq", "grouped_residual_vq", "dropout", "shared"])
def test_the_gradient_to_latents_is_that_of_a_straight_line(kind: str) -> None:
    built = quantizer(kind)
    for training in (True, False):
        for _ in range(3):  # dropout draws
            z = torch.randn(2, D, 4, 4, requires_grad=True)
            built.train(training)(z).z_q.sum().backward()
            torch.testing.assert_close(z.grad, torch.ones_like(z))


@every_kind
def test_training_brings_an_autoencoder_nearer(kind: str) -> None:
    torch.manual_seed(0)
    built = LibraryQuantizer(n_e=K, e_dim=D, **KINDS[kind]).train()
    encoder, decoder = nn.Conv2d(3, D, 1), nn.Conv2d(D, 3, 1)
    modules = nn.ModuleList([encoder, built, decoder])
    optimizer = torch.optim.Adam((p for p in modules.parameters() if p.requires_grad), 0.01)
    x = torch.randn(2, 3, 6, 6)

    def error() -> float:
        modules.eval()
        with torch.no_grad():
            value = float((decoder(built(encoder(x)).z_q) - x).square().mean())
        modules.train()
        return value

    before = error()
    for _ in range(40):
        optimizer.zero_grad()
        out = built(encoder(x))
        ((decoder(out.z_q) - x).square().mean() + 0.1 * out.loss).backward()
        optimizer.step()
    assert error() < 0.8 * before


@every_recipe
def test_a_tokenizer_trains_and_a_prior_learns_its_codes(kind: str, tmp_path: Path) -> None:
    tokenizer = model(kind)
    tokenizer.learning_rate = 1e-3
    trainer(tmp_path).fit(tokenizer, images(4), images(2))
    codes = tokenizer.eval().encode_to_codes(x := pictures(2))
    assert torch.equal(tokenizer.decode_code(codes), tokenizer(x)[0])
    prior = Net2NetTransformer(
        {
            "target": "taming.modules.transformer.mingpt.GPT",
            "params": {"n_layer": 1, "n_head": 2, "n_embd": 8, "site_shape": True},
        },
        {"target": f"{__name__}.keep", "params": {"model": tokenizer}},
        "__is_unconditional__",
    )
    assert prior.transformer.vocab_size == K
    prior.learning_rate = 0.01
    before, frozen = bits(prior, x), state_of(tokenizer)
    trainer(tmp_path, max_epochs=3).fit(prior, images(4), images(2))
    assert bits(prior, x) < before
    assert_same_state(tokenizer, frozen)
    sampled = prior.eval().sample_codes(torch.zeros(2, 1, dtype=torch.int64))
    assert sampled.shape == codes.shape and sampled.min() >= 0 and sampled.max() < K
    assert tokenizer.decode_code(sampled).shape == x.shape


def bits(prior: Net2NetTransformer, x: Tensor) -> float:
    with torch.no_grad():
        tokens = prior.eval().codes_to_tokens(prior.encode_codes(x))
        start = torch.zeros(len(x), 1, dtype=torch.int64)
        value = float(prior.nll(tokens, start, (8, 8)).sum())
    prior.train()
    return value


def keep(model: VQModel) -> VQModel:
    """Return a model unchanged, for use as a configuration's target."""
    return model


@pytest.mark.parametrize("kind", [PixelCNNPrior, ContextPrior])
def test_priors_without_a_sequence_learn_and_sample_codes_without_lengths(kind: Any) -> None:
    tokenizer = {"target": f"{__name__}.keep", "params": {"model": model("residual_vq").eval()}}
    stacks = {"target": "taming.modules.pixelcnn.stacks.GatedStacks"}
    stacks["params"] = {"channels": 4, "layers": 2}
    context = {"target": "taming.modules.context.ContextNetwork", "params": {"channels": 4}}
    prior = kind(tokenizer, stacks if kind is PixelCNNPrior else context).eval()
    codes = prior.encode_codes(pictures(2))
    nats, lengths = prior.measure_nats(prior.tokenize_batch(next(iter(images(2)))))
    assert nats.isfinite().all() and lengths.tolist() == [64 * 4] * 2
    sampled = prior.sample_codes(torch.zeros(2, 1, dtype=torch.int64))
    assert prior.decode_codes(sampled).isfinite().all() and sampled.shape == codes.shape


def test_lengths_that_vary_do_not_fit_a_fixed_number_of_codes() -> None:
    tokenizer = {"target": f"{__name__}.keep", "params": {"model": model("residual_vq")}}
    unary = "taming.modules.sequence.notations.UnarySequence"
    sequence = {"target": unary, "params": {"n_e": K, "max_loops": 4, "dummies": False}}
    network = {"target": "taming.modules.transformer.mingpt.GPT", "params": {"n_layer": 1}}
    with pytest.raises(ValueError, match="dummies=False, but the tokenizer .*fixed_length=True"):
        Net2NetTransformer(network, tokenizer, "__is_unconditional__", sequence_config=sequence)


def test_options_are_part_of_a_fingerprint() -> None:
    of = {kind: model(kind).fingerprint() for kind in ("lfq", "bsq", "fsq")}
    assert len(set(of.values())) == 3 and model("lfq").fingerprint() == of["lfq"]


def test_quantize_start_is_for_those_that_learn_without_a_decoder() -> None:
    assert model("residual_vq", quantize_start=2).quantize.trains_without_decoder
    with pytest.raises(ValueError, match="set model.params.quantize_start=0"):
        model("fsq", quantize_start=2)


@pytest.mark.parametrize(
    "params, words",
    [
        ({"name": "RVQ"}, [*PARTS]),
        ({"name": "HierarchicalVQ"}, ["no quantizer 'HierarchicalVQ'", *PARTS]),
        (
            {"name": "ResidualVQ", "num_quantizer": 4},
            ["no 'num_quantizer'", "did you mean 'num_quantizers'", "kmeans_init", "decay"],
        ),
        ({"name": "FSQ", "levels": [4, 4], "decay": 0.9}, ["FSQ takes no 'decay'", "levels"]),
        ({"name": "FSQ", "levels": [8, 5]}, [r"levels \[8, 5\] make 40 codes", "n_embed is 16"]),
        ({"name": "FSQ"}, ["FSQ", "levels"]),
        ({"name": "LFQ", "dim": 3}, ["dim is the model's embed_dim"]),
        ({"name": "SimVQ", "codebook_size": 3}, ["codebook_size is the model's n_embed"]),
        ({"name": "SimVQ", "channel_first": True}, ["takes no 'channel_first'"]),
        ({"name": "ResidualVQ"}, ["ResidualVQ", "num_quantizers"]),
        ({"name": "GroupedResidualVQ", "groups": 3, "num_quantizers": 2}, ["groups"]),
        ({"name": "FSQ", "levels": 16}, ["FSQ", "levels"]),
    ],
)
def test_mistakes_get_one_line(params: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        LibraryQuantizer(n_e=K, e_dim=D, **params)
    assert "\n" not in str(error.value)
    for word in words:
        assert error.match(word)


def test_sizes_that_a_quantizer_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="power of 2"):
        LibraryQuantizer("LFQ", n_e=12, e_dim=D)


def test_codes_that_no_quantizer_gives_are_refused() -> None:
    built = quantizer("residual_vq")
    codes = torch.zeros(1, 2, 2, 4, dtype=torch.int64)
    for wrong in (K, -1):
        with pytest.raises(ValueError, match=f"index {wrong} is out of range 0..15"):
            built.get_codebook_entry(torch.full_like(codes, wrong))
    for wrong in (codes[..., :3], codes[0], codes[..., None]):
        with pytest.raises(ValueError, match="expected 4 codes|codes must be"):
            built.get_codebook_entry(wrong)
    with pytest.raises(ValueError, match="expected latents"):
        built(torch.zeros(1, D + 1, 2, 2))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'loopy-taming\[zoo\]'"):
        LibraryQuantizer("LFQ", n_e=K, e_dim=D)


def test_codebooks_learn_from_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same latents learn as one with twice as many."""
    options = {"num_quantizers": 2, "rotation_trick": False}
    alone, rank = (LibraryQuantizer("ResidualVQ", K, D, **options) for _ in range(2))
    rank.load_state_dict(alone.state_dict())
    z = torch.randn(2, D, 6, 6)
    alone(torch.cat([z, z]))
    monkeypatch.setattr(zoo, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    rank(z)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(rank.state_dict()[name], value, msg=name)
