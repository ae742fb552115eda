"""How good proposals are, whatever their classifier: recall, and the upper bound that they allow."""

import math
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lexiseg.background import BackgroundSource
from lexiseg.data.base import SegmentationDataset, seen_ids, unseen_ids
from lexiseg.devices import EvaluationMode
from lexiseg.errors import LexisegError
from lexiseg.evaluation.metrics import Confusion, Metrics, percent, percent_text
from lexiseg.evaluation.run import Offsets, offset_classes, spread
from lexiseg.label_ids import IGNORE_INDEX, ignore_index
from lexiseg.models.base import ImageFeatures
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.proposals.base import Proposals
from lexiseg.regions.pooling import full_resolution, resize_masks
from lexiseg.segmenter import Segmenter
from lexiseg.windows import WindowPolicy

THRESHOLDS = (0.3, 0.5)
"""The IoUs from which on a region counts as covered."""

_CHUNK = 1 << 24


def region_ious(masks: Tensor, label: Tensor, ids: Sequence[int]) -> Tensor:
    """Intersection over union of each mask with each labelled region.

    ``ids``: the K ids whose regions are meant. Returns (N, K) float64; 0 where both are empty.
    """
    wanted = torch.as_tensor(list(ids), device=label.device)
    shared = torch.zeros(len(masks), len(wanted), dtype=torch.int64, device=label.device)
    height, width = label.shape
    step = max(1, _CHUNK // max(1, len(masks) * width))
    for top in range(0, height, step):
        part = masks[:, top : top + step].flatten(1).float()
        regions = (label[top : top + step].flatten()[:, None] == wanted).float()
        shared += (part @ regions).long()  # a chunk has fewer pixels than float32 has exact integers
    sizes = (label[..., None] == wanted).sum(dim=(0, 1)) if len(wanted) else wanted.long()
    union = masks.sum(dim=(1, 2))[:, None] + sizes - shared
    return shared.double() / union.clamp(min=1).double()


def upper_bound_scores(masks: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Class scores of regions as a perfect classifier would give them: the IoU with each class's labelled pixels.

    Put into `lexiseg.scores.RegionScores` instead of the model's own, they give the best that these proposals allow.

    ``masks``: (N, H, W) bool, the proposals binarised. ``label``: (H, W), 0..C-1, or `ignore_index` where a pixel is
    not evaluated; such pixels are left out of the masks too. Returns (N, C) float32; 0 for classes that are not in the
    picture. Raises ValueError if a label is no class. Source: MAFT (NeurIPS 2023), appendix C.1 and Table 7, which does
    not say how the proposals are binarised.
    """
    ignored = ignore_index(num_classes)
    present = _ids(label, ignored)
    if present and not 0 <= present[0] <= present[-1] < num_classes:
        raise ValueError(f"the label {present[-1]} is neither one of {num_classes} classes nor {ignored}")
    scores = torch.zeros(len(masks), num_classes, device=label.device)
    if present:
        scores[:, present] = region_ious(masks & (label != ignored), label, present).float()
    return scores


@dataclass(frozen=True)
class Recall:
    """Fractions in 0..1; NaN where there was nothing to find."""

    all: float
    seen: float
    unseen: float


@dataclass
class ProposalRecall:
    """The fraction of labelled regions that the proposals cover.

    A region is all pixels of one class in one picture. A proposal covers it if their intersection over union is larger
    than a threshold; ignored pixels are left out of both and are not a region. Each region counts once, however
    many proposals cover it, and proposals that cover nothing cost nothing: this is recall. DeOP's Table 8 counts
    otherwise, see `ReleasedRecall`.
    """

    seen: Collection[int]  # ids of the classes that had masks in training
    unseen: Collection[int]  # ids of those that had none
    _: KW_ONLY
    ignore_index: int = IGNORE_INDEX  # label of pixels that are not judged
    # for every region so far, its class and the largest IoU that a proposal has with it
    best: list[tuple[int, float]] = field(default_factory=list, init=False)

    def update(self, masks: Tensor, label: Tensor) -> None:
        """Add a picture.

        ``masks``: (N, H, W) bool, the proposals binarised at 0.5. ``label``: (H, W), class ids or ``ignore_index``.
        """
        present = _ids(label, self.ignore_index)
        if not len(masks):
            self.best += [(index, 0.0) for index in present]
        elif present:
            best = region_ious(masks & (label != self.ignore_index), label, present).amax(dim=0)
            self.best += list(zip(present, best.tolist(), strict=True))

    def compute(self) -> dict[float, Recall]:
        """The recall of all, seen and unseen regions at each threshold."""

        def fraction(threshold: float, classes: Collection[int] | None) -> float:
            found = [iou > threshold for index, iou in self.best if classes is None or index in classes]
            return sum(found) / len(found) if found else math.nan

        return {
            threshold: Recall(*(fraction(threshold, which) for which in (None, self.seen, self.unseen)))
            for threshold in THRESHOLDS
        }


@dataclass
class ReleasedRecall:
    """The counters behind DeOP's Table 8, as its released code has them. They are not a recall of proposals.

    What is counted are the regions of the *final* label map; the code has a second evaluator that counts raw proposals
    in the same way. Each predicted region takes the first labelled region, in the order of the ids, the ignored pixels
    among them by their label, whose IoU with it is over the threshold. The denominators are of different kinds:
    predicted regions for "all", labelled regions for "seen" and "unseen", and the ignored pixels of a picture count as
    one seen region. `ProposalRecall` is the recall that the table's title speaks of.
    """

    unseen: frozenset[int]  # ids of the unseen classes; every other id is seen
    threshold: float = 0.3  # IoU
    matched_seen: int = field(default=0, init=False)  # predicted regions whose labelled region is seen
    matched_unseen: int = field(default=0, init=False)  # the same, unseen
    predicted: int = field(default=0, init=False)  # predicted regions
    labelled_seen: int = field(default=0, init=False)  # labelled regions that are seen
    labelled_unseen: int = field(default=0, init=False)  # the same, unseen

    @property
    def matched(self) -> int:
        """Predicted regions that have a labelled region."""
        return self.matched_seen + self.matched_unseen

    def update(self, masks: Tensor, label: Tensor) -> None:
        """Add a picture's predicted regions (N, H, W), bool, none of them empty, and its labels (H, W)."""
        ids = _ids(label)
        unseen = [index in self.unseen for index in ids]
        self.labelled_unseen += sum(unseen)
        self.labelled_seen += len(ids) - sum(unseen)
        self.predicted += len(masks)
        for row in (region_ious(masks, label, ids) > self.threshold).tolist():
            first = next((place for place, over in enumerate(row) if over), None)
            if first is not None:
                self.matched_unseen += unseen[first]
                self.matched_seen += not unseen[first]

    def compute(self) -> Recall:
        """The table's three numbers."""
        return Recall(
            _ratio(self.matched, self.predicted),
            _ratio(self.matched_seen, self.labelled_seen),
            _ratio(self.matched_unseen, self.labelled_unseen),
        )


def _ids(label: Tensor, ignored: int | None = None) -> list[int]:
    return [int(index) for index in label.unique().tolist() if index != ignored]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


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
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    *,
    released: bool = False,
    limit: int | None = None,
    window: WindowPolicy | None = None,
    background: BackgroundSource = None,
    offsets: Offsets | None = None,
) -> ProposalReport:
    """Compare the proposals for every picture with its labels, at the labels' size.

    A proposal is binarised at 0.5. Pictures are run whole.

    ``dataset``: pictures with labels; its seen and unseen flags decide what counts as which. ``released``: also predict
    the pictures and count as DeOP's released code does. ``limit``: take only this many pictures, spread evenly; None
    takes all. ``window``: how pictures are resized; None is the model's own way. ``background`` and ``offsets``: as in
    `run_evaluation`, for these predictions, whose pixels of no class are no region. Raises LexisegError if the model
    has no proposals, the dataset is empty, or a picture is wrong.
    """
    model = segmenter.model
    if not isinstance(model, DecoupledModel):
        raise LexisegError(f"{model.system} has no proposals to evaluate; choose zsseg, zegformer, freeseg or deop.")
    indices = spread(len(dataset), limit)
    if not indices:
        raise LexisegError("There are no pictures to evaluate proposals on; check the dataset's list of pictures.")
    vocabulary = dataset.vocabulary
    asked = offset_classes(segmenter, vocabulary, offsets)[1]
    num_classes = len(vocabulary)
    ignore = ignore_index(num_classes)
    seen, unseen = seen_ids(vocabulary), unseen_ids(vocabulary)
    recall = ProposalRecall(seen, unseen, ignore_index=ignore)
    counters = {threshold: ReleasedRecall(frozenset(unseen), threshold) for threshold in THRESHOLDS}
    confusion = Confusion(num_classes)
    text = model.embed_text(segmenter.embedder, segmenter.vocabulary(vocabulary)).to(segmenter.device)
    words = text[:, 0] if text.dim() == 3 else text  # with several sources of text the first one is the generator's
    total = 0
    with EvaluationMode(model, None)():
        for index in indices:
            sample = dataset[index]
            images = segmenter.pixels(sample.image, window)
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
                scores = upper_bound_scores(masks, sample.label, num_classes)
            except ValueError as error:
                raise LexisegError(f"The sample '{sample.name}' cannot be evaluated: {error}.") from error
            features = ImageFeatures(frame, {"images": padded, "mask_logits": proposals.mask_logits})
            best = model.pixel_scores(scores[None].to(segmenter.device), features)
            confusion.update(best.label_map(size)[0].cpu().numpy(), sample.label.numpy())
            if released:
                result = segmenter.predict(sample.image, asked, window=window, background=background)
                prediction = result.label_map.long()
                found = [index for index in _ids(prediction) if index < num_classes]
                regions = prediction[None] == torch.tensor(found, dtype=torch.long)[:, None, None]
                for counter in counters.values():
                    counter.update(regions, sample.label)
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
