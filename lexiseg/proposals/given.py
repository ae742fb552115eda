"""Masks that are given, not proposed: ground truth, for the analyses that ask what perfect masks would give."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.label_ids import IGNORE_INDEX
from lexiseg.proposals.base import HARD_LOGIT, ProposalGenerator, Proposals, check_images


def ground_truth_proposals(labels: Tensor) -> Proposals:
    """One binary mask for each class of labels (B, H, W), but 255, in ascending order.

    N is the largest number of classes in an image, at least 1, and ``valid`` says which slots hold a mask.
    """
    present = [values[values != IGNORE_INDEX] for values in (image.unique() for image in labels)]
    num = max(1, *(len(values) for values in present))
    masks = labels.new_zeros((len(labels), num, *labels.shape[1:]), dtype=torch.bool)
    valid = torch.zeros((len(labels), num), dtype=torch.bool, device=labels.device)
    for index, values in enumerate(present):
        masks[index, : len(values)] = labels[index][None] == values[:, None, None]
        valid[index, : len(values)] = True
    return Proposals(hard_logits(masks), valid=valid)


def hard_logits(masks: Tensor) -> Tensor:
    """Turn masks (...) in 0..1, or bool, into logits -`HARD_LOGIT`..`HARD_LOGIT`."""
    return (masks.float() * 2 - 1) * HARD_LOGIT


class GroundTruth(ProposalGenerator):
    """A generator that "proposes" the masks of ``labels`` (B, H, W), 255 = no class, which are set beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: Tensor | None = None

    def forward(self, images: Tensor, text: Tensor | None = None) -> Proposals:
        """The masks of the given labels, padded like the images; a `LexisegError` if they do not fit."""
        check_images(images, self.stride)
        labels = self.labels
        if labels is None:
            raise LexisegError("Ground-truth proposals need labels; set the generator's attribute labels.")
        height, width = images.shape[-2:]
        if len(labels) != len(images) or labels.shape[1] > height or labels.shape[2] > width:
            raise LexisegError(
                f"The labels given are {tuple(labels.shape)}, which does not fit images of {len(images)} x {height} x "
                f"{width}; give the labels of these images, at their size."
            )
        labels = F.pad(labels, (0, width - labels.shape[2], 0, height - labels.shape[1]), value=IGNORE_INDEX)
        return ground_truth_proposals(labels.to(images.device))
