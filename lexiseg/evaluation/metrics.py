"""Pixel accuracy and intersection over union, from histograms that are summed picture by picture.

Only a few counts per class are kept, so the label maps of a dataset never have to be in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lexiseg.label_ids import ignore_index as ignored_among

_CHUNK = 1 << 16  # pixels counted at a time: their numbers then stay in the processor's cache


def harmonic_mean(seen: float, unseen: float) -> float:
    """``2 * seen * unseen / (seen + unseen)``: hIoU. NaN if either is NaN, 0 if both are 0."""
    if math.isnan(seen) or math.isnan(unseen):
        return math.nan
    return 0.0 if seen + unseen == 0 else 2.0 * seen * unseen / (seen + unseen)


def nanmean(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not NaN; NaN, without a warning, if there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan


@dataclass(frozen=True)
class Metrics:
    """The metrics of a confusion; all fractions are in 0..1, NaN where there was nothing to measure."""

    # ``(C,)`` float64, intersection over union. NaN for a class that neither label nor prediction shows; 0 for one that
    # was predicted but is nowhere in the labels.
    iou: NDArray[np.float64]
    # ``(C,)`` float64, fraction of a class's pixels that were found; NaN for a class without pixels
    accuracy: NDArray[np.float64]
    pacc: float  # fraction of all labelled pixels that were right
    macc: float  # mean of ``accuracy`` without NaN
    miou: float  # mean of ``iou`` over all classes, without NaN
    miou_seen: float  # the same over the seen classes
    miou_unseen: float  # the same over the unseen classes
    hiou: float  # harmonic mean of the last two
    unseen_to_seen: float  # fraction of the unseen classes' pixels that were taken for a seen class

    def summary(self) -> dict[str, float | None]:
        """The scalars in percent, rounded to two decimals as the papers print them; None instead of NaN."""
        return {name: percent(getattr(self, name)) for name in SCALARS}


SCALARS = tuple(one.name for one in fields(Metrics) if one.name not in ("iou", "accuracy"))
"""Names of the metrics that are one number."""


def percent(fraction: float) -> float | None:
    """A fraction in percent with two decimals, None for NaN."""
    return None if math.isnan(fraction) else round(100.0 * float(fraction), 2)


def percent_text(value: float | None) -> str:
    """What `percent` gives, as a table shows it."""
    return "-" if value is None else f"{value:.2f}"


class Confusion:
    """Counts of label, prediction and their intersection for each class.

    Pixels whose label is ``ignore_index`` are dropped. A prediction that is not a class (a pixel the background rule
    left without one) misses its label's class and counts for no other.

    ``counts``: ``(4, C)`` int64: ``intersection``, pixels of a class that were predicted as it; ``predicted``,
    evaluated pixels predicted as it; ``labelled``, pixels of it; and ``as_seen``, pixels of it that were predicted as
    one of ``seen``. ``ignore_index``: label of pixels that are not evaluated; None is 255, or 65535 of more than 255
    classes. Source: the evaluation of ZegCLIP and Cascade-CLIP, which is mmsegmentation's.
    """

    def __init__(self, num_classes: int, *, ignore_index: int | None = None, seen: Sequence[int] = ()) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignored_among(num_classes) if ignore_index is None else ignore_index
        self.counts = np.zeros((4, num_classes), np.int64)
        self._is_seen = np.isin(np.arange(num_classes), np.asarray(seen, np.int64))

    @property
    def intersection(self) -> NDArray[np.int64]:
        """``(C,)`` int64, pixels of a class that were predicted as it."""
        return self.counts[0]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """``(C,)`` int64, evaluated pixels predicted as a class."""
        return self.counts[1]

    @property
    def labelled(self) -> NDArray[np.int64]:
        """``(C,)`` int64, pixels of a class."""
        return self.counts[2]

    def update(self, pred: ArrayLike, label: ArrayLike) -> None:
        """Add one picture or a batch.

        ``label``: integer ids of the same shape, 0..C-1 or ``ignore_index``. Raises ValueError if shapes differ, ids
        are no integers, or a label is neither a class nor ``ignore_index``.
        """
        pred_ids, label_ids = np.asarray(pred), np.asarray(label)
        if pred_ids.shape != label_ids.shape:
            raise ValueError(f"the prediction is {pred_ids.shape} and the label {label_ids.shape}")
        for ids in (pred_ids, label_ids):
            if ids.size and ids.dtype.kind not in "iub":  # a fraction would be cut off
                raise ValueError(f"class ids must be whole numbers, not {ids.dtype}")
        pred_ids, label_ids = pred_ids.reshape(-1), label_ids.reshape(-1)
        counts = np.zeros_like(self.counts)
        for start in range(0, label_ids.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            counts += self._count_part(pred_ids[part], label_ids[part])
        self.counts += counts  # all of it or, of a label that is wrong, nothing

    def merge(self, other: Confusion) -> None:
        """Add the counts of another process or part of the dataset.

        Raises ValueError if it has another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot add counts of {other.num_classes} classes to {self.num_classes}")
        self.counts += other.counts

    def compute(self, seen_idx: Sequence[int] = (), unseen_idx: Sequence[int] = ()) -> Metrics:
        """Metrics of all pictures added so far.

        ``seen_idx``: ids of the classes that had masks in training. ``unseen_idx``: ids of those that had none. Either
        may be empty: its mean, and hIoU, are then NaN.
        """
        intersection, predicted, labelled, as_seen = self.counts
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = intersection / (predicted + labelled - intersection)
            accuracy = intersection / labelled
        total = int(labelled.sum())
        seen = nanmean(iou[np.asarray(seen_idx, np.int64)])
        hidden = np.asarray(unseen_idx, np.int64)
        unseen, pixels = nanmean(iou[hidden]), int(labelled[hidden].sum())
        return Metrics(
            iou=iou,
            accuracy=accuracy,
            pacc=float(intersection.sum() / total) if total else math.nan,
            macc=nanmean(accuracy),
            miou=nanmean(iou),
            miou_seen=seen,
            miou_unseen=unseen,
            hiou=harmonic_mean(seen, unseen),
            unseen_to_seen=float(as_seen[hidden].sum() / pixels) if pixels and self._is_seen.any() else math.nan,
        )

    def _count_part(self, pred: NDArray[np.integer], label: NDArray[np.integer]) -> NDArray[np.int64]:
        """Each class's pixels as `intersection`, `predicted`, `labelled` and `as_seen`, (4, C), of some in a row."""
        judged = label != self.ignore_index
        pred, label = pred[judged].astype(np.int64), label[judged].astype(np.int64)
        if label.size and (label.min() < 0 or label.max() >= self.num_classes):
            wrong = label[(label < 0) | (label >= self.num_classes)][0]
            raise ValueError(f"the label {wrong} is neither one of {self.num_classes} classes nor {self.ignore_index}")
        known = (pred >= 0) & (pred < self.num_classes)
        classes = pred[known]
        found = (label[pred == label], classes, label, label[known][self._is_seen[classes]])
        return np.stack([np.bincount(ids, minlength=self.num_classes) for ids in found])
