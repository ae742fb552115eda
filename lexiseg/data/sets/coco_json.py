"""COCO-style JSON: the outlines of objects, drawn into a label map."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.labels import MAX_PIXELS, LabelKind
from lexiseg.data.sets.listing import is_safe, key, with_unseen
from lexiseg.data.sets.outlines import Outline, draw_outlines, rest_of
from lexiseg.data.sets.pairing import plain_table
from lexiseg.errors import DataSetError, LexisegError
from lexiseg.files import spelled
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.words import counted, describe, word_key


def list_coco_json(
    root: Path, path: Path, split: str, unseen: str | None, folders: Sequence[Path], exif: str | None
) -> SplitFiles:
    """The pictures of a JSON file with images, annotations and categories.

    Classes are the categories by their id. A label map is drawn from polygons and run lengths, larger outlines first
    so that what lies before something larger stays visible; a pixel in no outline has no class, or is of the category
    "background" where there is one.

    ``unseen``: "none" leaves unseen.txt aside. ``folders``: where pictures may be, by the whole file_name or its last
    part. ``exif``: see :class:`lexiseg.data.sets.dataset.Item`. Raises LexisegError if the file is not JSON of this
    kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        records, annotations, categories = (_list_in(content, key) for key in ("images", "annotations", "categories"))
        numbers = {_id(entry["id"]): _name(entry["name"]) for entry in categories}
        in_order = sorted(numbers, key=lambda number: (isinstance(number, str), number))
        names = [numbers[number] for number in in_order]
        order = {number: index for index, number in enumerate(in_order)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataSetError(
            f"'{path}' is not COCO-style JSON; it must hold images, annotations and categories with ids and names.",
            "wrong-record",
        ) from error
    if not names:
        raise LexisegError(f"'{path}' has no categories; it must name the classes.")
    if len({word_key(name) for name in names}) < len(categories):
        raise LexisegError(f"'{path}' gives two categories the same name or id; fix one of them.")
    vocabulary = with_unseen(Vocabulary(tuple(map(VocabularyClass, names))), root, unseen, f"'{path}'")
    table = plain_table(len(names))
    rest = rest_of(names, table.ignore)
    outlines, findings = _by_image(annotations, order, path, split)

    def wrong(kind: str, problem: str, sample: str = "", severity: str = "error") -> None:
        findings.append(Finding(kind, problem, str(path), sample, split, severity))

    items: list[Item] = []
    ids, taken = set[int | str](), set[str]()
    for index, record in enumerate(records):
        try:
            number, name = _id(record["id"]), _name(record["file_name"])
            size = _side(record["height"]), _side(record["width"])
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            problem = f"'{path}': entry {index} of images has no valid id, file_name, height or width; complete it."
            wrong("wrong-record", problem)
            continue
        if number in ids or name in taken:
            wrong("duplicate-entry", f"'{path}' lists the image '{name}' twice; remove one.", name)
            continue
        ids.add(number)
        taken.add(name)
        if not is_safe(name):
            problem = f"'{path}' names '{name[:80]}', which leads outside the data folder; fix it."
            wrong("wrong-name", problem, name[:80])
            continue
        last = name.rpartition("/")[2]
        image = _first_file([*(folder / name for folder in folders), *(folder / last for folder in folders)])
        if image is None:
            where = ", ".join(f"'{folder}'" for folder in folders)
            problem = f"The picture '{name}' of '{path}' is in none of {where}; put it there or remove its record."
            wrong("missing-picture", problem, name)
            continue
        draw = partial(draw_outlines, outlines.get(number, []), size, rest)
        items.append(Item(key(Path(name).stem), image, path, LabelKind.index, table, draw, exif))
    strangers = [number for number in outlines if number not in ids]
    if strangers:
        problem = (
            f"'{path}' has no image for {counted(len(strangers), 'image_id')} of annotations, such as "
            f"{describe(strangers[0])}, so these outlines are never drawn; fix the ids or remove the annotations."
        )
        # Pictures may be left out on purpose; where not a single id fits, the two lists count differently.
        wrong("wrong-record", problem, severity="warning" if len(strangers) < len(outlines) else "error")
    if not records:
        wrong("empty-list", f"'{path}' lists no images.")
    return SplitFiles(split, tuple(items), vocabulary, tuple(findings))


def _list_in(content: Any, key: str) -> list[Any]:
    found = content[key]
    if not isinstance(found, list):
        raise TypeError
    return found


def _id(value: Any) -> int | str:
    """An id in one form, however it was written: 3, 3.0 and "3" are the same.

    Raises TypeError if it is neither a whole number nor text.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 and str(int(value)) == value:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return value


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise TypeError
    name = str(value).replace("\\", "/")  # as programs on Windows write it
    os.fsencode(name)  # JSON can hold half a character, which no file is called
    return name


def _side(value: Any) -> int:
    side = int(value)
    if side < 1:
        raise ValueError
    return side


def _first_file(places: Sequence[Path]) -> Path | None:
    try:
        return next((found for place in places if (found := spelled(place)).is_file()), None)
    except (OSError, ValueError):  # the name is too long to be a file's, or holds a null character
        return None


def _by_image(
    annotations: Sequence[Any], order: Mapping[int | str, int], path: Path, split: str
) -> tuple[dict[int | str, list[Outline]], list[Finding]]:
    """For each image the class and outline of its annotations, and what is wrong with them."""
    found: dict[int | str, list[Outline]] = defaultdict(list)
    findings: list[Finding] = []
    for entry in annotations:
        where = f"annotation {describe(entry.get('id', '?'))}" if isinstance(entry, dict) else "an annotation"
        image = _id_in(entry, "image_id")
        category = _id_in(entry, "category_id")
        if image is None or not entry.get("segmentation"):
            problem = f"'{path}': {where} has no image_id or no segmentation; draw its outline or remove it."
            findings.append(Finding("wrong-record", problem, str(path), split=split))
        elif category is None or category not in order:
            number = describe(entry.get("category_id"))
            problem = f"'{path}': {where} has the category_id {number}, which is not a category; fix one of them."
            findings.append(Finding("unknown-id", problem, str(path), split=split))
        else:
            found[image].append(Outline(order[category], entry["segmentation"], f"'{path}': {where}"))
    return found, findings


def _id_in(entry: Any, key: str) -> int | str | None:
    try:
        return _id(entry[key])
    except (KeyError, TypeError):
        return None
