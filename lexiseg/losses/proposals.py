"""The criterion that proposal generators are trained with: queries are matched to masks, then compared.

MaskFormer's criterion (Cheng et al., NeurIPS 2021, Sec. 3.3), which the first stage of DeOP, ZSSeg, ZegFormer and
FreeSeg uses; the matcher and the losses are those of `transformers`. Class weights and mask weights are the systems'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from lexiseg.losses.masks import IGNORE_INDEX, check_labels, ignore_index
from lexiseg.losses.reduction import mean_count, reduction_weight
from lexiseg.strict import StrictModel

if TYPE_CHECKING:
    from lexiseg.proposals.base import Proposals


class ProposalWeights(StrictModel):
    """Weights of the criterion. The defaults are ZSSeg's and ZegFormer's; DeOP's proposal stage has ``cost_class`` 0.

    Attributes:
        cost_class: weight of the class in the matching; its loss is not affected.
        class_weight: factor on the cross entropy.
        mask_weight: factor on the focal loss, in the matching too.
        dice_weight: factor on the dice loss, in the matching too (FreeSeg: 5).
        no_object: weight of the class "no object" in the cross entropy.
        skip_level_before_last: leave out the level right before the last one, as FreeSeg's released code does.
    """

    cost_class: Annotated[float, Field(ge=0)] = 1.0
    class_weight: Annotated[float, Field(ge=0)] = 1.0
    mask_weight: Annotated[float, Field(ge=0)] = 20.0
    dice_weight: Annotated[float, Field(ge=0)] = 1.0
    no_object: Annotated[float, Field(ge=0)] = 0.1
    skip_level_before_last: bool = False


_WEIGHTS = ProposalWeights()


@dataclass(frozen=True)
class MaskTargets:
    """What the queries of one image are to find."""

    classes: Tensor  # (M,) long, ascending
    masks: Tensor  # (M, H, W) float, 0 or 1


Match = tuple[Tensor, Tensor]


def mask_targets(
    labels: Tensor, size: tuple[int, int] | None = None, num_classes: int = IGNORE_INDEX
) -> list[MaskTargets]:
    """One binary mask for each class that occurs in labels (B, H, W), of the size that the images were padded to.

    Labels are in 0..C-1, or `ignore_index`; another is a `LexisegError`.
    """
    check_labels(labels, num_classes)
    height, width = size or (labels.shape[1], labels.shape[2])
    targets = []
    for image in labels:
        classes = image.unique()
        classes = classes[classes != ignore_index(num_classes)].long()
        masks = image.new_zeros((len(classes), height, width), dtype=torch.float32)
        masks[:, : image.shape[0], : image.shape[1]] = (image[None] == classes[:, None, None]).float()
        targets.append(MaskTargets(classes, masks))
    return targets


def match(
    mask_logits: Tensor, class_logits: Tensor | None, targets: Sequence[MaskTargets], weights: ProposalWeights
) -> list[Match]:
    """Give each target its own query, at the least total cost.

    Args:
        mask_logits: (B, N, h, w).
        class_logits: (B, N, C + 1), the last one "no object"; None matches by the masks alone.
        targets: one per image. Their masks are resized to h x w, taking the nearest pixel.
        weights: of the costs.

    Returns for each image the indices of queries and of the targets they are matched to, min(N, M) of them.
    """
    from transformers.models.maskformer import modeling_maskformer as modules

    mask_logits, cost_class = full_precision(mask_logits), weights.cost_class
    if class_logits is None:  # `transformers` always wants some: all alike
        most = max((int(target.classes.max()) for target in targets if len(target.classes)), default=0)
        class_logits, cost_class = mask_logits.new_zeros((*mask_logits.shape[:2], most + 2)), 0.0
    matcher = modules.MaskFormerHungarianMatcher(cost_class, weights.mask_weight, weights.dice_weight)
    scores = full_precision(class_logits)
    found: list[Match] = []
    for logits, score, target in zip(mask_logits, scores, targets, strict=True):
        if len(target.classes):
            with torch.autocast(logits.device.type, enabled=False):
                found += matcher(logits[None], score[None], [target.masks.to(logits.dtype)], [target.classes])
        else:
            nothing = torch.zeros(0, dtype=torch.int64)
            found.append((nothing, nothing))
    return found


def label_frame(frame: tuple[int, ...], size: tuple[int, int], labels: Tensor) -> tuple[int, int]:
    """The padded frame (H', W') of pictures of ``size`` in pixels of their labels, which may be smaller."""
    height, width = (
        max(round(full * part / whole), part) for full, part, whole in zip(frame, labels.shape[-2:], size, strict=True)
    )
    return height, width


def proposal_losses(
    proposals: Proposals,
    class_logits: Sequence[Tensor] | None,
    targets: Sequence[MaskTargets],
    weights: ProposalWeights = _WEIGHTS,
) -> dict[str, Tensor]:
    """Match and compare every level of the proposals.

    Args:
        proposals: with their earlier levels in ``aux``.
        class_logits: (B, N, C + 1) for each of ``proposals.levels``, the last column "no object"; None for proposals
            without classes: masks alone are matched and compared. Another number of levels is a ValueError.
        targets: one per image. Predictions are resized to their masks bilinearly.
        weights: the system's.

    Returns weighted scalars: ``loss_ce``, ``loss_mask`` (focal) and ``loss_dice`` of the last level, the same with
    ``_i`` of level i, and ``loss``, their sum. Each is divided by the number of masks in the batch (at least 1),
    averaged over processes; the cross entropy by its weights.
    """
    levels = proposals.levels
    result: dict[str, Tensor] = {}
    last = len(levels) - 1
    given: Sequence[Tensor | None] = class_logits or [None] * len(levels)
    for index, (level, logits) in enumerate(zip(levels, given, strict=True)):
        if weights.skip_level_before_last and index == last - 1:
            continue
        suffix = "" if index == last else f"_{index}"
        for name, value in level_losses(level.mask_logits, logits, targets, weights).items():
            result[name + suffix] = value
    result["loss"] = torch.stack(list(result.values())).sum()
    return result


def level_losses(
    mask_logits: Tensor, class_logits: Tensor | None, targets: Sequence[MaskTargets], weights: ProposalWeights
) -> dict[str, Tensor]:
    """Match and compare one level; arguments as for `match`, the result as for `proposal_losses` without a sum."""
    from transformers.models.maskformer import modeling_maskformer as modules

    mask_logits = full_precision(mask_logits)
    class_logits = None if class_logits is None else full_precision(class_logits)
    num_classes = 1 if class_logits is None else class_logits.shape[-1] - 1
    criterion = modules.MaskFormerLoss(num_classes, None, {}, weights.no_object).to(mask_logits)
    classes = [target.classes for target in targets]
    matched = match(mask_logits, class_logits, targets, weights)
    result: dict[str, Tensor] = {}
    if class_logits is not None:
        loss = criterion.loss_labels(class_logits, classes, matched)["loss_cross_entropy"]
        # The cross entropy is a mean weighted by 1 for a matched query and less for the others.
        num_matched = sum(len(queries) for queries, _ in matched)
        weight = num_matched + weights.no_object * (class_logits.shape[0] * class_logits.shape[1] - num_matched)
        result["loss_ce"] = weights.class_weight * loss * reduction_weight(weight, mask_logits.device)
    num_masks = mean_count(float(sum(map(len, classes))), mask_logits.device)
    if any(len(queries) for queries, _ in matched):
        losses = criterion.loss_masks(
            mask_logits, [target.masks.to(mask_logits.dtype) for target in targets], matched, num_masks
        )
    else:
        # No mask to compare with; the graph stays whole, so that every process has gradients to exchange.
        losses = dict.fromkeys(("loss_mask", "loss_dice"), mask_logits.sum() * 0.0)
    result["loss_mask"] = weights.mask_weight * losses["loss_mask"]
    result["loss_dice"] = weights.dice_weight * losses["loss_dice"]
    return result


def full_precision(x: Tensor) -> Tensor:
    """In single precision at least, whatever the network was run in: costs are compared, and sums run over images."""
    return x if x.dtype == torch.float64 else x.float()
