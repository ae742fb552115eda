"""What models are trained with: losses on class masks and on regions, one file each."""

from lexiseg.losses.exclusive import exclusive_logits, exclusive_losses
from lexiseg.losses.masks import (
    IGNORE_INDEX,
    MaskLosses,
    count_masks,
    ignore_index,
    mask_losses,
    pixel_accuracy,
    pseudo_labels,
)
from lexiseg.losses.ssim import ssim_loss

__all__ = [
    "IGNORE_INDEX",
    "MaskLosses",
    "count_masks",
    "exclusive_logits",
    "exclusive_losses",
    "ignore_index",
    "mask_losses",
    "pixel_accuracy",
    "pseudo_labels",
    "ssim_loss",
]
