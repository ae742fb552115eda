"""What no proposal claims, as proposals of its own: regions of classes that had no masks in training.

A generator that is trained on the masks of seen classes learns to leave out everything else: pixels of unseen classes
have no label there, and are negatives of every mask. So what its masks leave uncovered is where unseen things are.
None of the papers does this; it needs no training and no words.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lexiseg.proposals.base import HARD_LOGIT, Proposals
from lexiseg.strict import StrictModel


class LeftoverOptions(StrictModel):
    """Options of `add_leftover`.

    Attributes:
        count: at most this many regions, the largest ones; 0 adds none.
        threshold: a place is left over where every mask has a smaller probability than this.
        min_fraction: smallest region, as a fraction of the area of the masks.
    """

    count: Annotated[int, Field(ge=0)] = 0
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.85
    min_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0025


@torch.no_grad()
def add_leftover(
    proposals: Proposals, options: LeftoverOptions, frame: Sequence[int] = (1, 1), size: Sequence[int] = (1, 1)
) -> Proposals:
    """Append the connected parts of what no proposal claims.

    Their mask logits say how far below the threshold the best of the proposals is there, so that their borders lie
    between two places of the grid as those of other masks do. Their embeddings are 0: a class head says nothing of
    them. Slots that are not valid claim nothing, and earlier levels are dropped. The masks cover a padded ``frame``
    (H', W'), in which the picture has the ``size`` (H, W).
    """
    if not options.count:
        return proposals
    logits = proposals.mask_logits.float()
    batch, number, height, width = logits.shape
    claims = logits
    if proposals.valid is not None:
        claims = logits.masked_fill(~proposals.valid[..., None, None], -HARD_LOGIT)
    best = claims.amax(dim=1) if number else logits.new_full((batch, height, width), -HARD_LOGIT)
    lacking = (math.log(options.threshold / (1.0 - options.threshold)) - best).clamp(-HARD_LOGIT, HARD_LOGIT)
    rows, columns = math.ceil(size[0] / frame[0] * height), math.ceil(size[1] / frame[1] * width)
    lacking[:, rows:], lacking[:, :, columns:] = -HARD_LOGIT, -HARD_LOGIT
    added = logits.new_full((batch, options.count, height, width), -HARD_LOGIT)
    there = torch.zeros(batch, options.count, dtype=torch.bool, device=logits.device)
    smallest = options.min_fraction * rows * columns
    for index, image in enumerate(lacking):
        parts = _parts(image > 0, smallest, options.count)
        # One place more on every side: there the logits fall below zero by themselves.
        near = F.max_pool2d(parts[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
        added[index, : len(parts)] = torch.where(near, image, -HARD_LOGIT)
        there[index, : len(parts)] = True
    valid = proposals.valid
    if valid is None:
        valid = torch.ones(batch, number, dtype=torch.bool, device=logits.device)
    embeddings = proposals.embeddings
    if embeddings is not None:
        embeddings = F.pad(embeddings, (0, 0, 0, options.count))
    masks = torch.cat([proposals.mask_logits, added.to(proposals.mask_logits.dtype)], dim=1)
    return replace(proposals, mask_logits=masks, embeddings=embeddings, valid=torch.cat([valid, there], dim=1), aux=())


def _parts(left: Tensor, smallest: float, count: int) -> Tensor:
    """The connected parts of a map (h, w), largest first: (K, h, w) bool, K at most ``count``."""
    from scipy import ndimage

    labels, found = ndimage.label(left.cpu().numpy())
    parts = torch.from_numpy(labels).to(left.device)
    areas = torch.bincount(parts.flatten(), minlength=found + 1)[1:]
    order = [int(index) for index in areas.argsort(descending=True, stable=True) if areas[index] >= smallest]
    return torch.stack([parts == index + 1 for index in order[:count]]) if order else left.new_zeros(0, *left.shape)
