"""Drawing a label map over its picture, with a legend."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lexiseg.errors import warn
from lexiseg.fonts import Lettering

_PANEL, _INK, _MUTED, _FRAME = (250, 250, 250), (33, 33, 33), (95, 95, 95), (120, 120, 120)
_FADED = (228, 228, 228)
_OUTLINE_STRENGTH = 0.75
_MIN_FONT, _MAX_FONT = 14, 110
_MIN_OUTLINED_SIDE = 48
_WIDEST_NAME = 16  # in font sizes
_MIN_ROWS = 12
_WIDE = 1.3


@dataclass(frozen=True)
class LegendEntry:
    """A line of the legend."""

    name: str  # the class
    color: tuple[int, ...]  # its colour
    fraction: float  # its pixels as a fraction of the picture's, 0..1
    note: str = ""  # a word in grey behind the name
    hollow: bool = False  # the colour is not painted in the picture
    index: int = 0  # the class's id

    @property
    def text(self) -> str:
        """Name and note."""
        return f"{self.name}  {self.note}" if self.note else self.name


def paint_classes(
    image: np.ndarray | None,
    labels: np.ndarray,
    palette: np.ndarray,
    *,
    alpha: float,
    outlines: bool,
    background: int | None = None,
) -> Image.Image:
    """Blend the classes' colours over a picture.

    ``image``: uint8, shape (H, W, 3), or None for the colours alone. ``labels``: ids, shape (H, W); an id that the
    palette does not hold is ignored and shown faded. ``palette``: uint8, shape (C, 3). ``alpha``: how much the colours
    cover the picture, 0..1. ``outlines``: draw a light line between classes. ``background``: a class whose pixels keep
    the picture's own colours. Returns a picture of mode RGB and the size of the label map.
    """
    table = np.full((max(256, len(palette) + 1), 3), _FADED, np.uint8)
    table[: len(palette)] = palette
    index = labels if labels.dtype == np.uint8 else np.where(labels < len(palette), labels, len(palette))
    painted = Image.fromarray(table[index])
    if image is not None:
        picture = Image.fromarray(np.ascontiguousarray(image))
        painted = Image.blend(picture, painted, alpha)
        if background is not None:
            painted.paste(picture, mask=Image.fromarray(labels == background))
    if outlines and min(labels.shape) >= _MIN_OUTLINED_SIDE:
        strength = Image.fromarray(_edges(labels).astype(np.uint8) * np.uint8(round(255 * _OUTLINE_STRENGTH)))
        painted.paste((255, 255, 255), mask=strength)
    return painted


def _edges(labels: np.ndarray) -> np.ndarray:
    thin = np.zeros(labels.shape, bool)
    thin[:, :-1] = labels[:, :-1] != labels[:, 1:]
    thin[:-1] |= labels[:-1] != labels[1:]
    thickness = max(1, round(min(labels.shape) / 500))
    wide = thin.copy()
    for shift in range(1, thickness):
        wide[:, shift:] |= thin[:, :-shift]
    edges = wide.copy()
    for shift in range(1, thickness):
        edges[shift:] |= wide[:-shift]
    return edges


def draw_legend(
    picture: Image.Image, entries: Sequence[LegendEntry], *, font: str | Path | None = None, size: int | None = None
) -> Image.Image:
    """Put a panel with colours, names and fractions beside a picture, or below it where it is wide.

    Names that are too long end in an ellipsis; what does not fit is counted in a last line, never dropped silently.

    ``entries``: in the order in which they are listed. ``font``: a TrueType or OpenType file to use first; None begins
    with the one Pillow carries (Latin letters). What it lacks is drawn in fonts of this machine; a name that no font
    has becomes its class's id, with a note. ``size``: of the letters in pixels; None lets them grow with the picture.
    Returns a picture of mode RGB that holds ``picture`` unscaled. Raises LexisegError if the font file cannot be read.
    """
    if not entries:
        return picture
    size = size or min(max(round(0.024 * math.sqrt(picture.width * picture.height)), _MIN_FONT), _MAX_FONT)
    face = Lettering([_more(0), "0123456789 %<…", *(entry.text for entry in entries)], size, font)
    entries = _legible(entries, face.missing)
    pad, gap, row = round(0.9 * size), round(0.6 * size), round(1.75 * size)
    between = 4 * gap  # columns: a fraction is nearer to its own name than to the next one's colour
    name_width = min(max(math.ceil(face.length(entry.text)) for entry in entries), _WIDEST_NAME * size)
    name_width = max(name_width, math.ceil(face.length(_more(len(entries)))) if len(entries) > _MIN_ROWS else 0)
    fraction_width = math.ceil(face.length("100 %"))
    column = size + gap + name_width + gap + fraction_width

    rows_beside = (picture.height - 2 * pad) // row
    beside = len(entries) <= rows_beside and picture.width <= _WIDE * picture.height
    if beside:
        columns, rows = 1, len(entries)
        canvas_size = (picture.width + column + 2 * pad, picture.height)
        corner, origin = (0, 0), (picture.width + pad, pad)
    else:
        columns = min(len(entries), max(1, (picture.width - 2 * pad + between) // (column + between)))
        rows = min(math.ceil(len(entries) / columns), max(_MIN_ROWS, rows_beside))
        # Shorter columns are better filled; with few entries this also drops empty ones.
        columns = min(columns, math.ceil(len(entries) / rows))
        width = max(picture.width, columns * (column + between) - between + 2 * pad)
        canvas_size = (width, picture.height + rows * row + 2 * pad)
        corner, origin = ((width - picture.width) // 2, 0), (pad, picture.height + pad)

    canvas = Image.new("RGB", canvas_size, _PANEL)
    canvas.paste(picture, corner)
    draw = ImageDraw.Draw(canvas)
    places = columns * rows
    shown = list(entries) if len(entries) <= places else list(entries[: places - 1])
    for position in range(min(places, len(entries))):
        left = origin[0] + (position // rows) * (column + between)
        middle = origin[1] + (position % rows) * row + row / 2
        text_left = left + size + gap
        if position >= len(shown):
            face.draw(draw, text_left, middle, _more(len(entries) - len(shown)), _MUTED)
            break
        entry = shown[position]
        box = (left, round(middle - size / 2), left + size, round(middle + size / 2))
        fill = _PANEL if entry.hollow else entry.color
        draw.rounded_rectangle(box, radius=size // 5, fill=fill, outline=_FRAME, width=max(1, size // 14))
        note = f"  {entry.note}" if entry.note else ""
        note_width = math.ceil(face.length(note))
        name = _ellipsise(entry.name, face, name_width - note_width)
        face.draw(draw, text_left, middle, name, _INK)
        if note:
            face.draw(draw, text_left + face.length(name), middle, note, _MUTED)
        right = text_left + name_width + gap + fraction_width
        percent = _percent(entry.fraction)
        face.draw(draw, right - face.length(percent), middle, percent, _MUTED)
    return canvas


def _legible(entries: Sequence[LegendEntry], missing: set[str]) -> list[LegendEntry]:
    """Put a class's id where no font has its name's letters, and say so: boxes would tell nobody anything."""
    legible = []
    for entry in entries:
        if missing.intersection(entry.name):
            warn(
                f"No font on this machine has all the letters of '{entry.name}', so the legend calls it "
                f"'class {entry.index}'; name a font that has them (--font, or font= in Python)."
            )
            entry = replace(entry, name=f"class {entry.index}")
        legible.append(entry)
    return legible


def _more(count: int) -> str:
    return f"and {count} more"


def _percent(fraction: float) -> str:
    percent = 100 * fraction
    return "<1 %" if 0 < percent < 1 else f"{percent:.0f} %"


def _ellipsise(name: str, face: Lettering, width: int) -> str:
    if face.length(name) <= width:
        return name
    kept = bisect_right(range(1, len(name) + 1), float(width), key=lambda end: face.length(name[:end].rstrip() + "…"))
    return name[:kept].rstrip() + "…"
