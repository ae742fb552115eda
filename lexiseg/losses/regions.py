"""The loss of DeOP's last stage: the squashed map of class scores against the label map, without matching.

Han et al., "Open-Vocabulary Semantic Segmentation with Decoupled One-Pass Network", ICCV 2023, Sec. 3.2: dice and
focal loss. How they are combined is only in the released code, which this follows.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lexiseg.errors import LexisegError
from lexiseg.losses.masks import MaskLosses, bilinear_matrix, check_labels, ignore_index
from lexiseg.losses.reduction import reduction_weight

_ALPHA = 0.25
_CLAMP = 1e-4
# Entries of the score map that are held at a time; at 157 classes that is 16 rows of 512 pixels.
CHUNK = 1 << 20


def region_map_losses(
    class_probabilities: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    *,
    scale: float = 3.0,
    focal_weight: float = 2.0,
    dice_weight: float = 0.8,
) -> MaskLosses:
    """Focal and dice loss of the score map that regions make together.

    P(c, pixel) = sum over regions of probability(region, c) * sigmoid(mask logit at the pixel), the masks upsampled to
    the labels' size; x = sigmoid(scale * P - scale). The target is one-hot over the C classes and "no object", which
    takes the pixels labelled 255: they are positives of that channel, not left out. Focal: -a (1 - p_t)^2 log p_t, with
    p_t kept 1e-4 away from 0 and 1 in the logarithm and a = 0.25 for positives, averaged over images, channels and
    pixels. Dice: 1 - (2 sum(x t) + 1) / (sum x + sum t + 1) over all pixels and real classes of an image at once,
    averaged over the images. The map and its gradient are made a few rows at a time, so that memory grows with neither
    the classes nor the picture.

    Args:
        class_probabilities: (B, N, C + 1), softmax over the classes and "no object", which is the last.
        mask_logits: (B, N, h, w).
        labels: (B, H, W) long in 0..C-1, 255 = no class; others, or shapes that do not belong together, are a
            `LexisegError`.
        scale: steepness of the squashing (released: 3).
        focal_weight: factor on the focal term (released: 2).
        dice_weight: factor on the dice term (released: 0.8).
    """
    if (
        class_probabilities.ndim != 3
        or mask_logits.ndim != 4
        or labels.ndim != 3
        or class_probabilities.shape[:2] != mask_logits.shape[:2]
        or len(labels) != len(mask_logits)
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (class_probabilities, mask_logits, labels))
        raise LexisegError(
            f"Class probabilities, mask logits and labels of the shapes {shapes} do not match; "
            "give (B, N, C + 1), (B, N, h, w) and (B, H, W)."
        )
    check_labels(labels, class_probabilities.shape[2] - 1)
    if not labels.numel():
        raise LexisegError("There are no pixels for the loss; give at least one image.")
    batch, _, channels = class_probabilities.shape
    height, width = labels.shape[1:]
    # A resize by two matrix products can be done row by row.
    rows = bilinear_matrix(mask_logits.shape[2], height, mask_logits.device)
    columns = bilinear_matrix(mask_logits.shape[3], width, mask_logits.device)
    step = max(1, CHUNK // (max(channels, class_probabilities.shape[1]) * width))
    targets = labels.long().where(labels != ignore_index(channels - 1), channels - 1)
    focal, dice = mask_logits.new_zeros((2,), dtype=torch.float32)
    with torch.autocast(mask_logits.device.type, enabled=False):
        for scores, masks, target in zip(class_probabilities.float(), mask_logits.float(), targets, strict=True):
            # Each part of the map is made once more for its gradient, so that none is kept.
            parts = [
                checkpoint(
                    _sums, scores, masks, part, columns, goal, scale, use_reentrant=False, preserve_rng_state=False
                )
                for part, goal in zip(rows.split(step), target.split(step), strict=True)
            ]
            inside, predicted, focal_sum = map(sum, zip(*parts, strict=True))
            focal = focal + focal_sum
            dice = dice + 1.0 - (2.0 * inside + 1.0) / (predicted + (target < channels - 1).sum() + 1.0)
        weight = reduction_weight(batch, labels.device)
        focal = focal * (focal_weight * weight / (channels * labels.numel()))
        dice = dice * (dice_weight * weight / batch)
        return MaskLosses(focal + dice, focal.detach(), dice.detach())


def _sums(
    probabilities: Tensor, mask_logits: Tensor, rows: Tensor, columns: Tensor, target: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows of an image: x over the positives of real classes, x over the real classes, and the focal terms.

    Probabilities (N, C + 1), mask logits (N, h, w), the matrices of the resize, and the positive channel of each pixel.
    """
    masks = (rows @ mask_logits @ columns.T).sigmoid().flatten(1)
    x = torch.addmm(masks.new_tensor(-scale), (scale * probabilities).T, masks).sigmoid()
    target = target.flatten()
    right = x.gather(0, target[None])[0]
    # All are negatives first, with p_t = 1 - x; the positive of each pixel is corrected afterwards.
    focal = (1.0 - _ALPHA) * (_focal(x) - _focal(right)) + _ALPHA * _focal(1.0 - right)
    return right[target < len(x) - 1].sum(), x[:-1].sum(), focal


def _focal(x: Tensor) -> Tensor:
    """The sum of -x^2 log(1 - x), 1 - x kept away from 0 and 1 in the logarithm."""
    return -(x.square() * (1.0 - x).clamp(_CLAMP, 1.0 - _CLAMP).log()).sum()
