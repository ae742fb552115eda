"""The papers' datasets on disk, as they are distributed: which files belong to a split, and what its labels mean.

Each ``list_...`` raises LexisegError if its folder holds no such dataset, or a class list that it needs is missing or
wrong; files of samples that are missing are findings.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from lexiseg.class_list import read_class_list
from lexiseg.data.sets.archive import Place, zipped
from lexiseg.data.sets.catalog import DataSetInfo, data_set
from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.labels import LabelKind, ValueTable
from lexiseg.data.sets.listing import (
    LabelFolder,
    by_folder,
    by_stem,
    find_home,
    first_folder,
    folders_in,
    label_folder,
    pair,
    plain_table,
    read_list,
    table_of,
    zipped_labels,
)
from lexiseg.errors import LexisegError
from lexiseg.images import IMAGE_SUFFIXES
from lexiseg.words import word_key

_STUFF_MAPS = "stuffthingmaps_trainval2017.zip"
_COCO_ENDINGS = {"coco-stuff-164k": "_labelTrainIds", "coco-object": "_instanceTrainIds"}
_COCO_THINGS = 80
_ADE_150 = "ADEChallengeData2016"
_ADE_PARTS = {"train": "training", "val": "validation"}
_ADE_LISTS = ("classes.txt", "classes.json", "classes.yaml", "ADE20K_847_pure_class.json")
_ADE_SEEN = "ADE20K_572_pure_class.json"


def list_voc(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """PASCAL VOC 2012: ``train``, ``val``, ``trainval``, ``aug`` or ``trainaug`` (train and aug, the papers' training).

    The labels of ``aug`` are the PNGs of SegmentationClassAug, or the .mat files of the Semantic Boundaries Dataset as
    it is distributed (``benchmark_RELEASE/dataset/cls``). Its list is aug.txt; where that is missing, what trainaug.txt
    has beyond train.txt; or what SBD's own lists have beyond VOC's train and val.
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
                    str(voc_list(home, "aug")), name)
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
    known = set(read_list(voc_list(home, "train"), "train")[0])
    if whole.is_file() or sbd is None:
        names, findings = read_list(whole, "trainaug")
    else:
        known.update(read_list(voc_list(home, "val"), "val")[0])
        (names, findings), (more, wrong) = (read_list(sbd / f"{part}.txt", "aug") for part in ("train", "val"))
        names, findings = names + more, findings + wrong
    return sorted(set(names) - known), findings


def list_coco(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """COCO-Stuff 164K or COCO-Object, two sets of classes for the same pictures: ``train`` or ``val``.

    Labels are the distribution's stuffthingmaps (values 0..181 with gaps, 255 = unlabelled), or what was made of them:
    mmsegmentation's ``*_labelTrainIds.png`` (0..170) for COCO-Stuff, ``*_instanceTrainIds.png`` (0 = background, 1..80)
    for COCO-Object. Out of the stuffthingmaps, COCO-Object's background is whatever is no thing, unlabelled pixels too.
    They may lie in stuffthingmaps/, stuffthingmaps_trainval2017/, annotations/ or, as the archives unpack, beside the
    pictures in train2017/ and val2017/. Where pictures or labels are not unpacked, they are read out of the archives
    (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip).
    """
    year = f"{split}2017"
    marks = ("images", "train2017", "val2017", "stuffthingmaps")
    home = find_home(root, ("coco_stuff164k", "coco"), marks, info.title, ("train2017.zip", "val2017.zip"))
    packed = (home, home / "images", home / "stuffthingmaps", root)
    image_folder = first_folder((home / "images" / year, home / year), (".jpg",)) or home / "images" / year
    images: Mapping[str, Place] = by_stem(image_folder, (".jpg",))
    images = images or zipped([place / f"{year}.zip" for place in packed], year, (".jpg",))
    places = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017", ".")
    folder = first_folder((home / place / year for place in places), (".png",)) or home / "stuffthingmaps" / year
    raw = table_of(info)
    if info.name == "coco-object":
        things = list(data_set("coco-stuff-164k").id_map)[:_COCO_THINGS]
        raw = ValueTable({**dict.fromkeys(range(256), 0), **{v: i for i, v in enumerate(things, 1)}}, (), info.ignore)
    labels = [
        label_folder(folder, (f"{_COCO_ENDINGS[info.name]}.png",), LabelKind.index, plain_table(info.num_classes)),
        label_folder(folder, (".png",), LabelKind.index, raw, without=tuple(_COCO_ENDINGS.values())),
    ]
    if not any(source.files for source in labels):
        labels.append(zipped_labels([place / _STUFF_MAPS for place in packed], year, raw))
    return by_folder(info, split, images, image_folder, labels)


def list_context59(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """PASCAL Context 59: ``train`` or ``val`` of VOC 2010.

    Labels are the PNGs of SegmentationClassContext (1..59 in alphabetical order, 0 = none of them), or the
    distribution's own .mat files of 459 classes with its labels.txt, by whose names the 59 are picked; the pixels of
    the other 400 classes then have no class.
    """
    home = _context_home(root)
    folder = home / "SegmentationClassContext"
    if folder.is_dir():
        return _context_split(info, home, split, label_folder(folder, (".png",), LabelKind.index, table_of(info)))
    values = {word_key(name): value for name, value in _context_values(root, home).items()}
    absent = [name for name in info.classes if word_key(name) not in values]
    if absent:
        raise LexisegError(
            f"The labels.txt beside '{home}' lacks '{absent[0]}', one of PASCAL Context's 59 classes; take the "
            "distribution's own file."
        )
    id_map = {values[word_key(name)]: index for index, name in enumerate(info.classes)}
    table = ValueTable(id_map, {0, *values.values()}, info.ignore)
    return _context_split(info, home, split, _context_mats(root, home, table))


def list_context459(info: DataSetInfo, root: Path, split: str, classes: Path | None) -> SplitFiles:
    """PASCAL Context 459: ``train`` or ``val`` of VOC 2010.

    Labels are the distribution's .mat files (``trainval/*.mat``, variable LabelMap, 0 = no class), or 16-bit TIFFs made
    of them (``annotations_detectron2/pc459_SPLIT``: class ids from 0, 65535 = no class). The names come from
    labels.txt.
    """
    home = _context_home(root)
    values = _context_values(root, home, classes)
    info = info.with_classes(tuple(values))
    table = ValueTable({value: index for index, value in enumerate(values.values())}, info.void, info.ignore)
    labels = _context_mats(root, home, table)
    made = home / "annotations_detectron2" / f"pc459_{split}"
    if not labels.files and made.is_dir():
        labels = label_folder(made, (".tif", ".tiff"), LabelKind.wide, plain_table(info.num_classes))
    return _context_split(info, home, split, labels)


def _context_home(root: Path) -> Path:
    marks = ("SegmentationClassContext", "JPEGImages")
    return find_home(root, ("VOCdevkit/VOC2010", "VOC2010"), marks, "PASCAL Context (VOC 2010)")


def _context_mats(root: Path, home: Path, table: ValueTable) -> LabelFolder:
    places = (home / "trainval", root / "trainval", home.parent / "trainval")
    return label_folder(first_folder(places, (".mat",)) or places[0], (".mat",), LabelKind.context_mat, table)


def _context_values(root: Path, home: Path, classes: Path | None = None) -> dict[str, int]:
    """The 459 classes, as ``classes`` or the distribution's labels.txt lists them, and their values, which ascend."""
    places = (home, root, home.parent, home / "trainval", root / "trainval")
    path = classes or next((path for place in places if (path := place / "labels.txt").is_file()), None)
    if path is None:
        raise LexisegError(
            f"PASCAL Context's list of 459 classes is missing: put the distribution's labels.txt into '{home}'."
        )
    listed = enumerate(read_class_list(path).classes, 1)
    values = {one.text: place if one.value is None else one.value for place, one in listed}
    return dict(sorted(values.items(), key=lambda item: item[1]))


def _context_split(info: DataSetInfo, home: Path, split: str, labels: LabelFolder) -> SplitFiles:
    path = home / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    main = home / "ImageSets" / "Main" / f"{split}.txt"
    # Context annotates the pictures of VOC 2010's detection task, so that task's lists are its splits.
    names, wrong = read_list(main if main.is_file() and not path.is_file() else path, split)
    images = by_stem(home / "JPEGImages", IMAGE_SUFFIXES)
    items, missing = pair(names, split, images, home / "JPEGImages", [labels])
    return SplitFiles(split, tuple(items), info.vocabulary(), (*wrong, *missing))


def list_ade150(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """ADE20K 150 (ADEChallengeData2016): ``train`` or ``val``; label values 1..150, 0 = no class.

    Where it is not unpacked, it is read out of ADEChallengeData2016.zip.
    """
    marks, packed = ("images", "annotations"), f"{_ADE_150}.zip"
    home = find_home(root, (_ADE_150,), marks, _ADE_150, (packed,))
    part, archives = _ADE_PARTS[split], [root / packed, home / packed]
    image_folder = home / "images" / part
    images: Mapping[str, Place] = by_stem(image_folder, (".jpg",))
    images = images or zipped(archives, f"{_ADE_150}/images/{part}", (".jpg",))
    labels = label_folder(home / "annotations" / part, (".png",), LabelKind.index, table_of(info))
    if not labels.files:
        labels = zipped_labels(archives, f"{_ADE_150}/annotations/{part}", table_of(info))
    files = by_folder(info, split, images, image_folder, [labels])
    listed = home / "objectInfo150.txt"
    if not listed.is_file():
        return files
    try:
        names = [entry.name for entry in read_class_list(listed).classes]
        pairs = zip_longest(info.classes, names, fillvalue="no class")
        differ = next((pair for pair in pairs if word_key(pair[0]) != word_key(pair[1])), None)
        if differ is None:
            return files
        problem = f"'{listed}' lists '{differ[1]}' where '{differ[0]}' is expected; the known list is used."
    except LexisegError as error:
        problem = str(error)
    finding = Finding("class-list", problem, str(listed), severity="warning")
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
    that it lacks are unseen.
    """
    marks = ("images_detectron2", "images/ADE", "images")
    home = find_home(root, ("ADE20K_2021_17_01",), marks, "ADE20K's full set")
    beside = (path for place in (home, root) for name in _ADE_LISTS if (path := place / name).is_file())
    found = classes or next(beside, None)
    if found is None:
        raise LexisegError(
            f"The list of ADE20K's 847 classes is missing: put it into '{home}' as classes.txt or classes.json, or "
            "name it with --classes."
        )
    listed = read_class_list(found).classes
    info = info.with_classes(tuple(entry.text for entry in listed))
    seen = next((path for place in (home, root) if (path := place / _ADE_SEEN).is_file()), None)
    if seen is not None:
        keys = {word_key(entry.text) for entry in read_class_list(seen).classes}
        info = replace(info, unseen_lists={"papers": tuple(n for n in info.classes if word_key(n) not in keys)})
    elif info.unseen == "papers":
        raise LexisegError(f"The list of ADE20K's 572 seen classes is missing: put {_ADE_SEEN} into '{home}'.")
    part = _ADE_PARTS[split]
    made = home / "images_detectron2" / part
    if made.is_dir():
        folder = home / "annotations_detectron2" / part
        labels = label_folder(folder, (".tif", ".tiff"), LabelKind.wide, plain_table(info.num_classes))
        return by_folder(info, split, by_stem(made, (".jpg",)), made, [labels])
    if any(entry.value is None for entry in listed):
        raise LexisegError(
            f"The class list '{found}' does not give the classes' ids in ADE20K's full set, which its colour PNGs "
            "need; add 'id' to each class, or prepare 16-bit TIFFs."
        )
    folder = first_folder((home / "images" / "ADE" / part, home / "images" / part)) or home / "images" / "ADE" / part
    id_map = {entry.value: index for index, entry in enumerate(listed) if entry.value is not None}
    table = ValueTable(id_map, (), info.ignore, rest_is_void=True)
    labels = LabelFolder(_below(folder, "_seg.png"), folder, LabelKind.ade_full, table, "_seg.png")
    return by_folder(info, split, _below(folder, ".jpg"), folder, [labels])


def list_cityscapes(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """Cityscapes: ``train`` or ``val``, with one folder per city: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY.

    Labels are the distribution's ``*_gtFine_labelIds.png`` (ids 0..33, of which 19 are evaluated), or, where they were
    made, ``*_gtFine_labelTrainIds.png`` (0..18, 255 = not evaluated), which come first.
    """
    home = find_home(root, ("cityscapes",), ("leftImg8bit",), "Cityscapes")
    pictures, truth = home / "leftImg8bit" / split, home / "gtFine" / split
    made, raw = "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
    files, table, ending = _below(truth, made), plain_table(info.num_classes), made
    if not files:
        files, table, ending = _below(truth, raw), table_of(info), raw
    images = _below(pictures, "_leftImg8bit.png", "_leftImg8bit.jpg")
    return by_folder(info, split, images, pictures, [LabelFolder(files, truth, LabelKind.index, table, ending)])


def _below(folder: Path, *endings: str) -> dict[str, Path]:
    """The files of ``folder`` and the folders in it, at any depth, by their names without one of ``endings``."""
    found = by_stem(folder, endings)
    for inner in folders_in(folder):
        # In the full ADE20K, a folder that is named after a picture holds the masks of its single objects.
        if not inner.name.startswith("ADE_"):
            found.update(_below(inner, *endings))
    return dict(sorted(found.items()))


LAYOUTS: Mapping[str, Callable[..., SplitFiles]] = {
    "voc2012": list_voc,
    "coco-stuff-164k": list_coco,
    "coco-object": list_coco,
    "cityscapes": list_cityscapes,
    "pascal-context-59": list_context59,
    "pascal-context-459": list_context459,
    "ade20k-150": list_ade150,
    "ade20k-847": list_ade847,
}
"""By name, how a dataset is listed; those of 459 and 847 classes take a list of them as well."""
