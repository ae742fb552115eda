"""A split of a data set on disk: which files belong together, and the samples made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexiseg.data.base import Sample
from lexiseg.data.sets.archive import Place, readable
from lexiseg.data.sets.labels import UNKNOWN, LabelKind, ValueTable, read_values
from lexiseg.errors import LexisegError
from lexiseg.images import read_image
from lexiseg.vocabulary import Vocabulary


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a data set.

    Attributes:
        kind: what, in one or two words with a hyphen; the same fault always has the same kind.
        problem: one sentence: what, where, and what to do.
        path: of the file or folder.
        sample: which sample, where it is one.
        split: of the sample.
        severity: "error" makes training or evaluation fail or go wrong; "warning" may be meant so.
    """

    kind: str
    problem: str
    path: str = ""
    sample: str = ""
    split: str = ""
    severity: str = "error"


@dataclass(frozen=True)
class Item:
    """One picture and where its label is.

    Attributes:
        name: of the sample, usually the file's stem.
        image: the picture.
        label: the file of its label.
        kind: how that file holds its values.
        table: what its values stand for.
        draw: makes the values where they are not a picture in a file (COCO-style JSON); None reads ``label``.
    """

    name: str
    image: Place
    label: Place
    kind: LabelKind
    table: ValueTable
    draw: Callable[[], NDArray[np.int64]] | None = None

    def values(self) -> NDArray[np.int64]:
        """The label's numbers as the file holds them; see :func:`lexiseg.data.sets.labels.read_values`."""
        return self.draw() if self.draw is not None else read_values(self.label, self.kind)


@dataclass(frozen=True)
class SplitFiles:
    """What a layout found for one split, before a picture is opened.

    Attributes:
        split: its name.
        items: picture and label files that should be there; whether they are is not said.
        vocabulary: the classes.
        ignore: label of pixels without a class.
        findings: what is wrong with lists, folders and names.
    """

    split: str
    items: tuple[Item, ...]
    vocabulary: Vocabulary
    ignore: int
    findings: tuple[Finding, ...] = ()


class FileDataset:
    """The samples of a split; a :class:`lexiseg.data.base.SegmentationDataset`.

    Labels are int64 with 0-based class ids; pixels without a class are 255, or 65535 where there are more than 255
    classes. They have the size of the label file, which is never resized.

    Args:
        files: what belongs to the split.

    Raises:
        LexisegError: the split is empty, a file of it is missing, or its lists are wrong. Pictures and labels are read,
            and checked, one by one.
    """

    def __init__(self, files: SplitFiles) -> None:
        fault = next((finding for finding in files.findings if finding.severity == "error"), None)
        if fault is not None:
            raise LexisegError(fault.problem)
        if not files.items:
            raise LexisegError(f"The split '{files.split}' has no pictures; check the data set's folder.")
        self._items: Sequence[Item] = files.items
        self._vocabulary = files.vocabulary
        self.split = files.split
        self.ignore_index = files.ignore

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes in the order of their ids, with seen and unseen flags where they are known."""
        return self._vocabulary

    @property
    def items(self) -> Sequence[Item]:
        """Where the samples are, in order."""
        return self._items

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the samples, in order."""
        return tuple(item.name for item in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        """Read one picture and its label.

        Raises:
            IndexError: there are fewer samples.
            LexisegError: a file is damaged, the sizes differ, or the label holds a value that stands for nothing.
        """
        item = self._items[index]
        image, label = read_image(readable(item.image)), self.label(index)
        if image.shape[-2:] != label.shape:
            raise LexisegError(size_mismatch(item, (int(image.shape[1]), int(image.shape[2])), tuple(label.shape)))
        return Sample(image, label, item.name)

    def label(self, index: int) -> Tensor:
        """Read one label (H, W) without its picture.

        Raises:
            IndexError: there are fewer samples.
            LexisegError: the file is damaged, or holds a value that stands for nothing.
        """
        item = self._items[index]
        label = item.table.look_up(item.values())
        unknown = label == UNKNOWN
        if unknown.any():
            raise LexisegError(unknown_value(item, item.values()[unknown]))
        return torch.from_numpy(label)


def size_mismatch(item: Item, image: tuple[int, int], label: tuple[int, ...]) -> str:
    """The sentence for a picture and a label of different sizes (height, width)."""
    return (
        f"The label '{item.label}' is {label[1]} x {label[0]} pixels but its picture '{item.image}' is {image[1]} x "
        f"{image[0]}; they must have the same size."
    )


def unknown_value(item: Item, values: NDArray[np.int64]) -> str:
    """The sentence for values that stand for no class and are not known to be ignored; at least one."""
    found = np.unique(values)
    first = int(found[0])
    what = f"the colour #{first:06x}" if item.kind is LabelKind.color else f"the value {first}"
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"The label '{item.label}' holds {what}{more} at {values.size} pixels, which is no class of this data set; "
        "complete the class list or mend the label."
    )
