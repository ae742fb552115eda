"""Labels of the three training settings: which classes take part, and what an id means to the loss.

ZegCLIP (Sec. 4.1) and Cascade-CLIP (Sec. 4.3) train inductively, transductively (self-training) and fully supervised:

============= =========================== ====================================================================
setting       text of                     labels
============= =========================== ====================================================================
inductive     the seen classes            ranks among the seen classes; everything else is 255
transductive  all classes                 ids of seen classes; 255; -1 = no label, filled in by the model itself
supervised    all classes                 ids of all classes; 255
============= =========================== ====================================================================

In every setting the losses treat 255 as a negative of every class, as the authors' code does. Where there are more than
255 classes, 65535 stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lexiseg.data.base import SegmentationDataset
from lexiseg.errors import LexisegError
from lexiseg.evaluation.run import spread
from lexiseg.label_ids import IGNORE_INDEX, WIDE_IGNORE_INDEX
from lexiseg.recipes.schema import Setting, Unlabelled
from lexiseg.vocabulary import TemplateSource, Vocabulary, VocabularyClass

UNLABELLED = -1
"""Label of a pixel whose class self-training chooses itself."""

PADDING = -2
"""Label of the pixels that fill a picture up, where they must be told from void ones."""


def training_vocabulary(
    vocabulary: Vocabulary, *, setting: Setting = "inductive", templates: TemplateSource = None
) -> Vocabulary:
    """The classes whose text takes part in training, by their names, without synonyms.

    Inductive training takes those flagged as seen, and all of a vocabulary without any flag. The other settings take
    all, in the vocabulary's order; each class is flagged as seen if its masks are trained on. ``templates`` replace the
    vocabulary's.

    Raises:
        LexisegError: every class is flagged as unseen, self-training has none to find, or there are more classes than
            16-bit labels can hold.
    """
    if len(vocabulary) > WIDE_IGNORE_INDEX:
        raise LexisegError(
            f"The dataset has {len(vocabulary)} classes and labels have room for {WIDE_IGNORE_INDEX}; shorten its list."
        )
    unflagged = all(entry.seen is None for entry in vocabulary.classes)
    seen = [entry.seen is True or unflagged for entry in vocabulary.classes]
    if setting != "supervised" and not any(seen):
        raise LexisegError("The dataset has no seen class, so there is nothing to train on; fix its unseen list.")
    if setting == "transductive" and all(seen):
        raise LexisegError(
            "The dataset has no unseen class, so self-training has none to find; name some in its unseen list, or "
            "take the setting 'supervised'."
        )
    classes = tuple(
        VocabularyClass(entry.name, seen=masks or setting == "supervised", color=entry.color)
        for entry, masks in zip(vocabulary.classes, seen, strict=True)
        if masks or setting != "inductive"
    )
    return Vocabulary.parse(Vocabulary(classes, vocabulary.templates), templates=templates)


def masked_names(vocabulary: Vocabulary) -> tuple[str, ...]:
    """The classes of a :func:`training_vocabulary` with masks in training, which a model keeps as its seen names."""
    return tuple(entry.name for entry in vocabulary.classes if entry.seen)


def self_training_labels(
    label: Tensor, seen: Sequence[int], *, unlabelled: Unlabelled = "marked", void: int = IGNORE_INDEX
) -> Tensor:
    """Labels of self-training: ids of seen classes stay, -1 is where the model has to choose an unseen class.

    Only the place of an unlabelled pixel goes into the result, never its class: whatever is neither a seen id nor void
    becomes the same -1.

    Args:
        label: integer tensor of any shape with dataset ids, ``void``, and :data:`PADDING` where it was filled up.
        seen: the seen ids; one that is not in 0..void-1 is a ValueError.
        unlabelled: "marked" is what the authors' code does (ZegCLIP, and Cascade-CLIP after it): a pixel is unlabelled
            where the dataset's own label names an unseen class, so that the ground truth tells where unseen classes
            are, though not which; void stays void. The papers do not mention it. "ignored" takes no such help: every
            pixel without a seen label that is not padding is unlabelled, void and background included.
        void: the dataset's label of pixels without a class.
    """
    if any(not 0 <= index < void for index in seen):
        raise ValueError(f"seen ids must be in 0..{void - 1}, got {list(seen)}")
    label = label.long()
    result = torch.where(torch.isin(label, torch.tensor(list(seen), dtype=torch.long)), label, UNLABELLED)
    nothing = label == PADDING
    if unlabelled == "marked":
        nothing |= label == void
    return result.masked_fill(nothing, void)


def class_weights(
    said: Literal["frequency"] | Mapping[str, float], dataset: SegmentationDataset, trained: Vocabulary
) -> Tensor:
    """Factors (C,) float32 on the losses of the classes whose text takes part in training.

    ``said`` has factors by name, where a class that is not named has 1 and a name that is no class is a `LexisegError`;
    or it is "frequency": 1 over the square root of a class's fraction of the labelled pixels of up to 2,000 pictures,
    spread evenly, scaled to a mean of 1 over the classes found and cut at 10. A class that is not found has 1.
    """
    weights = torch.ones(len(trained))
    if said != "frequency":
        for name, factor in dict(said).items():
            if name not in trained.names:
                raise LexisegError(
                    f"'train.class_weights' names '{name}', which is no class with text in this training; there are "
                    f"{', '.join(trained.names[:8])}{' and more' if len(trained) > 8 else ''}."
                )
            weights[trained.names.index(name)] = factor
        return weights
    ids = [dataset.vocabulary.names.index(name) for name in trained.names]
    counts = torch.zeros(WIDE_IGNORE_INDEX + 1, dtype=torch.float64)
    for index in spread(len(dataset), 2000):
        counts += torch.bincount(read_label(dataset, index).flatten(), minlength=len(counts))
    found = counts[ids] > 0
    rarity = (counts[ids][found] / counts[ids].sum()).rsqrt()
    weights[found] = (rarity / rarity.mean()).clamp(max=10).float()
    return weights


def read_label(dataset: SegmentationDataset, index: int) -> Tensor:
    """The label of one sample, without its picture where the dataset can do so."""
    alone = getattr(dataset, "label", None)
    label: Tensor = dataset[index].label if alone is None else alone(index)
    return label
