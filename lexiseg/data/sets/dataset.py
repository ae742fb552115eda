"""A split of a dataset on disk: which files belong together, and the samples made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lexiseg.data.base import Sample, unseen_ids
from lexiseg.data.sets.archive import Place, readable
from lexiseg.data.sets.labels import UNKNOWN, LabelKind, ValueTable, read_values
from lexiseg.errors import LexisegError
from lexiseg.images import orientation_of, read_pixels
from lexiseg.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a dataset."""

    kind: str  # what, in one or two words with a hyphen; the same fault always has the same kind
    problem: str  # one sentence: what, where, and what to do
    path: str = ""  # of the file or folder
    sample: str = ""  # which sample, where it is one
    split: str = ""  # of the sample; "" until the dataset is verified
    severity: str = "error"  # "error" makes training or evaluation fail or go wrong; "warning" may be meant so
    # values of the label that stand for nothing, and how many pixels have each
    values: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Item:
    """One picture and where its label is."""

    name: str  # of the sample, usually the file's stem
    image: Place  # the picture
    label: Place  # the file of its label
    kind: LabelKind  # how that file holds its values
    table: ValueTable  # what its values stand for
    # makes the values where they are not a picture in a file (outlines); None reads ``label``
    draw: Callable[[], NDArray[np.int64]] | None = None
    # "raw" where labels lie on the pixels as the picture's file holds them, "apply" where they lie on the picture as
    # its EXIF orientation turns it; None where nobody says
    exif: str | None = "raw"

    def pixels(self) -> NDArray[np.uint8]:
        """The picture, (H, W, 3), turned where its label is; see :func:`lexiseg.images.read_pixels`."""
        return read_pixels(readable(self.image), orient=self.exif != "raw")

    def values(self) -> NDArray[np.int64]:
        """The label's numbers as the file holds them; see :func:`lexiseg.data.sets.labels.read_values`."""
        return self.draw() if self.draw is not None else read_values(self.label, self.kind)


@dataclass(frozen=True)
class SplitFiles:
    """What a layout found for one split, before a picture is opened."""

    split: str  # its name
    items: tuple[Item, ...]  # picture and label files that should be there; whether they are is not said
    vocabulary: Vocabulary  # the classes
    findings: tuple[Finding, ...] = ()  # what is wrong with lists, folders and names

    def faults(self) -> tuple[Finding, ...]:
        """The findings, and one more where nothing is left of the split."""
        if self.items or any(finding.severity == "error" for finding in self.findings):
            return self.findings
        problem = f"The split '{self.split}' has no pictures with labels; check the dataset's folder and its lists."
        return (*self.findings, Finding("empty-split", problem))


class FileDataset:
    """The samples of a split; a :class:`lexiseg.data.base.SegmentationDataset`.

    Labels are int64 with 0-based class ids; pixels without a class are 255, or 65535 where there are more than 255
    classes. They have the size of the label file, which is never resized. Raises LexisegError if the split is empty, a
    file of it is missing, or its lists are wrong. Pictures and labels are read, and checked, one by one.
    """

    def __init__(self, files: SplitFiles) -> None:
        fault = next((finding for finding in files.faults() if finding.severity == "error"), None)
        if fault is not None:
            raise LexisegError(fault.problem)
        self.items: Sequence[Item] = files.items  # where the samples are, in order
        self.vocabulary = files.vocabulary  # the classes in the order of their ids, with flags where they are known
        self.split = files.split

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the samples, in order."""
        return tuple(item.name for item in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        """Read one picture and its label.

        Raises IndexError if there are fewer samples. Raises LexisegError if a file is damaged, the sizes differ, or the
        label holds a value that stands for nothing.
        """
        import torch

        item = self.items[index]
        image, label = item.pixels(), self._ids(item)
        fault = misfit(item, image.shape[:2], label.shape)
        if fault is not None:
            raise LexisegError(fault[1])
        return Sample(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label), item.name)

    def label(self, index: int) -> Tensor:
        """Read one label (H, W) without its picture.

        Raises IndexError if there are fewer samples. Raises LexisegError if the file is damaged, or holds a value that
        has no meaning.
        """
        import torch

        return torch.from_numpy(self._ids(self.items[index]))

    def without_unseen(self) -> FileDataset:
        """The samples without a pixel of an unseen class: training data in the strict inductive setting.

        The usual inductive setting keeps such pictures and hides those pixels; here whole pictures are left out (DeOP,
        Sec. 5.1; Cascade-CLIP, Table 2). Labels are read once each. Raises LexisegError if none is left, or a label
        cannot be read.
        """
        hidden = unseen_ids(self.vocabulary)
        items = tuple(item for item in self.items if not np.isin(self._ids(item), hidden).any())
        if not items:
            raise LexisegError(
                f"Every training picture of {len(self)} shows an unseen class, so nothing is left to train on; set "
                "unseen_pictures to hide instead."
            )
        return FileDataset(SplitFiles(self.split, items, self.vocabulary))

    @staticmethod
    def _ids(item: Item) -> NDArray[np.int64]:
        values = item.values()
        label = item.table.look_up(values)
        unknown = label == UNKNOWN
        if unknown.any():
            raise LexisegError(unknown_value(item, values[unknown]))
        return label


def misfit(item: Item, image: tuple[int, ...], label: tuple[int, ...]) -> tuple[str, str] | None:
    """The kind of fault and its sentence where a label does not fit its picture, or how it does is ambiguous.

    ``image``: height and width of the picture as :meth:`Item.pixels` gives it. ``label``: height and width of the
    label.
    """
    orientation = 1 if item.exif is not None else _orientation(item.image)
    raw = image[::-1] if orientation > 4 else image
    if orientation > 1 and label == raw:
        return "open-orientation", (
            f"The camera's orientation flag ({orientation}) turns the picture '{item.image}', and it is unclear "
            f"whether its label '{item.label}' was drawn on the turned picture or on the pixels as stored; write "
            "'exif: apply' or 'exif: raw' into classes.yaml or lexiseg.yaml next to the data."
        )
    if image == label:
        return None
    return "size-mismatch", (
        f"The label '{item.label}' is {label[1]} x {label[0]} pixels but its picture '{item.image}' is {image[1]} x "
        f"{image[0]}; they must have the same size."
    )


def _orientation(place: Place) -> int:
    try:
        with Image.open(readable(place)) as picture:
            return orientation_of(picture)
    except Exception:  # whoever reads the pixels says what is wrong
        return 1


def unknown_value(item: Item, values: NDArray[np.int64]) -> str:
    """The sentence for values that stand for no class and are not known to be ignored; at least one."""
    found = np.unique(values)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"The label '{item.label}' holds {value_name(item.kind, int(found[0]))}{more} at {values.size} pixels; no "
        f"class has it: {item.table.remedy}."
    )


def value_name(kind: LabelKind, value: int) -> str:
    """What to call a value of a label."""
    return f"the colour #{value:06x}" if kind is LabelKind.color else f"the value {value}"


def nothing_labelled(split: str) -> str:
    """The sentence for a split in which no pixel has a class that counts."""
    which, what = ("a trained", "train on") if split.startswith("train") else ("any", "judge")
    return (
        f"There is no pixel of {which} class in the labels of the split '{split}', so there is nothing to {what}; "
        "check what the values of the masks stand for."
    )
