"""Cleaner masks from any system's scores, by what the picture itself shows: `edges`, `pamr` and `regions`.

- ``edges``: smoothing that stops where colours change, after the edge-avoiding "a trous" filter (Dammertz et al.,
  HPG 2010), on a lattice coarser than the picture: fast.
- ``pamr``: pixel-adaptive mask refinement (Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels",
  CVPR 2020), as the training-free papers use it: each pixel takes the mean of similar pixels around it, several times.
- ``regions``: a vote inside the regions that a proposal generator finds: each region gets the label of most of its
  pixels (as in CorrCLIP, Zhang et al., ICCV 2025).

Nothing here is trained. Smoothing works class by class, and only on classes that are among the best somewhere, so that
memory does not grow with the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.hub import INTO_CACHE, cached
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from lexiseg.proposals.options import SamOptions
from lexiseg.scores import GridScores, Scores
from lexiseg.smoothing import pamr, smooth
from lexiseg.words import describe, finite, whole_number

Kind = Literal["none", "edges", "pamr", "regions"]
Size = tuple[int, int]

# Classes that are refined at most, of those that are among the best `_RANKS` somewhere on a lattice of `_CELLS`: what
# smoothing keeps of a class is a lattice of edges, or a picture of PAMR.
MAX_CLASSES = {"edges": 512, "pamr": 64}
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
        for name in ("cells", "steps", "max_pixels"):
            whole_number(getattr(self, name), f"A refinement's {name}", 1)
        for name in ("distances", "dilations"):
            if not isinstance(numbers := getattr(self, name), list | tuple) or not numbers:
                raise LexisegError(f"A refinement's {name} must be a list of numbers, not {describe(numbers)}.")
            for number in numbers:
                whole_number(number, f"Each of a refinement's {name}", 1)
        width = self.colour_width
        if isinstance(width, str) or finite(width, "A refinement's colour_width") <= 0:
            raise LexisegError(f"A refinement's colour_width must be a number above 0, not {describe(width)}.")

    @classmethod
    def parse(cls, value: str | Refinement | None) -> Refinement:
        """A `Refinement` as it is, one of its kinds by name, or none. Raises LexisegError if there is no such kind."""
        if isinstance(value, Refinement):
            return value
        return cls(kind=value or "none")  # type: ignore[arg-type]


def refine(scores: Scores, image: Tensor, refinement: Refinement) -> tuple[Tensor, Tensor]:
    """The labels of a picture and their scores, refined.

    ``image``: the picture, uint8 (3, H, W). Returns labels (H, W) int64 and the winning scores (H, W) float32, on the
    scores' device. Raises LexisegError if the scores are not finite, or the regions cannot be had.
    """
    size = int(image.shape[1]), int(image.shape[2])
    if refinement.kind in ("none", "regions"):
        found, values = scores.label_and_score(size)
        if refinement.kind == "none":
            return found[0], values[0]
        return vote(found[0], values[0], region_map(image, refinement.regions, scores.device))
    classes = candidates(scores, size, MAX_CLASSES[refinement.kind])
    edges = refinement.kind == "edges"
    grid = _fit(size, short=refinement.cells) if edges else _fit(size, pixels=refinement.max_pixels)
    parts, guide = scores.dense(grid, classes), _guide(image, grid, scores.device)
    if edges:
        smoothed = smooth(parts, guide, refinement.distances, refinement.colour_width)
    else:
        smoothed = pamr(parts, guide, refinement.steps, refinement.dilations)
    found, values = GridScores(smoothed).label_and_score(size)
    labels = classes[found[0]]
    if len(classes) == MAX_CLASSES[refinement.kind] < scores.num_classes:
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


# ---- regions


@torch.no_grad()
def region_map(image: Tensor, generator: Any, device: torch.device) -> Tensor:
    """Which region each pixel lies in, -1 for none: (H, W) int64. Where regions overlap the smallest has the pixel.

    ``image``: uint8 (3, H, W). ``generator``: a `lexiseg.proposals.ProposalGenerator`; None is SAM. Raises LexisegError
    if SAM's weights cannot be had.
    """
    generator = sam() if generator is None else generator
    pixels = normalise(image[None].to(device).float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    height, width = (int(side) for side in image.shape[-2:])
    stride = int(generator.stride)
    padded = F.pad(pixels, (0, -width % stride, 0, -height % stride))
    proposals = generator.to(device).eval()(padded)
    masks = proposals.mask_logits[0].float()
    if proposals.valid is not None:
        masks = masks[proposals.valid[0]]
    frame = (int(padded.shape[-2]), int(padded.shape[-1]))
    regions = torch.full((height, width), -1, dtype=torch.long, device=device)
    for index in (masks > 0).flatten(1).sum(1).argsort(descending=True).tolist():
        full = F.interpolate(masks[index][None, None], size=frame, mode="bilinear", align_corners=False)
        regions[full[0, 0, :height, :width] > 0] = index
    return regions


def has_sam() -> bool:
    """Whether SAM's weights are on this machine, so that `sam` downloads nothing."""
    return cached(SamOptions().weights, ("model.safetensors",)) is not None


@cache
def sam() -> Any:
    """SAM's automatic masks, loaded once. Raises LexisegError if they cannot be had."""
    from lexiseg.proposals.sam import Sam

    generator = Sam(SamOptions(overlaps="all", points_per_side=16))
    generator.load(then=INTO_CACHE)
    return generator


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
