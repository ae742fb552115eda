"""Endpoints for annotation tools: Label Studio's ML backend and CVAT's serverless functions."""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, FiniteFloat
from starlette.exceptions import HTTPException

from lexiseg.app.queue import Answer
from lexiseg.app.requests import EXAMPLE_PICTURE, Body, Question, decode_picture
from lexiseg.errors import LexisegError
from lexiseg.formats import bounding_box

if TYPE_CHECKING:
    from lexiseg.app.service import Service
    from lexiseg.vocabulary import Vocabulary

_LOCAL_FILES = "/data/local-files/"
_MAX_CONFIG = 1 << 20
_CONTROLS = ("BrushLabels", "PolygonLabels")
_RUN_WIDTHS = (3, 4, 8, 16)  # bits of the lengths of runs in a brush
_INTERFACE = (
    '<View><Image name="image" value="$image"/><BrushLabels name="tag" toName="image"><Label value="tree"/>'
    '<Label value="sky"/></BrushLabels></View>'
)
_TASK: dict[str, Any] = {"tasks": [{"id": 1, "data": {"image": EXAMPLE_PICTURE}}], "label_config": _INTERFACE}


class LabelStudioRequest(Body):
    """What Label Studio sends to ``/predict``; other keys, such as ``params``, are ignored."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_TASK]})

    tasks: list[dict[str, Any]] = Field(min_length=1)
    """Each with ``data``, whose value under the image's key is the picture."""
    label_config: str = Field(max_length=_MAX_CONFIG)
    """The project's labelling interface, as XML."""


class CvatRequest(Body):
    """What CVAT sends to a serverless detector."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"image": EXAMPLE_PICTURE}]})

    image: str
    """The picture in base64."""
    threshold: FiniteFloat | None = None
    """Segments of a lower mean score are left out."""


class Label(NamedTuple):
    """A label of a Label Studio project."""

    name: str  # what results carry: its alias, or the value that people read
    brush: bool  # whether it is drawn with a brush; else it is a polygon
    from_name: str  # of its control
    to_name: str  # of the picture


class Interface:
    """The part of a Label Studio project that lexiseg fills.

    ``label_config``: XML with an ``Image`` and ``BrushLabels`` or ``PolygonLabels``, one or several. Raises
    LexisegError if there is none.
    """

    def __init__(self, label_config: str) -> None:
        # A document type can define entities that expand without bound; the interface needs none.
        if "<!" in label_config.replace("<!--", ""):
            raise LexisegError("The labelling interface declares a document type or entities; remove them.")
        try:
            root = ElementTree.fromstring(label_config)
        except (ElementTree.ParseError, ValueError) as error:  # ValueError: half of a surrogate pair
            raise LexisegError(f"The labelling interface is not valid XML ({error}); fix it.") from error
        controls = [tag for tag in root.iter() if tag.tag in _CONTROLS]
        image = next(root.iter("Image"), None)
        if not controls or image is None:
            raise LexisegError("The labelling interface needs an Image and BrushLabels or PolygonLabels; add them.")
        if any(control.find(f".//{kind}") is not None for control in controls for kind in _CONTROLS):
            raise LexisegError("The labelling interface has BrushLabels or PolygonLabels in each other; separate them.")
        self.key = image.get("value", "$image").lstrip("$")
        self.labels: dict[str, Label] = {}  # by value; where several controls have one, the first
        for control in controls:
            place = control.get("name", "tag"), str(control.get("toName") or image.get("name", "image"))
            for label in control.iter("Label"):
                value = label.get("value", "")
                self.labels.setdefault(value, Label(label.get("alias") or value, control.tag == "BrushLabels", *place))
        if not self.labels or "" in self.labels:
            raise LexisegError("The labelling interface has no Label with a value; add one for each class.")


def _picture(task: dict[str, Any], key: str, folder: Path | None) -> bytes:
    """The picture of a task: in the task itself, or a file below the folder that the service was given."""
    data = task.get("data")
    source = data.get(key) if isinstance(data, dict) else None
    if not isinstance(source, str):
        raise HTTPException(422, f"The task has no picture under '{key[:40]}'; check the value of the Image tag.")
    parts = None
    with suppress(ValueError):  # no address
        parts = urlsplit(source) if not source.startswith("data:") else None
    if parts is None or not parts.path.startswith(_LOCAL_FILES):
        return decode_picture(source)
    name = parse_qs(parts.query).get("d", [""])[0]
    if folder is None:
        raise HTTPException(422, "Local files need the folder they lie in; start the service with --files FOLDER.")
    root = folder.resolve()
    with suppress(OSError, ValueError):  # no name of a file
        path = (root / name.lstrip("/")).resolve()
        if path.is_relative_to(root) and path.is_file():
            return path.read_bytes()
    raise HTTPException(422, "There is no such file in the folder of local files.")


def encode_brush(mask: NDArray[np.bool_]) -> list[int]:
    """A mask (H, W) as the bytes of Label Studio's ``rle``: RGBA pixels, 255 in all four where the mask is set.

    It is thi.ng's rle-pack format, bit by bit: the number of values (32 bits), their width less one (5), and four
    widths of run lengths, each less one (4 bits each). Then runs: one bit that says whether the value repeats, two that
    choose the width of the run's length, the length less one, and the values: one where it repeats, else all.
    """
    flat = mask.reshape(-1)
    bits = [f"{flat.size * 4:032b}", f"{7:05b}", *(f"{width - 1:04b}" for width in _RUN_WIDTHS)]
    starts = np.concatenate(([0], np.flatnonzero(np.diff(flat)) + 1)) if flat.size else np.empty(0, np.int64)
    lengths = np.diff(np.concatenate((starts, [flat.size]))) * 4
    for value, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        byte = "11111111" if value else "00000000"
        while length:
            run = min(length, 1 << _RUN_WIDTHS[-1])
            choice = next(index for index, width in enumerate(_RUN_WIDTHS) if run <= 1 << width)
            bits.append(f"1{choice:02b}{run - 1:0{_RUN_WIDTHS[choice]}b}{byte}")
            length -= run
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0")).tolist()


def _brush_results(answer: Answer, interface: Interface) -> dict[str, Any]:
    result, labels = answer.result, list(interface.labels.values())
    height, width = result.size
    outlines = {} if all(label.brush for label in labels) else result.polygons()
    common: dict[str, Any] = {"original_width": width, "original_height": height, "image_rotation": 0}
    found: list[dict[str, Any]] = []
    for row in result.table():
        label = labels[row.index]
        if label.brush:
            values: list[dict[str, Any]] = [{"format": "rle", "rle": encode_brush(np.asarray(result.mask(row.index)))}]
        else:
            # A polygon of Label Studio has no holes, and its numbers are percentages.
            rings = [[[100 * x / width, 100 * y / height] for x, y in outer] for outer, *_ in outlines[row.name]]
            values = [{"points": points, "closed": True} for points in rings]
        kind = "brushlabels" if label.brush else "polygonlabels"
        where = {"from_name": label.from_name, "to_name": label.to_name, "type": kind, **common, "score": row.score}
        found += [{"id": uuid.uuid4().hex[:10], **where, "value": {**value, kind: [label.name]}} for value in values]
    scores = [row.score for row in result.table() if row.score is not None]
    return {"result": found, "score": float(np.mean(scores)) if scores else 0.0}


def _cvat_results(answer: Answer, threshold: float) -> list[dict[str, Any]]:
    result = answer.result
    outlines = result.polygons()
    import cv2  # there, for the outlines are made by it

    found = []
    for row in result.table():
        if row.score is not None and row.score < threshold:
            continue
        mask = np.asarray(result.mask(row.index))
        left, top, width, height = bounding_box(mask)
        right, bottom = left + width - 1, top + height - 1
        inside = mask[top : bottom + 1, left : right + 1]
        outer = (polygon[0] for polygon in outlines[row.name])
        largest = max(outer, key=lambda ring: cv2.contourArea(np.array(ring, np.float32)), default=[])
        found.append(
            {
                "confidence": None if row.score is None else str(row.score),
                "label": row.name,
                "points": [number for point in largest for number in point],
                # Run by rows inside the box, then the box itself.
                "mask": [*inside.astype(int).reshape(-1).tolist(), left, top, right, bottom],
                "type": "mask",
            }
        )
    return found


def add_annotation_routes(app: FastAPI, service: Service) -> None:
    """Add what annotation tools call."""

    @app.post("/setup")
    async def setup(content: dict[str, Any]) -> dict[str, str]:
        """Label Studio asks this when a project is connected: whether its interface fits."""
        schema = content.get("schema")
        if isinstance(schema, str) and schema:
            Interface(schema)
        return {"model_version": next(iter(service.segmenters))}

    @app.post("/predict")
    async def predict(request: Request, content: LabelStudioRequest) -> dict[str, Any]:
        """Label Studio's tasks, answered with brush labels or polygons of the project's own labels."""
        interface = Interface(content.label_config)
        words = service.vocabulary([re.sub("[;\uff1b]", " ", value) for value in interface.labels])  # a class each
        pictures = [
            await asyncio.to_thread(_picture, task, interface.key, service.settings.files) for task in content.tasks
        ]
        name, answers = await service.answer(request, Question(classes=""), pictures, words)
        results = [await asyncio.to_thread(_brush_results, answer, interface) for answer in answers]
        return {"results": [{**result, "model_version": name} for result in results]}

    @app.post("/cvat")
    async def cvat(request: Request, content: CvatRequest) -> list[dict[str, Any]]:
        """A picture as CVAT sends it, segmented by the classes that the service was started with."""
        if service.settings.classes is None:
            raise HTTPException(422, "CVAT sends no words; start the service with --classes 'cat; dog'.")
        words: Vocabulary = service.vocabulary(service.settings.classes)
        _, answers = await service.answer(request, Question(classes=""), [decode_picture(content.image)], words)
        return await asyncio.to_thread(_cvat_results, answers[0], content.threshold or 0.0)
