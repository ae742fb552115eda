"""Cross entropy over classes that exclude each other: what ZegCLIP's non-mutually exclusive loss replaces.

A pixel's logits go through a softmax over the classes, so a class gains only what others lose; `lexiseg.losses.masks`
judges every class by itself. A pixel labelled 255 has no class that could exclude the others and is left out here,
whereas there it is a negative of every class.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.losses.masks import MaskLosses, check_labels, count_masks, ignore_index
from lexiseg.losses.reduction import mean_count


def exclusive_losses(
    logits: Tensor, labels: Tensor, entropy_weight: float = 1.0, dice_weight: float = 0.0, weights: Tensor | None = None
) -> MaskLosses:
    """Cross entropy of the softmax over classes, the mean over labelled pixels, and dice of the same probabilities.

    Logits (B, C, h, w) are upsampled bilinearly to labels (B, H, W) in 0..C-1 or 255, other values being a
    `LexisegError`. The dice term is that of `lexiseg.losses.masks.mask_losses` on labelled pixels; with weight 0 it is
    not computed. ``weights`` (C,) are factors on the terms of each class.
    """
    check_labels(labels, logits.shape[1])
    size = (int(labels.shape[-2]), int(labels.shape[-1]))
    with torch.autocast(logits.device.type, enabled=False):
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        ignored = ignore_index(logits.shape[1])
        counted = labels != ignored
        weights = None if weights is None else weights.to(logits)
        summed = F.cross_entropy(logits, labels, weights, ignore_index=ignored, reduction="sum")
        labelled = mean_count(float(counted.sum()), labels.device)
        entropy = entropy_weight * summed / labelled
        dice = entropy.new_zeros(())
        if dice_weight:
            probabilities = logits.softmax(dim=1) * counted[:, None]
            target = torch.zeros_like(probabilities).scatter_(
                1, labels.where(counted, 0)[:, None], counted[:, None].to(probabilities.dtype)
            )
            sizes = target.sum((2, 3))
            inside = (probabilities * target).sum((2, 3))
            terms = 1.0 - (2.0 * inside + 1.0) / (probabilities.sum((2, 3)) + sizes + 1.0)
            terms = terms if weights is None else terms * weights
            dice = dice_weight * terms[sizes > 0].sum() / count_masks(labels, logits.shape[1])
    return MaskLosses(entropy + dice, entropy.detach(), dice.detach())


def exclusive_logits(logits: Tensor) -> Tensor:
    """Logits whose sigmoid is the softmax of ``logits`` (B, C, ...): ``log p - log(1 - p)``, float32."""
    log_p = logits.float().log_softmax(dim=1)
    # 1 - p without the rounding of a difference, and no infinity where p rounds to 1.
    return log_p - torch.expm1(log_p).neg().clamp(min=1e-30).log()
