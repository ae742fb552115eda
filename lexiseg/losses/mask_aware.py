"""MAFT's two losses: CLIP's score of a region should follow the quality of its mask, and CLIP should not drift.

Jiao et al., "Learning Mask-aware CLIP Representations for Zero-Shot Segmentation", NeurIPS 2023, Sec. 4.2. The released
code and the paper differ in what the target is; both are options, and the released form is the default.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lexiseg.losses.masks import check_labels, ignore_index
from lexiseg.losses.reduction import reduction_weight

Distance = Literal["smooth-l1", "l1", "l2", "kl"]
Normalisation = Literal["row", "matrix"]

EPS_IOU = 1e-7
EPS_RANGE = 1e-8


def mask_ious(masks: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """IoUs (k, N) of the proposals of a picture with the classes that are present, and their ids (k,), ascending.

    Args:
        masks: (N, H, W) in [0, 1]; soft masks give soft IoUs.
        labels: (H, W) long in 0..C-1, or 255; another value is a `LexisegError`.
        num_classes: C.
    """
    check_labels(labels, num_classes)
    present = labels.unique()
    present = present[present != ignore_index(num_classes)]
    truth = (labels.flatten()[None] == present[:, None]).to(masks.dtype)
    flat = masks.flatten(1)
    common = truth @ flat.T
    union = truth.sum(dim=1)[:, None] + flat.sum(dim=1)[None] - common
    return common / (union + EPS_IOU), present


def iou_targets(ious: Tensor, normalise: Normalisation = "row") -> Tensor:
    """Min-max normalisation of the IoUs (k, N) of one picture (Eq. 5).

    CLIP's best score is near 1 and a proposal's best IoU is not, so the IoUs are stretched to 0..1. Where all are
    equal, the target is 0.
    """
    if not ious.numel():
        return ious
    low, high = (
        (ious.amin(dim=1, keepdim=True), ious.amax(dim=1, keepdim=True))
        if normalise == "row"
        else (ious.min(), ious.max())
    )
    return (ious - low) / (high - low + EPS_RANGE)


def mask_aware_loss(scores: Tensor, targets: Tensor, distance: Distance = "smooth-l1") -> Tensor:
    """How far the scores of the proposals are from the quality of their masks (Eq. 6 and Table 4b).

    Args:
        scores: (R, N) CLIP's probability of a class for each proposal, one row for each class of each picture. The mean
            is over all rows, so that pictures with more classes weigh more, as in the released code.
        targets: (R, N) from `iou_targets`, without gradient.
        distance: "smooth-l1" is Eq. 7. "kl", which the paper does not define, is the divergence of the scores from the
            targets over the proposals, each made a distribution by dividing by its sum.

    Returns a scalar; 0, with a gradient of 0, if there is nothing to compare.
    """
    weight = reduction_weight(len(scores) if distance == "kl" else scores.numel(), scores.device)
    if not scores.numel():
        return scores.sum() * 0.0
    targets = targets.detach()
    if distance == "smooth-l1":
        return F.smooth_l1_loss(scores, targets) * weight
    if distance == "l1":
        return F.l1_loss(scores, targets) * weight
    if distance == "l2":
        return F.mse_loss(scores, targets) * weight
    total = targets.sum(dim=1, keepdim=True)
    target = targets / total.clamp(min=EPS_RANGE)
    ours = scores / scores.sum(dim=1, keepdim=True).clamp(min=EPS_RANGE)
    return F.kl_div(ours.clamp(min=EPS_RANGE).log(), target, reduction="batchmean") * weight


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance between probabilities (B, C) of whole pictures, student's and teacher's (Eq. 8)."""
    return F.smooth_l1_loss(student, teacher.detach()) * reduction_weight(len(student), student.device)
