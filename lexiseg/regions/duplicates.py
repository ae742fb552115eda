"""Regions that repeat another one, which need no run of the tower of their own; no paper leaves them out."""

import torch
from torch import Tensor


def near_duplicates(mask_logits: Tensor, threshold: float | None) -> Tensor:
    """For each region (N, h, w) of mask logits the first one whose binary mask it repeats with an IoU of ``threshold``.

    (N,) long, itself for a region that repeats none before it; with None that is each. A region is never mapped to one
    that is itself mapped.
    """
    if threshold is None:
        return torch.arange(len(mask_logits), device=mask_logits.device)
    inside = (mask_logits > 0).flatten(1).float()
    common, area = inside @ inside.T, inside.sum(dim=1)
    iou = common / (area[:, None] + area[None] - common).clamp(min=1.0)
    first: list[int] = []
    for index, alike in enumerate((iou >= threshold).tolist()):
        first.append(next((other for other in range(index) if alike[other] and first[other] == other), index))
    return torch.tensor(first, dtype=torch.long, device=mask_logits.device)
