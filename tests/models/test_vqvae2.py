"""VQ-VAE-2: codes at several scales decode, depend on those above, and train."""

from typing import Any

import pytest
import torch
from support.models import (
    BETWEEN,
    DDCONFIG,
    LEVELS,
    PLAIN,
    QUANTIZERS,
    TURNS,
    every_pair,
    hierarchy_config,
    images,
    level_config,
    pictures,
    spread_codes,
    trainer,
    vqvae2_config,
)

from taming.models.vqvae2 import VQVAE2, Level
from taming.modules.vqvae.hierarchy import Hierarchy


def model(*kinds: str) -> VQVAE2:
    return spread_codes(VQVAE2(**vqvae2_config(*kinds)["params"]))


def test_a_levels_condition_holds_all_codes_above_and_marks_absent_ones() -> None:
    config = vqvae2_config("loopy", "ema", "flat")
    level = Level(config, "bottom")
    top, middle = torch.tensor([[[[0, 3, -1], [5, -1, -1]]]]), torch.tensor([[[[7], [0]]]])
    assert level.condition_tokens([top, middle]).tolist() == [[0, 3, 16, 5, 16, 16, 7, 0]]
    assert level.condition_vocab_size == 17


@pytest.mark.parametrize(
    "kinds", [("ema", "flat"), ("loopy", "loopy"), ("ema", "loopy", "flat")], ids="-".join
)
@torch.no_grad()
def test_codes_of_all_levels_decode_to_the_reconstruction(kinds: tuple[str, ...]) -> None:
    tokenizer, x = model(*kinds).eval(), pictures(2, 16, 32)
    quant, loss, (perplexity, levels, codes) = tokenizer.encode(x)
    grids = [(2, 4), (4, 8), (8, 16)][-len(kinds) :]
    assert [tuple(c.shape) for c in codes] == [
        (2, *grid, TURNS[kind]) for grid, kind in zip(grids, kinds, strict=True)
    ]
    assert list(levels) == LEVELS[len(kinds)] and len(perplexity) == len(kinds)
    assert quant.shape == (2, 4 * len(kinds), 8, 16)
    assert torch.equal(tokenizer.quantize.get_codebook_entry(codes), quant)
    assert all(map(torch.equal, tokenizer.encode_to_codes(x), codes))
    assert torch.equal(tokenizer.decode_code(codes), tokenizer.decode(quant))
    torch.testing.assert_close(loss, sum(level.quantized.loss for level in levels.values()))
    assert all(len(c.unique()) > 2 for c in codes)  # codes that vary


@torch.no_grad()
def test_a_level_depends_on_the_levels_above_only() -> None:
    tokenizer, x = model("ema", "loopy", "flat").eval(), pictures(2)
    before = tokenizer.encode(x).info.encodings
    for number, moved in enumerate(before):
        quantizer = tokenizer.quantize.levels[number]
        quantizer.embedding.weight.neg_()
        after = tokenizer.encode(x).info.encodings
        quantizer.embedding.weight.neg_()
        changed = [not torch.equal(before[name].z, after[name].z) for name in before]
        assert changed == [below > number for below in range(3)], moved


@torch.no_grad()
def test_codes_of_upper_levels_decode_as_if_the_lower_were_zero() -> None:
    tokenizer, x = model("ema", "flat").eval(), pictures(2)
    quant, _, (_, _, codes) = tokenizer.encode(x)
    quant[:, 4:] = 0
    torch.testing.assert_close(tokenizer.decode_code(codes[:1]), tokenizer.decode(quant))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@torch.no_grad()
def test_level_dropout_leaves_the_upper_levels(share: float) -> None:
    """Zero the lower levels as `pad_stack` does, for a share of the training images only."""
    config = hierarchy_config("flat", "flat", "flat")["params"]
    hierarchy = Hierarchy(**config, level_dropout=share)
    z = torch.randn(200, 12, 8, 8)
    whole = hierarchy.eval()(z).z_q
    codes = hierarchy(z).info.indices
    upper = [hierarchy.pad_stack(hierarchy.get_codebook_entry(codes[:n])) for n in (1, 2)]
    dropped = hierarchy.train()(z).z_q
    alike = torch.stack([(dropped == other).flatten(1).all(1) for other in (*upper, whole)])
    assert (alike.sum(0) == 1).all()
    top, middle, every = (alike.float().mean(1) * 100).tolist()
    assert every == pytest.approx(100 * (1 - share), abs=10 * (0 < share < 1))
    assert top == pytest.approx(middle, abs=20 * (share > 0))
    with pytest.raises(ValueError, match=r"level_dropout must be in \[0, 1\], got 2"):
        Hierarchy(**config, level_dropout=2)


@every_pair
def test_training_changes_every_part_and_counts_every_level(
    kinds: tuple[str, ...], tmp_path
) -> None:
    tokenizer = model(*kinds).train()
    before = {name: value.clone() for name, value in tokenizer.named_parameters()}
    tokenizer.learning_rate = 1e-3
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(tokenizer, images(8, 4), images(4, 4))
    assert [n for n, value in tokenizer.named_parameters() if torch.equal(value, before[n])] == []
    logged = fit.callback_metrics
    for level, kind in zip(LEVELS[2], kinds, strict=True):
        assert 0 < logged[f"val/{level}_usage"] <= 1
        assert 1 <= logged[f"val/{level}_mean_length"] <= TURNS[kind]
    assert logged["val/top_codes_per_image"] >= 16 and logged["val/bottom_codes_per_image"] >= 64
    shown = tokenizer.eval().log_images(next(iter(images(3, 3))))
    lengths = {f"{level}_lengths" for level in LEVELS[2] if kinds[0] == "loopy"}
    assert set(shown) == {"inputs", "reconstructions", "top_only"} | lengths
    assert all(picture.shape == (3, 3, 16, 16) for picture in shown.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Hierarchy({"top": QUANTIZERS["ema"]}, BETWEEN), "two levels .*'top'"),
        (lambda: model("ema", "flat").encode(pictures(1, 16, 18)), "8x9 does not fit 'top'"),
        (lambda: model("ema", "flat").decode_code(()), "got codes of 0 levels"),
        (
            lambda: model("ema", "flat").decode_code(
                [torch.zeros(1, 4, n, 1).long() for n in (4, 4)]
            ),
            r"codes of 'bottom' are \(1, 4, 4, 1\), not \(1, 8, 8, T\)",
        ),
        (lambda: model("ema", "flat").quantize.sequence, "are not one sequence"),
        (
            lambda: VQVAE2(DDCONFIG, PLAIN, 16, 4, QUANTIZERS["flat"]),
            "VQVAE2 .*Hierarchy.* VectorQuantizer2",
        ),
        (
            lambda: VQVAE2(**{**vqvae2_config("ema", "flat")["params"], "n_embed": 99}),
            "n_embed is 99 .* top, bottom have 32 codes",
        ),
        (
            lambda: VQVAE2(**vqvae2_config("ema", "flat")["params"], quantize_start=9),
            "Hierarchy .*quantize_start",
        ),
    ],
    ids=[
        *("one level", "odd grid", "no codes", "other grid", "sequence", "no hierarchy"),
        *("other sizes", "continuous"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_hierarchy_answers_for_its_levels() -> None:
    hierarchy = model("loopy", "flat", "loopy").quantize.eval()
    out = hierarchy(torch.randn(2, 12, 8, 8))
    traces = hierarchy.traces(out)
    assert list(traces) == ["top", "bottom"] and not hierarchy.variable_rate
    assert traces["bottom"] is out.info.encodings["bottom"].quantized.info.encodings
    before = str(hierarchy.identity())
    hierarchy.levels[2].transform.beam = 2
    assert before != str(hierarchy.identity())
    metrics = hierarchy.codebook_metrics()
    metrics.update(None, out)
    never = {name: float((~trace.within).float().mean()) for name, trace in traces.items()}
    for name in LEVELS[3]:
        share = metrics.compute()[f"{name}_never_within_threshold"]
        assert share == pytest.approx(never.get(name, 0.0))


def test_thresholds_of_all_levels_are_tracked() -> None:
    tracked = model("loopy", "flat", "loopy").quantize.tracked_scalars()
    assert set(tracked) == {"top_relative_threshold", "bottom_relative_threshold"}


@every_pair
@torch.no_grad()
def test_a_level_is_a_tokenizer_of_its_own_codes(kinds: tuple[str, ...]) -> None:
    x = pictures(2)
    for number, name in enumerate(LEVELS[2]):
        level = Level(**level_config(name, *kinds)["params"]).eval()
        tokenizer = spread_codes(level.model)
        quant, _, (_, _, codes) = tokenizer.encode(x)
        assert (level.factor, level.grid) == (((4, (4, 4)), (2, (8, 8)))[number])
        stack, _, (_, _, own) = level.encode(x)
        assert torch.equal(level.encode_to_codes(x), own)
        assert torch.equal(own.reshape(codes[number].shape), codes[number])
        assert torch.equal(stack, tokenizer.quantize.get_codebook_entry(codes[: number + 1]))
        torch.testing.assert_close(level.decode(stack), tokenizer.decode_code(codes[: number + 1]))
        if number == 0:
            torch.testing.assert_close(level.decode_code(own), tokenizer.decode_code([own]))
        else:
            above, tokens = level.condition_of(level.codes_of(x)[:-1])
            torch.testing.assert_close(level.decode_under(own, above), tokenizer.decode(quant))
            assert tokens.shape == (2, 16 * TURNS[kinds[0]]) == (2, level.condition_length)
            assert tokens.min() >= 0 and tokens.max() < level.condition_vocab_size
            with pytest.raises(ValueError, match="'bottom' .*without"):
                level.decode_code(own)


def test_models_without_such_a_level_are_refused() -> None:
    kinds = ("loopy", "flat")
    plain = {"target": "taming.models.vqgan.VQModel", "params": vqvae2_config(*kinds)["params"]}
    with pytest.raises(ValueError, match="VQVAE2, .*VQModel"):
        Level(plain, "top")
    with pytest.raises(ValueError, match="'middle'.*top, bottom"):
        Level(vqvae2_config(*kinds), "middle")


def test_the_fingerprint_is_of_what_decides_the_codes_of_all_levels() -> None:
    tokenizer = model("loopy", "loopy")
    quantize, found = tokenizer.quantize, tokenizer.fingerprint()
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.add_(1)
        quantize.levels[1].entropy.codes.fill_(1)
        assert tokenizer.fingerprint() == found
        for part in (quantize.merges[0], quantize.decoders[0].conv_out, quantize.levels[0]):
            next(part.parameters()).add_(1)
            assert tokenizer.fingerprint() != found
            found = tokenizer.fingerprint()


def test_the_fingerprint_of_a_level_is_of_what_decides_codes_too() -> None:
    level = Level(vqvae2_config("loopy", "flat"), "top")
    found = level.fingerprint()
    with torch.no_grad():
        level.model.decoder.conv_out.weight.add_(1)
        assert level.fingerprint() == found
        level.model.encoder.conv_out.weight.add_(1)
    assert level.fingerprint() != found


def test_the_fingerprint_is_of_what_no_weight_shows_too() -> None:
    tokenizer = model("loopy", "loopy")

    def again(between: int = 32, compile: bool = False, **sizes: Any) -> VQVAE2:
        params = vqvae2_config("loopy", "loopy")["params"]
        hierarchy = hierarchy_config("loopy", "loopy")
        hierarchy["params"]["ddconfig"] = {**BETWEEN, "num_groups": between}
        params |= {"ddconfig": {**DDCONFIG, **sizes}, "quantizer_config": hierarchy}
        other = VQVAE2(**params, compile=compile)
        other.load_state_dict(tokenizer.state_dict())
        return other

    alike = again(compile=True, dropout=0.5, gradient_checkpointing=True)
    assert alike.fingerprint() == tokenizer.fingerprint()
    others = [again(num_groups=8), again(between=8)]
    for name in ("top", "bottom"):
        others.append(Level(vqvae2_config("loopy", "loopy"), name))
        others[-1].model.load_state_dict(tokenizer.state_dict())
    assert len({other.fingerprint() for other in [tokenizer, *others]}) == 5
