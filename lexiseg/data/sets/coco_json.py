"""COCO-style JSON: the outlines of objects, drawn into a label map."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.errors import DataSetError
from lexiseg.data.sets.labels import MAX_PIXELS, LabelKind, ValueTable
from lexiseg.data.sets.listing import is_safe, with_unseen
from lexiseg.errors import LexisegError
from lexiseg.label_ids import ignore_index
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.words import describe, word_key

_FAR = 1_000_000.0  # pycocotools walks along an outline pixel by pixel: one that leads farther would fill the memory


def list_coco_json(root: Path, path: Path, split: str, unseen: str | None = None) -> SplitFiles:
    """The pictures of a JSON file with images, annotations and categories.

    Classes are the categories by their id. A label map is drawn from polygons and run lengths, larger outlines first
    so that what lies before something larger stays visible; a pixel in no outline has no class.

    Args:
        root: pictures are looked for below it: as their file_name says, in images/, in images/SPLIT and in SPLIT/.
        path: the JSON file.
        split: its name.
        unseen: "none" leaves unseen.txt aside.

    Raises:
        LexisegError: the file is not JSON of this kind.
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
            f"'{path}' is no COCO-style JSON; it must hold images, annotations and categories with ids and names.",
            "wrong-record",
        ) from error
    if not names:
        raise LexisegError(f"'{path}' has no categories; it must name the classes.")
    if len({word_key(name) for name in names}) < len(categories):
        raise LexisegError(f"'{path}' gives two categories the same name or id; mend one of them.")
    vocabulary = with_unseen(Vocabulary(tuple(map(VocabularyClass, names))), root, unseen, f"'{path}'")
    ignore = ignore_index(len(names))
    table = ValueTable({index: index for index in range(len(names))}, (ignore,), ignore)
    outlines, findings = _by_image(annotations, order, path, split)
    items: list[Item] = []
    ids: set[int | str] = set()
    taken: set[str] = set()
    for index, record in enumerate(records):
        try:
            number, name = _id(record["id"]), _name(record["file_name"])
            size = _side(record["height"]), _side(record["width"])
            if size[0] * size[1] > MAX_PIXELS:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            problem = f"'{path}': entry {index} of images has no right id, file_name, height or width; complete it."
            findings.append(Finding("wrong-record", problem, str(path), split=split))
            continue
        if number in ids or name in taken:
            problem = f"'{path}' lists the image '{name}' twice; remove one."
            findings.append(Finding("duplicate-entry", problem, str(path), name, split))
            continue
        ids.add(number)
        taken.add(name)
        if not is_safe(name):
            problem = f"'{path}' names '{name[:80]}', which leads outside the data folder; mend it."
            findings.append(Finding("wrong-name", problem, str(path), name[:80], split))
            continue
        places = (root / name, root / "images" / name, root / "images" / split / name, root / split / name)
        image = _first_file(places)
        if image is None:
            problem = (
                f"The picture '{name}' of '{path}' is in none of images/, images/{split}/ and {split}/ of '{root}'."
            )
            findings.append(Finding("missing-picture", problem, str(path), name, split))
            continue
        draw = _drawer(outlines.get(number, []), size, ignore, path, name)
        items.append(Item(Path(name).stem, image, path, LabelKind.index, table, draw))
    strangers = [number for number in outlines if number not in ids]
    if strangers:
        problem = (
            f"'{path}': {len(strangers)} image_ids of annotations, such as {describe(strangers[0])}, belong to no "
            "image, so these outlines are never drawn; mend the ids or remove the annotations."
        )
        # Pictures may be left out on purpose; where not a single id fits, the two lists count differently.
        severity = "warning" if len(strangers) < len(outlines) else "error"
        findings.append(Finding("wrong-record", problem, str(path), split=split, severity=severity))
    if not records:
        problem = f"'{path}' lists no images."
        findings.append(Finding("empty-list", problem, str(path), split=split))
    return SplitFiles(split, tuple(items), vocabulary, ignore, tuple(findings))


def _list_in(content: Any, key: str) -> list[Any]:
    found = content[key]
    if not isinstance(found, list):
        raise TypeError
    return found


def _id(value: Any) -> int | str:
    """An id in one form, however it was written: 3, 3.0 and "3" are the same.

    Raises:
        TypeError: it is neither a whole number nor text.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 and str(int(value)) == value:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return value


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    name = str(value)
    name.encode()  # JSON can hold half a character, which no file is called and no terminal can print
    return name


def _side(value: Any) -> int:
    side = int(value)
    if side < 1:
        raise ValueError
    return side


def _first_file(places: Sequence[Path]) -> Path | None:
    try:
        return next((place for place in places if place.is_file()), None)
    except (OSError, ValueError):  # the name is too long to be a file's, or holds a null character
        return None


def _by_image(
    annotations: Sequence[Any], order: Mapping[int | str, int], path: Path, split: str
) -> tuple[dict[int | str, list[tuple[int, Any]]], list[Finding]]:
    """For each image the class and outline of its annotations, and what is wrong with them."""
    found: dict[int | str, list[tuple[int, Any]]] = defaultdict(list)
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
            problem = f"'{path}': {where} has the category_id {number}, which is no category; mend one of them."
            findings.append(Finding("unknown-id", problem, str(path), split=split))
        else:
            found[image].append((order[category], entry["segmentation"]))
    return found, findings


def _id_in(entry: Any, key: str) -> int | str | None:
    try:
        return _id(entry[key])
    except (KeyError, TypeError):
        return None


def _drawer(
    outlines: Sequence[tuple[int, Any]], size: tuple[int, int], ignore: int, path: Path, name: str
) -> Callable[[], NDArray[np.int64]]:
    def draw() -> NDArray[np.int64]:
        try:
            from pycocotools import mask as rle
        except ImportError as error:
            raise LexisegError(
                f"Drawing the outlines of '{path}' needs pycocotools; install it with: pip install 'lexiseg[coco]'."
            ) from error
        label: NDArray[np.int64] = np.full(size, ignore, np.int64)
        masks = []
        for index, outline in outlines:
            try:
                _check_outline(outline, size)
                if isinstance(outline, dict) and isinstance(outline["counts"], str):
                    code: Any = {"size": outline["size"], "counts": outline["counts"].encode("ascii")}
                elif isinstance(outline, dict):
                    code = rle.frPyObjects(outline, *size)
                else:
                    code = rle.merge(rle.frPyObjects(outline, *size))
                mask = rle.decode(code).astype(bool)
                if mask.shape != size:
                    raise ValueError
            except Exception as error:  # pycocotools raises nearly anything on damaged outlines
                raise LexisegError(
                    f"'{path}' holds an outline for '{name}' that cannot be drawn; draw it again or remove it."
                ) from error
            masks.append((int(mask.sum()), index, mask))
        for _, index, mask in sorted(masks, key=lambda entry: -entry[0]):
            label[mask] = index
        return label

    return draw


def _check_outline(outline: Any, size: tuple[int, int]) -> None:
    """Refuse what pycocotools would not: it is written in C and reads and writes where an outline tells it to.

    Raises:
        ValueError, TypeError, KeyError: the outline is no polygons or run lengths of a picture of this size.
    """
    if isinstance(outline, dict):
        counts = outline["counts"]
        if tuple(outline["size"]) != size:
            raise ValueError
        if isinstance(counts, list) and (min(counts, default=-1) < 0 or sum(counts) != size[0] * size[1]):
            raise ValueError
        return
    for polygon in outline:
        if isinstance(polygon, dict):
            _check_outline(polygon, size)
            continue
        corners = np.asarray(polygon, np.float64)
        if corners.ndim != 1 or not corners.size or not np.abs(corners).max() <= _FAR:
            raise ValueError
