"""What a segmentation dataset is: pictures with a label map, and the vocabulary their ids stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lexiseg.label_ids import IGNORE_INDEX, ignore_index

if TYPE_CHECKING:
    from torch import Tensor

    from lexiseg.vocabulary import Vocabulary


@dataclass(frozen=True)
class Sample:
    """One picture with its ground truth."""

    image: Tensor  # ``(3, H, W)`` uint8, RGB, 0..255
    # ``(H, W)`` int64, 0-based ids into the dataset's vocabulary, 255 = ignored; 65535 = ignored where the dataset has
    # more than 255 classes
    label: Tensor
    name: str  # what to call it in reports and error messages, usually the file's stem


@runtime_checkable
class SegmentationDataset(Protocol):
    """A finite, indexable set of samples; the same index gives the same sample, in any process."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes the label ids index, in order, with their seen/unseen flags where the dataset has them."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``, ``0 <= index < len(self)``."""
        ...


def read_label(dataset: SegmentationDataset, index: int) -> Tensor:
    """The label of one sample, without its picture where the dataset can do so."""
    alone = getattr(dataset, "label", None)
    label: Tensor = dataset[index].label if alone is None else alone(index)
    return label


def fingerprint(dataset: SegmentationDataset) -> str:
    """How many pictures a dataset has, and a hash of their names and of its classes."""
    names = "\n".join(getattr(dataset, "names", ()))
    digest = hashlib.sha256(f"{dataset.vocabulary.hash()}\n{names}".encode("utf-8", "surrogateescape")).hexdigest()
    return f"{len(dataset)} ({digest[:16]})"


def seen_ids(vocabulary: Vocabulary) -> list[int]:
    """Ids of the classes flagged as seen, ascending; classes without a flag do not count as seen."""
    return [index for index, entry in enumerate(vocabulary.classes) if entry.seen is True]


def unseen_ids(vocabulary: Vocabulary) -> list[int]:
    """Ids of the classes flagged as unseen, ascending."""
    return [index for index, entry in enumerate(vocabulary.classes) if entry.seen is False]


def remap_to_seen(label: Tensor, seen: Sequence[int], *, void: int = IGNORE_INDEX) -> Tensor:
    """Renumber the seen classes from 0 and ignore all other ids: the labels of inductive training.

    ``label``: integer tensor of any shape with dataset ids 0..void. ``seen``: the seen ids; the id at position k
    becomes k. ``void``: the dataset's own label of pixels without a class, which is its largest. Returns int64 tensor
    of the same shape with values 0..len(seen)-1 and :func:`ignore_index` of so many classes. Ids outside ``seen``
    become the latter, so that pixels of unseen classes never carry a label into training.
    """
    import torch

    table = torch.full((void + 1,), ignore_index(len(seen)), dtype=torch.long)
    table[torch.tensor(list(seen), dtype=torch.long)] = torch.arange(len(seen))
    return table[label.long()]
