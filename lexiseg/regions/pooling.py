"""Masks resized, and vectors of unit length, as every system of regions needs them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]

# A hundred masks at full resolution take gigabytes, so that they are made this many pixels at a time.
_PIXELS = 1 << 23


def resize_masks(masks: Tensor, size: tuple[int, ...], align_corners: bool = False) -> Tensor:
    """Resize (B, N, h, w) bilinearly to ``size`` (H, W), also where there is no mask at all, which torch refuses.

    No antialias: where the grid is much smaller only the pixels next to each place count, as in the authors' codes.
    """
    if masks.shape[-2:] == size:
        return masks
    if not masks.shape[0] * masks.shape[1]:
        return masks.new_zeros((*masks.shape[:2], *size))
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=align_corners)


def full_resolution(mask_logits: Tensor, frame: Tensor, align_corners: bool) -> Iterator[Tensor]:
    """Mask logits (B, N, h, w) at every pixel of ``frame`` (..., H, W): float (B, n, H, W), some of the N at a time.

    No masks at all are one part as well.
    """
    size = frame.shape[-2:]
    step = max(_PIXELS // (len(mask_logits) * size[0] * size[1]), 1)
    return (resize_masks(part.float(), size, align_corners) for part in mask_logits.split(step, dim=1))


def unit_or_zero(x: Tensor) -> Tensor:
    """Divide by the length along the last axis; a vector of zeros, from an empty mask, stays zero.

    The released code adds 1e-10 to every length of a batch once one of them is zero. That changes a vector by less
    than rounding does, unless it is nearly zero itself, and would let one picture touch the results of another.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, torch.ones_like(length))
