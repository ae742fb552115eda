"""COCO-style JSON: the outlines of objects, drawn into a label map."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lexiseg.data.sets.catalog import NARROW_IGNORE, WIDE_IGNORE
from lexiseg.data.sets.class_list import ListedClass, vocabulary_of
from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.errors import DataSetError
from lexiseg.data.sets.labels import LabelKind, ValueTable
from lexiseg.data.sets.listing import is_safe
from lexiseg.errors import LexisegError
from lexiseg.words import word_key


def list_coco_json(root: Path, path: Path, split: str, unseen: Sequence[str] = ()) -> SplitFiles:
    """The pictures of a JSON file with images, annotations and categories.

    Classes are the categories by their id. A label map is drawn from polygons and run lengths, larger outlines first
    so that what lies before something larger stays visible; a pixel in no outline has no class.

    Args:
        root: pictures are looked for below it: as their file_name says, in images/, in images/SPLIT and in SPLIT/.
        path: the JSON file.
        split: its name.
        unseen: names of the classes without masks in training.

    Raises:
        LexisegError: the file is not JSON of this kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records, annotations, categories = content["images"], content["annotations"], content["categories"]
        numbers = {int(entry["id"]): str(entry["name"]) for entry in categories}
        listed = [ListedClass(numbers[number]) for number in sorted(numbers)]
        order = {number: index for index, number in enumerate(sorted(numbers))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataSetError(
            f"'{path}' is no COCO-style JSON; it must hold images, annotations and categories with ids and names.",
            "wrong-record",
        ) from error
    if not listed:
        raise LexisegError(f"'{path}' has no categories; it must name the classes.")
    if len({word_key(entry.name) for entry in listed}) < len(categories):
        raise LexisegError(f"'{path}' gives two categories the same name or id; mend one of them.")
    known = {word_key(entry.name) for entry in listed}
    for name in unseen:
        if word_key(name) not in known:
            raise LexisegError(f"'{root / 'unseen.txt'}' names '{name}', which '{path}' does not; mend one of them.")
    ignore = NARROW_IGNORE if len(listed) <= NARROW_IGNORE else WIDE_IGNORE
    table = ValueTable({index: index for index in range(len(listed))}, (ignore,), ignore)
    outlines, findings = _by_image(annotations, order, path, split)
    items: list[Item] = []
    taken: set[Any] = set()
    for record in records:
        try:
            number, name = record["id"], str(record["file_name"])
            size = int(record["height"]), int(record["width"])
        except (KeyError, TypeError, ValueError):
            problem = f"'{path}' has an image without id, file_name, height or width; complete it."
            findings.append(Finding("wrong-record", problem, str(path), split=split))
            continue
        if number in taken or name in taken:
            problem = f"'{path}' lists the image '{name}' twice; remove one."
            findings.append(Finding("duplicate-entry", problem, str(path), name, split))
            continue
        taken |= {number, name}
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
    if not records:
        problem = f"'{path}' lists no images."
        findings.append(Finding("empty-list", problem, str(path), split=split))
    return SplitFiles(split, tuple(items), vocabulary_of(listed, unseen), ignore, tuple(findings))


def _first_file(places: Sequence[Path]) -> Path | None:
    try:
        return next((place for place in places if place.is_file()), None)
    except (OSError, ValueError):  # the name is too long to be a file's, or holds a null character
        return None


def _by_image(
    annotations: Any, order: Mapping[int, int], path: Path, split: str
) -> tuple[dict[Any, list[tuple[int, Any]]], list[Finding]]:
    """For each image the class and outline of its annotations, and what is wrong with them."""
    found: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
    findings: list[Finding] = []
    for entry in annotations:
        where = f"annotation {entry.get('id', '?')}" if isinstance(entry, dict) else "an annotation"
        if not isinstance(entry, dict) or "image_id" not in entry or not entry.get("segmentation"):
            problem = f"'{path}': {where} has no image_id or no segmentation; draw its outline or remove it."
            findings.append(Finding("wrong-record", problem, str(path), split=split))
        elif entry.get("category_id") not in order:
            number = entry.get("category_id")
            problem = f"'{path}': {where} has the category_id {number}, which is no category; mend one of them."
            findings.append(Finding("unknown-id", problem, str(path), split=split))
        else:
            found[entry["image_id"]].append((order[entry["category_id"]], entry["segmentation"]))
    return found, findings


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
                if isinstance(outline, dict) and isinstance(outline.get("counts"), str):
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
