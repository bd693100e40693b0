"""Laws of the loopy quantizer and its codebook."""

import copy
import math

import pytest
import torch

from taming.modules.vqvae.codebook import Codebook
from taming.modules.vqvae.quantize import LoopyVectorQuantizer, VectorQuantizer2
from taming.modules.vqvae.transforms import Residual
from taming.util import NonFiniteError

K, D, T = 16, 4, 5
TRANSFORMS = {
    "residual": None,
    "attract": {"target": "taming.modules.vqvae.transforms.Attract", "params": {"step": 0.4}},
    "attract-depth": {
        "target": "taming.modules.vqvae.transforms.Attract",
        "params": {"step": 0.4, "depth_embedding": (T, D)},
    },
    "residual-beam": {
        "target": "taming.modules.vqvae.transforms.Residual",
        "params": {"max_loops": T, "beam": 3},
    },
    "linear": {
        "target": "taming.modules.vqvae.transforms.LinearResidual",
        "params": {"max_loops": T, "e_dim": D},
    },
    "residual-depth": {
        "target": "taming.modules.vqvae.transforms.Residual",
        "params": {"max_loops": T, "depth_embedding": (T, D)},
    },
}
every_transform = pytest.mark.parametrize("transform", list(TRANSFORMS))


def loopy(transform: str = "residual", threshold: float = 0.8, **kwargs) -> LoopyVectorQuantizer:
    """A small quantizer in eval mode with a random codebook (and scales, and depth vectors)."""
    quantizer = LoopyVectorQuantizer(
        K, D, 0.25, threshold, T, TRANSFORMS[transform], start_batches=0, **kwargs
    ).eval()
    with torch.no_grad():
        quantizer.embedding.weight.normal_()
        for name, tensor in quantizer.transform.state_dict().items():
            if name == "scales":
                tensor[1:].uniform_(0.2, 0.8)
            elif name == "maps":
                tensor[1:] += 0.5 * torch.randn(T - 1, D, D)
            elif name == "depth":
                tensor.normal_()
    return quantizer


@every_transform
def test_infinite_threshold_is_vector_quantizer_2(transform: str) -> None:
    quantizer = loopy(transform.removesuffix("-depth"), math.inf)
    plain = VectorQuantizer2(K, D, 0.25, legacy=False)
    with torch.no_grad():
        plain.embedding.weight.copy_(quantizer.embedding.weight)
    z = torch.randn(2, D, 3, 4)
    loopy_out, plain_out = quantizer(z), plain(z)
    assert torch.equal(loopy_out.info.indices[..., 0].flatten(), plain_out.info.indices)
    assert (loopy_out.info.indices[..., 1:] == -1).all()
    assert torch.equal(loopy_out.z_q, plain_out.z_q)
    torch.testing.assert_close(loopy_out.loss, plain_out.loss)


@every_transform
@pytest.mark.parametrize("rate_weight", [0.0, 0.5])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_loss_without_gradient_is_the_loss(transform, ema_decay, rate_weight) -> None:
    weight = {"rate_weight": rate_weight, "rate_range": (0.01, 0.1)} if rate_weight else {}
    if rate_weight and transform.startswith("attract"):
        pytest.skip("has no rate")
    quantizer, z = loopy(transform, ema_decay=ema_decay, **weight), torch.randn(2, D, 5, 4)
    graph = quantizer(z)
    with torch.no_grad():
        plain = quantizer(z)
    torch.testing.assert_close(plain.loss, graph.loss.detach())
    assert torch.equal(plain.z_q, graph.z_q) and plain.info.perplexity == graph.info.perplexity


def test_zero_threshold_is_fixed_depth_residual_quantization() -> None:
    rvq = pytest.importorskip("vector_quantize_pytorch").ResidualVQ
    quantizer = loopy(threshold=0.0)
    quantizer.transform.scales.fill_(1.0)
    peer = rvq(dim=D, codebook_size=K, num_quantizers=T, shared_codebook=True).eval()
    with torch.no_grad():
        for layer in peer.layers:
            layer._codebook.embed.copy_(quantizer.embedding.weight[None])
            layer._codebook.initted.fill_(True)
    z = torch.randn(30, D)
    z_q, codes, _ = peer(z[None])
    out = quantizer(z)
    assert torch.equal(out.info.indices, codes[0])
    torch.testing.assert_close(out.z_q, z_q[0])


@every_transform
@pytest.mark.parametrize("shape", [(3, D, 4, 5), (17, D)])
def test_codes_decode_exactly_and_the_input_stays(transform: str, shape: tuple) -> None:
    quantizer, z = loopy(transform), torch.randn(shape)
    kept = z.clone()
    out = quantizer(z)
    assert torch.equal(z, kept)
    assert torch.equal(quantizer.get_codebook_entry(out.info.indices), out.z_q)
    assert out.info.indices.shape == (*z.shape[:1], *z.shape[2:], T)
    assert out.info.indices.dtype == torch.int64
    lengths = (out.info.indices >= 0).sum(-1)
    assert torch.equal(lengths, out.info.encodings.lengths)
    assert lengths.unique().numel() > 1


@every_transform
def test_gradient_goes_straight_through(transform: str) -> None:
    quantizer, z = loopy(transform), torch.randn(2, D, 3, 3, requires_grad=True)
    weight = torch.randn(2, D, 3, 3)
    (quantizer(z).z_q * weight).sum().backward()
    assert torch.equal(z.grad, weight)


@pytest.mark.parametrize("transform", ["attract-depth", "residual-depth"])
def test_the_decoder_s_gradient_reaches_the_depth_embedding_but_no_code(transform: str) -> None:
    quantizer = loopy(transform)
    quantizer(torch.randn(2, D, 3, 3)).z_q.sum().backward()
    assert quantizer.transform.depth.grad.abs().sum() > 0
    assert quantizer.embedding.weight.grad is None


@every_transform
def test_an_image_is_quantized_as_if_it_were_alone(transform: str) -> None:
    quantizer, z = loopy(transform), torch.randn(4, D, 3, 3)
    whole = quantizer(z).info.indices
    assert torch.equal(whole, torch.cat([quantizer(image[None]).info.indices for image in z]))
    thresholds = torch.tensor([0.0, 0.5, 1.0, math.inf])
    each = quantizer(z, thresholds).info.indices
    assert torch.equal(each[3:], quantizer(z[3:], thresholds[3]).info.indices)


@every_transform
def test_a_lower_threshold_gives_no_fewer_codes(transform: str) -> None:
    quantizer, image = loopy(transform), torch.randn(1, D, 3, 3)
    thresholds = torch.tensor([0.0, 0.5, 1.0, math.inf])
    codes = (quantizer(image.expand(4, -1, -1, -1), thresholds).info.indices >= 0).sum((1, 2, 3))
    assert (codes.diff() <= 0).all() and codes[0] > codes[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_transform
def test_torch_s_default_dtype_changes_nothing(transform: str, dtype: torch.dtype) -> None:
    quantizer, z = loopy(transform, None, target_length=2.3), torch.randn(2, D, 4, 4)
    rates = [{}, {"threshold": 0.7}, {"max_codes": 33}]
    if not quantizer.transform.dummies:
        rates += [{"rate": 0.03}, {"target_bits": 150.3}]

    def results() -> list[torch.Tensor]:
        own = copy.deepcopy(quantizer)
        codes = [own(z, **rate).info.indices for rate in rates]
        own.length_range = (1.0, 3.0)
        torch.manual_seed(1)
        return [*codes, own.train()(z).info.indices, *own.state_dict().values()]

    wanted = results()
    torch.set_default_dtype(dtype)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, wanted))


def test_sites_that_ran_into_the_last_turn_are_told() -> None:
    quantizer = loopy(threshold=0.3)
    z = torch.randn(2, D, 6, 6) * 3
    trace = quantizer(z).info.encodings
    assert (trace.lengths[~trace.within] == T).all()
    assert torch.equal(trace.within, trace.distances <= 0.3)
    assert 0 < trace.within.sum() < trace.within.numel()


@pytest.mark.parametrize("codes", [[-1] * T, [K] * T, [0, -1, 0, -1, -1], [K + 1, -1, -1, -1, -1]])
@every_transform
def test_codes_the_loop_never_writes_are_refused(transform: str, codes: list) -> None:
    with pytest.raises(ValueError, match="are not of the form"):
        loopy(transform).get_codebook_entry(torch.tensor([codes]))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@every_transform
def test_training_fits_clusters_and_uses_every_code(transform: str, ema_decay) -> None:
    centers = torch.randn(4, D) * 5
    quantizer = LoopyVectorQuantizer(
        K, D, 0.25, 1.0, T, TRANSFORMS[transform], ema_decay=ema_decay, start_batches=2
    ).train()
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
    for _ in range(60):
        z = centers[torch.randint(4, (64,))] + 0.1 * torch.randn(64, D)
        out = quantizer(z)
        optimizer.zero_grad()
        if out.loss.requires_grad:
            out.loss.backward()
            optimizer.step()
    out = quantizer.eval()(centers)
    assert (out.z_q - centers).norm(dim=1).max() < 0.5
    assert (quantizer.embedding.usage > 0).all()


@pytest.mark.reported(20)
def test_dead_codes_are_revived_from_what_is_searched() -> None:
    quantizer = LoopyVectorQuantizer(K, D, 0.25, math.inf, 2, start_batches=0).train()
    with torch.no_grad():
        quantizer.embedding.weight.copy_(100 + torch.randn(K, D))
    z = torch.randn(256, D)
    for _ in range(400):
        quantizer(z)
    assert quantizer.eval()(z).info.indices[:, 0].unique().numel() >= 0.9 * K


def test_a_revived_code_counts_as_used() -> None:
    codebook = Codebook(4, 1, revive_below=0.5)
    codebook.usage[2] = 0
    targets, everyone = torch.arange(10.0, 14.0)[:, None], torch.tensor([0, 1, 3, 3])
    codebook.learn(targets, everyone, torch.ones(4))
    assert codebook.weight[2] in targets and codebook.usage[2] == 1 / 4
    revived = codebook.weight[2].clone()
    codebook.learn(targets + 10, everyone, torch.ones(4))
    assert torch.equal(codebook.weight[2], revived)


def test_a_later_start_begins_from_the_present_codes() -> None:
    codebook = Codebook(K, 1, ema_decay=0.9)
    places = 10 * torch.randperm(K).float()[:, None]
    codebook.weight.copy_(places)
    codebook.initialize((places + torch.tensor([[-1.0, 1.0]])).reshape(-1, 1), fresh=False)
    assert torch.equal(codebook.weight, places)


@pytest.mark.parametrize(("vectors", "taken"), [(5, 5), (40, 40), (16 * K + 7, 16 * K)])
def test_a_start_takes_each_vector_at_most_once(
    monkeypatch: pytest.MonkeyPatch, vectors: int, taken: int
) -> None:
    def keep(pool: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        assert len(pool.unique()) == len(pool) == taken and len(centers) == K
        return centers

    monkeypatch.setattr("taming.modules.vqvae.codebook.k_means", keep)
    Codebook(K, 1).initialize(torch.arange(float(vectors))[:, None], fresh=True)


def test_the_first_batch_sets_the_threshold() -> None:
    quantizer = LoopyVectorQuantizer(K, D, max_loops=T, target_length=T, start_batches=1).train()
    z = 100 * torch.randn(500, D)
    quantizer(z)
    nearest = torch.cdist(z, quantizer.embedding.weight).amin(dim=1).mean()
    assert quantizer.threshold == pytest.approx(nearest.item(), rel=0.06)  # steered once since


def test_the_first_batch_sets_the_sizes_of_all_turns() -> None:
    quantizer = LoopyVectorQuantizer(K, D, threshold=0.0, max_loops=T, start_batches=1).train()
    z = torch.randn(500, D)
    quantizer(z)
    kept = quantizer.transform.scales.clone()
    quantizer(z)  # finds the same sizes
    assert (kept[1:] < 0.9).all()
    torch.testing.assert_close(quantizer.transform.scales, kept, rtol=1e-5, atol=0)


def test_a_batch_moves_the_threshold_by_5_percent_at_most_and_not_if_it_has_its_own() -> None:
    quantizer = loopy(threshold=None, target_length=1.0).train()
    quantizer.threshold.fill_(0.01)  # all turns everywhere: T - 1 too many
    z = torch.randn(200, D)
    quantizer(z, threshold=0.3)
    assert quantizer.threshold == torch.tensor(0.01)
    quantizer.latent_std.fill_(1.0)
    quantizer(z)
    assert quantizer.threshold.item() == pytest.approx(0.01 * math.exp(0.05), rel=1e-4)


def test_codes_that_nothing_finds_stay_where_they_are() -> None:
    codebook = Codebook(2, 1, ema_decay=0.8, revive_below=0.0)
    codebook.initialize(torch.tensor([[-5.0], [5.0]]), fresh=True)
    weight = codebook.weight.clone()
    found = weight.argmax(dim=0).expand(4)
    for _ in range(600):  # until votes for the other one are too few to divide by
        codebook.learn(torch.full((4, 1), 5.0), found, torch.ones(4))
    torch.testing.assert_close(codebook.weight, weight)


def test_a_codebook_of_few_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="codebook is torch.bfloat16.*train with --precision"):
        LoopyVectorQuantizer(K, D, threshold=1.0).bfloat16().train()(torch.randn(64, D))


def test_target_length_steers_the_threshold_and_is_kept() -> None:
    quantizer = LoopyVectorQuantizer(K, D, max_loops=T, target_length=2.5).train()
    for _ in range(200):
        out = quantizer(torch.randn(200, D))
    assert abs(out.info.encodings.lengths.float().mean() - 2.5) < 0.3
    other = LoopyVectorQuantizer(K, D, max_loops=T, target_length=2.5)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.threshold, quantizer.threshold)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("transform", ["residual", "linear"])
def test_a_steered_threshold_leaves_zero(transform: str, value: float) -> None:
    transform_config = TRANSFORMS[transform]
    quantizer = LoopyVectorQuantizer(
        K, D, max_loops=T, target_length=2.5, transform_config=transform_config
    ).train()
    quantizer(torch.full((200, D), value))  # all on one code
    for _ in range(300):
        out = quantizer(torch.randn(200, D))
    assert abs(out.info.encodings.lengths.float().mean() - 2.5) < 0.3


@every_transform
def test_codes_are_never_more_than_wanted_and_as_many_as_can_be(transform: str) -> None:
    quantizer, z = loopy(transform), torch.randn(6, D, 4, 4)
    wanted = torch.tensor([16, 17, 30, 50, 16 * T, 999])
    trace = quantizer(z, max_codes=wanted).info.encodings
    codes = trace.lengths.sum((1, 2))
    assert (codes <= wanted).all()
    assert codes[-1] == codes[-2] and codes[0] == 16
    # A site's distance may fall below several thresholds at once, so one turn more of one site may
    # be out of reach; but no more than that is lost.
    assert (codes[1:4] >= wanted[1:4] - T + 1).all()
    one_by_one = [quantizer(z[i : i + 1], max_codes=int(wanted[i])) for i in range(6)]
    assert torch.equal(trace.lengths, torch.cat([o.info.encodings.lengths for o in one_by_one]))
    rows = z[2].flatten(1).T  # (N, D), which are one image
    for found in (
        quantizer(rows, max_codes=30).info.indices,
        quantizer.walk(rows, max_codes=30).codes,
    ):
        assert torch.equal(found, one_by_one[2].info.indices.flatten(0, 2))


@every_transform
def test_a_budget_is_met_by_a_threshold(transform: str) -> None:
    quantizer, z = loopy(transform), torch.randn(1, D, 4, 4)
    out = quantizer(z, max_codes=40)
    trace = out.info.encodings
    tau = trace.distances[trace.within].max()
    assert torch.equal(quantizer(z, threshold=tau).info.indices, out.info.indices)
    assert (trace.lengths[~trace.within] == T).all()


def test_fewer_codes_than_sites_are_refused() -> None:
    with pytest.raises(ValueError, match="16 sites.* at least 16 codes, got 15"):
        loopy()(torch.randn(2, D, 4, 4), max_codes=15)
    with pytest.raises(ValueError, match="give one rate, got threshold and max_codes"):
        loopy()(torch.randn(2, D, 4, 4), threshold=1.0, max_codes=20)
    with pytest.raises(ValueError, match="max_codes must be a whole number"):
        loopy()(torch.randn(2, D, 4, 4), max_codes=20.5)
    for name, values in (("threshold", torch.ones(3)), ("max_codes", torch.full((3,), 20))):
        with pytest.raises(ValueError, match=rf"{name} must be one number or one for each of 2"):
            loopy()(torch.randn(2, D, 4, 4), **{name: values})


def test_lengths_are_drawn_per_image_in_training_only() -> None:
    plain, drawn = loopy(threshold=0.8), loopy(threshold=0.8, length_range=(1.5, 3.0))
    drawn.load_state_dict(plain.state_dict())
    z = torch.randn(64, D, 4, 4)
    assert torch.equal(plain(z).info.indices, drawn(z).info.indices)
    per_image = drawn.train()(z).info.encodings.lengths.float().mean((1, 2))
    assert per_image.min() < 1.7 and 2.7 < per_image.max() <= 3.0
    assert per_image.std() > plain.train()(z).info.encodings.lengths.float().mean((1, 2)).std()


def test_the_threshold_is_steered_while_lengths_are_drawn() -> None:
    quantizer = LoopyVectorQuantizer(
        K, D, max_loops=T, target_length=2.5, length_range=(1.0, float(T))
    ).train()
    for _ in range(200):
        quantizer(torch.randn(20, D, 3, 3))
    lengths = quantizer.eval()(torch.randn(20, D, 3, 3)).info.encodings.lengths
    assert abs(lengths.float().mean() - 2.5) < 0.4


def test_latent_std_is_the_distance_of_latents_from_their_mean() -> None:
    quantizer = loopy().train()
    for _ in range(3):
        quantizer(5.0 + 2.0 * torch.randn(4000, D))
    torch.testing.assert_close(quantizer.latent_std, torch.tensor(4.0), rtol=0.05, atol=0)


def test_training_is_repeatable_from_its_state() -> None:
    batches = [torch.randn(64, D) for _ in range(6)]

    def run(stop: int | None) -> LoopyVectorQuantizer:
        torch.manual_seed(1)
        quantizer = LoopyVectorQuantizer(K, D, 0.25, 0.5, T, ema_decay=0.9, revive_below=0.5)
        for step, batch in enumerate(batches):
            if step == stop:
                state = quantizer.state_dict()
                torch.manual_seed(99)
                quantizer = LoopyVectorQuantizer(
                    K, D, 0.25, 0.5, T, ema_decay=0.9, revive_below=0.5
                )
                quantizer.load_state_dict(state)
            quantizer(batch)
        return quantizer

    for key, value in run(None).state_dict().items():
        assert torch.equal(value, run(3).state_dict()[key]), key


@pytest.mark.reported(13)
@every_transform
def test_quantizing_is_float32_under_autocast(transform: str) -> None:
    quantizer, z = loopy(transform), torch.randn(2, D, 3, 3, dtype=torch.bfloat16)
    expected = quantizer(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(z)
        entry = quantizer.get_codebook_entry(out.info.indices)
    assert out.z_q.dtype == torch.float32
    assert torch.equal(out.info.indices, expected.info.indices)
    assert torch.equal(out.z_q, expected.z_q)
    assert torch.equal(entry, out.z_q)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"n_e": 0}, "n_e and e_dim must be at least 1"),
        ({"max_loops": 0}, "max_loops must be at least 1, got 0"),
        ({"threshold": -1.0}, "threshold must be a distance of at least 0, got -1.0"),
        ({"threshold": float("nan")}, "threshold must be"),
        (
            {"threshold": None},
            "exactly one of threshold, target_length, rate, .*set the others to null",
        ),
        ({"threshold": None, "target_length": 9}, r"target_length must be in \[1, 4\], got 9"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        (
            {"length_range": (0.5, 2)},
            r"length_range must be two bounds in \[1, max_loops = 4\], got \[0.5, 2\]",
        ),
        ({"length_range": (3, 2)}, "length_range must be"),
        ({"length_range": (1, 2, 3)}, "length_range must be two bounds"),
        (
            {
                "transform_config": {
                    "target": "taming.modules.vqvae.transforms.Residual",
                    "params": {"max_loops": 3},
                }
            },
            "Residual: max_loops is 3.*has 4",
        ),
        (
            {"max_loops": 2, "transform_config": TRANSFORMS["attract-depth"]},
            r"Attract: depth_embedding is \(5, 4\).*has \(2, 4\)",
        ),
        ({"revive_below": -1.0}, "revive_below must be in"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopyVectorQuantizer(**{"n_e": K, "e_dim": D, "threshold": 1.0, **kwargs})


@every_transform
def test_sizes_of_a_transform_need_not_be_stated(transform: str) -> None:
    stated = dict(TRANSFORMS[transform] or {"target": "taming.modules.vqvae.transforms.Residual"})
    params = stated.get("params", {})
    decided = {k: v for k, v in params.items() if k in ("step", "beam")}
    decided["depth_embedding"] = "depth_embedding" in params
    quantizers = [
        LoopyVectorQuantizer(K, D, threshold=1.0, max_loops=T, transform_config=config)
        for config in (stated, {**stated, "params": decided})
    ]
    shapes = [{k: v.shape for k, v in q.state_dict().items()} for q in quantizers]
    assert shapes[0] == shapes[1]
    assert quantizers[0].identity() == quantizers[1].identity()


def test_identity_has_what_decides_the_codes_and_nothing_else() -> None:
    attract = {**TRANSFORMS["attract"], "params": {"step": 0.3}}
    same = loopy("attract", length_range=(1.0, 2.0), ema_decay=0.9).train()
    assert loopy("attract").identity() == same.identity()
    others = [
        loopy("attract-depth"),  # its parameter is part of the state
        loopy("residual"),
        loopy("residual-beam"),
        LoopyVectorQuantizer(K, D, threshold=0.8, max_loops=T, transform_config=attract),
        VectorQuantizer2(K, D, 0.25),
        VectorQuantizer2(K, D + 1, 0.25),
    ]
    identities = [str(quantizer.identity()) for quantizer in others]
    assert identities[0] == str(same.identity())
    assert len(set(identities)) == len(identities)


class Shifted(Residual):
    """A transform of a stranger, whose plain attributes decide the codes."""

    def __init__(self, max_loops: int, shift: tuple[float, ...], beam: int = 1) -> None:
        super().__init__(max_loops, beam=beam)
        self.shift, self._cache, self.table = shift, 3, torch.zeros(2)


def test_a_new_transform_is_identified_by_all_its_plain_attributes() -> None:
    assert Shifted(T, (0.5, 1.0)).identity() == {
        **{"type": "Shifted", "max_loops": T, "beam": 1, "shift": (0.5, 1.0)}
    }


def test_variable_rate_and_traces_are_answered_by_the_quantizer() -> None:
    plain, quantizer, z = VectorQuantizer2(K, D, 0.25), loopy(), torch.randn(3, D, 4, 4)
    assert not plain.variable_rate and plain.traces(plain(z)) == {}
    with pytest.raises(ValueError, match="VectorQuantizer2 .*fixed rate"):
        plain.reach(z, lambda codes: codes[:, 0, 0, 0], torch.zeros(3))
    out = quantizer(z)
    assert quantizer.variable_rate and quantizer.traces(out) == {"": out.info.encodings}
    most = quantizer(z, max_codes=40).info.encodings.lengths.sum((1, 2))
    found = quantizer.reach(z, lambda codes: (codes >= 0).sum((1, 2, 3)), most)
    assert torch.equal(found.info.encodings.lengths.sum((1, 2)), most)


def test_metrics_count_sites_that_never_came_within_the_threshold() -> None:
    quantizer, z = loopy(threshold=0.3), torch.randn(2, D, 6, 6) * 3
    for each in (quantizer, VectorQuantizer2(K, D, 0.25)):
        metrics, out = each.codebook_metrics(), each(z)
        metrics.update(z, out)
        share = metrics.compute()["never_within_threshold"]
        traces = each.traces(out).values()
        assert share == sum((~trace.within).float().mean() for trace in traces)
    assert share == 0


def test_codes_of_another_number_of_turns_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"expected {T} codes for each site, got .*\(2, 4, 4\)"):
        loopy().get_codebook_entry(torch.zeros(2, 4, 4, dtype=torch.int64), (2, 4, 4, D))
    with pytest.raises(ValueError, match=rf"\(B, h, w, T\) or \(N, T\), got .*\(2, 4, {T}\)"):
        loopy().get_codebook_entry(torch.zeros(2, 4, T, dtype=torch.int64))


def test_latents_of_the_wrong_shape_or_value_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected latents \(B, 4, h, w\).*got \(2, 3, 4, 4\)"):
        loopy()(torch.randn(2, 3, 4, 4))
    with pytest.raises(NonFiniteError, match="not finite"):
        loopy()(torch.full((2, D, 2, 2), float("nan")))


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_a_threshold_that_is_no_distance_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be a distance of at least 0, got"):
        loopy()(torch.randn(1, D, 2, 2), threshold=threshold)


def test_the_threshold_is_tracked_in_units_of_the_latents_spread() -> None:
    quantizer = loopy(threshold=0.8)
    quantizer.latent_std.fill_(1.6)
    assert quantizer.tracked_scalars() == {"relative_threshold": torch.tensor(0.5)}
    assert loopy(threshold=math.inf).tracked_scalars() == {}  # which JSON could not hold


def test_a_fixed_threshold_outlives_a_checkpoint_and_a_steered_one_comes_with_it() -> None:
    trained = LoopyVectorQuantizer(K, D, threshold=0.8, max_loops=T).state_dict()
    fixed = LoopyVectorQuantizer(K, D, threshold=0.3, max_loops=T)
    steered = LoopyVectorQuantizer(K, D, target_length=2.0, max_loops=T)
    for quantizer in (fixed, steered):
        assert quantizer.load_state_dict(trained).missing_keys == []
    assert fixed.threshold == torch.tensor(0.3) and steered.threshold == torch.tensor(0.8)
    assert trained["threshold"] == torch.tensor(0.8)
