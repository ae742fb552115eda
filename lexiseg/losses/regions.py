"""The loss of DeOP's last stage: the map of class scores itself, squashed, against the label map; nothing is matched.

Han et al., "Open-Vocabulary Semantic Segmentation with Decoupled One-Pass Network", ICCV 2023, Sec. 3.2: dice and
focal loss. How they are put together is only in the released code, which this follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lexiseg.errors import LexisegError
from lexiseg.losses.masks import MaskLosses, bilinear_matrix, check_labels, ignore_index
from lexiseg.losses.shares import share_weight

_ALPHA = 0.25
_CLAMP = 1e-4
# Entries of the score map that are held at a time; at 157 classes that is 64 rows of 512 pixels.
_CHUNK = 1 << 22


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
    averaged over the images.

    The map is made a few rows at a time and its gradient on the way, so that memory grows with neither the classes nor
    the picture.

    Args:
        class_probabilities: (B, N, C + 1), softmax over the classes and "no object", which is the last.
        mask_logits: (B, N, h, w).
        labels: (B, H, W) long in 0..C-1, 255 = no class.
        scale: steepness of the squashing (released: 3).
        focal_weight: factor on the focal term (released: 2).
        dice_weight: factor on the dice term (released: 0.8).

    Returns:
        the weighted terms; ``total`` carries the gradient, to both the probabilities and the masks.

    Raises:
        LexisegError: a label is neither in 0..C-1 nor 255, or the shapes do not belong together.
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
            f"Class probabilities, mask logits and labels of the shapes {shapes} do not belong together; "
            "give (B, N, C + 1), (B, N, h, w) and (B, H, W)."
        )
    check_labels(labels, class_probabilities.shape[2] - 1)
    with torch.autocast(mask_logits.device.type, enabled=False):
        total, focal, dice = _RegionMapLoss.apply(
            class_probabilities, mask_logits, labels.long(), scale, focal_weight, dice_weight
        )
    share = share_weight(len(labels), labels.device)
    return MaskLosses(total * share, focal.detach() * share, dice.detach() * share)


class _RegionMapLoss(torch.autograd.Function):
    """Focal plus dice with their gradients, computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        probabilities: Tensor,
        mask_logits: Tensor,
        labels: Tensor,
        scale: float,
        focal_weight: float,
        dice_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_probabilities, needs_masks = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        batch, _, channels = probabilities.shape
        height, width = labels.shape[-2:]
        focal = probabilities.new_zeros((), dtype=torch.float32)
        dice = torch.zeros_like(focal)
        for_probabilities = torch.zeros_like(probabilities, dtype=torch.float32) if needs_probabilities else None
        for_masks = torch.zeros_like(mask_logits, dtype=torch.float32) if needs_masks else None
        if not batch * height * width:
            raise LexisegError("There is no pixel to compute a loss of; give at least one image.")
        focal_scale = focal_weight / (batch * channels * height * width)
        for index in range(batch):
            image = _Image(probabilities[index].detach(), mask_logits[index].detach(), labels[index], scale)
            inside, predicted, focal_sum = image.sums()
            top = 2.0 * inside + 1.0
            bottom = predicted + (labels[index] != ignore_index(channels - 1)).sum() + 1.0
            focal += focal_scale * focal_sum
            dice += dice_weight / batch * (1.0 - top / bottom)
            if needs_probabilities or needs_masks:
                # d dice / dx is (top - 2 t bottom) / bottom^2.
                negative = float(dice_weight / batch * top / bottom.square())
                positive = negative - float(dice_weight / batch * 2.0 / bottom)
                image.gradients(
                    focal_scale,
                    negative,
                    positive,
                    None if for_probabilities is None else for_probabilities[index],
                    None if for_masks is None else for_masks[index],
                )
        ctx.save_for_backward(
            *(
                None if gradient is None else gradient.to(given.dtype)
                for gradient, given in ((for_probabilities, probabilities), (for_masks, mask_logits))
            )
        )
        ctx.mark_non_differentiable(focal, dice)
        return focal + dice, focal, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        first, second = (None if saved is None else outputs[0].to(saved.dtype) * saved for saved in ctx.saved_tensors)
        return first, second, None, None, None, None


class _Image:
    """The score map of one image, a few rows at a time.

    Args:
        probabilities: (N, C + 1).
        mask_logits: (N, h, w).
        labels: (H, W).
        scale: see `region_map_losses`.
    """

    def __init__(self, probabilities: Tensor, mask_logits: Tensor, labels: Tensor, scale: float) -> None:
        self.probabilities, self.mask_logits = probabilities.float(), mask_logits.float()
        self.channels = probabilities.shape[1]
        self.target = labels.where(labels != ignore_index(self.channels - 1), self.channels - 1)
        self.scale = scale
        height, width = labels.shape
        # A resize by two matrix products has a transpose, which is its gradient, and can be done row by row.
        self.rows = bilinear_matrix(mask_logits.shape[1], height, mask_logits.device)
        self.columns = bilinear_matrix(mask_logits.shape[2], width, mask_logits.device)
        step = max(1, _CHUNK // (max(self.channels, len(mask_logits)) * width))
        self.parts = [slice(start, min(start + step, height)) for start in range(0, height, step)]

    def _block(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (N, P) and x (C + 1, P) of some rows, and the channel (P,) that is each pixel's positive."""
        masks = (self.rows[part] @ self.mask_logits @ self.columns.T).sigmoid_().flatten(1)
        x = (self.probabilities.T @ masks).sub_(1.0).mul_(self.scale).sigmoid_()
        return masks, x, self.target[part].flatten()

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of x over the positives of real classes, sum of x over the real classes, sum of the focal terms."""
        inside = self.probabilities.new_zeros(())
        predicted, focal = torch.zeros_like(inside), torch.zeros_like(inside)
        for part in self.parts:
            _, x, target = self._block(part)
            right = x.gather(0, target[None])[0]
            inside += right[target < self.channels - 1].sum()
            predicted += x[:-1].sum()
            # All are negatives first, with p_t = 1 - x; the positive of each pixel is corrected afterwards.
            focal += (1.0 - _ALPHA) * _focal(1.0 - x).sum()
            focal += (_ALPHA * _focal(right) - (1.0 - _ALPHA) * _focal(1.0 - right)).sum()
        return inside, predicted, focal

    def gradients(
        self,
        focal_scale: float,
        dice_negative: float,
        dice_positive: float,
        for_probabilities: Tensor | None,
        for_masks: Tensor | None,
    ) -> None:
        """Add the gradients of the loss to ``for_probabilities`` (N, C + 1) and ``for_masks`` (N, h, w).

        Args:
            focal_scale: factor on the sum of the focal terms.
            dice_negative: derivative of the dice term by x where the class is not the pixel's.
            dice_positive: the same where it is.
            for_probabilities: where to add, or None.
            for_masks: where to add, or None.
        """
        for part in self.parts:
            masks, x, target = self._block(part)
            slope = _focal_slope(1.0 - x).mul_(-(1.0 - _ALPHA) * focal_scale)
            slope[:-1] += dice_negative
            right = x.gather(0, target[None])
            corrected = _focal_slope(right).mul_(_ALPHA * focal_scale)
            corrected += (target[None] < self.channels - 1) * dice_positive
            slope.scatter_(0, target[None], corrected)
            # d x / d P is scale * x (1 - x).
            slope.mul_(x).mul_(x.neg_().add_(1.0)).mul_(self.scale)
            if for_probabilities is not None:
                for_probabilities += masks @ slope.T
            if for_masks is not None:
                by_mask = (self.probabilities @ slope).mul_(masks).mul_(masks.neg_().add_(1.0))
                by_mask = by_mask.unflatten(1, (part.stop - part.start, -1))
                for_masks += self.rows[part].T @ by_mask @ self.columns


def _focal(p: Tensor) -> Tensor:
    """-(1 - p)^2 log p, p kept away from 0 and 1 in the logarithm."""
    return (1.0 - p).square_().mul_(p.clamp(_CLAMP, 1.0 - _CLAMP).log_()).neg_()


def _focal_slope(p: Tensor) -> Tensor:
    """Derivative of `_focal` by p: 2 (1 - p) log p - (1 - p)^2 / p, the second term 0 where the logarithm's is kept."""
    rest = 1.0 - p
    kept = p.clamp(_CLAMP, 1.0 - _CLAMP)
    second = rest.square().div_(kept).mul_((p >= _CLAMP) & (p <= 1.0 - _CLAMP))
    return kept.log_().mul_(rest).mul_(2.0).sub_(second)
