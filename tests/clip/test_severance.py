"""Patch severance, and DeOP's two kinds of visual prompts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import resize_positions
from lexiseg.clip.tower import Attention
from lexiseg.models.deop import AddedTables, patch_severance
from lexiseg.models.deop_ablations import PrependedPrompts, mask_severance, mix_by_masks
from tests.towers import small_clip

DEPTH = 4


def embedded(clip: CLIP, height: int = 40, width: int = 24) -> tuple[Tensor, tuple[int, int]]:
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return clip.image_tower.embed(images)


# ---- severance ----


def severed(*blocks: int, alpha: float = 1.0) -> dict[int, Attention]:
    return {block: partial(patch_severance, alpha=alpha) for block in blocks}


@given(
    kind=st.sampled_from(["gps", "mps", "mps-sum", "released"]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    count=st.sampled_from([0, 1, 7]),
    block=st.integers(0, DEPTH - 1),
)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_any_grid_any_block_any_number_of_masks(kind: str, rows: int, columns: int, count: int, block: int) -> None:
    clip = small_clip()
    tokens, grid = embedded(clip, rows * 8, columns * 8)
    masks = torch.rand(2, count, rows, columns)
    severance = patch_severance if kind == "gps" else partial(mask_severance, masks=masks, kind=kind)
    result = clip.image_tower.run(tokens, grid, attention={block: severance})
    assert result.tokens.shape == tokens.shape
    assert bool(torch.isfinite(result.tokens).all())


@torch.no_grad()
def test_alpha_0_is_the_tower_itself(clip: CLIP) -> None:
    tokens, grid = embedded(clip)
    tower = clip.image_tower
    plain = tower.run(tokens, grid).tokens
    assert torch.equal(tower.run(tokens, grid, attention=severed(3, alpha=0.0)).tokens, plain)
    for alpha in (0.3, 1.0):
        assert not torch.allclose(tower.run(tokens, grid, attention=severed(2, 3, alpha=alpha)).tokens, plain)


@torch.no_grad()
def test_every_kind_is_its_formula() -> None:
    value, masks = torch.randn(2, 7, 6), torch.rand(2, 3, 2, 3)
    weights = torch.cat([torch.ones(2, 3, 1), masks.flatten(2)], dim=2)  # the class token is in every region
    pairs = torch.einsum("bnt,bns->bts", weights, weights)
    for kind, expected in (
        ("mps", torch.softmax(pairs, dim=2) @ value),
        ("mps-sum", pairs @ value),
        ("released", value * weights.sum(1)[..., None]),
    ):
        torch.testing.assert_close(mix_by_masks(value, masks, kind), expected)


@torch.no_grad()
def test_severed_patches_keep_to_themselves(clip: CLIP) -> None:
    """With every block severed a patch depends on its own pixels only."""
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[..., :8, :8] += 1.0
    tower = clip.image_tower
    runs = [tower.run(*tower.embed(x), attention=severed(*range(DEPTH))).tokens for x in (images, other)]
    same = (runs[0] == runs[1]).all(dim=-1)[0]
    assert same.tolist() == [True, False, *[True] * 15]


@torch.no_grad()
def test_the_residual_of_the_released_plain_encoder(clip: CLIP) -> None:
    tokens, grid = embedded(clip)
    tower = clip.image_tower
    assert not torch.allclose(tower.run(tokens, grid, residual={3: 0.2}).tokens, tower.run(tokens, grid).tokens)


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
    tables = AddedTables(tower.width, (1, 3), side=3)
    assert {name: tuple(value.shape) for name, value in tables.named_parameters()} == {
        "table": (10, 24),
        "block_tables.1": (10, 24),
        "block_tables.3": (10, 24),
    }
    images = torch.randn(1, 3, 40, 24)

    def run() -> Tensor:
        added, hook = tables((5, 3))
        return tower.run(*tower.embed(images, added=added), before_block=hook).tokens

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
    tables = AddedTables(24, (2,), side=2)
    tokens = torch.zeros(2, 5, 24)
    _, hook = tables((2, 2))
    assert torch.equal(hook(1, tokens)[0], tokens)
    assert torch.equal(hook(2, tokens)[0][1], tables.block_tables["2"])


# ---- prompts in front ----


@pytest.mark.parametrize("blocks", [(0,), (0, 1, 2, 3), (1, 2), (3,), (0, 2)])
@pytest.mark.parametrize("severed", [(), (3,), (1,), (2, 3)])
@torch.no_grad()
def test_prompts_stand_behind_the_class_token_until_others_or_none_do(
    clip: CLIP, blocks: tuple[int, ...], severed: tuple[int, ...]
) -> None:
    tower = clip.image_tower
    prompts = PrependedPrompts(tower, blocks, severed, 3, 0.1).eval()
    (_, hook), tokens = prompts((5, 3)), torch.zeros(2, 16, tower.width)
    extra = 0
    for index in range(DEPTH):
        tokens, context = hook(index, tokens)
        listed = index in blocks and index not in severed
        extra = 0 if index in severed or (listed and index - 1 in blocks) else extra
        extra += 3 * listed
        assert context is None and tokens.shape[1] == 16 + extra
        if listed:
            assert torch.equal(tokens[1, 1:4], prompts.embeddings[blocks.index(index)])
