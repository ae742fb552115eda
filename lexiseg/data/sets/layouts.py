"""Where the pictures, the labels and the lists of a folder of one's own are, in the layouts people have."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lexiseg.data.sets.dataset import Finding, SplitFiles
from lexiseg.data.sets.listing import by_stem, child, entries, files_in, folders_in, listed_as, read_list
from lexiseg.errors import DataSetError
from lexiseg.images import IMAGE_SUFFIXES

IMAGE_FOLDERS = ("images", "JPEGImages", "imgs", "image", "img", "photos", "data")
MASK_FOLDERS = (
    *("masks", "labels", "SegmentationClass", "annotations", "mask", "label", "annots", "gt", "ground_truth"),
    *("labelme", "yolo"),  # as `lexiseg predict` calls them
)
CLASS_FILES = (
    *("classes.txt", "classes.yaml", "classes.yml", "classes.json", "classes.csv", "classes.names", "_classes.csv"),
    *("data.yaml", "data.yml", "dataset.yaml", "class_dict.csv", "codes.txt", "label_colors.txt", "labelmap.txt"),
    *("labels.txt", "names.txt", "obj.names"),
)
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
_LIST_FOLDERS = (".", "ImageSets/Segmentation", "splits")
_BESIDE = ("annot", "_annot", "_labels", "_label", "_masks", "_mask", "_annotations")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
_COCO_NAMES = ("_annotations.coco.json", "annotations.json", "labels.json", "instances.json", "coco.json")
_JSON_FOLDERS = ("annotations",)
_NO_OUTLINES = ("captions", "person_keypoints", "panoptic")
_EVERY = 5


@dataclass(frozen=True)
class Layout:
    """Where the pictures and the labels of a split are, and whether the folders are the split's own."""

    images: Path
    labels: Path
    own: bool


def find_place(root: Path, split: str) -> Layout:
    """The folders of a split's pictures and labels. Raises DataSetError if there are none."""
    images, labels, part = child(root, IMAGE_FOLDERS), _mask_folder(root), part_of(root, split)
    images_part, labels_part = part_of(images, split), part_of(labels, split)
    if part is not None and not images_part:
        inside = child(part, IMAGE_FOLDERS) or part
        beside = _mask_folder(part) or child(root, [part.name + end for end in _BESIDE]) or inside
        return Layout(inside, beside, True)
    if images is None and labels is None and by_stem(root, IMAGE_SUFFIXES):
        return Layout(root, root, False)
    if images is None:
        lacks = f"no folder of pictures ({' or '.join(IMAGE_FOLDERS[:2])})"
        raise DataSetError(f"'{root}' has {lacks} for '{split}'; see docs/own-data.md for the layouts.")
    if labels is None and not _has_labels(images_part or images):
        lacks = f"no folder of masks ({', '.join(MASK_FOLDERS[:4])})"
        raise DataSetError(
            f"'{root}' has {lacks} and no JSON of annotations for '{split}'; see docs/own-data.md for the layouts."
        )
    inner = folders_in(images)
    if images_part is None and not by_stem(images, IMAGE_SUFFIXES) and inner:
        names = ", ".join(sorted(folder.name for folder in inner))
        raise DataSetError(
            f"'{images}' has no folder for the split '{split}', only {names}; call one of them '{split}', or write "
            f"{split}.txt.",
            "missing-list",
        )
    chosen = images_part or images
    return Layout(chosen, labels_part or labels or chosen, images_part is not None)


def part_of(folder: Path | None, split: str) -> Path | None:
    """The folder of a split inside ``folder``: "val" may be called valid, validation or val2017."""
    if folder is None:
        return None
    wanted = re.compile(rf"(?:{'|'.join(SPLITS.get(split, (re.escape(split),)))})(?:_?20\d\d)?", re.IGNORECASE)
    found = [inner for inner in folders_in(folder) if wanted.fullmatch(inner.name)]
    return min(found, key=lambda inner: (inner.name != split, inner.name), default=None)


def _mask_folder(root: Path) -> Path | None:
    """The folder of labels: the first that holds any, by itself or in its folders, else the first there is."""
    there = [folder for name in MASK_FOLDERS if (folder := child(root, (name,))) is not None]
    holding = (folder for folder in there if any(map(_has_labels, (folder, *folders_in(folder)))))
    return next(holding, there[0] if there else None)


def _has_labels(folder: Path) -> bool:
    return any(name.lower().endswith((*MASK_SUFFIXES, ".txt", ".json")) for name in entries(folder))


def class_file_in(root: Path, place: Layout) -> Path | None:
    """The class file of a folder, in it or beside its pictures or labels."""
    folders = (root, place.images.parent, place.images, place.labels)
    return next((path for folder in folders for path in files_in(folder, CLASS_FILES)), None)


def picture_folders(root: Path, split: str) -> list[Path]:
    """Where the pictures of a JSON file may be."""
    images = child(root, IMAGE_FOLDERS)
    chosen = [root, images]
    for name in dict.fromkeys((split, *SPLITS)):
        part = part_of(root, name)
        chosen += [part, child(part, IMAGE_FOLDERS), part_of(images, name)]
    return list(dict.fromkeys(folder for folder in chosen if folder is not None))


def json_of(root: Path, split: str) -> tuple[Path | None, bool]:
    """The COCO-style JSON of a split, and whether it is the only one and so holds all of them.

    Raises DataSetError if there are several, and their names say no split.
    """
    names = SPLITS.get(split, (split,))
    for path in _jsons(part_of(root, split)):
        if path.name.endswith((*_COCO_NAMES, ".coco.json")) or any(name in path.stem.lower() for name in names):
            return path, False
    found = [*_jsons(child(root, _JSON_FOLDERS)), *_jsons(root)]
    named = [path for path in found if any(name in path.stem.lower() for name in names)]
    if named:
        return min(named, key=lambda path: "instances" not in path.name), False
    if any(name in path.stem.lower() for path in found for names in SPLITS.values() for name in names):
        return None, False
    if len(found) > 1:
        raise DataSetError(
            f"The name of '{found[0]}' says no split, and there is '{found[1].name}' as well; if they are COCO-style "
            "JSON, call them instances_train.json and instances_val.json.",
            "missing-list",
        )
    return (found[0], True) if found else (None, False)


def _jsons(folder: Path | None) -> list[Path]:
    """The JSON files of a folder that may be COCO's and hold outlines."""
    stems = {} if folder is None else by_stem(folder, IMAGE_SUFFIXES)
    found = [] if folder is None else [folder / name for name in entries(folder) if name not in CLASS_FILES]
    found = [path for path in found if path.suffix == ".json" and not path.name.startswith(_NO_OUTLINES)]
    return [path for path in found if path.stem not in stems and not is_labelme(path)]


def without_outlines(root: Path) -> Path | None:
    """A file of COCO's that is not read: of captions, key points or panoptic segments."""
    folder = child(root, _JSON_FOLDERS) or root
    return next((folder / name for name in entries(folder) if name.startswith(_NO_OUTLINES)), None)


def is_labelme(path: Path) -> bool:
    """Whether a JSON file is of one picture, by its beginning: files of whole datasets may be large."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:  # whoever reads it says so
        return False
    return any(key in head for key in (b'"shapes"', b'"imagePath"', b'"imageData"'))


def own_splits(root: Path) -> tuple[str, ...]:
    """Which of "train" and "val" a folder says anything about; both where it says nothing."""
    images = child(root, IMAGE_FOLDERS)
    found = tuple(
        split
        for split in SPLITS
        if own_list(root, split) is not None
        or (split == "train" and own_list(root, "val") is not None)
        or any(part_of(folder, split) is not None for folder in (root, images))
        or json_of(root, split) != (None, False)
    )
    return found or tuple(SPLITS)


def own_list(root: Path, split: str) -> Path | None:
    """The list of a split's pictures; None where there is none."""
    names = [f"{name}.txt" for name in SPLITS.get(split, (split,))]
    return next((path for place in _LIST_FOLDERS for path in files_in(root / place, names)), None)


def names_of(root: Path, split: str, place: Layout, pictures: Sequence[str]) -> tuple[list[str], list[Finding]]:
    """The names of a split's pictures, and what is wrong with its list.

    Raises DataSetError if there is no such split.
    """
    path = own_list(root, split)
    if path is not None:
        return read_list(path, split)
    other = next((one for name in SPLITS if name != split and (one := own_list(root, name)) is not None), None)
    if other is not None and not place.own:
        if split == "train":  # a list of what is held back leaves the rest for training
            held, findings = read_list(other, "val")
            known = set(pictures)
            away = {listed_as(one, known) for one in held}
            return [name for name in pictures if name not in away], findings
        return read_list(root / f"{split}.txt", split)
    if place.own:
        return list(pictures), []
    if split not in SPLITS:
        raise DataSetError(
            f"'{root}' has no list '{split}.txt' and no pictures for it in a folder, so there is no such split; "
            "choose another.",
            "missing-list",
        )
    return every_fifth(pictures, split), []


def part_in_split(files: SplitFiles, root: Path, split: str) -> SplitFiles:
    """The part of a JSON file of the whole dataset that is in a split."""
    pictures = {item.name for item in files.items}
    names, findings = names_of(root, split, Layout(root, root, False), sorted(pictures))
    wanted = {listed_as(name, pictures) for name in names}
    items = tuple(item for item in files.items if item.name in wanted)
    return replace(files, items=items, findings=(*files.findings, *findings))


def every_fifth(names: Sequence[str], split: str) -> list[str]:
    """The part of ``names`` that is in a split where no list says so; of fewer than five the last one is "val"."""
    if len(names) < _EVERY:
        return list(names[-1:] if split == "val" else names[:-1])
    return [name for index, name in enumerate(names) if (index % _EVERY == _EVERY - 1) == (split == "val")]
