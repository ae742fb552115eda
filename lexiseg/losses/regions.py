"""The loss of DeOP's last stage: the squashed map of class scores against the label map, without matching.

Han et al., "Open-Vocabulary Semantic Segmentation with Decoupled One-Pass Network", ICCV 2023, Sec. 3.2: dice and
focal loss. How they are combined is only in the released code, which this follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.losses.masks import MaskLosses, bilinear_matrix, check_labels, gradient_of, ignore_index, with_gradients
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
    gradients = gradient_of(class_probabilities), gradient_of(mask_logits)
    focal, dice = mask_logits.new_zeros((2,), dtype=torch.float32)
    with torch.autocast(mask_logits.device.type, enabled=False):
        for index in range(batch):
            image = _Image(class_probabilities[index].detach(), mask_logits[index].detach(), labels[index], scale)
            with torch.no_grad():
                inside, predicted, focal_sum = map(sum, zip(*(image.sums(part) for part in image.parts), strict=True))
            top = 2.0 * inside + 1.0
            bottom = predicted + (labels[index] != ignore_index(channels - 1)).sum() + 1.0
            focal_scale, dice_scale = focal_weight / (channels * labels.numel()), dice_weight / batch
            focal = focal + focal_scale * focal_sum
            dice = dice + dice_scale * (1.0 - top / bottom)
            # The dice term's derivatives by the two sums it is made of.
            slopes = (-2.0 * dice_scale / bottom, dice_scale * top / bottom.square(), focal_scale)
            image.add_gradients(slopes, *(None if gradient is None else gradient[index] for gradient in gradients))
        total = with_gradients(focal + dice, *zip((class_probabilities, mask_logits), gradients, strict=True))
        weight = reduction_weight(len(labels), labels.device)
        return MaskLosses(total * weight, focal * weight, dice * weight)


class _Image:
    """The score map of one image, some rows at a time; of probabilities (N, C + 1), logits (N, h, w), labels (H, W)."""

    def __init__(self, probabilities: Tensor, mask_logits: Tensor, labels: Tensor, scale: float) -> None:
        self.probabilities, self.mask_logits = probabilities.float(), mask_logits.float()
        self.last = probabilities.shape[1] - 1
        self.target = labels.long().where(labels != ignore_index(self.last), self.last)
        self.scale, self.offset = scale, self.probabilities.new_tensor(-scale)
        height, width = labels.shape
        # A resize by two matrix products can be done row by row.
        self.rows = bilinear_matrix(mask_logits.shape[1], height, mask_logits.device)
        self.columns = bilinear_matrix(mask_logits.shape[2], width, mask_logits.device)
        step = max(1, CHUNK // (max(self.last + 1, len(mask_logits)) * width))
        self.parts = [slice(start, min(start + step, height)) for start in range(0, height, step)]

    def map(self, part: slice) -> tuple[Tensor, Tensor]:
        """Map values x (C + 1, P) of some rows, and the channel (P,) that is each pixel's positive."""
        masks = (self.rows[part] @ self.mask_logits @ self.columns.T).sigmoid().flatten(1)
        x = torch.addmm(self.offset, (self.scale * self.probabilities).T, masks).sigmoid()
        return x, self.target[part].flatten()

    def sums(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows: x over the positives of real classes, x over the real classes, and the focal terms, summed."""
        x, target = self.map(part)
        right = x.gather(0, target[None])[0]
        # All are negatives first, with p_t = 1 - x; the positive of each pixel is corrected afterwards.
        focal = (1.0 - _ALPHA) * (_focal(x) - _focal(right)) + _ALPHA * _focal(1.0 - right)
        return right[target < self.last].sum(), x[:-1].sum(), focal

    def add_gradients(
        self, slopes: tuple[Tensor, Tensor, float], for_probabilities: Tensor | None, for_masks: Tensor | None
    ) -> None:
        """Add the gradients by probabilities (N, C + 1) and mask logits (N, h, w), a few rows in memory at a time.

        Args:
            slopes: derivatives of the loss by the three `sums`.
            for_probabilities: where to add, or None.
            for_masks: where to add, or None.
        """
        pairs = [(self.probabilities, for_probabilities), (self.mask_logits, for_masks)]
        known = [(tensor.requires_grad_(), memory) for tensor, memory in pairs if memory is not None]
        for part in self.parts if known else ():
            with torch.enable_grad():
                x, target = self.map(part)
            slope = self.slope(x.detach(), target, *slopes)
            found = torch.autograd.grad(x, [tensor for tensor, _ in known], slope)
            for (_, memory), gradient in zip(known, found, strict=True):
                memory += gradient

    def slope(self, x: Tensor, target: Tensor, inside: Tensor, predicted: Tensor, focal: float) -> Tensor:
        """The loss's derivative by x (C + 1, P), by hand: autograd would take twice the passes over the map."""
        slope = _focal_slope(x).mul_((1.0 - _ALPHA) * focal)
        slope[:-1] += predicted
        right = x.gather(0, target[None])
        positive = -_ALPHA * focal * _focal_slope(1.0 - right) + (target < self.last) * (inside + predicted)
        return slope.scatter_(0, target[None], positive)


def _focal(x: Tensor) -> Tensor:
    """The sum of -x^2 log(1 - x), 1 - x kept away from 0 and 1 in the logarithm."""
    return -(1.0 - x).clamp_(_CLAMP, 1.0 - _CLAMP).log_().mul_(x).mul_(x).sum()


def _focal_slope(x: Tensor) -> Tensor:
    """The derivative of `_focal` by each x."""
    rest = 1.0 - x
    kept = rest.clamp(_CLAMP, 1.0 - _CLAMP)
    return x.square().div_(kept).mul_(kept == rest).addcmul_(x, kept.log_(), value=-2.0)
