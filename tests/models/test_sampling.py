"""Images beyond the trained grid are drawn as the original drew them, others in one go."""

from itertools import product

import pytest
import torch
from support.models import DDCONFIG, GPT, prior, tokenizer_config
from torch import Tensor

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.sampling import (
    Progress,
    condition_windows,
    numbers_of,
    paste,
    sample_images,
    upper_part,
    window_around,
)
from taming.modules.transformer.generate import SamplingParams, generators_of

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
@torch.no_grad()
def test_codes_are_the_originals(pair: Net2NetTransformer, grid: tuple[int, int]) -> None:
    c = torch.rand(2, 3, 2 * grid[0], 2 * grid[1]) * 2 - 1
    _, c_tokens = pair.encode_to_c(c)
    expected = originals_codes(
        pair, c_tokens.reshape(2, *grid), torch.zeros(2, *grid, dtype=torch.int64)
    )
    seen: list[Progress] = []

    def follow(progress: Progress) -> None:
        seen.append(progress)
        done = progress.sites()
        assert done == progress.tokens  # one token per site
        assert torch.equal(progress.codes().flatten(1)[:, :done], expected.flatten(1)[:, :done])
        assert not progress.codes().flatten(1)[:, done:].any()

    condition = condition_windows(pair, c, grid)
    codes = pair.sample_codes(condition, GREEDY, grid=grid, callback=follow)
    assert [p.tokens for p in seen] == list(range(1, grid[0] * grid[1] + 1))
    assert {p.most for p in seen} == {grid[0] * grid[1]}
    assert torch.equal(codes[..., 0], expected)
    assert expected.unique().numel() > 3  # it did look at what was before


@pytest.mark.parametrize("kind", ["plain", "residual", "attract"])
def test_an_image_of_the_trained_grid_is_drawn_in_one_go(kind: str) -> None:
    model, start = prior(kind).eval(), torch.zeros(3, 1, dtype=torch.int64)
    torch.manual_seed(1)
    tokens = model.sample(start[:, :0], start, None, 1.0, True, 5, grid=(8, 8))
    torch.manual_seed(1)
    codes = model.sample_codes(start, SamplingParams(top_k=5))
    assert torch.equal(codes, model.sequence.decode(tokens, (8, 8)))
    torch.testing.assert_close(model.decode_codes(codes), model.decode_to_img(tokens, (3, 4, 8, 8)))


@pytest.mark.parametrize("kind", ["plain", "residual", "attract"])
def test_known_sites_stay_and_the_rest_is_drawn(kind: str) -> None:
    model, grid = prior(kind).eval(), (10, 12)
    x = torch.rand(2, 3, 20, 24) * 2 - 1
    given = model.encode_codes(x)
    assert given.shape == (2, *grid, model.sequence.max_loops)
    quant, _, _ = model.first_stage_model.encode(x)
    torch.testing.assert_close(model.decode_codes(given), model.first_stage_model.decode(quant))
    condition, unchanged = torch.zeros(2, 1, dtype=torch.int64), given.clone()
    start = {"codes": given, "known": 5 * 12 + 3}
    torch.manual_seed(1)
    images = sample_images(model, condition, SamplingParams(), **start)
    torch.manual_seed(1)
    codes = model.sample_codes(condition, **start)
    assert images.shape == x.shape and torch.equal(given, unchanged)
    before, after = (table.flatten(1, 2) for table in (given, codes))
    assert torch.equal(before[:, :63], after[:, :63])
    assert not torch.equal(before[:, 63:], after[:, 63:])
    assert torch.equal(images, model.decode_codes(codes))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("grid", [(8, 8), (9, 11)])
@pytest.mark.parametrize("order", [None, "SpiralIn"])
def test_a_mask_keeps_sites_anywhere(levels: int, grid: tuple[int, int], order: str | None) -> None:
    path = f"taming.modules.transformer.permuter.{order}"
    permuter = {"target": path, "params": {"H": 8, "W": 8}} if order else None
    if order and grid != (8, 8):
        return  # refused; see below
    model = prior("residual", levels=levels, permuter_config=permuter).eval()
    given = model.encode_codes(torch.rand(2, 3, 2 * grid[0], 2 * grid[1]) * 2 - 1)
    mask = torch.rand(grid) < 0.5
    blank = given.masked_fill(~mask[..., None], -1)  # unknown codes are not read
    condition = torch.zeros(2, 1, dtype=torch.int64)
    codes = model.sample_codes(condition, codes=blank, known=mask)
    assert torch.equal(codes[:, mask], given[:, mask])
    assert (codes[..., 0] >= 0).all() and not torch.equal(codes[:, ~mask], given[:, ~mask])
    with pytest.raises(ValueError, match=r"known sites .*\(3, 3\).*grid"):
        model.sample_codes(condition, codes=blank, known=mask[:3, :3])


def test_sites_known_by_their_number_are_the_upper_ones_in_any_order() -> None:
    order = {"target": "taming.modules.transformer.permuter.SpiralIn", "params": {"H": 8, "W": 8}}
    model = prior(permuter_config=order).eval()
    given = model.encode_codes(torch.rand(2, 3, 16, 16) * 2 - 1)
    codes = model.sample_codes(torch.zeros(2, 1, dtype=torch.int64), codes=given, known=20)
    before, after = (table.flatten(1, 2) for table in (given, codes))
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("grid", [(8, 8), (9, 11)])
def test_known_sites_after_the_last_unknown_one_cost_nothing(grid: tuple[int, int]) -> None:
    model = prior().eval()
    given = model.encode_codes(torch.rand(2, 3, 2 * grid[0], 2 * grid[1]) * 2 - 1)
    condition, sites = torch.zeros(2, 1, dtype=torch.int64), []
    mask = torch.ones(grid, dtype=torch.bool)
    mask[0, 2] = mask[0, 4] = False
    start = {"codes": given, "callback": lambda progress: sites.append(progress.sites())}
    codes = model.sample_codes(condition, known=mask, **start)
    assert max(sites) == 5 and sites == sorted(sites)
    assert torch.equal(codes[:, mask], given[:, mask])
    sites.clear()
    mask[:] = True
    assert torch.equal(model.sample_codes(condition, known=mask, **start), given) and not sites


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
        condition = torch.zeros(len(images), 1, dtype=torch.int64)
        params = SamplingParams(generators=generators_of(3, images))
        return model.sample_codes(condition, params, grid=grid)

    together = drawn([4, 5, 6])
    assert torch.equal(together, torch.cat([drawn([4]), drawn([5, 6])]))
    assert not torch.equal(together[0], together[1])


def test_guidance_needs_hidden_conditions() -> None:
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    given = {"cond_stage_config": labels, "cond_stage_key": "class_label"}
    condition = torch.tensor([[3], [4]])

    def drawn(model: Net2NetTransformer, scale: float) -> Tensor:
        params = SamplingParams(greedy=True, guidance=scale)
        return model.eval().sample_codes(condition, params)

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
    codes = model.sample_codes(start, GREEDY)
    torch.testing.assert_close(model.decode_codes(codes), model.decode_to_img(tokens, (2, 4, 8, 8)))
    with pytest.raises(ValueError, match="9x8 .*8x8.*SpiralIn"):
        model.window_size((9, 8))


def test_a_window_that_the_transformer_is_too_short_for_is_refused_before_it_is_drawn() -> None:
    """Of a prior of 4 x 4 crops whose tokenizer was trained on 8 x 8 sites."""
    model = prior("plain", gpt={"block_size": 16}).eval()
    condition, drawn = torch.zeros(1, 1, dtype=torch.int64), []
    with pytest.raises(ValueError, match="8x8 .*block_size 16 .*--grid"):
        model.sample_codes(condition, GREEDY, callback=drawn.append)
    assert not drawn
    assert model.sample_codes(condition, GREEDY, grid=(4, 4)).shape == (1, 4, 4, 1)
    through = model.sample_codes(condition, GREEDY, grid=(5, 6), window=(4, 4))
    assert through.shape == (1, 5, 6, 1)


def test_a_condition_of_another_grid_is_seen_whole_or_not_at_all(pair: Net2NetTransformer) -> None:
    c = torch.rand(1, 3, 4, 4)
    _, tokens = pair.encode_to_c(c)
    seen = condition_windows(pair, c, (4, 4))
    assert torch.equal(seen, tokens) and tokens.shape == (1, 4)
    with pytest.raises(ValueError, match=r"condition.* \(2, 2\) .*\(4, 5\)"):
        condition_windows(pair, c, (4, 5))


def test_the_trained_grid_is_the_tables_or_the_tokenizers(pair: Net2NetTransformer) -> None:
    assert pair.grid == (SIDE, SIDE)
    assert prior("residual", gpt={"site_shape": (5, 7, 4)}).grid == (5, 7)
    assert pair.window_size((3, 9)) == (3, 4)
