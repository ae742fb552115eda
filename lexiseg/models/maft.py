"""Mask-aware fine-tuning: a copy of CLIP's image tower learns that a region's score should say how well it fits (MAFT).

Jiao et al., "Learning Mask-aware CLIP Representations for Zero-Shot Segmentation", NeurIPS 2023. It plugs into every
system that shows regions to CLIP: the copy, run with mask attention, takes the place of the frozen tower and its crops,
and is trained for a few hundred steps on the masks of a frozen generator.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from lexiseg.losses.mask_aware import MaskAwareOptions, iou_targets, mask_aware_loss, mask_ious

FrozenUnit = Literal["conv", "cls", "pos", "ln_pre", "mlp", "proj"]


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


def mask_aware_step(
    probabilities: Tensor, masks: Iterable[Tensor], labels: Tensor, valid: Tensor | None, options: MaskAwareOptions
) -> Tensor:
    """The mask-aware loss of a batch (Sec. 4.2).

    Args:
        probabilities: A^c (B, N, C).
        masks: for each picture the masks (N, h, w) in [0, 1] at the size of its labels; asked for one after another.
        labels: (B, h, w) long in 0..C-1, or 255.
        valid: (B, N) bool or None; a region that is not valid adds 0 to the loss and takes no part in the targets.
        options: see `MaskAwareOptions`.

    Raises:
        LexisegError: a label is out of range.
    """
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
