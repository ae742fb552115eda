"""Results in the forms that other tools read: COCO, GeoJSON, YOLO, labelme, CVAT, one mask per class, supervision."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from lexiseg.errors import LexisegError, need
from lexiseg.files import atomic_write
from lexiseg.label_ids import ignore_index
from lexiseg.words import counted, describe, printable, quoted, shorten

if TYPE_CHECKING:
    from lexiseg.segmentation import Segmentation, TableRow

SAVE_FORMATS = ("labels", "overlay", "json", "coco", "geojson", "yolo", "labelme", "cvat", "masks")
"""What `lexiseg.segmentation.Segmentation.save` writes."""

FAR = 1_000_000.0
"""How far from its picture's corner an outline may lead, in pixels: pycocotools walks along it pixel by pixel, so that
one that leads farther would fill the memory."""

_LOOSE_POINTS = 1000  # compared one by one before a tree is made of them

Ring = list[list[float]]
Polygon = list[Ring]


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask as a COCO segmentation.

    Returns ``{"size": [H, W], "counts": text}``: COCO's compressed run lengths, which ``pycocotools.mask.decode``
    reads.
    """
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def _encode_part(part: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """`encode_rle` of a mask of this size that is ``part`` with its corner at ``left`` and ``top``, and 0 elsewhere."""
    from pycocotools import mask as coco

    height, width = size
    steps = np.diff(np.pad(part.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # column by column, as COCO counts
    (columns, starts), (_, ends) = np.nonzero(steps == 1), np.nonzero(steps == -1)
    starts, ends = ((left + columns) * height + top + rows for rows in (starts, ends))
    joined = starts[1:] == ends[:-1]  # from the foot of one column to the head of the next
    starts, ends = starts[np.r_[True, ~joined]], ends[np.r_[~joined, True]]
    edges = np.r_[0, np.stack([starts, ends], axis=1).ravel()]
    counts = [*np.diff(edges).tolist(), *([height * width - int(edges[-1])] if edges[-1] < height * width else [])]
    encoded = coco.frPyObjects({"counts": counts, "size": [height, width]}, height, width)
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


def encode_outline(shape: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Encode an outline as run lengths that ``pycocotools.mask.decode`` takes.

    ``shape``: polygons ``[[x, y, x, y, ...], ...]`` in pixels, or run lengths, as COCO has them. ``size``: height and
    width of its picture. Raises ValueError if it is neither of a picture of this size; the text, as in "it is damaged",
    is for a sentence.
    """
    from pycocotools import mask as coco

    try:
        _check_outline(shape, size)
        counts = shape["counts"] if isinstance(shape, dict) else None
        if isinstance(counts, str | bytes):  # in a file it is text, in memory what pycocotools gave
            packed = counts.encode("ascii") if isinstance(counts, str) else counts
            code: Any = {"size": shape["size"], "counts": packed}
        elif isinstance(shape, dict):
            code = coco.frPyObjects(shape, *size)
        else:
            code = coco.merge(coco.frPyObjects(shape, *size))
        if coco.decode(code).shape != size:
            raise ValueError("it is of another size than its picture")
        return code
    except Exception as error:  # pycocotools raises nearly anything on damaged outlines
        said = isinstance(error, ValueError) and str(error).startswith("it ")
        raise ValueError(str(error) if said else "it is damaged") from error


def _check_outline(shape: Any, size: tuple[int, int]) -> None:
    """Refuse what pycocotools would not: it is written in C and reads and writes where an outline tells it to.

    Raises ValueError, TypeError, KeyError if the outline is no polygons or run lengths of a picture of this size.
    """
    if isinstance(shape, dict):
        counts = shape["counts"]
        if tuple(shape["size"]) != size:
            raise ValueError("it is of another size than its picture")
        if isinstance(counts, list) and (min(counts, default=-1) < 0 or sum(counts) != size[0] * size[1]):
            raise ValueError("it has run lengths that do not add up to its picture")
        return
    for polygon in shape:
        if isinstance(polygon, dict):
            _check_outline(polygon, size)
            continue
        corners = np.asarray(polygon, np.float64)
        if corners.ndim != 1:
            raise ValueError("it is not a list of numbers x, y, x, y")
        if corners.size % 2:
            raise ValueError(f"it has {corners.size} coordinates, an odd number")
        if corners.size < 6:
            raise ValueError(f"it has {corners.size} coordinates, and three corners need 6")
        if not np.abs(corners).max() <= FAR:
            raise ValueError("it extends far outside its picture")


def bounding_box(mask: np.ndarray) -> list[int]:
    """Left, top, width and height in pixels of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def polygons_of(mask: np.ndarray, tolerance: float = 1.0, corner: tuple[int, int] = (0, 0)) -> list[Polygon]:
    """The outlines of a mask, whose upper left corner is at ``corner`` (x, y).

    ``tolerance``: how far in pixels an outline may run from the true one, so that it has fewer points (Douglas and
    Peucker); 0 keeps every corner. Returns one polygon per connected region. Each is a list of rings, the outer one
    first, then its holes; a ring is a list of points ``[x, y]``, its first not repeated. Coordinates are pixels from
    the upper left corner, along the pixels' edges: a mask of one pixel at the corner is the square from 0, 0 to 1, 1.
    Raises LexisegError if OpenCV is not installed.
    """
    if not mask.any():
        return []
    cv2 = need("cv2", "Outlines need OpenCV", "polygons")
    left, top, width, height = bounding_box(mask)
    # A grid of pixels (odd places) and edges (even places): OpenCV's outlines run through the places they are made of,
    # which cuts half a pixel off on every side unless those are edges.
    grid = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    grid[1::2, 1::2] = mask[top : top + height, left : left + width]
    grid = np.asarray(cv2.dilate(grid, np.ones((3, 3), np.uint8)))
    contours, hierarchy = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    polygons: dict[int, Polygon] = {}
    for outer in (True, False):
        for index, contour in enumerate(contours):
            parent = int(hierarchy[0][index][3])
            if (parent < 0) == outer:
                corners = _with_corners(np.asarray(contour)[:, 0])
                allowed = 2 * min(tolerance, width + height)
                while len(simple := np.asarray(cv2.approxPolyDP(corners, allowed, True))[:, 0]) < 3:
                    corners, allowed = cv2.convexHull(corners), allowed / 2  # a line or a point was left
                points = simple / 2 + (left + corner[0], top + corner[1])
                polygons.setdefault(index if outer else parent, []).append(points.tolist())
    return list(polygons.values())


def _with_corners(outline: np.ndarray) -> np.ndarray:
    """Put the corners back that an outline on the grid of edges cuts by a step aslant: they lie at even places."""
    following = np.roll(outline, -1, axis=0)
    odd = (outline % 2).any(axis=1)
    aslant = odd & (np.abs(following - outline) == 1).all(axis=1)
    corners = np.where(outline % 2 == 0, outline, following)
    return np.where(aslant[:, None], corners, outline)[aslant | ~odd].astype(np.int32)


def _one_ring(polygon: Polygon) -> Ring:
    """A polygon as one ring, for formats without holes: each hole hangs by a cut without width on what is near.

    That is the outline or a hole before it. A mask may have thousands of holes, so they are found by trees of points.
    """
    from scipy.spatial import KDTree

    rings = [np.asarray(ring) for ring in polygon]
    ends = np.cumsum([len(ring) for ring in rings])
    points, known = np.concatenate(rings), 0  # how many of them are in the tree
    hanging: dict[int, list[tuple[int, int]]] = {}  # by point, the holes that hang on it and where their rings begin
    for number, ring in enumerate(rings[1:], 1):
        first = int(ends[number - 1])
        if not known or first - known > _LOOSE_POINTS:
            known, tree = first, KDTree(points[:first])
        far, near = tree.query(ring)
        if first > known:
            loose = np.square(points[known:first, None] - ring).sum(-1)
            best = loose.argmin(0)
            closer = loose[best, np.arange(len(ring))] < far**2
            far, near = np.where(closer, loose.min(0) ** 0.5, far), np.where(closer, known + best, near)
        start = int(far.argmin())
        hanging.setdefault(int(near[start]), []).append((number, start))
    loops: list[list[int]] = [[] for _ in rings]
    starts = {number: start for holes in hanging.values() for number, start in holes}
    for number in reversed(range(len(rings))):  # a hole hangs on an earlier ring, so what hangs on it is ready
        length, first, start = len(rings[number]), int(ends[number]) - len(rings[number]), starts.get(number, 0)
        for step in range(length + (number > 0)):
            point = first + (start + step) % length
            loops[number].append(point)
            for hole, _ in hanging.pop(point, ()):
                loops[number] += [*loops[hole], point]
    return points[loops[0]].tolist()


def objects_of(result: Segmentation, instances: Collection[str] = ()) -> Iterator[tuple[TableRow, np.ndarray]]:
    """The masks of a result: one per class, or one per connected region of the classes that are ``instances``.

    A region is not an object: things that touch are one region, and a thing that something covers in part may be two.

    ``instances``: names of classes to take apart. Yields the class's row of the table, and a mask: bool, shape (H, W).
    Raises LexisegError if there is no class of such a name.
    """
    for row, (left, top, width, height), part in _parts_of(result, instances):
        mask = np.zeros(result.size, bool)
        mask[top : top + height, left : left + width] = part
        yield row, mask


def _parts_of(
    result: Segmentation, instances: Collection[str]
) -> Iterator[tuple[TableRow, tuple[int, int, int, int], np.ndarray]]:
    """As `objects_of`, but each mask is cut to its bounding box: of many specks each costs its own pixels alone.

    Yields the row, the box (left, top, width, height) and the part of the mask in it, bool.
    """
    instances = names_in(result, instances)
    for row in sorted(result.table(), key=lambda row: row.index):
        mask = np.asarray(result.mask(row.index))
        if row.name not in instances:
            left, top, width, height = bounding_box(mask)
            yield row, (left, top, width, height), mask[top : top + height, left : left + width]
            continue
        from scipy import ndimage

        regions, _ = ndimage.label(mask, np.ones((3, 3)))
        for number, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
            box = columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start
            yield row, box, regions[rows, columns] == number


def names_in(result: Segmentation, names: Iterable[str]) -> tuple[str, ...]:
    """Names of a result's classes, also where one alone is given.

    Raises LexisegError if there is no class of such a name.
    """
    if not isinstance(names, Iterable):
        raise LexisegError(f"Instances are given as a list of class names, not {describe(names)}.")
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in result.classes:
            raise LexisegError(f"There is no class '{shorten(str(name))}' in this result; see its `classes`.")
    return names


def coco_annotations(result: Segmentation, instances: Collection[str] = ()) -> list[dict[str, Any]]:
    """A result as COCO's annotations, without the ids that belong to a dataset.

    Returns one mapping per mask of `objects_of`: ``category_id`` (1 for the first class), ``segmentation`` (run
    lengths), ``area`` (pixels), ``bbox`` (left, top, width, height in pixels), ``iscrowd`` and ``score``.
    """
    return [
        {
            "category_id": row.index + 1,
            "segmentation": _encode_part(part, box[0], box[1], result.size),
            "area": int(part.sum()),
            "bbox": list(box),
            "iscrowd": 0,
            "score": 1.0 if row.score is None else row.score,
        }
        for row, box, part in _parts_of(result, instances)
    ]


def to_coco(results: Sequence[Segmentation], instances: Collection[str] = ()) -> dict[str, Any]:
    """Results of one vocabulary as a COCO dataset, which ``pycocotools.coco.COCO`` loads.

    Its annotations carry scores and are what ``COCO.loadRes`` takes. Ids count from 1; a category's is its place in the
    vocabulary. Raises LexisegError if there are no results, or they are of different classes.
    """
    if not results or any(result.classes != results[0].classes for result in results):
        raise LexisegError("A COCO dataset holds results of the same classes; give at least one, or several sets.")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, result in enumerate(results, 1):
        height, width = result.size
        images.append({"id": image_id, "file_name": Path(result.name).name, "height": height, "width": width})
        for annotation in coco_annotations(result, instances):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    return {**coco_head(results[0].classes), "images": images, "annotations": annotations}


def coco_head(classes: Iterable[str]) -> dict[str, Any]:
    """What a COCO dataset has besides pictures and annotations."""
    categories = [{"id": index, "name": name, "supercategory": ""} for index, name in enumerate(classes, 1)]
    return {"info": {"description": "made by lexiseg"}, "licenses": [], "categories": categories}


def merge_coco(path: Path, classes: Iterable[str], pieces: Iterable[tuple[str, Path]]) -> Path:
    """Join datasets of one picture each to one, without holding them all.

    ``pieces``: each picture's file name, and the file with its dataset. Raises LexisegError if the file cannot be
    written, or a piece cannot be read.
    """
    images: list[dict[str, Any]] = []
    count = 0
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        head = json.dumps(coco_head(classes))
        file.write(head[:-1] + ', "annotations": [')
        for name, piece in pieces:
            try:
                content = json.loads(piece.read_bytes())
                (image,), annotations = content["images"], content["annotations"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise LexisegError(f"Cannot read '{piece}'; run again without --resume.") from error
            images.append({**image, "id": len(images) + 1, "file_name": name})
            for annotation in annotations:
                count += 1
                line = json.dumps({**annotation, "id": count, "image_id": len(images)})
                file.write(("\n" if count == 1 else ",\n") + line)
        file.write('],\n"images": ' + json.dumps(images) + "}\n")
    return path


def read_coco(dataset: Mapping[str, Any], image_id: int | None = None) -> tuple[np.ndarray, list[str], str]:
    """Paint a picture's annotations of a COCO dataset, later ones over earlier ones.

    ``dataset``: the content of the JSON file. ``image_id``: which picture; None takes the only one. Returns the place
    of each pixel's category among the categories, int32, shape (H, W), with `ignore_index` where there is no
    annotation; the categories' names; the picture's file name. Raises LexisegError if there is no such picture, an
    outline cannot be drawn, or the dataset is not one.
    """
    from pycocotools import mask as coco

    try:
        images = [image for image in dataset["images"] if image_id is None or image["id"] == image_id]
        if len(images) != 1:
            which = "" if image_id is None else f" with the id {quoted(image_id)}"
            raise LexisegError(f"The dataset has {counted(len(images), 'picture')}{which}; give the id of one.")
        height, width = int(images[0]["height"]), int(images[0]["width"])
        places = {category["id"]: place for place, category in enumerate(dataset["categories"])}
        labels = np.full((height, width), ignore_index(len(places)), np.int32)
        for annotation in dataset["annotations"]:
            if annotation["image_id"] == images[0]["id"]:
                try:
                    runs = encode_outline(annotation["segmentation"], (height, width))
                except ValueError as error:
                    who = f"Annotation {describe(annotation.get('id', '?'))}"
                    raise LexisegError(f"{who} cannot be drawn, {error}; draw it again or remove it.") from error
                if annotation["category_id"] not in places:
                    raise ValueError(f"there is no category with the id {quoted(annotation['category_id'])}")
                labels[coco.decode(runs).astype(bool)] = places[annotation["category_id"]]
        names = [str(category["name"]) for category in dataset["categories"]]
    except (KeyError, TypeError, ValueError, IndexError, MemoryError) as error:
        raise LexisegError(f"This is not a COCO dataset ({shorten(str(error))}); give the contents of one.") from error
    return labels, names, str(images[0].get("file_name", ""))


def to_geojson(result: Segmentation, instances: Collection[str] = (), tolerance: float = 1.0) -> dict[str, Any]:
    """A result as a GeoJSON feature collection, in pixels (x to the right, y down), not in degrees.

    A feature has the class's ``id`` and ``name``, and its own ``score`` and ``fraction`` of the picture.
    """
    features, pixels = [], result.size[0] * result.size[1]
    for row, box, part in _parts_of(result, instances):
        polygons = polygons_of(part, tolerance, box[:2])
        coordinates = [[[*ring, ring[0]] for ring in polygon] for polygon in polygons]
        facts = {"id": row.index, "name": row.name, "score": row.score, "fraction": int(part.sum()) / pixels}
        geometry = {"type": "MultiPolygon", "coordinates": coordinates}
        features.append({"type": "Feature", "properties": facts, "geometry": geometry})
    return {"type": "FeatureCollection", "features": features}


def to_yolo(result: Segmentation, instances: Collection[str] = (), tolerance: float = 1.0) -> str:
    """A result as lines of YOLO's segmentation format: class index, then x and y in fractions of the picture."""
    height, width = result.size
    lines = []
    for row, box, part in _parts_of(result, instances):
        for polygon in polygons_of(part, tolerance, box[:2]):
            numbers = (np.asarray(_one_ring(polygon)) / (width, height)).ravel()
            lines.append(" ".join([str(row.index), *(f"{number:.6g}" for number in numbers)]) + "\n")
    return "".join(lines)


def to_labelme(result: Segmentation, instances: Collection[str] = (), tolerance: float = 1.0) -> dict[str, Any]:
    """A result as labelme's JSON, without the picture itself; one group per mask."""
    shapes = [
        {"label": row.name, "points": _one_ring(polygon), "group_id": group, "shape_type": "polygon", "flags": {}}
        for group, (row, box, part) in enumerate(_parts_of(result, instances))
        for polygon in polygons_of(part, tolerance, box[:2])
    ]
    height, width = result.size
    facts = {"imagePath": Path(result.name).name, "imageData": None, "imageHeight": height, "imageWidth": width}
    return {"version": "5.0.0", "flags": {}, "shapes": shapes, **facts}


def to_cvat(result: Segmentation, instances: Collection[str] = ()) -> str:
    """A result as CVAT's XML for images, version 1.1, with masks, which keep every pixel."""
    height, width = result.size
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    facts = {"id": "0", "name": printable(Path(result.name).name), "width": str(width), "height": str(height)}
    image = ElementTree.SubElement(root, "image", facts)
    for row, (left, top, wide, high), part in _parts_of(result, instances):
        flat = part.ravel()
        edges = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
        runs = [*([0] if flat[0] else []), *np.diff(edges).tolist()]
        place = {"left": str(left), "top": str(top), "width": str(wide), "height": str(high)}
        rle = {"label": row.name, "source": "auto", "occluded": "0", "rle": ", ".join(map(str, runs)), **place}
        ElementTree.SubElement(image, "mask", {**rle, "z_order": "0"})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def to_supervision(result: Segmentation, instances: Collection[str] = ()) -> Any:
    """A result as ``supervision.Detections``: one mask per class, with scores, class ids and names.

    Raises LexisegError if supervision is not installed.
    """
    supervision = need("supervision", "This needs supervision", "supervision")
    found = list(objects_of(result, instances))
    boxes = np.array([bounding_box(mask) for _, mask in found], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2] - 1  # supervision's boxes end at the last pixel
    return supervision.Detections(
        xyxy=boxes,
        mask=np.array([mask for _, mask in found], bool).reshape(-1, *result.size),
        confidence=np.array([1.0 if row.score is None else row.score for row, _ in found], np.float32),
        class_id=np.array([row.index for row, _ in found], int),
        data={"class_name": np.array([row.name for row, _ in found], dtype=str)},
    )
