"""The qualitative grid: one row per picture, with the picture, the ground truth and the prediction side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lexiseg.overlay import LegendEntry, draw_legend, paint_classes
from lexiseg.vocabulary import Vocabulary

_GAP, _HEADER = 6, 24
_PAPER, _INK = (250, 250, 250), (33, 33, 33)
_TITLES = ("picture", "truth", "prediction")
_ALPHA = 0.75


@dataclass(frozen=True, eq=False)
class Example:
    """What one row shows."""

    image: NDArray[np.uint8]  # ``(H, W, 3)`` uint8
    truth: NDArray[np.integer]  # ``(H, W)`` integer ids; one that is no class is drawn faded
    prediction: NDArray[np.integer]  # ``(H, W)``, the same
    name: str = ""  # of the sample


def draw_grid(examples: Sequence[Example], vocabulary: Vocabulary, *, width: int = 256) -> Image.Image:
    """Draw the rows, with a legend of every class that occurs in them.

    ``vocabulary``: gives names, colours and which classes are unseen; the legend says so. ``width``: of a cell in
    pixels; heights follow from the pictures. Returns a picture of mode RGB. Raises ValueError if there is no example.
    """
    if not examples:
        raise ValueError("a grid needs at least one example")
    palette = vocabulary.palette()
    rows = [[_fit(cell, width) for cell in _cells(example, palette)] for example in examples]
    height = _HEADER + sum(row[0].height + _GAP for row in rows)
    canvas = Image.new("RGB", (len(_TITLES) * (width + _GAP) + _GAP, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    for column, title in enumerate(_TITLES):
        draw.text((_GAP + column * (width + _GAP) + width / 2, _HEADER / 2), title, _INK, font, anchor="mm")
    top = _HEADER
    for row in rows:
        for column, cell in enumerate(row):
            canvas.paste(cell, (_GAP + column * (width + _GAP), top))
        top += row[0].height + _GAP
    return draw_legend(canvas, _legend(examples, vocabulary, palette))


def _cells(example: Example, palette: NDArray[np.uint8]) -> list[Image.Image]:
    painted = [
        paint_classes(example.image, labels, palette, alpha=_ALPHA, outlines=True)
        for labels in (example.truth, example.prediction)
    ]
    return [Image.fromarray(np.ascontiguousarray(example.image)), *painted]


def _fit(cell: Image.Image, width: int) -> Image.Image:
    height = max(1, round(cell.height * width / cell.width))
    return cell if cell.width == width else cell.resize((width, height), Image.Resampling.LANCZOS)


def _legend(examples: Sequence[Example], vocabulary: Vocabulary, palette: NDArray[np.uint8]) -> list[LegendEntry]:
    truth, predicted = np.zeros((2, len(vocabulary)), np.int64)
    for example in examples:
        for counts, labels in ((truth, example.truth), (predicted, example.prediction)):
            counts += np.bincount(labels[(labels >= 0) & (labels < len(vocabulary))], minlength=len(vocabulary))
    total = max(1, sum(example.truth.size for example in examples))
    # Unseen classes first: they are what a reader looks for. Then by fraction of the truth.
    order = sorted(
        (int(index) for index in np.flatnonzero(truth + predicted)),
        key=lambda index: (vocabulary.classes[index].seen is not False, -truth[index]),
    )
    return [
        LegendEntry(_label(vocabulary, index), tuple(int(part) for part in palette[index]), truth[index] / total)
        for index in order
    ]


def _label(vocabulary: Vocabulary, index: int) -> str:
    entry = vocabulary.classes[index]
    return f"{entry.name} (unseen)" if entry.seen is False else entry.name
