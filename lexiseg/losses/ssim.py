"""Structural similarity of mask logits and class masks, the second loss of SPT-SEG.

The released code takes the logits as they are, without a sigmoid, and does not divide by the number of masks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.losses.masks import bilinear_matrix, check_labels, gradient_of, ignore_index, with_gradient
from lexiseg.losses.reduction import reduction_weight

_SIDE, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
# Classes whose maps at the labels' size are in memory at once.
_CHUNK = 32
_Sides = tuple[Tensor, Tensor]


def ssim_loss(logits: Tensor, labels: Tensor, *, weight: float = 1.0) -> Tensor:
    """``weight * (1 - SSIM)`` of mask logits (B, C, h, w), upsampled bilinearly, and binary masks of labels (B, H, W).

    The statistics are those of a Gaussian window of 11 x 11 and sigma 1.5, with zeros around the map; the mean is over
    images, all classes and pixels. A class that is absent from an image, and a pixel labelled 255, have the target 0; a
    label that is neither that nor in 0..C-1 is a `LexisegError`. The gradient is computed on the way, as in
    `mask_losses`.
    """
    check_labels(labels, logits.shape[1])
    with torch.autocast(logits.device.type, enabled=False):
        gradient = gradient_of(logits)
        loss = _batch_loss(logits.detach().float(), labels.long(), weight, gradient)
        return with_gradient(loss, logits, gradient) * reduction_weight(len(logits), logits.device)


def _batch_loss(logits: Tensor, labels: Tensor, weight: float, gradient: Tensor | None) -> Tensor:
    """The loss, whose gradient is written into ``gradient``."""
    height, width = labels.shape[-2:]
    sides = ((logits.shape[-2], height), (logits.shape[-1], width))
    resize: Any = [bilinear_matrix(source, target, logits.device) for source, target in sides]
    window: Any = [_window_matrix(target, logits.device) for _, target in sides]
    total = logits.new_zeros(())
    scale = weight / (logits.shape[0] * logits.shape[1] * height * width)
    for index, image in enumerate(logits):
        present = labels[index].unique()
        present = present[present != ignore_index(logits.shape[1])]
        absent = torch.ones(len(image), dtype=torch.bool, device=image.device)
        absent[present] = False
        for classes, are_present in ((present, True), (absent.nonzero().flatten(), False)):
            for chunk in classes.split(_CHUNK):
                with torch.set_grad_enabled(gradient is not None):
                    part = image[chunk].requires_grad_(gradient is not None)
                    target = (labels[index] == chunk[:, None, None]).float() if are_present else None
                    similarity = _ssim(part, resize, window, target).sum()
                    if gradient is not None:
                        gradient[index, chunk] = -scale * torch.autograd.grad(similarity, part)[0]
                total += similarity.detach()
    return weight - scale * total


def _ssim(x: Tensor, resize: _Sides, window: _Sides, target: Tensor | None) -> Tensor:
    """Similarity map (C, H, W) of maps (C, h, w), upsampled first, and masks (C, H, W), or None for zeros."""

    def apply(sides: _Sides, maps: Tensor) -> Tensor:
        return sides[0] @ maps @ sides[1].T

    large = x if x.shape[-2:] == (len(resize[0]), len(resize[1])) else apply(resize, x)
    mean = apply((window[0] @ resize[0], window[1] @ resize[1]), x)
    variance = apply(window, large * large) - mean * mean
    if target is None:
        return _C1 * _C2 / ((mean * mean + _C1) * (variance + _C2))
    covered = apply(window, target)  # also the mean of the squares, which are the masks themselves
    covariance = apply(window, large * target) - mean * covered
    top = (2 * mean * covered + _C1) * (2 * covariance + _C2)
    return top / ((mean * mean + covered * covered + _C1) * (variance + covered - covered * covered + _C2))


def _window_matrix(size: int, device: torch.device) -> Tensor:
    """The (size, size) matrix that filters a signal with the Gaussian window, with zeros around it."""
    place = torch.arange(_SIDE, device=device, dtype=torch.float32) - _SIDE // 2
    window = torch.exp(-(place**2) / (2 * _SIGMA**2))
    window = window / window.sum()
    identity = torch.eye(size, dtype=torch.float32, device=device)[:, None]
    return F.conv1d(identity, window[None, None], padding=_SIDE // 2)[:, 0]
