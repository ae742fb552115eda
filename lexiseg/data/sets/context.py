"""PASCAL Context, 59 and 459 classes, on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lexiseg.class_forms import ListedClass
from lexiseg.class_list import read_class_list
from lexiseg.data.sets.catalog import DataSetInfo
from lexiseg.data.sets.dataset import SplitFiles
from lexiseg.data.sets.labels import LabelKind, ValueTable
from lexiseg.data.sets.listing import by_stem, find_home, first_folder, read_list
from lexiseg.data.sets.pairing import LabelFolder, label_folder, pair, plain_table, table_of
from lexiseg.errors import LexisegError
from lexiseg.images import IMAGE_SUFFIXES
from lexiseg.words import word_key


def list_context59(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """PASCAL Context 59: ``train`` or ``val`` of VOC 2010.

    Labels are the PNGs of SegmentationClassContext (1..59 in alphabetical order, 0 = none of them), or the
    distribution's own .mat files of 459 classes with its labels.txt, by whose names the 59 are picked; the pixels of
    the other 400 classes then have no class. Raises LexisegError if ``root`` holds no such dataset, or labels.txt
    is needed and missing, wrong or without one of the 59.
    """
    home = _context_home(root)
    folder = home / "SegmentationClassContext"
    if folder.is_dir():
        labels = [label_folder(folder, (".png",), LabelKind.index, table_of(info))]
    else:
        listed = _context_labels(root, home)
        values = {word_key(entry.text): _value(entry, index) for index, entry in enumerate(listed)}
        absent = [name for name in info.classes if word_key(name) not in values]
        if absent:
            raise LexisegError(
                f"The labels.txt beside '{home}' lacks '{absent[0]}', one of PASCAL Context's 59 classes; take the "
                "distribution's own file."
            )
        id_map = {values[word_key(name)]: index for index, name in enumerate(info.classes)}
        others = {_value(entry, index) for index, entry in enumerate(listed)} - set(id_map)
        labels = [_context_mats(root, home, ValueTable(id_map, {0, *others}, info.ignore))]
    return _context_split(info, home, split, labels)


def list_context459(info: DataSetInfo, root: Path, split: str, classes: Path | None) -> SplitFiles:
    """PASCAL Context 459: ``train`` or ``val`` of VOC 2010.

    Labels are the distribution's .mat files (``trainval/*.mat``, variable LabelMap, 0 = no class), or 16-bit TIFFs made
    of them (``annotations_detectron2/pc459_SPLIT``: class ids from 0, 65535 = no class). The names come from
    labels.txt. Raises LexisegError if ``root`` holds no such dataset, or the class list is missing, wrong or not of
    459 classes.
    """
    home = _context_home(root)
    listed = list(read_class_list(classes).classes) if classes else _context_labels(root, home)
    listed.sort(key=lambda entry: -1 if entry.value is None else entry.value)
    info = info.with_classes(tuple(entry.text for entry in listed))
    made = home / "annotations_detectron2" / f"pc459_{split}"
    if _context_mat_folder(root, home) is None and made.is_dir():
        labels = [label_folder(made, (".tif", ".tiff"), LabelKind.wide, plain_table(info.num_classes))]
    else:
        id_map = {_value(entry, index): index for index, entry in enumerate(listed)}
        labels = [_context_mats(root, home, ValueTable(id_map, info.void, info.ignore))]
    return _context_split(info, home, split, labels)


def _value(entry: ListedClass, index: int) -> int:
    return index + 1 if entry.value is None else entry.value


def _context_home(root: Path) -> Path:
    marks = ("SegmentationClassContext", "JPEGImages")
    return find_home(root, ("VOCdevkit/VOC2010", "VOC2010"), marks, "PASCAL Context (VOC 2010)")


def _context_mat_folder(root: Path, home: Path) -> Path | None:
    return first_folder((home / "trainval", root / "trainval", home.parent / "trainval"), (".mat",))


def _context_mats(root: Path, home: Path, table: ValueTable) -> LabelFolder:
    folder = _context_mat_folder(root, home) or home / "trainval"
    return label_folder(folder, (".mat",), LabelKind.context_mat, table)


def _context_labels(root: Path, home: Path) -> list[ListedClass]:
    places = (home, root, home.parent, home / "trainval", root / "trainval")
    found = next((path for place in places if (path := place / "labels.txt").is_file()), None)
    if found is None:
        raise LexisegError(
            f"PASCAL Context's list of 459 classes is missing: put the distribution's labels.txt into '{home}'."
        )
    return list(read_class_list(found).classes)


def _context_split(info: DataSetInfo, home: Path, split: str, labels: Sequence[LabelFolder]) -> SplitFiles:
    path = home / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    main = home / "ImageSets" / "Main" / f"{split}.txt"
    # Context annotates the pictures of VOC 2010's detection task, so that task's lists are its splits.
    names, wrong = read_list(main if main.is_file() and not path.is_file() else path, split)
    images = by_stem(home / "JPEGImages", IMAGE_SUFFIXES)
    items, missing = pair(names, split, images, home / "JPEGImages", labels)
    return SplitFiles(split, tuple(items), info.vocabulary(), (*wrong, *missing))
