"""Datasets on disk in the layout of Pascal VOC.

::

    ROOT/JPEGImages/NAME.jpg               pictures (.jpg, .jpeg or .png)
    ROOT/SegmentationClass/NAME.png        label ids as palette or grey values, 255 = ignored
    ROOT/ImageSets/Segmentation/SPLIT.txt  a NAME a line
    ROOT/classes.txt                       a class a line, in the order of the ids
    ROOT/unseen.txt                        optional: the classes without masks in training
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from lexiseg.data.base import Sample
from lexiseg.data.sets.labels import LabelKind, read_values
from lexiseg.errors import LexisegError
from lexiseg.images import read_image
from lexiseg.label_ids import IGNORE_INDEX
from lexiseg.vocabulary import Vocabulary
from lexiseg.words import word_key

_SUFFIXES = (".jpg", ".jpeg", ".png")


def read_label(path: str | Path) -> Tensor:
    """Read a label picture: ``(H, W)`` int64, the palette indices or grey values 0..255 as they are in the file.

    Raises:
        LexisegError: the file is missing, damaged, larger than 200 megapixels, or holds colours instead of ids.
    """
    return torch.from_numpy(read_values(path, LabelKind.index))


def _read_lines(path: Path, what: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise LexisegError(f"'{path}' does not exist; it must list {what}, one a line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LexisegError(f"'{path}' cannot be read as text; it must list {what}, one a line.") from error
    return [line.strip() for line in lines if line.strip()]


class VocFolder:
    """A split of a dataset in the VOC layout (see the module).

    Args:
        root: the dataset's folder.
        split: name of the list below ``ImageSets/Segmentation``, without ``.txt``.
        labels: folder of the label pictures below ``root``; Context, for example, uses "SegmentationClassContext".
        splits: folder of the lists below ``root``.
        reduce_zero_label: ids count from 1 and 0 is background, as in VOC's own files: 0 becomes 255, v becomes v-1.

    Raises:
        LexisegError: a folder, list, picture or label is missing, the list is empty, or ``unseen.txt`` names a class
            that ``classes.txt`` does not. The pictures themselves are read, and checked, one by one.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        labels: str = "SegmentationClass",
        splits: str = "ImageSets/Segmentation",
        reduce_zero_label: bool = False,
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.reduce_zero_label = reduce_zero_label
        if not self.root.is_dir():
            raise LexisegError(f"The dataset folder '{self.root}' does not exist.")
        self._vocabulary = self._read_vocabulary()
        self._labels = self.root / labels
        self.list_path = self.root / splits / f"{split}.txt"
        self.names = self._read_split()
        self._paths = [self._find(name) for name in self.names]

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes in the order of their ids; seen and unseen are known where ``unseen.txt`` exists."""
        return self._vocabulary

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Read one picture and its label.

        Raises:
            IndexError: there are fewer samples.
            LexisegError: a file is damaged, the sizes differ, or the label holds an id that is no class.
        """
        name, (image_path, label_path) = self.names[index], self._paths[index]
        image = read_image(image_path)
        label = read_label(label_path)
        if image.shape[-2:] != label.shape:
            raise LexisegError(
                f"The label '{label_path}' is {label.shape[1]} x {label.shape[0]} pixels but its picture "
                f"'{image_path}' is {image.shape[2]} x {image.shape[1]}; they must have the same size."
            )
        if self.reduce_zero_label:
            label = torch.where((label == 0) | (label == IGNORE_INDEX), IGNORE_INDEX, label - 1)
        wrong = label[(label >= len(self._vocabulary)) & (label != IGNORE_INDEX)]
        if wrong.numel():
            raise LexisegError(
                f"The label '{label_path}' holds the id {int(wrong[0]) + self.reduce_zero_label}, but "
                f"'{self.root / 'classes.txt'}' lists {len(self._vocabulary)} classes; complete the list or mend the "
                "label."
            )
        return Sample(image, label, name)

    def verify(self) -> Iterator[tuple[str, str]]:
        """Read every sample and yield the name and what is wrong for each that cannot be used."""
        for index, name in enumerate(self.names):
            problem = self._problem(index)
            if problem:
                yield name, problem

    def _problem(self, index: int) -> str | None:
        try:
            self[index]
        except LexisegError as error:
            return str(error)
        return None

    def _read_vocabulary(self) -> Vocabulary:
        path = self.root / "classes.txt"
        if not path.is_file():
            raise LexisegError(f"'{path}' does not exist; it must list the classes, one a line, in the order of ids.")
        vocabulary = Vocabulary.load(path)
        if len(vocabulary) > IGNORE_INDEX:
            raise LexisegError(f"'{path}' lists {len(vocabulary)} classes; 8-bit labels have room for {IGNORE_INDEX}.")
        unseen_path = self.root / "unseen.txt"
        if not unseen_path.is_file():
            return vocabulary
        known = {word_key(name): name for name in vocabulary.names}
        unseen = set()
        for name in _read_lines(unseen_path, "the classes without masks in training"):
            if word_key(name) not in known:
                raise LexisegError(f"'{unseen_path}' names '{name}', which '{path}' does not; mend one of them.")
            unseen.add(known[word_key(name)])
        return vocabulary.with_seen(name for name in vocabulary.names if name not in unseen)

    def _read_split(self) -> tuple[str, ...]:
        names = _read_lines(self.list_path, f"the pictures of the split '{self.split}'")
        if not names:
            raise LexisegError(f"'{self.list_path}' is empty; it must name a picture a line, without the ending.")
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\x00" in name or "\\" in name:
                raise LexisegError(f"'{self.list_path}' names '{name}', which leads outside the dataset folder.")
        return tuple(names)

    def _find(self, name: str) -> tuple[Path, Path]:
        label = self._labels / f"{name}.png"
        folder = self.root / "JPEGImages"
        try:
            image = next((path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)
            has_label = label.is_file()
        except OSError as error:
            raise LexisegError(f"'{self.list_path}' names '{name[:80]}', which cannot be a file's name.") from error
        if image is None:
            raise LexisegError(f"'{self.list_path}' names '{name}', but '{folder / name}.jpg' (or .png) is missing.")
        if not has_label:
            raise LexisegError(f"'{self.list_path}' names '{name}', but its label '{label}' is missing.")
        return image, label
