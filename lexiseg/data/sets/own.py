"""A folder of one's own: pictures and masks in two folders with a class file, or COCO-style JSON.

::

    ROOT/images/NAME.jpg       pictures (.jpg, .jpeg or .png); JPEGImages/ is taken as well
    ROOT/masks/NAME.png        labels (or .tif); labels/, annotations/ and SegmentationClass/ are taken as well
    ROOT/classes.txt           the classes (.yaml, .json and .csv as well), in the order of their ids
    ROOT/unseen.txt            optional: the classes without masks in training
    ROOT/train.txt, val.txt    optional: a NAME a line; ImageSets/Segmentation/ is looked in as well

Masks hold class ids from 0, with 255 (65535 where there are more than 255 classes) for no class. Where the class file
numbers the classes ("1: cat"), masks hold those numbers, and 0 is no class unless it is one of them. Where it gives
every class a colour and the masks are colour pictures, a class is a colour, and black is no class unless it is one.

Without lists, ``images/train`` and ``images/val`` are the splits; without those, every fifth picture by name is ``val``
and the others are ``train``.

COCO-style JSON: ``ROOT/annotations/*SPLIT*.json`` or ``ROOT/SPLIT.json`` with images, annotations and categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lexiseg.class_list import ClassList, read_class_list
from lexiseg.data.sets.coco_json import list_coco_json
from lexiseg.data.sets.dataset import Finding, SplitFiles
from lexiseg.data.sets.errors import DataSetError
from lexiseg.data.sets.labels import LabelKind, ValueTable
from lexiseg.data.sets.listing import IMAGE_SUFFIXES, by_stem, entries, first_folder, read_list, same_stems, with_unseen
from lexiseg.data.sets.pairing import LabelFolder, orphans, pair
from lexiseg.errors import LexisegError
from lexiseg.label_ids import IGNORE_INDEX, ignore_index
from lexiseg.vocabulary import Vocabulary

IMAGE_FOLDERS = ("images", "JPEGImages")
MASK_FOLDERS = ("masks", "labels", "SegmentationClass", "annotations")
CLASS_FILES = ("classes.txt", "classes.yaml", "classes.yml", "classes.json", "classes.csv")
_LIST_FOLDERS = (".", "ImageSets/Segmentation", "splits")
_MASK_SUFFIXES = (".png", ".tif", ".tiff")
_SPLITS = ("train", "val")
_EVERY = 5


def list_own(root: Path, split: str, unseen: str | None, classes: Path | None) -> SplitFiles:
    """The files of a split of a folder of one's own; see the module.

    Args:
        root: the folder.
        split: usually "train" or "val".
        unseen: "none" leaves unseen.txt aside.
        classes: the class file; None looks for one in the folder.

    Raises:
        LexisegError: the folder, its pictures, masks or class file cannot be found or read, or unseen.txt names a class
            that there is not, or all.
    """
    if not root.is_dir():
        raise DataSetError(f"The data folder '{root}' does not exist; check the path.")
    annotations = _json_of(root, split)
    if annotations is not None:
        return list_coco_json(root, annotations, split, unseen)
    images, masks = first_folder(root / name for name in IMAGE_FOLDERS), _mask_folder(root)
    unnamed = _unnamed_json(root)
    if unnamed is not None and (masks is None or (masks.name == "annotations" and not _holds_masks(masks))):
        raise DataSetError(
            f"The name of '{unnamed}' says no split; if it is COCO-style JSON, call it "
            f"'{root / 'annotations'}/instances_train.json', or instances_val.json.",
            "missing-list",
        )
    if images is None or masks is None:
        lacks = f"no folder of pictures ({' or '.join(IMAGE_FOLDERS)})"
        if images is not None:
            lacks = f"no folder of masks ({', '.join(MASK_FOLDERS)})"
        raise DataSetError(
            f"'{root}' has {lacks} and no JSON of annotations for '{split}'; see docs/own-data.md for the layouts."
        )
    class_file = classes or find_class_file(root)
    listed = read_class_list(class_file)
    vocabulary = with_unseen(Vocabulary.parse(listed.without_shared()), root, unseen, "the class file")
    parts = (images / split).is_dir() and (masks / split).is_dir()
    image_folder, mask_folder = (images / split, masks / split) if parts else (images, masks)
    pictures = by_stem(image_folder, IMAGE_SUFFIXES)
    files = by_stem(mask_folder, _MASK_SUFFIXES)
    ignore = ignore_index(len(vocabulary))
    kind, table = _reading(listed, files, ignore)
    labels = [LabelFolder(files, mask_folder, kind, table)]
    findings: list[Finding] = []
    list_path = own_list(root, split)
    if list_path is not None:
        names, findings = read_list(list_path, split)
    elif _has_lists(root):
        names, findings = read_list(root / f"{split}.txt", split)
    elif parts:
        names = list(pictures)
    elif split not in _SPLITS:
        raise DataSetError(
            f"'{root}' has no list '{split}.txt' and no pictures for it in a folder, so there is no such split.",
            "missing-list",
        )
    else:
        names = every_fifth(list(pictures), split)
    items, missing = pair(names, split, pictures, image_folder, labels)
    findings += missing
    findings += same_stems(names, image_folder, IMAGE_SUFFIXES, split)
    findings += same_stems(names, mask_folder, _MASK_SUFFIXES, split)
    findings += _left_out(listed, class_file)
    if list_path is None:
        findings += orphans(labels, pictures, split)
        if not pictures:
            problem = f"The folder '{image_folder}' holds no pictures; put .jpg or .png files into it."
            findings.append(Finding("missing-folder", problem, str(image_folder), split=split))
    return SplitFiles(split, tuple(items), vocabulary, ignore, tuple(findings))


def find_class_file(root: Path) -> Path:
    """The class file of a folder.

    Raises:
        LexisegError: there is none.
    """
    for name in CLASS_FILES:
        if (root / name).is_file():
            return root / name
    raise LexisegError(
        f"'{root / CLASS_FILES[0]}' does not exist; it must list the classes, one a line, in the order of their ids."
    )


def own_splits(root: Path) -> tuple[str, ...]:
    """Which of "train" and "val" a folder says anything about; both where it says nothing."""
    found = tuple(
        split
        for split in _SPLITS
        if own_list(root, split) is not None
        or _json_of(root, split) is not None
        or any((root / name / split).is_dir() for name in IMAGE_FOLDERS)
    )
    return found or _SPLITS


def _mask_folder(root: Path) -> Path | None:
    places = [root / name for name in MASK_FOLDERS]
    inside = [root / name / part for name in MASK_FOLDERS for part in _SPLITS]
    holds = first_folder([*places, *inside], _MASK_SUFFIXES)
    if holds is None:
        return first_folder(places)
    return holds if holds in places else holds.parent


def _holds_masks(folder: Path) -> bool:
    return first_folder([folder, *(folder / split for split in _SPLITS)], _MASK_SUFFIXES) is not None


def _json_of(root: Path, split: str) -> Path | None:
    beside = [root / name for name in entries(root) if name == f"{split}.json" or name.startswith("instances_")]
    found = (path for path in (*_annotations(root), *beside) if path.suffix == ".json")
    return next((path for path in found if split in path.stem), None)


def _annotations(root: Path) -> list[Path]:
    folder = root / "annotations"
    return [folder / name for name in entries(folder) if name.endswith(".json") and not name.startswith("captions")]


def _unnamed_json(root: Path) -> Path | None:
    """A JSON file that may hold outlines but belongs to no split by its name."""
    beside = [root / name for name in entries(root) if name.endswith(".json") and name not in CLASS_FILES]
    found = (path for path in (*_annotations(root), *beside) if not any(split in path.stem for split in _SPLITS))
    return next(found, None)


def own_list(root: Path, split: str) -> Path | None:
    """The list of a split's pictures; None where there is none."""
    return next((path for place in _LIST_FOLDERS if (path := root / place / f"{split}.txt").is_file()), None)


def _has_lists(root: Path) -> bool:
    return any(own_list(root, split) is not None for split in _SPLITS)


def every_fifth(names: Sequence[str], split: str) -> list[str]:
    """The part of ``names`` that is in a split where no list says so; of fewer than five the last one is "val"."""
    if len(names) < _EVERY:
        return list(names[-1:] if split == "val" else names[:-1])
    return [name for index, name in enumerate(names) if (index % _EVERY == _EVERY - 1) == (split == "val")]


def _left_out(listed: ClassList, class_file: Path) -> list[Finding]:
    return [
        Finding(
            "class-list",
            f"The class list '{class_file}' gives the word '{word}' to '{name}' and to another class, so it is no "
            "synonym of either; take it out of one.",
            str(class_file),
            severity="warning",
        )
        for name, word in dict.fromkeys(listed.shared_words())
    ]


def _reading(listed: ClassList, files: dict[str, Path], ignore: int) -> tuple[LabelKind, ValueTable]:
    """How the masks hold their values, and what those stand for."""
    classes = listed.classes
    if all(entry.color is not None for entry in classes) and _are_colored(list(files.values())[: 2 * _EVERY - 1]):
        colors = {_packed(entry.color or (0, 0, 0)): index for index, entry in enumerate(classes)}
        if len(colors) < len(classes):
            raise LexisegError("Two classes of the class file have the same colour, so masks cannot tell them apart.")
        return LabelKind.color, ValueTable(colors, (0, *map(_packed, listed.ignored_colors)), ignore)
    kind = LabelKind.index if ignore == IGNORE_INDEX else LabelKind.wide
    if all(entry.value is not None for entry in classes):
        id_map = {entry.value: index for index, entry in enumerate(classes) if entry.value is not None}
        return kind, ValueTable(id_map, (0, ignore, *listed.ignored), ignore)
    return kind, ValueTable({index: index for index in range(len(classes))}, (ignore, *listed.ignored), ignore)


def _packed(color: tuple[int, int, int]) -> int:
    red, green, blue = color
    return red * 65536 + green * 256 + blue


def _are_colored(paths: Sequence[Path]) -> bool:
    """Whether at least half of the pictures hold colours; one that cannot be opened counts for neither side."""
    return sum(_mode(path) in ("RGB", "RGBA") for path in paths) * 2 >= len(paths)


def _mode(path: Path) -> str:
    try:
        with Image.open(path) as picture:
            return picture.mode
    except (OSError, ValueError, SyntaxError):
        return ""
