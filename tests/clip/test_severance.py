"""Patch severance, and DeOP's two kinds of visual prompts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import resize_positions
from lexiseg.clip.severance import (
    Severance,
    SeveranceKind,
    released_residual,
    severance_masks,
    severed_attention,
    token_weights,
)
from lexiseg.errors import LexisegError
from lexiseg.models.deop_prompts import AddedTables, PrependedPrompts
from tests.towers import small_clip

DEPTH = 4


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return small_clip()


def embedded(clip: CLIP, height: int = 40, width: int = 24) -> tuple[Tensor, tuple[int, int]]:
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return clip.image_tower.embed(images)


# ---- severance ----


@given(
    kind=st.sampled_from(["gps", "mps", "mps-sum", "released"]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    count=st.sampled_from([0, 1, 7]),
    block=st.integers(0, DEPTH - 1),
)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_any_grid_any_block_any_number_of_masks(
    kind: SeveranceKind, rows: int, columns: int, count: int, block: int
) -> None:
    clip = small_clip()
    tokens, grid = embedded(clip, rows * 8, columns * 8)
    masks = severance_masks(torch.randn(2, count, 13, 9), grid)
    assert masks.shape == (2, count, rows, columns)
    result = clip.image_tower.run(tokens, grid, attention=severed_attention({block: Severance(kind)}, masks))
    assert result.tokens.shape == tokens.shape
    assert bool(torch.isfinite(result.tokens).all())


@torch.no_grad()
def test_alpha_0_is_the_tower_itself(clip: CLIP) -> None:
    tokens, grid = embedded(clip)
    tower = clip.image_tower
    plain = tower.run(tokens, grid).tokens
    assert torch.equal(tower.run(tokens, grid, attention=severed_attention({3: Severance("gps", 0.0)})).tokens, plain)
    for alpha in (0.3, 1.0):
        severed = severed_attention({index: Severance("gps", alpha) for index in (2, 3)})
        assert not torch.allclose(tower.run(tokens, grid, attention=severed).tokens, plain)


@torch.no_grad()
def test_every_kind_is_its_formula() -> None:
    value, masks = torch.randn(2, 7, 6), torch.rand(2, 3, 2, 3)
    weights = token_weights(masks, 7)
    assert weights.shape == (2, 3, 7)
    assert bool((weights[..., 0] == 1).all())
    assert torch.equal(weights[..., 1:], masks.flatten(2))
    pairs = torch.einsum("bnt,bns->bts", weights, weights)
    for kind, expected in (
        ("mps", torch.softmax(pairs, dim=2) @ value),
        ("mps-sum", pairs @ value),
        ("released", value * weights.sum(1)[..., None]),
    ):
        torch.testing.assert_close(Severance(kind).mix(value, weights), expected)


@torch.no_grad()
def test_severed_patches_keep_to_themselves(clip: CLIP) -> None:
    """With every block severed a patch depends on its own pixels only."""
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[..., :8, :8] += 1.0
    tower = clip.image_tower
    severed = severed_attention(dict.fromkeys(range(DEPTH), Severance("gps")))
    runs = [tower.run(*tower.embed(x), attention=severed).tokens for x in (images, other)]
    same = (runs[0] == runs[1]).all(dim=-1)[0]
    assert same.tolist() == [True, False, *[True] * 15]


def test_tokens_in_front_of_the_patches_are_in_every_region() -> None:
    weights = token_weights(torch.zeros(1, 2, 2, 2), 8)
    assert weights[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_logits_are_resized_before_the_sigmoid() -> None:
    logits = torch.tensor([[[[8.0, -4.0]]]])
    assert severance_masks(logits, (1, 1)).item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())


@torch.no_grad()
def test_the_residual_of_the_released_plain_encoder(clip: CLIP) -> None:
    assert released_residual([10, 11]) == {11: 0.2}
    assert released_residual([4, 10]) == {}
    tokens, grid = embedded(clip)
    tower = clip.image_tower
    assert not torch.allclose(tower.run(tokens, grid, residual={3: 0.2}).tokens, tower.run(tokens, grid).tokens)


def test_severance_by_masks_needs_masks(clip: CLIP) -> None:
    with pytest.raises(LexisegError, match="needs region masks"):
        clip.image_tower.run(*embedded(clip), attention=severed_attention({0: Severance("mps")}))


@torch.no_grad()
def test_a_run_in_two_halves_is_the_run(clip: CLIP) -> None:
    tokens, grid = embedded(clip)
    tower = clip.image_tower
    half = tower.run(tokens, grid, stop=2, levels=[0, 3])
    assert list(half.levels) == [0]
    assert torch.equal(tower.run(half.tokens, grid, first=2).tokens, tower.run(tokens, grid).tokens)


# ---- positions and tables ----


def test_a_table_with_enough_rows_is_used_as_it_is() -> None:
    table = torch.randn(17, 3)
    assert torch.equal(resize_positions(table, (8, 2), interpolation="bicubic", by_count=True), table)
    assert not torch.equal(resize_positions(table, (8, 2), interpolation="bicubic"), table)


def test_corners_stay_corners() -> None:
    table = torch.randn(10, 3)
    corners = resize_positions(table, (5, 7), interpolation="bicubic-corners")[1:].reshape(5, 7, 3)
    torch.testing.assert_close(corners[::4, ::6], table[1:].reshape(3, 3, 3)[::2, ::2])
    other = resize_positions(table, (5, 7), interpolation="bicubic")[1:].reshape(5, 7, 3)
    assert not torch.allclose(corners, other)


@torch.no_grad()
def test_tables_of_zeros_add_nothing_and_others_train(clip: CLIP) -> None:
    tower = clip.image_tower
    tables = AddedTables(tower.width, DEPTH, (1, 3), side=3)
    assert {name: tuple(value.shape) for name, value in tables.named_parameters()} == {
        "table": (10, 24),
        "block_tables.1": (10, 24),
        "block_tables.3": (10, 24),
    }
    images = torch.randn(1, 3, 40, 24)

    def run() -> Tensor:
        tokens, grid = tower.embed(images, added=tables.at_input((5, 3)))
        return tower.run(tokens, grid, before_block=tables.hook(grid)).tokens

    with torch.enable_grad():
        run().square().sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in tables.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in tables.parameters())
    changed = run()
    for parameter in tables.parameters():
        parameter.zero_()
    torch.testing.assert_close(run(), tower.run(*tower.embed(images)).tokens)
    assert not torch.allclose(run(), changed)


def test_a_block_table_reaches_the_residual_stream(clip: CLIP) -> None:
    tables = AddedTables(24, DEPTH, (2,), side=2)
    tokens = torch.zeros(2, 5, 24)
    assert torch.equal(tables.hook((2, 2))(1, tokens)[0], tokens)
    assert torch.equal(tables.hook((2, 2))(2, tokens)[0][1], tables.block_tables["2"])


# ---- prompts in front ----


@pytest.mark.parametrize("blocks", [(0,), (0, 1, 2, 3), (1, 2), (3,), (0, 2)])
@pytest.mark.parametrize("severed", [(), (3,), (1,), (2, 3)])
@torch.no_grad()
def test_dead_rows_change_nothing_but_the_time(clip: CLIP, blocks: tuple[int, ...], severed: tuple[int, ...]) -> None:
    tokens, grid = embedded(clip)
    tower = clip.image_tower
    prompts = PrependedPrompts(3, tower.width, DEPTH, tower.patch_size, blocks).eval()
    results, masks = [], torch.rand(2, 4, *grid)
    for keep in (True, False):
        run = tower.run(
            tokens,
            grid,
            before_block=prompts.hook(15, severed=severed, keep_rows=keep),
            attention=severed_attention(dict.fromkeys(severed, Severance("released")), masks),
        )
        results.append(torch.cat([run.tokens[:, :1], run.tokens[:, -15:]], dim=1))
    torch.testing.assert_close(results[0], results[1])
    if not severed:
        assert not torch.allclose(results[0], tower.run(tokens, grid).tokens)


def test_wrong_prompts_are_refused() -> None:
    for make in (
        lambda: AddedTables(8, 4, (4,)),
        lambda: AddedTables(8, 4, (1, 1)),
        lambda: PrependedPrompts(2, 8, 4, 16, (-1,)),
    ):
        with pytest.raises(LexisegError, match="list each block once, from 0 to 3"):
            make()
    with pytest.raises(LexisegError, match="at least one"):
        PrependedPrompts(0, 8, 4, 16, (0,))
    with pytest.raises(LexisegError, match="at least 1"):
        AddedTables(8, 4, (1,), side=0)
