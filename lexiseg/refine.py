"""Cleaner masks from any system's scores, by what the picture itself shows: `edges`, `pamr` and `regions`.

- ``edges``: smoothing that stops where colours change, after the edge-avoiding "a trous" filter (Dammertz et al.,
  HPG 2010), on a lattice coarser than the picture: fast.
- ``pamr``: pixel-adaptive mask refinement (Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels",
  CVPR 2020), as the training-free papers use it: each pixel takes the mean of like pixels around it, several times.
- ``regions``: a vote inside the regions that a proposal generator finds: each region gets the label of most of its
  pixels (as in CorrCLIP, Zhang et al., ICCV 2025).

Nothing here is trained. Smoothing works class by class, and only on classes that are among the best somewhere, so that
memory does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from lexiseg.scores import GridScores, Scores

Kind = Literal["none", "edges", "pamr", "regions"]
Size = tuple[int, int]

# The weights of a binomial filter of three: near cells count more than far ones, whatever their colour.
_BINOMIAL = (1.0, 2.0, 1.0)
_WORDS = 128
_PAMR_WORDS = 8
# Classes that are refined at most, of those that are among the best `_RANKS` somewhere on a lattice of `_CELLS`: what
# smoothing keeps of a class is a lattice of edges, or a picture of PAMR.
_MAX_CLASSES = {"edges": 512, "pamr": 64}
_RANKS = 3
_CELLS = 64


@dataclass(frozen=True)
class Refinement:
    """How masks are cleaned up after a system has scored the picture. Raises LexisegError if a value makes no sense."""

    kind: Kind = "none"  # one of none, edges, pamr and regions
    cells: int = 128  # of ``edges``: cells along the picture's shorter side
    distances: tuple[int, ...] = (1, 2, 4)  # of ``edges``: of the neighbours in each pass, in cells
    # of ``edges``: the difference of colours, RGB in 0..1, beyond which neighbours stop counting
    colour_width: float = 0.1
    steps: int = 10  # of ``pamr``
    dilations: tuple[int, ...] = (8, 16)  # of ``pamr``: distances of the neighbours in pixels
    max_pixels: int = 2**20  # of ``pamr``: larger pictures are refined at this size, and the result interpolated
    # of ``regions``: what proposes them (`lexiseg.proposals.ProposalGenerator`); None is SAM's automatic masks, which
    # are downloaded
    regions: Any = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise LexisegError(f"There is no refinement '{self.kind}'; choose one of {', '.join(get_args(Kind))}.")
        numbers = (self.cells, self.steps, self.max_pixels, *self.distances, *self.dilations)
        if min(numbers) < 1 or not self.dilations or self.colour_width <= 0:
            raise LexisegError("A refinement's cells, steps, distances, dilations and widths must be above 0.")

    @classmethod
    def parse(cls, value: str | Refinement | None) -> Refinement:
        """A `Refinement` as it is, one of its kinds by name, or none. Raises LexisegError if there is no such kind."""
        if isinstance(value, Refinement):
            return value
        return cls(kind=value or "none")  # type: ignore[arg-type]


def refine(scores: Scores, image: Tensor, refinement: Refinement, size: Size | None = None) -> tuple[Tensor, Tensor]:
    """The labels of a picture and their scores, refined.

    ``image``: the picture, uint8 (3, H, W). ``size``: (h, w) of the result; None is the picture's. Returns labels (h,
    w) int64 and the winning scores (h, w) float32, on the scores' device. Raises LexisegError if the scores are not
    finite, or the regions cannot be had.
    """
    size = size or (int(image.shape[1]), int(image.shape[2]))
    if refinement.kind in ("none", "regions"):
        found, values = scores.label_and_score(size)
        if refinement.kind == "none":
            return found[0], values[0]
        return vote(found[0], values[0], region_map(image, size, refinement.regions, scores.device))
    classes = candidates(scores, size, _MAX_CLASSES[refinement.kind])
    if refinement.kind == "edges":
        grid = _fit(size, short=refinement.cells)
        parts = scores.dense(grid, classes)
        smoothed = smooth(parts, _guide(image, grid, scores.device), refinement.distances, refinement.colour_width)
    else:
        grid = _fit(size, pixels=refinement.max_pixels)
        parts = scores.dense(grid, classes)
        smoothed = pamr(parts, _guide(image, grid, scores.device), refinement.steps, refinement.dilations)
    found, values = GridScores(smoothed).label_and_score(size)
    labels = classes[found[0]]
    if len(classes) == _MAX_CLASSES[refinement.kind] < scores.num_classes:
        # So many classes win that not all were refined: where one of the others does, it keeps the pixel.
        plain, plain_values = scores.label_and_score(size)
        others = ~torch.isin(plain[0], classes)
        return torch.where(others, plain[0], labels), torch.where(others, plain_values[0], values[0])
    return labels, values[0]


def refined_dense(scores: Scores, image: Tensor, refinement: Refinement) -> Tensor:
    """Every class at every pixel, refined by PAMR where that is asked for: (C, H, W) float32.

    Raises LexisegError if another refinement is asked for, which the protocols that need this do not know.
    """
    if refinement.kind not in ("none", "pamr"):
        raise LexisegError(
            f"The protocols of the training-free papers have no refinement '{refinement.kind}'; choose none or pamr."
        )
    size = (int(image.shape[1]), int(image.shape[2]))
    dense = scores.dense(size)
    if refinement.kind == "pamr":
        dense = pamr(dense, _guide(image, size, dense.device), refinement.steps, refinement.dilations)
    return dense[0]


def candidates(scores: Scores, size: Size, limit: int) -> Tensor:
    """The classes (K,), ascending, that are among the best few somewhere; all of them where they are no more."""
    if scores.num_classes <= limit:
        return torch.arange(scores.num_classes, device=scores.device)
    _, best = scores.top_k(_fit(size, short=_CELLS), _RANKS)
    # Winners come before all others, whatever the others' number of places.
    weights = torch.tensor([float(best[0, 0].numel()), 1.0, 1.0], device=best.device)[:, None, None]
    counts = torch.zeros(scores.num_classes, device=best.device)
    counts.index_add_(0, best[0].flatten(), weights.expand(best[0].shape).flatten())
    found = counts.topk(min(limit, int((counts > 0).sum()))).indices
    return found.sort().values


def _fit(size: Size, *, short: int | None = None, pixels: int | None = None) -> Size:
    """A size of the same shape, no larger, with this shorter side or about so many pixels."""
    factor = short / min(size) if short is not None else ((pixels or 1) / (size[0] * size[1])) ** 0.5
    factor = min(factor, 1.0)
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def _guide(image: Tensor, size: Size, device: torch.device) -> Tensor:
    """The picture's colours (1, 3, h, w), RGB in 0..1, each the mean of its cell."""
    return F.interpolate(image[None].to(device).float() / 255, size=size, mode="area")


# ---- edges


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

    return _by_parts(smoothed, scores, _WORDS)


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


# ---- regions


@torch.no_grad()
def region_map(image: Tensor, size: Size, generator: Any, device: torch.device) -> Tensor:
    """Which region each pixel lies in, -1 for none: (h, w) int64. Where regions overlap the smallest has the pixel.

    ``image``: uint8 (3, H, W). ``generator``: a `lexiseg.proposals.ProposalGenerator`; None is SAM. Raises LexisegError
    if SAM's weights cannot be had.
    """
    generator = _sam() if generator is None else generator
    pixels = normalise(image[None].to(device).float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    height, width = (int(side) for side in image.shape[-2:])
    stride = int(generator.stride)
    padded = F.pad(pixels, (0, -width % stride, 0, -height % stride))
    proposals = generator.to(device).eval()(padded)
    masks = proposals.mask_logits[0].float()
    if proposals.valid is not None:
        masks = masks[proposals.valid[0]]
    frame = (int(padded.shape[-2]), int(padded.shape[-1]))
    regions = torch.full(size, -1, dtype=torch.long, device=device)
    for index in (masks > 0).flatten(1).sum(1).argsort(descending=True).tolist():
        full = F.interpolate(masks[index][None, None], size=frame, mode="bilinear", align_corners=False)
        own = full[..., :height, :width]
        if size != (height, width):
            own = F.interpolate(own, size=size, mode="bilinear", align_corners=False)
        regions[own[0, 0] > 0] = index
    return regions


@cache
def _sam() -> Any:
    """SAM's automatic masks, loaded once."""
    from lexiseg.proposals.build import build_generator
    from lexiseg.proposals.options import SamOptions

    return build_generator(SamOptions(overlaps="all", points_per_side=16))


def vote(labels: Tensor, values: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Give each region the label of most of its pixels (of several the lowest); pixels in no region keep theirs.

    ``labels``: (h, w) int64. ``regions``: (h, w) from `region_map`. Returns labels and scores; in a region, the score
    is the mean over those pixels that had its label.
    """
    inside = regions >= 0
    if not bool(inside.any()):
        return labels, values
    names, flat = labels.unique(return_inverse=True)
    num_regions = int(regions.max()) + 1
    key = regions[inside] * len(names) + flat[inside]
    counts = torch.bincount(key, minlength=num_regions * len(names)).view(num_regions, -1)
    sums = torch.bincount(key, weights=values[inside].double(), minlength=counts.numel()).view(num_regions, -1)
    most, winner = counts.max(dim=1)
    mean = sums.gather(1, winner[:, None])[:, 0] / most.clamp(min=1)
    labels, values = labels.clone(), values.clone()
    labels[inside] = names[winner[regions[inside]]]
    values[inside] = mean.float()[regions[inside]]
    return labels, values
