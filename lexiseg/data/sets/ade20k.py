"""ADE20K, 150 classes and the full set's 847, on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lexiseg.class_list import read_class_list
from lexiseg.data.sets.archive import Place, zipped
from lexiseg.data.sets.catalog import DataSetInfo
from lexiseg.data.sets.dataset import Finding, SplitFiles
from lexiseg.data.sets.labels import LabelKind, ValueTable
from lexiseg.data.sets.listing import by_stem, entries, find_home, first_folder
from lexiseg.data.sets.pairing import LabelFolder, by_folder, label_folder, plain_table, table_of, zipped_labels
from lexiseg.errors import LexisegError
from lexiseg.words import word_key

_ADE_150 = "ADEChallengeData2016.zip"


def list_ade150(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """ADE20K 150 (ADEChallengeData2016): ``train`` or ``val``; label values 1..150, 0 = no class.

    Where it is not unpacked, it is read out of ADEChallengeData2016.zip. Raises LexisegError if ``root`` holds no such
    dataset.
    """
    marks = ("images", "annotations")
    home = find_home(root, ("ADEChallengeData2016",), marks, "ADEChallengeData2016", (_ADE_150,))
    part = {"train": "training", "val": "validation"}.get(split, split)
    image_folder = home / "images" / part
    images: Mapping[str, Place] = by_stem(image_folder, (".jpg",))
    labels = label_folder(home / "annotations" / part, (".png",), LabelKind.index, table_of(info))
    packed, inner = [root / _ADE_150, home / _ADE_150], "ADEChallengeData2016"
    images = images or zipped(packed, f"{inner}/images/{part}", (".jpg",))
    if not labels.files:
        labels = zipped_labels(packed, f"{inner}/annotations/{part}", table_of(info))
    files = by_folder(info, split, images, image_folder, [labels])
    listed = home / "objectInfo150.txt"
    if not listed.is_file():
        return files
    try:
        names = [word_key(entry.name) for entry in read_class_list(listed).classes]
        expected = [word_key(name) for name in info.classes]
        differ = [(ours, found) for ours, found in zip(expected, names, strict=False) if ours != found]
        if len(names) == len(expected) and not differ:
            return files
        detail = f"'{differ[0][1]}' where '{differ[0][0]}' is expected" if differ else f"{len(names)} classes"
        problem = f"'{listed}' lists other classes than ADE20K's 150: {detail}; the known list is used."
    except LexisegError as error:
        problem = str(error)
    finding = Finding("class-list", problem, str(listed), split=split, severity="warning")
    return replace(files, findings=(*files.findings, finding))


def list_ade847(info: DataSetInfo, root: Path, split: str, classes: Path | None) -> SplitFiles:
    """ADE20K 847: ``train`` or ``val``.

    Labels are 16-bit TIFFs (``annotations_detectron2``: class ids 0..846, 65535 = no class) beside
    ``images_detectron2``, or the full set as distributed: ``images/ADE/training/*/*/NAME.jpg`` with ``NAME_seg.png``,
    whose value is ``R // 10 * 256 + G``. For the latter the class list must give each class that value as its "id".
    Values outside the 847 classes have no class.

    A class is called by all its words ("building, edifice"): many share the first one, and the papers' code puts the
    whole text into its sentences. The list is read from ``classes``, or from classes.txt, classes.json, classes.yaml or
    ADE20K_847_pure_class.json in the dataset's folder. Where ADE20K_572_pure_class.json lies beside it, the classes
    that it lacks are unseen. Raises LexisegError if ``root`` holds no such dataset, or the class list is missing,
    wrong, not of 847 classes, or without the ids that colour PNGs need.
    """
    marks = ("images_detectron2", "images/ADE", "images")
    home = find_home(root, ("ADE20K_2021_17_01",), marks, "ADE20K's full set")
    names = ("classes.txt", "classes.json", "classes.yaml", "ADE20K_847_pure_class.json")
    found = classes or next(
        (path for place in (home, root) for name in names if (path := place / name).is_file()), None
    )
    if found is None:
        raise LexisegError(
            f"The list of ADE20K's 847 classes is missing: put it into '{home}' as classes.txt or classes.json, or "
            "name it with --classes."
        )
    listed = read_class_list(found).classes
    info = info.with_classes(tuple(entry.text for entry in listed))
    seen = next((path for place in (home, root) if (path := place / "ADE20K_572_pure_class.json").is_file()), None)
    if seen is not None:
        keys = {word_key(entry.text) for entry in read_class_list(seen).classes}
        info = replace(info, unseen_lists={"papers": tuple(n for n in info.classes if word_key(n) not in keys)})
    elif info.unseen == "papers":
        raise LexisegError(
            f"The list of ADE20K's 572 seen classes is missing: put ADE20K_572_pure_class.json into '{home}'."
        )
    part = {"train": "training", "val": "validation"}.get(split, split)
    made = home / "images_detectron2" / part
    if made.is_dir():
        folder = home / "annotations_detectron2" / part
        labels = [label_folder(folder, (".tif", ".tiff"), LabelKind.wide, plain_table(info.num_classes))]
        return by_folder(info, split, by_stem(made, (".jpg",)), made, labels)
    if any(entry.value is None for entry in listed):
        raise LexisegError(
            f"The class list '{found}' does not give the classes' ids in ADE20K's full set, which its colour PNGs "
            "need; add 'id' to each class, or prepare 16-bit TIFFs."
        )
    folder = first_folder((home / "images" / "ADE" / part, home / "images" / part)) or home / "images" / "ADE" / part
    id_map = {entry.value: index for index, entry in enumerate(listed) if entry.value is not None}
    table = ValueTable(id_map, (), info.ignore, rest_is_void=True)
    images, files = _walk(folder)
    return by_folder(info, split, images, folder, [LabelFolder(files, folder, LabelKind.ade_full, table, "_seg.png")])


def _walk(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Pictures and label PNGs in a folder's scenes, by name."""
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    pending = [folder] if folder.is_dir() else []
    while pending:
        place = pending.pop()
        # A folder named after a picture holds the masks of its single objects.
        pending += [entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith((".", "ADE_"))]
        for name in entries(place):
            if name.lower().endswith(".jpg"):
                images[name[:-4]] = place / name
            elif name.endswith("_seg.png"):
                labels[name[:-8]] = place / name
    return dict(sorted(images.items())), dict(sorted(labels.items()))
