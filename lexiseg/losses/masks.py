"""Losses on class masks: focal and dice, without a matching, as ZegCLIP trains with them; and cross entropy.

Channel c of the prediction is class c. Pixels labelled 255 (65535 where there are more than 255 classes) are not left
out: they are negatives of every class, as in the authors' code (the papers do not say). Focal and dice are divided by
the number of masks in the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.label_ids import IGNORE_INDEX, ignore_index
from lexiseg.losses.reduction import mean_count

_ALPHA = 0.25


@dataclass(frozen=True)
class MaskLosses:
    """Losses of class masks, each a scalar."""

    total: Tensor  # ``mask + dice``, weighted; carries the gradient
    mask: Tensor  # the weighted term that is summed over pixels, focal loss or cross entropy, detached
    dice: Tensor  # the weighted dice term, detached


def count_masks(labels: Tensor, num_classes: int = IGNORE_INDEX) -> float:
    """Number of (image, class) pairs in labels (B, H, W), averaged over the processes; at least 1 in all."""
    ignored = ignore_index(num_classes)
    count = float(sum(int((image.unique() != ignored).sum()) for image in labels))
    # At least 1 in the whole batch, so that several processes divide by what one would.
    return mean_count(count, labels.device)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check that labels are in 0..C-1, or `ignore_index`; another is a `LexisegError`."""
    ignored = ignore_index(num_classes)
    wrong = (labels != ignored) & ((labels >= num_classes) | (labels < 0))
    if bool(wrong.any()):
        raise LexisegError(
            f"A label is {int(labels[wrong][0])} but there are {num_classes} classes (0 to {num_classes - 1}, "
            f"{ignored} = no class); check the class list of the data."
        )


def mask_losses(
    logits: Tensor, labels: Tensor, focal_weight: float = 100.0, dice_weight: float = 1.0, weights: Tensor | None = None
) -> MaskLosses:
    """Focal and dice loss of class masks (ZegCLIP, Sec. 3.2 and its released code).

    The focal term is ``alpha_t (1 - p_t)^2 BCE``, alpha_t 0.25 for positives and 0.75 for negatives, averaged over all
    pixels of a mask and summed over images and classes, with every pixel that is not of the class a negative, 255
    included. The dice term ``1 - (2 sum(p t) + 1) / (sum p + sum t + 1)`` is taken for the classes present in an image
    only. Both are divided by `count_masks`. The prediction is upsampled one image at a time, and the gradient is
    computed on the way, so that neither upsampled masks of a batch nor one-hot labels are ever held in memory.

    Args:
        logits: (B, C, h, w) mask logits, before the sigmoid; upsampled bilinearly where the labels are larger.
        labels: (B, H, W) long in 0..C-1, or 255; others, or another batch size, are a `LexisegError`.
        focal_weight: factor on the focal term.
        dice_weight: factor on the dice term.
        weights: (C,) factors on the terms of each class; None is 1 for all.
    """
    if labels.ndim != 3 or logits.ndim != 4 or len(labels) != len(logits):
        raise LexisegError(
            f"Mask logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not match; "
            "give (B, C, h, w) and (B, H, W)."
        )
    check_labels(labels, logits.shape[1])
    masks = count_masks(labels, logits.shape[1])
    # The loss is computed in float32 whatever the model runs in: sums over so many pixels do not survive bfloat16.
    with torch.autocast(logits.device.type, enabled=False):
        gradient = gradient_of(logits)
        with torch.no_grad():
            factors = focal_weight / masks, dice_weight / masks
            weights = None if weights is None else weights.to(logits.device, torch.float32)
            focal, dice = _batch_losses(logits, labels.long(), factors, weights, gradient)
        return MaskLosses(with_gradient(focal + dice, logits, gradient), focal, dice)


def _batch_losses(
    logits: Tensor, labels: Tensor, factors: tuple[float, float], weights: Tensor | None, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Focal and dice, and their gradient with respect to the logits, which is written into ``gradient``.

    Written by hand because of what it saves. Forward and backward of 2 images of 512 x 512 with 60 classes, one thread:
    0.83 s and a process of 1.20 GB, against 6.4 s and 1.45 GB with torchvision's ``sigmoid_focal_loss`` checkpointed an
    image at a time; with 15 classes 0.25 s against 0.62 s.
    """
    focal, dice = logits.new_zeros((2,), dtype=torch.float32)
    height, width = labels.shape[-2:]
    resize = logits.shape[-2:] != (height, width)
    rows = bilinear_matrix(logits.shape[-2], height, logits.device)
    columns = bilinear_matrix(logits.shape[-1], width, logits.device)
    # One set of buffers serves all images: fresh memory of this size costs more than the arithmetic done in it.
    buffers = logits.new_empty((4, logits.shape[1], height * width), dtype=torch.float32)
    for index, (image, image_labels) in enumerate(zip(logits.float(), labels.flatten(1), strict=True)):
        x = (rows @ image @ columns.T if resize else image).reshape(len(image), -1)
        image_focal, image_dice, upstream = _image_losses(
            x, image_labels, *factors, gradient is not None, buffers, weights
        )
        focal, dice = focal + image_focal, dice + image_dice
        if gradient is not None and upstream is not None:
            upstream = upstream.view(-1, height, width)
            gradient[index] = rows.T @ upstream @ columns if resize else upstream
    return focal, dice


def with_gradient(value: Tensor, tensor: Tensor, gradient: Tensor | None) -> Tensor:
    """``value`` with a known gradient by ``tensor``, by way of a term that is 0; None leaves it out."""
    if gradient is None:
        return value
    term = (tensor.float() * gradient).sum()
    return value + (term - term.detach())


def gradient_of(tensor: Tensor) -> Tensor | None:
    """Float32 memory for the gradient by ``tensor``, zero; None where none is wanted."""
    wanted = tensor.requires_grad and torch.is_grad_enabled()
    return torch.zeros_like(tensor, dtype=torch.float32) if wanted else None


def bilinear_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """The (target, source) matrix whose product with a signal is its bilinear resize (align_corners False).

    A resize by two matrix products, and its transpose by two more, is several times faster on a CPU than the
    library's interpolation and its backward.
    """
    identity = torch.eye(source, dtype=torch.float32, device=device)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T


def _image_losses(
    x: Tensor,
    labels: Tensor,
    focal_weight: float,
    dice_weight: float,
    needed: bool,
    buffers: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weighted focal and dice of logits (C, P) and, if ``needed``, their gradient (C, P), in ``buffers``."""
    scale = focal_weight / x.shape[1]
    p, q, softplus, squared = buffers
    torch.sigmoid(x, out=p)
    torch.sigmoid(torch.neg(x, out=q), out=q)  # 1 - p, without the rounding of a difference
    torch.log(q.clamp_(min=1e-38), out=softplus).neg_()  # -log(1 - p)
    torch.mul(p, p, out=squared)
    # Everything is a negative first; the few positives (at most one per pixel) are corrected afterwards.
    # Sums of each class and then of all: one dot product of so many pixels loses digits, percents at 171 classes.
    negatives = torch.stack([(one * other).sum() for one, other in zip(squared, softplus, strict=True)])
    if weights is not None:
        negatives = negatives * weights
    focal = negatives.sum() * ((1.0 - _ALPHA) * scale)
    place = (labels != ignore_index(len(x))).nonzero().flatten()
    label = labels[place]
    x_t, p_t, q_t, softplus_t = (values[label, place] for values in (x, p, q, softplus))
    log_t = softplus_t - x_t  # -log p
    positives = _ALPHA * q_t.square() * log_t - (1.0 - _ALPHA) * p_t.square() * softplus_t
    focal = focal + scale * (positives if weights is None else positives * weights[label]).sum()

    present, slot = label.unique(return_inverse=True)
    p_present = p[present]
    counts = torch.bincount(slot, minlength=len(present)).to(x.dtype)
    inside = torch.zeros_like(counts).index_add_(0, slot, p_t)
    top, bottom = 2.0 * inside + 1.0, p_present.sum(dim=1) + counts + 1.0
    terms = 1.0 - top / bottom
    dice = dice_weight * (terms if weights is None else terms * weights[present]).sum()
    if not needed:
        return focal, dice, None

    # d/dx of (1 - a) p^2 softplus(x) is (1 - a) p^2 (2 (1 - p) softplus(x) + p).
    gradient = softplus.mul_(q).mul_(2.0).add_(p).mul_(squared).mul_((1.0 - _ALPHA) * scale)
    # d/dx of a (1 - p)^2 (-log p) is -a (1 - p)^2 (2 p (-log p) + 1 - p).
    gradient[label, place] = (-_ALPHA * scale) * q_t.square() * (2.0 * p_t * log_t + q_t)
    # d/dp of 1 - top / bottom is (top - 2 t bottom) / bottom^2, and dp/dx is p (1 - p).
    slope = p_present * (1.0 - p_present)
    gradient.index_add_(0, present, slope * (dice_weight * top / bottom.square())[:, None])
    gradient[label, place] -= slope[slot, place] * (2.0 * dice_weight / bottom)[slot]
    if weights is not None:  # each class's terms depend on its own logits alone
        gradient.mul_(weights[:, None])
    return focal, dice, gradient


def pseudo_labels(logits: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Fill in pixels of unseen classes with the model's own best unseen class (ZegCLIP's transductive setting).

    Logits (B, C, H, W) of all classes; labels (B, H, W) and ``seen`` (C,) as for `fill_unseen`. For errors see
    `unseen_of`.
    """
    unseen = unseen_of(seen)
    best = unseen[logits.detach()[:, unseen].argmax(dim=1)]
    return fill_unseen(labels, best, seen)


def unseen_of(seen: Tensor) -> Tensor:
    """The ids of the classes that are not ``seen`` (C,) bool; a `LexisegError` says that self-training has none."""
    if bool(seen.all()):
        raise LexisegError("Self-training needs at least one unseen class; give the text of all classes.")
    return (~seen).nonzero().flatten()


def fill_unseen(labels: Tensor, best: Tensor, seen: Tensor) -> Tensor:
    """The rule of every self-training here: labels of seen classes stay, and pixels of unseen ones get another.

    Args:
        labels: (..., H, W) long; ids of seen classes and 255 are kept; all others (ids of unseen classes, or -1 where
            only the place of unseen pixels is known) are replaced.
        best: (..., H, W) long, what they get.
        seen: (C,) bool.
    """
    kept = labels == ignore_index(len(seen))
    known = (labels >= 0) & (labels < len(seen))
    kept[known] = seen[labels[known]]
    return torch.where(kept, labels, best)


# ---- classes that exclude each other: what ZegCLIP's non-mutually exclusive loss replaces


def exclusive_losses(
    logits: Tensor, labels: Tensor, entropy_weight: float = 1.0, dice_weight: float = 0.0, weights: Tensor | None = None
) -> MaskLosses:
    """Cross entropy of the softmax over classes, the mean over labelled pixels, and dice of the same probabilities.

    A class gains only what others lose; `mask_losses` judges every class by itself. A pixel labelled 255 has no class
    that could exclude the others and is left out here, whereas there it is a negative of every class.

    Logits (B, C, h, w) are upsampled bilinearly to labels (B, H, W) in 0..C-1 or 255, other values being a
    `LexisegError`. The dice term is that of `mask_losses` on labelled pixels; with weight 0 it is not computed.
    ``weights`` (C,) are factors on the terms of each class.
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
