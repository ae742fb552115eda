"""Mask-aware fine-tuning: a copy of CLIP's image tower learns that a region's score should say how well it fits (MAFT).

Jiao et al., "Learning Mask-aware CLIP Representations for Zero-Shot Segmentation", NeurIPS 2023. It plugs into every
base model that asks CLIP about regions: the copy, run with mask attention (`lexiseg.regions.mask_attention`), takes the
place of the frozen tower and its crops, and is trained for a few hundred steps on the masks of a frozen generator. The
two losses are in `lexiseg.losses.mask_aware`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from lexiseg.losses.mask_aware import MaskAwareOptions, distillation_loss, iou_targets, mask_aware_loss, mask_ious
from lexiseg.regions.encoder import RegionEncoder

FrozenUnit = Literal["conv", "cls", "pos", "ln_pre", "mlp", "proj"]
Probabilities = Callable[[Tensor], Tensor]


class MaftOptions(MaskAwareOptions):
    """Options of mask-aware fine-tuning; the defaults are those of the released code.

    Attributes:
        frozen: units of the image tower that keep CLIP's weights (Table 4d): "conv" the patch embedding (of a ResNet
            everything before its attention pool), "cls" the class embedding, "pos" the position table, "ln_pre" the
            norm before the blocks, "mlp" their feed-forward parts, "proj" the final projection. Attention and the other
            norms are trained always, in all blocks. The paper's default leaves "proj" and "ln_pre" out.
    """

    frozen: tuple[FrozenUnit, ...] = ("conv", "cls", "pos", "ln_pre", "mlp", "proj")


def student_of(visual: nn.Module) -> nn.Module:
    """A copy of CLIP's image tower, to be tuned."""
    return copy.deepcopy(visual).eval()


def maft_losses(
    encoder: RegionEncoder,
    student: nn.Module,
    teacher: nn.Module,
    image: Tensor,
    grid_masks: Tensor,
    masks: Iterable[Tensor],
    labels: Tensor,
    valid: Tensor | None,
    options: MaftOptions,
    *,
    region_probabilities: Probabilities,
    image_probabilities: Probabilities,
) -> dict[str, Tensor]:
    """MAFT's losses of a batch (Sec. 4.2), on the masks of a frozen generator.

    Args:
        encoder: how regions are encoded.
        student: the tower that is tuned.
        teacher: the frozen one.
        image: (B, 3, S, S), the square picture.
        grid_masks: (B, N, g, g) in [0, 1], the masks as mask attention reads them.
        masks: for each picture the masks (N, h, w) in [0, 1] at the size of its labels; asked for one after another.
        labels: (B, h, w) long in 0..C-1, or 255; another value is a `LexisegError`.
        valid: (B, N) bool or None; a region that is not valid adds 0 to the loss and takes no part in the targets.
        options: see `MaftOptions`.
        region_probabilities: from region features (B, N, D) to A^c (B, N, C).
        image_probabilities: the same of whole images (B, D) to (B, C).

    Returns:
        "loss" and its parts, weighted: "loss_mask_aware", and "loss_distillation" unless its weight is 0.
    """
    probabilities = region_probabilities(encoder.attend(student, image, grid_masks))
    loss = mask_aware_step(probabilities, masks, labels, valid, options)
    losses = {"loss": loss, "loss_mask_aware": loss.detach()}
    if options.distillation:
        with torch.no_grad():
            target = image_probabilities(encoder.whole(teacher, image))
        own = image_probabilities(encoder.whole(student, image))
        distillation = options.distillation * distillation_loss(own, target)
        losses |= {"loss": loss + distillation, "loss_distillation": distillation.detach()}
    return losses


def mask_aware_step(
    probabilities: Tensor, masks: Iterable[Tensor], labels: Tensor, valid: Tensor | None, options: MaskAwareOptions
) -> Tensor:
    """The mask-aware loss of a batch; the arguments are those of `maft_losses`, and A^c (B, N, C)."""
    scores, targets = [], []
    for index, mask in enumerate(masks):
        there = torch.ones_like(mask[:, 0, 0], dtype=torch.bool) if valid is None else valid[index]
        with torch.no_grad():
            soft = (mask > 0.5).float() if options.binary else mask
            ious, present = mask_ious(soft[there], labels[index], probabilities.shape[2])
            target = ious.new_zeros(len(present), len(mask))
            target[:, there] = iou_targets(ious, options.normalise)
        targets.append(target)
        scores.append((probabilities[index] * there[:, None])[:, present].T)
    return mask_aware_loss(torch.cat(scores), torch.cat(targets), options.distance)
