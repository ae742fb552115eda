"""Outlines drawn into label maps: COCO-style JSON of a whole split, labelme's files, YOLO's normalised polygons."""

import base64
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lexiseg.data.sets.archive import Place, readable
from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.labels import MAX_PIXELS, LabelKind
from lexiseg.data.sets.listing import is_safe, key, plain_table, with_unseen
from lexiseg.errors import DataSetError, LexisegError
from lexiseg.files import spelled
from lexiseg.formats import FAR, encode_outline
from lexiseg.images import open_header, orientation_of, pillow_silenced, stored_size
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.words import counted, describe, shorten, word_key

BACKGROUNDS = ("background", "_background_", "__background__")
"""Classes of these names are what lies in no outline."""


@dataclass(frozen=True)
class Outline:
    """The outline of one thing."""

    index: int  # its class id
    shape: Any  # polygons [[x, y, x, y, ...], ...] in pixels, or run lengths, as COCO has them
    who: str  # which it is, for the sentence, such as "annotation 7 of 'x.json'"


def draw_outlines(outlines: Sequence[Outline], size: tuple[int, int], rest: int) -> NDArray[np.int64]:
    """Draw outlines into a label map, larger ones first, so that what lies before something larger stays visible.

    ``rest``: label of the pixels in no outline. Raises LexisegError if an outline cannot be drawn; the sentence says
    which.
    """
    from pycocotools import mask as rle

    codes = [(outline.index, _encoded(outline, size)) for outline in outlines]
    label: NDArray[np.int64] = np.full(size, rest, np.int64)
    for index, code in sorted(codes, key=lambda entry: -int(rle.area(entry[1]))):
        label[rle.decode(code).astype(bool)] = index
    return label


def _encoded(outline: Outline, size: tuple[int, int]) -> dict[str, Any]:
    """The run lengths of an outline, which take less memory than its mask."""
    try:
        return encode_outline(outline.shape, size)
    except ValueError as error:
        raise LexisegError(
            f"{outline.who}: the outline cannot be drawn, {error}; draw it again or remove it."
        ) from error


def rest_of(names: Sequence[str], ignore: int) -> int:
    """The label of what lies in no outline: a class called background where there is one, else no class."""
    return next((index for index, name in enumerate(names) if word_key(name) in BACKGROUNDS), ignore)


def picture_size(place: Place, *, turned: bool) -> tuple[int, int]:
    """Height and width of a picture, as its file holds it or as its orientation turns it.

    Raises LexisegError if it cannot be opened, or is too large.
    """
    try:
        with pillow_silenced(), open_header(readable(place)) as picture:
            width, height = stored_size(picture)
            sideways = turned and orientation_of(picture) > 4
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        raise LexisegError(f"The picture '{place}' cannot be read; replace it or remove it.") from error
    if width * height > MAX_PIXELS:
        raise LexisegError(f"The picture '{place}' has more than {MAX_PIXELS // 1_000_000} megapixels; shrink it.")
    return (width, height) if sideways else (height, width)


def read_labelme(path: Path) -> dict[str, Any]:
    """A labelme file, with its ``shapes``. Raises LexisegError if it is not one."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        shapes = content["shapes"]
        if not isinstance(shapes, list) or not all(
            isinstance(shape, dict) and isinstance(shape.get("label"), str) for shape in shapes
        ):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LexisegError(
            f"'{path}' is not a labelme file; it must hold shapes, each with a label and points."
        ) from error
    return content


def draw_labelme(
    path: Path, image: Place, ids: Mapping[str, int], left_out: frozenset[str], rest: int, turned: bool
) -> NDArray[np.int64]:
    """Draw a labelme file: polygons, rectangles, circles and masks.

    ``image``: its picture, whose size the label has. ``ids``: class id by :func:`lexiseg.words.word_key` of the name.
    ``left_out``: the same of names whose shapes are not drawn. ``rest``: label of the pixels in no outline. ``turned``:
    whether the shapes lie on the picture as its orientation turns it. Raises LexisegError if a shape is of no class or
    of no area, or cannot be drawn, or the picture had another size when it was labelled.
    """
    size, content = picture_size(image, turned=turned), read_labelme(path)
    height, width = content.get("imageHeight"), content.get("imageWidth")
    # Which way round they are depends on who turned the picture.
    if isinstance(height, int) and isinstance(width, int) and height * width and {height, width} != set(size):
        raise DataSetError(
            f"The shapes in '{path}' were drawn on a picture of {width} x {height} pixels, but '{image}' has {size[1]} "
            f"x {size[0]}; they must have the same size.",
            "size-mismatch",
        )
    outlines = []
    for number, shape in enumerate(content["shapes"]):
        who, name = f"'{path}': shape {number}", word_key(shape["label"])
        if name in left_out:
            continue
        if name not in ids:
            raise LexisegError(
                f"{who} has the label '{shorten(describe(shape['label']))}', which is not a class; fix it or "
                "add the class."
            )
        outlines.append(Outline(ids[name], _labelme_shape(shape, size, who), who))
    return draw_outlines(outlines, size, rest)


def _labelme_shape(shape: Mapping[str, Any], size: tuple[int, int], who: str) -> Any:
    from pycocotools import mask as rle

    kind = shape.get("shape_type") or "polygon"
    try:
        points = np.asarray(shape["points"], np.float64).reshape(-1, 2)
        if not (np.abs(points) <= FAR).all():
            raise ValueError
        if kind == "polygon":
            return [points.reshape(-1).tolist()]
        (x, y), (x2, y2) = points[:2].tolist()
        if kind == "rectangle":
            return [[x, y, x2, y, x2, y2, x, y2]]
        if kind == "circle":
            turns = np.linspace(0, 2 * math.pi, 64, endpoint=False)
            circle = np.stack([np.cos(turns), np.sin(turns)], axis=1) * math.hypot(x2 - x, y2 - y) + (x, y)
            return [circle.reshape(-1).tolist()]
        if kind == "mask":
            with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=("PNG",)) as picture:
                if picture.width > size[1] or picture.height > size[0]:
                    raise ValueError
                mask = np.asarray(picture.convert("L")) > 0
            whole = np.zeros(size, np.uint8)
            top, left = round(y), round(x)
            whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask[: size[0] - top, : size[1] - left]
            return {"size": list(size), "counts": rle.encode(np.asfortranarray(whole))["counts"].decode("ascii")}
    except Exception as error:  # whatever a damaged shape makes of itself
        raise LexisegError(f"{who}: the outline cannot be drawn, it is damaged; draw it again or remove it.") from error
    raise LexisegError(f"{who} is a {shorten(describe(kind))}, which has no area; draw a polygon or remove it.")


def draw_yolo(path: Path, image: Place, ids: Mapping[int, int], rest: int, turned: bool) -> NDArray[np.int64]:
    """Draw a text file of YOLO's: one line per thing, its class and the corners as fractions of width and height.

    ``image``: its picture, whose size the label has. ``ids``: class id by the number in the file. ``rest``: label of
    the pixels in no outline. ``turned``: whether the corners lie on the picture as its orientation turns it. Raises
    LexisegError if a line is none of these, or of no class.
    """
    height, width = picture_size(image, turned=turned)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise LexisegError(f"The label '{path}' cannot be read as text; is the file complete?") from error
    outlines = []
    for number, line in enumerate(lines, 1):
        who, words = f"'{path}': line {number}", line.split()
        if not words:
            continue
        try:
            index, corners = int(words[0]), np.array([float(word) for word in words[1:]])
        except ValueError as error:
            raise LexisegError(f"{who} is not a class id and coordinates; fix it or remove it.") from error
        if index not in ids:
            raise LexisegError(f"{who} has the class {index}, which is not in the class file; fix one of them.")
        if corners.size == 4:
            raise LexisegError(f"{who} is a box, not an outline; export the dataset for segmentation.")
        if corners.size % 2 == 0:
            if not (np.abs(corners) <= 2).all():
                raise LexisegError(f"{who} has coordinates outside 0 to 1; they must be fractions of the picture.")
            corners *= np.tile([width, height], corners.size // 2)
        outlines.append(Outline(ids[index], [corners.tolist()], who))
    return draw_outlines(outlines, (height, width), rest)


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
    ids, taken = set[int | str](), set[Path]()
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
        last = name.rpartition("/")[2]
        # Of a path on the machine where the file was written only the last part means anything here.
        parts = [name, last] if is_safe(name) else [last]
        image = _first_file([folder / part for part in parts for folder in folders])
        if number in ids or image in taken:
            what = f"gives two images the id {describe(number)}" if number in ids else f"lists the image '{name}' twice"
            wrong("duplicate-entry", f"'{path}' {what}; remove one.", name)
            continue
        ids.add(number)
        if image is None:
            where = ", ".join(f"'{folder}'" for folder in folders)
            problem = f"The picture '{name}' of '{path}' is in none of {where}; put it there or remove its record."
            wrong("missing-picture", problem, name)
            continue
        taken.add(image)
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
