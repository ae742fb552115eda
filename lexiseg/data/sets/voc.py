"""PASCAL VOC 2012 on disk."""

from __future__ import annotations

from pathlib import Path

from lexiseg.data.sets.catalog import DataSetInfo
from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.labels import LabelKind
from lexiseg.data.sets.listing import by_stem, find_home, first_folder, read_list
from lexiseg.data.sets.pairing import label_folder, pair, table_of
from lexiseg.images import IMAGE_SUFFIXES


def list_voc(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """PASCAL VOC 2012: ``train``, ``val``, ``trainval``, ``aug`` or ``trainaug`` (train and aug, the papers' training).

    The labels of ``aug`` are the PNGs of SegmentationClassAug, or the .mat files of the Semantic Boundaries Dataset as
    it is distributed (``benchmark_RELEASE/dataset/cls``). Its list is aug.txt; where that is missing, what trainaug.txt
    has beyond train.txt; or what SBD's own lists have beyond VOC's train and val. Raises LexisegError if ``root`` holds
    no such dataset.
    """
    home = find_home(root, ("VOCdevkit/VOC2012", "VOC2012"), ("JPEGImages",), "PASCAL VOC 2012")
    table = table_of(info)
    images = by_stem(home / "JPEGImages", IMAGE_SUFFIXES)
    plain = label_folder(home / "SegmentationClass", (".png",), LabelKind.index, table)
    items: list[Item] = []
    findings: list[Finding] = []
    if split != "aug":
        names, wrong = read_list(voc_list(home, "train" if split == "trainaug" else split), split)
        items, missing = pair(names, split, images, home / "JPEGImages", [plain])
        findings += [*wrong, *missing]
    if split in ("aug", "trainaug"):
        sbd = find_sbd(root, home)
        names, wrong = aug_names(home, sbd)
        taken = {item.name for item in items}
        wrong += [
            Finding("duplicate-entry", f"'{name}' is in the lists of both train and aug; take it out of aug.txt.",
                    str(voc_list(home, "aug")), name, split)
            for name in names if name in taken
        ]  # fmt: skip
        labels = [label_folder(home / "SegmentationClassAug", (".png",), LabelKind.index, table)]
        if sbd is not None:
            labels.append(label_folder(sbd / "cls", (".mat",), LabelKind.sbd_mat, table))
            images = {**by_stem(sbd / "img", IMAGE_SUFFIXES), **images}
        more, missing = pair((n for n in names if n not in taken), split, images, home / "JPEGImages", labels)
        items += more
        findings += [*wrong, *missing]
    return SplitFiles(split, tuple(items), info.vocabulary(), tuple(findings))


def find_sbd(root: Path, home: Path) -> Path | None:
    """The Semantic Boundaries Dataset's own folder, beside VOC's or above it; None where it is not there."""
    places = (root, home, home.parent, home.parent.parent)
    return first_folder(place / "benchmark_RELEASE" / "dataset" for place in places)


def voc_list(home: Path, split: str) -> Path:
    """The list of a split of the segmentation task."""
    return home / "ImageSets" / "Segmentation" / f"{split}.txt"


def aug_names(home: Path, sbd: Path | None) -> tuple[list[str], list[Finding]]:
    """Names of the augmented pictures, and what is wrong with their list; see :func:`list_voc`."""
    path = voc_list(home, "aug")
    whole = voc_list(home, "trainaug")
    if path.is_file() or (sbd is None and not whole.is_file()):
        return read_list(path, "aug")
    train, _ = read_list(voc_list(home, "train"), "train")
    known = set(train)
    if whole.is_file():
        names, findings = read_list(whole, "trainaug")
    else:
        val, _ = read_list(voc_list(home, "val"), "val")
        known |= set(val)
        names, findings = [], []
        for part in ("train", "val"):
            listed, wrong = read_list((sbd or home) / f"{part}.txt", "aug")
            names += listed
            findings += wrong
    return sorted({name for name in names if name not in known}), findings
