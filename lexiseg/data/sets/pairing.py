"""Pictures and their labels, side by side: what the layouts of all datasets share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lexiseg.data.sets.archive import Place, zipped
from lexiseg.data.sets.catalog import DataSetInfo
from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.labels import LabelKind, ValueTable
from lexiseg.data.sets.listing import by_stem, entries, listed_as
from lexiseg.label_ids import ignore_index


@dataclass(frozen=True)
class LabelFolder:
    """Label files of one kind, by the name of their sample."""

    files: Mapping[str, Place]
    folder: Path
    kind: LabelKind
    table: ValueTable
    ending: str = ".png"


def table_of(info: DataSetInfo) -> ValueTable:
    """What the values of the distribution's label files stand for."""
    return ValueTable(info.id_map, info.void, info.ignore)


def plain_table(num_classes: int) -> ValueTable:
    """For labels that hold class ids as they are, and the ignored value."""
    ignore = ignore_index(num_classes)
    return ValueTable({index: index for index in range(num_classes)}, (ignore,), ignore)


def pair(
    names: Iterable[str], split: str, images: Mapping[str, Place], image_folder: Path, labels: Sequence[LabelFolder]
) -> tuple[list[Item], list[Finding]]:
    """The items of ``names``, and a finding for each that lacks its picture or its label.

    The first of ``labels`` that has a name gives its label.
    """
    items: list[Item] = []
    findings: list[Finding] = []
    others: dict[str, str] | None = None
    taken: set[str] = set()
    for listed in names:
        name = listed_as(listed, images)
        if name in taken:
            problem = f"The split '{split}' names '{name}' twice; remove one line of its list."
            findings.append(Finding("duplicate-entry", problem, str(image_folder), name, split))
            continue
        taken.add(name)
        image = images.get(name)
        source = next((source for source in labels if name in source.files), None)
        if image is None:
            problem = f"The picture '{image_folder / name}.jpg' (or .png) of the split '{split}' is missing."
            findings.append(Finding("missing-picture", problem, str(image_folder), name, split))
        if source is None:
            # The full ADE20K keeps a label beside its picture, in a folder of the scene.
            ade = image is not None and labels[0].kind is LabelKind.ade_full
            folder = image.parent if image is not None and ade else labels[0].folder
            problem = f"The label '{folder / name}{labels[0].ending}' of the split '{split}' is missing"
            others = _unread(labels[0].folder) if others is None else others
            problem += f"; {others[name]}." if name in others else "."
            findings.append(Finding("missing-label", problem, str(labels[0].folder), name, split))
        if image is not None and source is not None:
            items.append(Item(name, image, source.files[name], source.kind, source.table))
    return items, findings


def _unread(folder: Path) -> dict[str, str]:
    """What to say of the files of a folder of labels whose ending no reader takes, by the name of their sample."""
    said = {}
    for file in entries(folder) if folder.is_dir() else ():
        stem, _, ending = file.rpartition(".")
        if stem and ending.lower() in ("jpg", "jpeg"):
            said[stem] = f"'{file}' is there, but JPEG changes the numbers of a label; save it anew as PNG"
        elif stem and ending.lower() in ("npy", "webp"):
            said[stem] = f"'{file}' is there, but labels of this kind are not read; save it as PNG"
    return said


def orphans(labels: Sequence[LabelFolder], images: Mapping[str, Place], split: str) -> list[Finding]:
    """A warning for each label without a picture, in datasets that have no lists."""
    return [
        Finding(
            "label-without-picture",
            f"The label '{path}' has no picture, so it is never used; add the picture or remove the label.",
            str(path),
            name,
            split,
            "warning",
        )
        for source in labels
        for name, path in source.files.items()
        if name not in images
    ]


def label_folder(
    folder: Path, suffixes: Sequence[str], kind: LabelKind, table: ValueTable, without: str | tuple[str, ...] = ()
) -> LabelFolder:
    """The label files of a folder that end in one of ``suffixes``, but for names that end in ``without``."""
    files = by_stem(folder, suffixes)
    if without:
        files = {name: path for name, path in files.items() if not name.endswith(without)}
    return LabelFolder(files, folder, kind, table, suffixes[0])


def zipped_labels(archives: Sequence[Path], inner: str, table: ValueTable) -> LabelFolder:
    """The PNGs in the folder ``inner`` of a zip archive, which may be at any of ``archives``."""
    return LabelFolder(zipped(archives, inner, (".png",)), archives[0] / inner, LabelKind.index, table)


def by_folder(
    info: DataSetInfo,
    split: str,
    images: Mapping[str, Place],
    image_folder: Path,
    labels: Sequence[LabelFolder],
) -> SplitFiles:
    """A split that is every picture of a folder."""
    if images:
        items, findings = pair(images, split, images, image_folder, labels)
        findings += orphans(labels, images, split)
    else:
        problem = (
            f"The folder '{image_folder}' of the split '{split}' is missing or holds no pictures; unpack them there."
        )
        items, findings = [], [Finding("missing-folder", problem, str(image_folder), split=split)]
    return SplitFiles(split, tuple(items), info.vocabulary(), tuple(findings))
