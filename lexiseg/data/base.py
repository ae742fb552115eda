"""What a segmentation dataset is: pictures with a label map, and the vocabulary their ids stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lexiseg.vocabulary import Vocabulary

IGNORE_INDEX = 255
"""Label id of pixels that have no class: void, border, padding, and in training the unseen classes."""


@dataclass(frozen=True)
class Sample:
    """One picture with its truth.

    Attributes:
        image: ``(3, H, W)`` uint8, RGB, 0..255.
        label: ``(H, W)`` int64, 0-based ids into the dataset's vocabulary, 255 = ignored; 65535 = ignored where the
            dataset has more than 255 classes.
        name: what to call it in reports and error messages, usually the file's stem.
    """

    image: Tensor
    label: Tensor
    name: str


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


class Subset:
    """The samples of ``dataset`` at ``indices``, as a dataset of their own with the same vocabulary.

    Args:
        dataset: where the samples come from.
        indices: which, in the wanted order.
    """

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._indices = tuple(indices)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the dataset this is a part of."""
        return self._dataset.vocabulary

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._indices[index]]

    def __iter__(self) -> Iterator[Sample]:
        return (self._dataset[index] for index in self._indices)


def seen_ids(vocabulary: Vocabulary) -> list[int]:
    """Ids of the classes flagged as seen, ascending; classes without a flag do not count as seen."""
    return [index for index, entry in enumerate(vocabulary.classes) if entry.seen is True]


def unseen_ids(vocabulary: Vocabulary) -> list[int]:
    """Ids of the classes flagged as unseen, ascending."""
    return [index for index, entry in enumerate(vocabulary.classes) if entry.seen is False]


def remap_to_seen(label: Tensor, seen: Sequence[int]) -> Tensor:
    """Number the seen classes by their rank and ignore all other ids: the labels of inductive training.

    Args:
        label: integer tensor of any shape with dataset ids 0..255.
        seen: the seen ids; the id at position k becomes k.

    Returns:
        int64 tensor of the same shape with values 0..len(seen)-1 and 255. Ids outside ``seen`` become 255, so that
        pixels of unseen classes never carry a label into training.

    Raises:
        ValueError: an id in ``seen`` is not in 0..254.
    """
    if any(not 0 <= index < IGNORE_INDEX for index in seen):
        raise ValueError(f"seen ids must be in 0..{IGNORE_INDEX - 1}, got {list(seen)}")
    table = torch.full((IGNORE_INDEX + 1,), IGNORE_INDEX, dtype=torch.long)
    table[torch.tensor(list(seen), dtype=torch.long)] = torch.arange(len(seen))
    return table[label.long()]
