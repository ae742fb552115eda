"""Smoothing of scores that stops at edges of the picture: cells of like colour agree, cells of other colour do not.

The grid of an image transformer is coarse, the picture is not. Each pass here takes the mean of a cell and its eight
neighbours at some distance, weighted by how alike their colours are; passes at growing distances reach far with few
weights, as in the edge-avoiding "a trous" filter (Dammertz et al., "Edge-Avoiding A-Trous Wavelet Transform for fast
Global Illumination Filtering", HPG 2010). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# The weights of a binomial filter of three: near cells count more than far ones, whatever their colour.
_BINOMIAL = (1.0, 2.0, 1.0)
_WORDS = 128


def edge_weights(colours: Tensor, distance: int, width: float) -> Tensor:
    """How much each of nine cells counts: itself and its neighbours ``distance`` away.

    Args:
        colours: (B, 3, h, w).
        distance: in cells; beyond the border the border is repeated.
        width: a difference of colours of this length counts exp(-1/2).

    Returns:
        (B, 9, h, w), row by row, summing to 1 over the nine.
    """
    moved = torch.stack([part for _, part in _neighbours(colours, distance)], dim=1)
    kernel = colours.new_tensor([a * b for a in _BINOMIAL for b in _BINOMIAL])[:, None, None]
    weights = kernel * (-(moved - colours[:, None]).square().sum(dim=2) / (2 * width**2)).exp()
    return weights / weights.sum(dim=1, keepdim=True)


def smooth(scores: Tensor, colours: Tensor, distances: Sequence[int], width: float) -> Tensor:
    """Smooth scores (B, W, h, w), each word by itself, by the colours (B, 3, h, w) of the cells.

    Args:
        scores: of any range; results lie between the smallest and the largest score.
        colours: RGB in 0..1, the mean of each cell.
        distances: of the neighbours in each pass, in cells.
        width: see `edge_weights`.

    Returns:
        (B, W, h, w).
    """
    passes = [(distance, edge_weights(colours, distance, width)) for distance in distances]
    smoothed = torch.empty_like(scores)
    for start in range(0, scores.shape[1], _WORDS):  # the words do not meet, and a part stays in the cache
        part = scores[:, start : start + _WORDS]
        for distance, weights in passes:
            total = torch.zeros_like(part)
            for index, moved in _neighbours(part, distance):
                total.addcmul_(moved, weights[:, index : index + 1])
            part = total
        smoothed[:, start : start + part.shape[1]] = part
    return smoothed


def _neighbours(cells: Tensor, distance: int) -> list[tuple[int, Tensor]]:
    """The cells (B, C, h, w) as seen from nine places around them, with the place's index."""
    height, width = cells.shape[-2:]
    padded = F.pad(cells, (distance,) * 4, mode="replicate")
    steps = (0, distance, 2 * distance)
    return [
        (3 * i + j, padded[..., top : top + height, left : left + width])
        for i, top in enumerate(steps)
        for j, left in enumerate(steps)
    ]
