"""Evaluating a decoupled model's proposals on a dataset: recall, and the upper bound that they allow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lexiseg.data.base import SegmentationDataset, seen_ids, unseen_ids
from lexiseg.devices import EvaluationMode
from lexiseg.errors import LexisegError
from lexiseg.evaluation.metrics import Confusion, Metrics, percent, percent_text
from lexiseg.evaluation.proposals import ProposalRecall, Recall, ReleasedRecall, upper_bound_scores
from lexiseg.evaluation.run import spread
from lexiseg.label_ids import ignore_index
from lexiseg.models.base import ImageFeatures
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.proposals.base import Proposals
from lexiseg.regions.pooling import full_resolution, resize_masks
from lexiseg.segmenter import Segmenter


@dataclass(frozen=True)
class ProposalReport:
    """How good a model's proposals are."""

    recall: dict[float, Recall]  # the fraction of labelled regions covered, by IoU; see `ProposalRecall`
    # of the label map that the proposals give with the labels' IoU as class scores (MAFT, Table 7)
    upper_bound: Metrics
    # the counters of DeOP's Table 8, by IoU, of the model's own label maps; {} unless asked for
    released: dict[float, Recall]
    num_pictures: int  # how many were evaluated
    num_proposals: int  # how many there were, all together; those that the generator marks as no region are not counted

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it: recalls as fractions, the upper bound in percent, None for what is missing."""
        return {
            "recall": {f"{threshold:g}": _fractions(value) for threshold, value in self.recall.items()},
            "upper_bound": self.upper_bound.summary(),
            "released": {f"{threshold:g}": _fractions(value) for threshold, value in self.released.items()},
            "num_pictures": self.num_pictures,
            "num_proposals": self.num_proposals,
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column titles and rows of text, in percent, for printing."""
        rows = [
            (f"{what} at IoU {threshold:g}", [found.all, found.seen, found.unseen])
            for what, recalls in (("recall", self.recall), ("released counters", self.released))
            for threshold, found in recalls.items()
        ]
        best = self.upper_bound
        rows.append(("mIoU they allow", [best.miou, best.miou_seen, best.miou_unseen]))
        cells = [[what, *(percent_text(percent(value)) for value in values)] for what, values in rows]
        return ["", "all", "seen", "unseen"], cells


def _fractions(recall: Recall) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in asdict(recall).items()}


def evaluate_proposals(
    segmenter: Segmenter, dataset: SegmentationDataset, *, released: bool = False, limit: int | None = None
) -> ProposalReport:
    """Compare the proposals for every picture with its labels, at the labels' size.

    A proposal is binarised at 0.5. Pictures are run whole, at the model's own working size.

    ``dataset``: pictures with labels; its seen and unseen flags decide what counts as which. ``released``: also predict
    the pictures and count as DeOP's released code does. ``limit``: take only this many pictures, spread evenly; None
    takes all. Raises LexisegError if the model has no proposals, the dataset is empty, or a picture is wrong.
    """
    model = segmenter.model
    if not isinstance(model, DecoupledModel):
        raise LexisegError(f"{model.system} has no proposals to evaluate; choose zsseg, zegformer, freeseg or deop.")
    indices = spread(len(dataset), limit)
    if not indices:
        raise LexisegError("There are no pictures to evaluate proposals on; check the dataset's list of pictures.")
    vocabulary = dataset.vocabulary
    num_classes = len(vocabulary)
    ignore = ignore_index(num_classes)
    seen, unseen = seen_ids(vocabulary), unseen_ids(vocabulary)
    recall = ProposalRecall(seen, unseen, ignore_index=ignore)
    counters = {threshold: ReleasedRecall(frozenset(unseen), threshold) for threshold in recall.thresholds}
    confusion = Confusion(num_classes, ignore_index=ignore)
    text = model.embed_text(segmenter.embedder, segmenter.vocabulary(vocabulary)).to(segmenter.device)
    words = text[:, 0] if text.dim() == 3 else text  # with several sources of text the first one is the generator's
    total = 0
    with EvaluationMode(model, None)():
        for index in indices:
            sample = dataset[index]
            images = segmenter.pixels(sample.image)
            frame = (int(images.shape[-2]), int(images.shape[-1]))
            size = (int(sample.label.shape[0]), int(sample.label.shape[1]))
            padded = model.pad(images)
            proposals = model.propose(padded, words, frame)
            if proposals.valid is not None:  # without the slots that hold no region
                proposals = Proposals(proposals.mask_logits[:, proposals.valid[0]])
            masks = _binary(model, proposals, padded, frame, size)
            total += len(masks)
            recall.update(masks, sample.label)
            try:
                scores = upper_bound_scores(masks, sample.label, num_classes, ignore_index=ignore)
            except ValueError as error:
                raise LexisegError(f"The sample '{sample.name}' cannot be evaluated: {error}.") from error
            features = ImageFeatures(frame, {"images": padded, "mask_logits": proposals.mask_logits})
            best = model.pixel_scores(scores[None].to(segmenter.device), features)
            confusion.update(best.label_map(size)[0].cpu().numpy(), sample.label.numpy())
            if released:
                prediction = segmenter.predict(sample.image, vocabulary).label_map.long()
                for counter in counters.values():
                    counter.update_map(prediction, sample.label)
    return ProposalReport(
        recall.compute(),
        confusion.compute(seen, unseen),
        {threshold: counter.compute() for threshold, counter in counters.items()} if released else {},
        len(indices),
        total,
    )


def _binary(
    model: DecoupledModel, proposals: Proposals, padded: Tensor, frame: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Masks (N, H, W), bool, on the CPU: upsampled, cut out of the padding, brought to ``size``, and halved at 0.5."""
    parts = full_resolution(proposals.mask_logits, padded, model.options.align_corners)
    masks = (part[..., : frame[0], : frame[1]].sigmoid() for part in parts)
    return torch.cat([(resize_masks(part, size)[0] > 0.5).cpu() for part in masks])
