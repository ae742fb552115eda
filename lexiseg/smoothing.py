"""Filters that smooth maps of scores where the picture does not change: edge-avoiding smoothing, and PAMR.

Sources: the edge-avoiding "a trous" filter (Dammertz et al., HPG 2010); pixel-adaptive mask refinement (Araslanov and
Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020). Nothing is trained.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# The weights of a binomial filter of three: near cells count more than far ones, whatever their colour.
_BINOMIAL = (1.0, 2.0, 1.0)
WORDS = 128
_PAMR_WORDS = 8


def edge_weights(colours: Tensor, distance: int, width: float) -> Tensor:
    """How much each of nine cells counts: itself and its neighbours ``distance`` away.

    ``colours``: (B, 3, h, w). ``distance``: in cells; beyond the border the border is repeated. ``width``: a difference
    of colours of this length counts exp(-1/2). Returns (B, 9, h, w), row by row, summing to 1 over the nine.
    """
    moved = torch.stack(list(_around(colours, distance)), dim=1)
    kernel = colours.new_tensor([a * b for a in _BINOMIAL for b in _BINOMIAL])[:, None, None]
    weights = kernel * (-(moved - colours[:, None]).square().sum(dim=2) / (2 * width**2)).exp()
    return weights / weights.sum(dim=1, keepdim=True)


def smooth(scores: Tensor, colours: Tensor, distances: Sequence[int], width: float) -> Tensor:
    """Smooth scores (B, W, h, w), each word by itself, by the colours (B, 3, h, w) of the cells.

    ``scores``: of any range; results lie between the smallest and the largest score. ``colours``: RGB in 0..1, the mean
    of each cell. ``distances``: of the neighbours in each pass, in cells. ``width``: see `edge_weights`. Returns (B, W,
    h, w).
    """
    passes = [(distance, edge_weights(colours, distance, width)) for distance in distances]

    def smoothed(part: Tensor) -> Tensor:
        for distance, weights in passes:
            part = _add_weighted(torch.zeros_like(part), part, distance, weights)
        return part

    return _by_parts(smoothed, scores, WORDS)


def _by_parts(function: Callable[[Tensor], Tensor], scores: Tensor, count: int) -> Tensor:
    """A function of so many words at a time: they do not meet in it, and a part stays in the cache."""
    if torch.compiler.is_compiling():  # a graph for any number of words has no loop over them
        return function(scores)
    found = torch.empty_like(scores)
    for start in range(0, scores.shape[1], count):
        found[:, start : start + count] = function(scores[:, start : start + count])
    return found


def _around(cells: Tensor, distance: int) -> Iterator[Tensor]:
    """The cells (B, C, h, w) as seen from nine places around them, row by row; the fifth is the place itself."""
    height, width = cells.shape[-2:]
    padded = F.pad(cells, (distance,) * 4, mode="replicate")
    if torch.compiler.is_compiling():  # exporters lose the size of slices of what is padded
        return iter(_moved(padded, distance).unbind(2))
    steps = (0, distance, 2 * distance)
    return (padded[..., top : top + height, left : left + width] for top in steps for left in steps)


def _moved(padded: Tensor, distance: int) -> Tensor:
    """What `_around` gives, as one tensor (B, C, 9, h, w) of cells that are padded."""
    kernel = torch.eye(9, device=padded.device, dtype=padded.dtype).view(9, 1, 3, 3)
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel, dilation=distance).unflatten(0, padded.shape[:2])


def _add_weighted(total: Tensor, cells: Tensor, distance: int, weights: Tensor) -> Tensor:
    """Add cells as seen from the places around, by weights (B, 9, h, w), or (B, 8, h, w) of the others alone."""
    places = [place for place in range(9) if place != 4 or weights.shape[1] == 9]
    if torch.compiler.is_compiling():  # few steps: exporters are slow
        moved = _moved(F.pad(cells, (distance,) * 4, mode="replicate"), distance)
        return total + (moved[:, :, places] * weights[:, None]).sum(dim=2)
    seen = list(_around(cells, distance))
    for index, place in enumerate(places):
        total.addcmul_(seen[place], weights[:, index : index + 1])
    return total


# ---- PAMR


def pamr_weights(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """How much each neighbour of a pixel counts: the softmax of how little it differs, in local standard deviations.

    ``image``: (B, 3, h, w), of any scale and offset. ``dilations``: distances of the rings of eight neighbours. Returns
    (B, 8 * rings, h, w), ring by ring, row by row without the centre, summing to 1 over the neighbours.
    """
    count = 9 * len(dilations)
    mean = sum((moved for distance in dilations for moved in _around(image, distance)), torch.zeros_like(image)) / count
    squares = torch.zeros_like(image)
    for distance in dilations:
        for moved in _around(image, distance):
            squares += (moved - mean).square()
    scale = 1e-8 + 0.1 * (squares / (count - 1)).sqrt()
    logits = [
        -((image - moved).abs() / scale).mean(dim=1)
        for distance in dilations
        for index, moved in enumerate(_around(image, distance))
        if index != 4
    ]
    return torch.stack(logits, dim=1).softmax(dim=1)


def pamr(scores: Tensor, image: Tensor, steps: int = 10, dilations: Sequence[int] = (8, 16)) -> Tensor:
    """Pixel-adaptive mask refinement: ``steps`` times the weighted mean of like neighbours.

    ``scores``: (B, W, h, w), each word by itself. ``image``: (B, 3, h, w), see `pamr_weights`. ``dilations``: distances
    of the neighbours in pixels. Returns (B, W, h, w).
    """
    rings = pamr_weights(image, dilations).split(8, dim=1)

    def refined(part: Tensor) -> Tensor:
        for _ in range(steps):
            total = torch.zeros_like(part)
            for distance, weights in zip(dilations, rings, strict=True):
                total = _add_weighted(total, part, distance, weights)
            part = total
        return part

    return _by_parts(refined, scores, _PAMR_WORDS)
