"""Images beyond the trained grid are drawn as the original drew them, others in one go."""

from itertools import pairwise, product

import pytest
import torch
from models.test_cond_transformer import prior, tokenizer_config
from support.models import DDCONFIG, GPT
from torch import Tensor

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.sampling import (
    SamplingParams,
    Window,
    condition_windows,
    decode_codes,
    empty_codes,
    encode_codes,
    numbers_of,
    paste,
    sample_images,
    trained_grid,
    upper_part,
    whole_condition,
    window_around,
    window_size,
    write_codes,
)
from taming.modules.transformer.generate import generators_of

GREEDY = SamplingParams(greedy=True)
SIDE = 4  # of the trained grid of `pair`


@pytest.fixture
def pair() -> Net2NetTransformer:
    """A prior on 4 x 4 sites, given an image of as many."""
    tokenizer = tokenizer_config("plain")
    tokenizer["params"]["ddconfig"] = {**DDCONFIG, "resolution": 2 * SIDE}
    gpt = {**GPT, "params": {**GPT["params"], "block_size": 2 * SIDE**2}}
    model = Net2NetTransformer(gpt, tokenizer, "__is_first_stage__", cond_stage_key="image").eval()
    with torch.no_grad():  # untrained, it would hardly look at what is before it
        model.first_stage_model.quantize.embedding.weight.copy_(torch.randn(16, 4) * 0.5)
        for parameter in model.transformer.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter))
    return model


def originals_window(i: int, rows: int, side: int) -> tuple[int, int]:
    """First row of the original's window for row i, and i's place in it."""
    if i <= side // 2:
        local = i
    elif rows - i < side // 2:
        local = side - (rows - i)
    else:
        local = side // 2
    return i - local, local


@pytest.mark.reported(25)
@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("more", [0, 1, 2, 7, 40])
def test_windows_are_the_originals(side: int, more: int) -> None:
    grid, size = (side + more, side + 2 * more), (side, side)
    for row, column in product(range(grid[0]), range(grid[1])):
        window = window_around(row, column, grid, size)
        top, local_row = originals_window(row, grid[0], side)
        left, local_column = originals_window(column, grid[1], side)
        assert window == (top, left, side, side)
        assert (row - window.top, column - window.left) == (local_row, local_column)


def originals_codes(model: Net2NetTransformer, condition: Tensor, codes: Tensor) -> Tensor:
    """Greedy codes (B, h, w), every site from the whole window before it, without a cache."""
    _, h, w = codes.shape
    for row, column in product(range(h), range(w)):
        top, i = originals_window(row, h, SIDE)
        left, j = originals_window(column, w, SIDE)
        patch = codes[:, top : top + SIDE, left : left + SIDE].flatten(1)
        seen = condition[:, top : top + SIDE, left : left + SIDE].flatten(1)
        logits, _ = model.transformer(torch.cat([seen, patch], dim=1)[:, :-1])
        logits = logits[:, -(SIDE**2) :].unflatten(1, (SIDE, SIDE))[:, i, j, :16]
        codes[:, row, column] = logits.argmax(dim=-1)
    return codes


@pytest.mark.parametrize("grid", [(4, 4), (5, 4), (4, 7), (6, 9)])
@pytest.mark.parametrize("longest", [None, 3])
@torch.no_grad()
def test_codes_are_the_originals(
    pair: Net2NetTransformer, grid: tuple[int, int], longest: int | None
) -> None:
    c = torch.rand(2, 3, 2 * grid[0], 2 * grid[1]) * 2 - 1
    _, c_tokens = pair.encode_to_c(c)
    expected = originals_codes(
        pair, c_tokens.reshape(2, *grid), torch.zeros(2, *grid, dtype=torch.int64)
    )
    codes = empty_codes(pair, 2, grid)
    condition = condition_windows(pair, c, grid)
    written = list(write_codes(pair, condition, codes, GREEDY, longest=longest))
    assert written[-1] == grid[0] * grid[1] and written == sorted(set(written))
    assert longest is None or max(b - a for a, b in pairwise([0, *written])) <= longest
    assert torch.equal(codes[..., 0], expected)
    assert expected.unique().numel() > 3  # it did look at what was before


@pytest.mark.parametrize("kind", ["plain", "residual", "attract"])
def test_an_image_of_the_trained_grid_is_drawn_in_one_go(kind: str) -> None:
    model, start = prior(kind).eval(), torch.zeros(3, 1, dtype=torch.int64)
    torch.manual_seed(1)
    tokens = model.sample(start[:, :0], start, None, 1.0, True, 5, grid=(8, 8))
    codes = empty_codes(model, 3, (8, 8))
    torch.manual_seed(1)
    drawing = SamplingParams(top_k=5)
    assert list(write_codes(model, whole_condition(start), codes, drawing)) == [64]
    assert torch.equal(codes, model.sequence.decode(tokens, (8, 8)))
    torch.testing.assert_close(
        decode_codes(model, codes), model.decode_to_img(tokens, (3, 4, 8, 8))
    )


@pytest.mark.parametrize("kind", ["plain", "residual", "attract"])
def test_known_sites_stay_and_the_rest_is_drawn(kind: str) -> None:
    model, grid = prior(kind).eval(), (10, 12)
    x = torch.rand(2, 3, 20, 24) * 2 - 1
    given = encode_codes(model, x)
    assert given.shape == (2, *grid, model.sequence.max_loops)
    quant, _, _ = model.first_stage_model.encode(x)
    torch.testing.assert_close(decode_codes(model, given), model.first_stage_model.decode(quant))
    condition = whole_condition(torch.zeros(2, 1, dtype=torch.int64))
    codes = given.clone()
    images = sample_images(model, condition, codes, SamplingParams(), known=5 * 12 + 3)
    assert images.shape == x.shape
    before, after = (table.flatten(1, 2) for table in (given, codes))
    assert torch.equal(before[:, :63], after[:, :63])
    assert not torch.equal(before[:, 63:], after[:, 63:])
    assert torch.equal(images, decode_codes(model, codes))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("grid", [(8, 8), (9, 11)])
@pytest.mark.parametrize("order", [None, "SpiralIn"])
def test_a_mask_keeps_sites_anywhere(levels: int, grid: tuple[int, int], order: str | None) -> None:
    path = f"taming.modules.transformer.permuter.{order}"
    permuter = {"target": path, "params": {"H": 8, "W": 8}} if order else None
    if order and grid != (8, 8):
        return  # refused; see below
    model = prior("residual", levels=levels, permuter_config=permuter).eval()
    given = encode_codes(model, torch.rand(2, 3, 2 * grid[0], 2 * grid[1]) * 2 - 1)
    mask = torch.rand(grid) < 0.5
    codes = given.masked_fill(~mask[..., None], -1)  # what is to be drawn is not read
    condition = whole_condition(torch.zeros(2, 1, dtype=torch.int64))
    assert (
        list(write_codes(model, condition, codes, SamplingParams(), mask))[-1] == grid[0] * grid[1]
    )
    assert torch.equal(codes[:, mask], given[:, mask])
    assert (codes[..., 0] >= 0).all() and not torch.equal(codes[:, ~mask], given[:, ~mask])
    with pytest.raises(ValueError, match=r"mask of known sites is \(3, 3\), but the grid is"):
        list(write_codes(model, condition, codes, SamplingParams(), mask[:3, :3]))


def test_sites_known_by_their_number_are_the_upper_ones_in_any_order() -> None:
    order = {"target": "taming.modules.transformer.permuter.SpiralIn", "params": {"H": 8, "W": 8}}
    model = prior(permuter_config=order).eval()
    given = encode_codes(model, torch.rand(2, 3, 16, 16) * 2 - 1)
    codes, condition = given.clone(), whole_condition(torch.zeros(2, 1, dtype=torch.int64))
    list(write_codes(model, condition, codes, SamplingParams(), known=20))
    before, after = (table.flatten(1, 2) for table in (given, codes))
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("grid", [(8, 8), (9, 11)])
def test_known_sites_after_the_last_unknown_one_cost_nothing(grid: tuple[int, int]) -> None:
    model = prior().eval()
    given = encode_codes(model, torch.rand(2, 3, 2 * grid[0], 2 * grid[1]) * 2 - 1)
    codes, condition = given.clone(), whole_condition(torch.zeros(2, 1, dtype=torch.int64))
    mask = torch.ones(grid, dtype=torch.bool)
    mask[0, 2] = mask[0, 4] = False
    written = list(write_codes(model, condition, codes, SamplingParams(), mask, longest=1))
    assert written == [3, 4, mask.numel()]
    assert torch.equal(codes[:, mask], given[:, mask])
    mask[:] = True
    assert list(write_codes(model, condition, given, SamplingParams(), mask)) == []


def test_pixels_of_known_sites_do_not_change() -> None:
    grid = (4, 6)
    images, given = torch.rand(3, 3, 8, 12), torch.rand(1, 3, 8, 12)
    mask = torch.rand(grid) < 0.5
    pasted = paste(images, given, mask)
    for row, column in product(range(grid[0]), range(grid[1])):
        site = (..., slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        expected = given.expand(3, -1, -1, -1) if mask[row, column] else images
        assert torch.equal(pasted[site], expected[site])


def test_a_share_of_the_rows_is_known() -> None:
    for share, rows in ((0.0, 0), (0.5, 4), (0.7, 6), (1.0, 8)):
        mask = upper_part(share, (8, 3))
        assert mask.shape == (8, 3) and mask[:rows].all() and not mask[rows:].any()


def test_samples_of_every_item_are_numbered_apart() -> None:
    assert numbers_of(0, range(4)) == [0, 1, 2, 3]
    points = [
        generator.random()
        for item in range(3)
        for generator in generators_of(5, numbers_of(item, range(4)))
    ]
    assert len(set(points)) == 12


@pytest.mark.parametrize("grid", [(8, 8), (9, 10)])
def test_a_seed_gives_the_same_images_in_whatever_batch(grid: tuple[int, int]) -> None:
    model = prior().eval()

    def drawn(images: list[int]) -> Tensor:
        codes = empty_codes(model, len(images), grid)
        condition = whole_condition(torch.zeros(len(images), 1, dtype=torch.int64))
        drawing = SamplingParams(generators=generators_of(3, images))
        for _ in write_codes(model, condition, codes, drawing):
            pass
        return codes

    together = drawn([4, 5, 6])
    assert torch.equal(together, torch.cat([drawn([4]), drawn([5, 6])]))
    assert not torch.equal(together[0], together[1])


def test_guidance_needs_hidden_conditions() -> None:
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    given = {"cond_stage_config": labels, "cond_stage_key": "class_label"}
    condition = whole_condition(torch.tensor([[3], [4]]))

    def drawn(model: Net2NetTransformer, scale: float) -> Tensor:
        codes = empty_codes(model.eval(), 2, (8, 8))
        list(write_codes(model, condition, codes, SamplingParams(greedy=True, guidance=scale)))
        return codes

    model = prior(gpt={"vocab_size": 18}, condition_dropout=0.1, **given)
    with torch.no_grad():  # untrained, it would hardly look at the class
        for parameter in model.transformer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert not torch.equal(drawn(model, 1.0), drawn(model, 4.0))
    with pytest.raises(ValueError, match="guidance 2.0 needs a prior .* condition_dropout"):
        drawn(prior(**given), 2.0)


def test_an_order_of_sites_needs_its_own_grid() -> None:
    order = {"target": "taming.modules.transformer.permuter.SpiralIn", "params": {"H": 8, "W": 8}}
    model = prior("plain", permuter_config=order).eval()
    start = torch.zeros(2, 1, dtype=torch.int64)
    tokens = model.sample(start[:, :0], start, grid=(8, 8))
    codes = empty_codes(model, 2, (8, 8))
    assert list(write_codes(model, whole_condition(start), codes, GREEDY)) == [64]
    torch.testing.assert_close(
        decode_codes(model, codes), model.decode_to_img(tokens, (2, 4, 8, 8))
    )
    with pytest.raises(ValueError, match="9x8 sites is larger than the 8x8.*SpiralIn"):
        window_size(model, (9, 8))


def test_a_window_that_the_transformer_is_too_short_for_is_refused_before_it_is_drawn() -> None:
    """Of a prior of 4 x 4 crops whose tokenizer was trained on 8 x 8 sites."""
    model = prior("plain", gpt={"block_size": 16}).eval()
    condition, drawn = whole_condition(torch.zeros(1, 1, dtype=torch.int64)), []
    with pytest.raises(ValueError, match="8x8 sites is too large: .*block_size 16 .* --grid"):
        list(
            write_codes(
                model,
                condition,
                empty_codes(model, 1, trained_grid(model)),
                GREEDY,
                callback=drawn.append,
            )
        )
    assert not drawn
    assert list(write_codes(model, condition, empty_codes(model, 1, (4, 4)), GREEDY)) == [16]


def test_a_condition_of_another_grid_is_seen_whole_or_not_at_all(pair: Net2NetTransformer) -> None:
    c = torch.rand(1, 3, 4, 4)
    _, tokens = pair.encode_to_c(c)
    seen = condition_windows(pair, c, (4, 4))(Window(0, 0, 4, 4))
    assert torch.equal(seen, tokens) and tokens.shape == (1, 4)
    with pytest.raises(ValueError, match=r"condition's grid \(2, 2\) is not the image's \(4, 5\)"):
        condition_windows(pair, c, (4, 5))


def test_the_trained_grid_is_the_tables_or_the_tokenizers(pair: Net2NetTransformer) -> None:
    assert trained_grid(pair) == (SIDE, SIDE)
    assert trained_grid(prior("residual", gpt={"site_shape": (5, 7, 4)})) == (5, 7)
    assert window_size(pair, (3, 9)) == (3, 4)
