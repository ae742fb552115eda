"""A segmentation in the forms that clients ask for."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from lexiseg.app.queue import Answer
from lexiseg.formats import coco_annotations, to_geojson

if TYPE_CHECKING:
    from lexiseg.scores.base import Scores
    from lexiseg.segmentation import Segmentation

Output: TypeAlias = Literal["rle", "png", "polygons", "geojson", "scores"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
SCORE_SIDE = 128
"""Longer side of a map of scores."""


def encode_png(image: Image.Image) -> str:
    """The picture as PNG in base64."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def describe_result(answer: Answer, model: str, output: Output) -> dict[str, Any]:
    """The answer as JSON holds it.

    ``output``: "rle" gives each class COCO's compressed run lengths, area and box; "png" one PNG of ids in base64;
    "polygons" each class's outlines in pixels with holes; "geojson" a FeatureCollection; "scores" each class's map of
    scores as a grey PNG in base64, 255 at the picture's highest score, 0 at its lowest.
    """
    result = answer.result
    height, width = result.size
    palette = result.palette()
    rows: list[dict[str, Any]] = [
        {
            "id": row.index,
            "name": row.name,
            "seen": row.seen,
            "fraction": row.fraction,
            "score": row.score,
            "color": palette[row.index].tolist(),
        }
        for row in result.table()
    ]
    found: dict[str, Any] = {
        "model": model,
        "width": width,
        "height": height,
        "names": list(result.classes),
        "ignored_fraction": result.num_ignored / max(1, height * width),
        "classes": rows,
        "notes": list(answer.notes),
    }
    if output == "png":
        found |= {"png": encode_png(result.label_image()), "ignore_index": result.ignore_index}
    elif output == "rle":
        entries = {entry["category_id"]: entry for entry in coco_annotations(result)}
        for row in rows:
            entry = entries[row["id"] + 1]
            row |= {"rle": entry["segmentation"], "area": entry["area"], "bbox": entry["bbox"]}
    elif output == "polygons":
        outlines = result.polygons()
        for row in rows:
            row["polygons"] = outlines[row["name"]]
    elif output == "geojson":
        found["geojson"] = to_geojson(result)
    elif answer.scores is not None:
        found["scores"] = _score_maps(answer.scores, result)
    return found


def _score_maps(scores: Scores, result: Segmentation) -> dict[str, Any]:
    factor = min(1.0, SCORE_SIDE / max(result.size))
    height, width = (max(1, round(side * factor)) for side in result.size)
    values = scores.dense((height, width))[0].cpu().numpy()
    low, high = float(values.min()), float(values.max())
    grey = np.round((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    maps = {name: encode_png(Image.fromarray(values)) for name, values in zip(result.classes, grey, strict=False)}
    return {"low": low, "high": high, "maps": maps}
