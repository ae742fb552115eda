"""What models compute in another way while a graph is made of them, against their usual way."""

from __future__ import annotations

import pytest
import torch

from lexiseg.clip import positions
from lexiseg.clip.positions import resize_positions
from lexiseg.models.last_block import neighbourhood
from lexiseg.models.spt_seg import SpectralFilter
from lexiseg.smoothing import pamr, smooth

GRIDS = [(4, 4), (5, 6), (6, 5), (1, 3), (13, 2)]


@pytest.fixture
def as_graph(monkeypatch: pytest.MonkeyPatch) -> object:
    """A switch: from then on models believe that a graph is made of them."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_of_any_size(grid: tuple[int, int], as_graph: object) -> None:
    table = torch.randn(17, 6)
    want = resize_positions(table, grid, (4, 4), "bicubic-offset")
    down, across = positions.bicubic(grid, (4, 4))
    patches = table[1:].view(4, 4, 6).permute(2, 0, 1)
    got = (down @ patches @ across.T).flatten(1).T
    torch.testing.assert_close(got, want[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_spectral_filter_of_any_size(grid: tuple[int, int], as_graph: object) -> None:
    module = SpectralFilter((5, 4), 6)
    patches, cls = torch.randn(2, grid[0] * grid[1], 6), torch.randn(2, 1, 6)
    with torch.no_grad():
        want = module(patches, cls, grid)
        as_graph()  # type: ignore[operator]
        torch.testing.assert_close(module(patches, cls, grid), want, rtol=0, atol=1e-6)


def test_smoothing_and_neighbours_of_any_size(as_graph: object) -> None:
    scores, colours = torch.rand(2, 5, 7, 9), torch.rand(2, 3, 7, 9)
    want, near = smooth(scores, colours, (1, 2, 4), 0.1), neighbourhood((3, 5), 2.0)
    adapted = pamr(scores, colours, steps=2)
    as_graph()  # type: ignore[operator]
    torch.testing.assert_close(smooth(scores, colours, (1, 2, 4), 0.1), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(pamr(scores, colours, steps=2), adapted, rtol=0, atol=1e-6)
    torch.testing.assert_close(neighbourhood((3, 5), 2.0), near)
