"""A folder of one's own, in any of the layouts people have; docs/own-data.md shows them.

Pictures and labels lie in two folders (``images/`` and ``masks/``, with ``train/`` and ``val/`` inside them or around
them), or side by side. Labels are masks with the picture's name, or that name with something before or after it
(``p0_mask.png``, lexiseg's own ``p0_labels.png``); text files of YOLO's; labelme's JSON files; or COCO-style JSON for a
whole split. ``val`` may be called ``valid`` or ``validation``, ``train`` ``training``, both with a year.

Masks hold class ids from 0, with 255 (65535 where there are more than 255 classes) for no class. Where the class file
numbers the classes ("1: cat"), masks hold those numbers, in 16 bits if one is above 255, and 0 is no class unless it is
one of them. Where it gives every class a colour and the masks are colour pictures, a class is a colour, and black is no
class unless it is one. What else is no class, whether the camera's orientation counts, and how masks are called, the
class file says, or ``lexiseg.yaml`` beside it.

Without lists and without folders for the splits, every fifth picture by name is ``val`` and the others are ``train``.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from lexiseg.class_forms import ListedClass
from lexiseg.class_list import ClassList, read_class_list
from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.labels import LabelKind, ValueTable, read_values
from lexiseg.data.sets.layouts import (
    CLASS_FILES,
    MASK_SUFFIXES,
    SPLITS,
    Layout,
    class_file_in,
    find_place,
    is_labelme,
    json_of,
    names_of,
    own_list,
    part_in_split,
    picture_folders,
    without_outlines,
)
from lexiseg.data.sets.listing import (
    LabelFolder,
    by_stem,
    entries,
    files_in,
    orphans,
    pair,
    plain_table,
    same_stems,
    with_unseen,
)
from lexiseg.data.sets.outlines import draw_labelme, draw_yolo, list_coco_json, read_labelme, rest_of
from lexiseg.errors import DataSetError, LexisegError
from lexiseg.files import is_folder
from lexiseg.images import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, open_header, pillow_silenced
from lexiseg.label_ids import IGNORE_INDEX, WIDE_IGNORE_INDEX, ignore_index
from lexiseg.vocabulary import Vocabulary
from lexiseg.words import word_key

SETTINGS = "lexiseg.yaml"
_NO_CLASS = frozenset(("__ignore__",))
_SAMPLED = 16


def list_own(root: Path, split: str, unseen: str | None, classes: Path | None) -> SplitFiles:
    """The files of a split of a folder of one's own; see the module.

    ``split``: usually "train" or "val". ``unseen``: "none" leaves unseen.txt aside. ``classes``: the class file; None
    looks for one in the folder. Raises LexisegError if the folder, its pictures, masks or class file cannot be found or
    read, or unseen.txt names a class that there is not, or all.
    """
    if not is_folder(root):
        raise DataSetError(f"The data folder '{root}' does not exist; check the path.")
    settings = ClassList(())
    for path in files_in(root, (SETTINGS,)):
        settings = read_class_list(path, settings_only=True)
    annotations, whole = json_of(root, split)
    if annotations is not None:
        files = list_coco_json(root, annotations, split, unseen, picture_folders(root, split), settings.exif)
        lists = files_in(root, CLASS_FILES) if classes is None else [classes]
        files = replace(files, findings=(*files.findings, *_not_the_categories(lists, files.vocabulary, annotations)))
        return part_in_split(files, root, split) if whole else files
    place = find_place(root, split)
    class_file = classes or class_file_in(root, place)
    if class_file is not None:
        settings = _merged(read_class_list(class_file), settings)
    pictures, masks = _masks(by_stem(place.images, IMAGE_SUFFIXES), place, settings.masks)
    others = {} if _any_of(masks, pictures) else {end: by_stem(place.labels, (end,)) for end in (".txt", ".json")}
    ending = next((end for end, files in others.items() if _any_of(files, pictures)), None)
    if ending == ".json":
        listed = tuple(one for one in settings.classes if one.name not in _NO_CLASS)  # labelme's labels.txt has it
        settings = replace(settings, classes=listed or _labelme_classes(root))
    if not settings.classes:
        if (other := without_outlines(root)) is not None:
            raise LexisegError(f"'{other}' holds no outlines of classes; add COCO's instances_{split}.json.")
        raise LexisegError(
            f"'{root / CLASS_FILES[0]}' does not exist; it must list the classes, one per line, in the order of their "
            "ids."
        )
    vocabulary = with_unseen(Vocabulary.parse(settings.without_shared()), root, unseen, "the class file")
    if ending is None:
        kind, table = _reading(settings, masks, ignore_index(len(vocabulary)), root)
        labels = [LabelFolder(masks, place.labels, kind, table)]
    else:
        table = plain_table(len(vocabulary))
        labels = [LabelFolder(others[ending], place.labels, LabelKind.index, table, ending)]
    names, findings = names_of(root, split, place, list(pictures))
    any_named = bool(names or findings)  # findings say why there are none
    items, missing = pair(names, split, pictures, place.images, labels)
    named = [item.name for item in items]
    if ending is None:
        items = [replace(item, exif=settings.exif) for item in items]
        findings += [*missing, *same_stems(named, place.labels, MASK_SUFFIXES)]
    else:
        items = [_drawn(item, settings, table.ignore) for item in items]
        # No file of outlines means that nothing is in the picture.
        findings += [replace(one, severity="warning") if one.kind == "missing-label" else one for one in missing]
    suffixes = IMAGE_SUFFIXES - {".png"} if place.images == place.labels else IMAGE_SUFFIXES
    findings += same_stems(named, place.images, suffixes)
    findings += _left_out(settings, class_file)
    if classes is None and class_file is not None:
        findings += _passed_over(class_file) + _of_the_labels(settings, class_file, place.labels)
    if own_list(root, split) is None:
        findings += _unlisted(place, labels, pictures, split, any_named)
    return SplitFiles(split, tuple(items), vocabulary, tuple(findings))


def _unlisted(
    place: Layout, labels: Sequence[LabelFolder], pictures: Mapping[str, Path], split: str, any_named: bool
) -> list[Finding]:
    """What is wrong with folders out of which nobody has chosen: everything in them counts."""
    findings = orphans(labels, pictures) if labels[0].ending == ".png" else []
    for name in entries(place.images):
        if name.lower().endswith(tuple(FOREIGN_SUFFIXES)):
            problem = (
                f"The picture '{place.images / name}' is in a format that is not supported; save it as JPEG or PNG."
            )
            findings.append(Finding("unread-picture", problem, str(place.images / name), name, severity="warning"))
    if not pictures:
        problem = f"The folder '{place.images}' holds no pictures; put .jpg or .png files into it."
        findings.append(Finding("missing-folder", problem, str(place.images)))
    elif not any_named:
        problem = (
            f"'{place.images}' holds one picture in total, so none is left for the split '{split}'; add pictures, or "
            "write train.txt and val.txt."
        )
        findings.append(Finding("empty-split", problem, str(place.images)))
    return findings


def _any_of(files: Mapping[str, Path], pictures: Mapping[str, Path]) -> bool:
    return not files.keys().isdisjoint(pictures)


def _masks(pictures: dict[str, Path], place: Layout, pattern: str | None) -> tuple[dict[str, Path], dict[str, Path]]:
    """The pictures, and the masks by the name of their picture, which they may add something to."""
    files = by_stem(place.labels, MASK_SUFFIXES)
    together = place.labels == place.images
    if pattern is None and not together and (_any_of(files, pictures) or not pictures):
        return pictures, files
    before, after = pattern.split("NAME") if pattern is not None else _affix(list(pictures), list(files))
    masks = {
        stem[len(before) : len(stem) - len(after)]: path
        for stem, path in files.items()
        if stem.startswith(before) and stem.endswith(after) and len(stem) > len(before + after)
    }
    if together and not (before or after):  # photo.jpg beside photo.png
        kept = by_stem(place.images, IMAGE_SUFFIXES - {".png"})
        return (kept, masks) if kept else (pictures, {})
    if together:
        marked = {before + name + after for name in masks if name in pictures}
        pictures = {stem: path for stem, path in pictures.items() if stem not in marked}
    return pictures, {name: path for name, path in masks.items() if name in pictures or not together}


def _affix(pictures: Sequence[str], stems: Sequence[str]) -> tuple[str, str]:
    """What masks have before and after the names of their pictures: what most of them have."""
    count: Counter[tuple[str, str]] = Counter()
    for name in pictures[:: max(1, len(pictures) // _SAMPLED)]:
        for stem in stems:
            before, found, after = stem.partition(name)
            if found and stem != name:
                count[before, after] += 1
    # Of two that are as frequent, the one that says what it is: predict writes NAME_overlay beside NAME_labels.
    best = max(
        count, key=lambda affix: (count[affix], bool(re.search("label|mask|gt|seg", "".join(affix)))), default=None
    )
    return best or ("", "")


def _merged(listed: ClassList, settings: ClassList) -> ClassList:
    return replace(
        listed,
        ignored=(*listed.ignored, *settings.ignored),
        ignored_colors=(*listed.ignored_colors, *settings.ignored_colors),
        masks=settings.masks or listed.masks,
        exif=settings.exif or listed.exif,
    )


def _labelme_classes(root: Path) -> tuple[ListedClass, ...]:
    """The labels in all of a folder's labelme files, by name."""
    found: dict[str, str] = {}
    for split in SPLITS:
        try:
            place = find_place(root, split)
        except DataSetError:  # whoever asks for that split is told
            continue
        for path in by_stem(place.labels, (".json",)).values():
            for shape in read_labelme(path)["shapes"] if is_labelme(path) else ():
                found.setdefault(word_key(shape["label"]), shape["label"])
    return tuple(ListedClass(found[name]) for name in sorted(found) if name not in _NO_CLASS)


def _drawn(item: Item, settings: ClassList, ignore: int) -> Item:
    """An item whose label is drawn from the outlines in its file."""
    assert isinstance(item.label, Path)
    ids, turned = _ids(settings, ignore), settings.exif == "apply"
    rest = rest_of([one.name for one in settings.classes], ignore)
    if item.label.suffix.lower() == ".txt":
        draw = partial(draw_yolo, item.label, item.image, ids, rest, turned)
    else:
        names = {
            word_key(word): ids[index if one.value is None else one.value]
            for index, one in enumerate(settings.classes)
            for word in (*one.synonyms, one.name)
        }
        draw = partial(draw_labelme, item.label, item.image, names, _NO_CLASS, rest, turned)
    return replace(item, exif=settings.exif, draw=draw)


def _ids(listed: ClassList, ignore: int) -> dict[int, int]:
    """The class id of each number that the class file gives, or of the classes' places; ``ignore`` of ignored ones."""
    ids = {index if one.value is None else one.value: index for index, one in enumerate(listed.classes)}
    return {**ids, **dict.fromkeys(listed.ignored, ignore)}


def _left_out(listed: ClassList, class_file: Path | None) -> list[Finding]:
    return [
        Finding(
            "class-list",
            f"The class list '{class_file}' gives the word '{word}' to '{name}' and to another class, so it is a "
            "synonym of neither; remove it from one.",
            str(class_file),
            severity="warning",
        )
        for name, word in dict.fromkeys(listed.shared_words())
    ]


def _passed_over(class_file: Path) -> list[Finding]:
    """Class files beside the one that is read which say something else."""
    said, findings = _said(class_file), []
    for path in files_in(class_file.parent, CLASS_FILES):
        with suppress(LexisegError):  # of such a name, but no class file
            if _said(path) != said:
                problem = (
                    f"'{class_file}' lists the classes; '{path.name}' beside it says something else and is "
                    "ignored; remove one of them."
                )
                findings.append(Finding("class-list", problem, str(path), severity="warning"))
    return findings


def _of_the_labels(listed: ClassList, class_file: Path, folder: Path) -> list[Finding]:
    """The list beside labels, as `lexiseg predict` writes it, where it numbers the classes in another way."""
    for path in files_in(folder, CLASS_FILES)[:1] if folder != class_file.parent else ():
        with suppress(LexisegError):  # of such a name, but no class file
            ours, theirs = ([(one.name, one.value) for one in said.classes] for said in (listed, read_class_list(path)))
            if ours != theirs:
                problem = (
                    f"'{class_file}' lists other classes than '{path}', which may be those of the labels beside it; "
                    "correct or remove one of them."
                )
                return [Finding("class-list", problem, str(path), severity="warning")]
    return []


def _not_the_categories(paths: Sequence[Path], vocabulary: Vocabulary, annotations: Path) -> list[Finding]:
    """Class files that say something else than the categories of COCO-style JSON, which are the classes."""
    findings = []
    for path in paths:
        with suppress(LexisegError):  # of such a name, but no class file
            ours, theirs = (
                [(word_key(one.text), one.seen is False) for one in said.classes]
                for said in (vocabulary, read_class_list(path))
            )
            if ours != theirs:
                problem = (
                    f"The classes are the categories of '{annotations}'; '{path}' says something else and is ignored; "
                    "edit the categories or remove the file."
                )
                findings.append(Finding("class-list", problem, str(path), severity="warning"))
    return findings


def _said(path: Path) -> ClassList:
    """What a class file says, however it says it."""
    listed = read_class_list(path)
    numbered = (
        replace(one, value=index if one.value is None else one.value) for index, one in enumerate(listed.classes)
    )
    return replace(listed, classes=tuple(numbered), path=None)


def _reading(listed: ClassList, files: Mapping[str, Path], ignore: int, root: Path) -> tuple[LabelKind, ValueTable]:
    """How the masks hold their values, and what those stand for."""
    classes = listed.classes
    paths = list(files.values())[:: max(1, len(files) // _SAMPLED)]
    remedy = "list it as ignored or add a class"
    if files and all(one.color is not None for one in classes) and _are_colored(paths):
        colors = {_packed(one.color or (0, 0, 0)): index for index, one in enumerate(classes)}
        if len(colors) < len(classes):
            raise LexisegError("Two classes of the class file have the same colour, so masks cannot tell them apart.")
        return LabelKind.color, ValueTable(colors, (0, *map(_packed, listed.ignored_colors)), ignore, remedy=remedy)
    numbered = all(one.value is not None for one in classes)
    id_map = _ids(listed, ignore)
    wide = max(ignore, *id_map) > IGNORE_INDEX
    if IGNORE_INDEX not in id_map and _are_black_and_white(paths, every=len(classes) > 2):
        name = classes[-1].name
        white = (
            f"number the {len(classes)} classes in classes.txt, 255 being what white is"
            if len(classes) > 2
            else f"write '0: background' and '255: {name}' into classes.txt if white is {name}, '255: {name}' alone to "
            "ignore black"
        )
        raise DataSetError(
            f"Masks of '{root}' hold only 0 and 255, like black and white masks, so their meaning is unclear: {white}, "
            "or write 'ignore: 255' into classes.yaml or lexiseg.yaml to ignore white.",
            "black-and-white",
        )
    void = [ignore]
    if wide:
        void.append(WIDE_IGNORE_INDEX)
    if numbered:
        void.append(0)
    return LabelKind.wide if wide else LabelKind.index, ValueTable(id_map, tuple(void), ignore, remedy=remedy)


def _packed(color: tuple[int, int, int]) -> int:
    red, green, blue = color
    return red * 65536 + green * 256 + blue


def _are_black_and_white(paths: Sequence[Path], every: bool) -> bool:
    """Whether half of the masks, or ``every`` one, hold 0 and 255 alone, both somewhere, and no other one has 255."""
    found: set[int] = set()
    white = others = 0
    for path in paths:
        with suppress(LexisegError):  # whoever reads it says so
            values = set(np.unique(read_values(path, LabelKind.index)).tolist())
            if values <= {0, 255}:
                found |= values
                white += 255 in values
            elif 255 in values:
                return False
            else:
                others += 1
    return found == {0, 255} and (not others if every else white >= others)


def _are_colored(paths: Sequence[Path]) -> bool:
    """Whether at least half of the pictures hold colours; one that cannot be opened counts for neither side."""
    colored = 0
    for path in paths:
        with suppress(Exception), pillow_silenced(), open_header(path) as picture:  # whoever reads it says so
            colored += picture.mode in ("RGB", "RGBA")
    return colored * 2 >= len(paths)
