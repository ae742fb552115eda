"""Drawing figures with Pillow: panels with captions, heat maps, a colour bar.

matplotlib would be a dependency of 30 MB and seven packages for four figures that need rectangles, text and one colour
map, so it is not one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
PAPER, INK, MUTED, GRID = (255, 255, 255), (33, 33, 33), (110, 110, 110), (225, 225, 225)
ACCENT = (200, 30, 40)
TITLE, CAPTION, SMALL = 26, 19, 16
PANEL = 256
_MARGIN, _GAP, _BAR, _TICKS = 28, 18, 26, 52
_LINE = 1.3

# Nine points of viridis (van der Walt and Smith, public domain): even to the eye, also in grey and to the colour-blind.
_VIRIDIS = np.array(
    [
        (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
        (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
    ],
    dtype=np.float64,
)  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        image: what it shows.
        caption: above it.
        note: a smaller line under the caption.
        color: of the caption.
    """

    image: Image.Image
    caption: str
    note: str = ""
    color: Color = INK


@dataclass(frozen=True)
class Scale:
    """What colours mean.

    Attributes:
        low: value of the darkest colour.
        high: value of the brightest.
        label: what the values are.
    """

    low: float
    high: float
    label: str


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all figures, which comes with Pillow."""
    return ImageFont.load_default(size)


def colors(values: NDArray[np.floating], scale: Scale) -> NDArray[np.uint8]:
    """Colours (..., 3) of values; those outside the scale get its ends."""
    span = scale.high - scale.low
    place = np.clip((values - scale.low) / span if span > 0 else np.zeros_like(values), 0, 1) * (len(_VIRIDIS) - 1)
    below = np.minimum(place.astype(int), len(_VIRIDIS) - 2)
    share = (place - below)[..., None]
    return np.round(_VIRIDIS[below] * (1 - share) + _VIRIDIS[below + 1] * share).astype(np.uint8)


def fit(width: int, height: int, side: int = PANEL) -> tuple[int, int]:
    """Width and height brought to a box of ``side`` x ``side``, keeping the aspect."""
    factor = side / max(width, height)
    return max(1, round(width * factor)), max(1, round(height * factor))


def heat_map(values: NDArray[np.floating], size: tuple[int, int], scale: Scale) -> Image.Image:
    """Values (h, w) as a picture of ``size`` (width, height); between the values it is interpolated bilinearly."""
    field = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    resized = np.asarray(field.resize(size, Image.Resampling.BILINEAR))
    return Image.fromarray(colors(resized, scale))


def mark(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """A copy of the picture with a box (left, top, right, bottom) in pixels drawn on it, visible on any ground."""
    result = image.copy()
    draw = ImageDraw.Draw(result)
    left, top, right, bottom = box
    # A patch may be a pixel or two in a small panel: the box around it stays visible.
    grow = max(0.0, (9 - min(right - left, bottom - top)) / 2)
    left, top, right, bottom = left - grow, top - grow, right + grow, bottom + grow
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(255, 255, 255), width=4)
    draw.rectangle((left, top, right, bottom), outline=ACCENT, width=2)
    return result


def wrap(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Break text into lines of at most ``width`` pixels; a word that is longer is cut with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
            continue
        while len(word) > 1 and face.getlength(word) > width:
            word = word[:-2].rstrip("…") + "…"
        lines.append(word)
    return lines


def columns_for(count: int) -> int:
    """How many panels of ``count`` stand side by side in a figure about as wide as a screen."""
    return min(count, max(3, math.ceil(math.sqrt(1.7 * count)))) if count > 4 else max(1, count)


def compose(
    title: str,
    rows: Sequence[Sequence[Panel]],
    *,
    scale: Scale | None = None,
    subtitle: str = "",
    footer: str = "",
) -> Image.Image:
    """Put panels into a figure.

    Args:
        title: above everything.
        rows: panels row by row; a column is as wide as its widest panel.
        scale: drawn as a colour bar on the right.
        subtitle: under the title, smaller.
        footer: under everything, smaller.

    Raises:
        ValueError: there is no panel.
    """
    if not rows or not all(rows):
        raise ValueError("a figure needs at least one panel in each row")
    widths = [max(row[i].image.width for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    bar_width = 0 if scale is None else _GAP + _BAR + _TICKS + round(SMALL * _LINE) + 4
    body_width = max(sum(widths) + _GAP * (len(widths) - 1) + bar_width, 2 * PANEL)
    caption_height = round(CAPTION * _LINE) + (round(SMALL * _LINE) if any(p.note for row in rows for p in row) else 0)
    heights = [max(panel.image.height for panel in row) for row in rows]
    title_face, small_face = font(TITLE), font(SMALL)
    head = [(line, title_face, TITLE, INK) for line in wrap(title, title_face, body_width)]
    head += [(line, small_face, SMALL, MUTED) for line in wrap(subtitle, small_face, body_width)]
    feet = wrap(footer, small_face, body_width)
    top = _MARGIN + sum(round(size * _LINE) for _, _, size, _ in head) + 10
    bottom = top + sum(heights) + len(rows) * caption_height + _GAP * (len(rows) - 1)
    height = bottom + (10 + len(feet) * round(SMALL * _LINE) if feet else 0) + _MARGIN
    canvas = Image.new("RGB", (round(body_width) + 2 * _MARGIN, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN
    for line, face, size, color in head:
        draw.text((_MARGIN, y), line, color, face)
        y += round(size * _LINE)
    y = top
    for row, row_height in zip(rows, heights, strict=True):
        x = _MARGIN
        for panel, width in zip(row, widths, strict=False):
            _caption(draw, panel, x, y, width)
            canvas.paste(panel.image, (x + (width - panel.image.width) // 2, y + caption_height))
            x += width + _GAP
        y += caption_height + row_height + _GAP
    if scale is not None:
        left = _MARGIN + sum(widths) + _GAP * len(widths)
        _color_bar(canvas, scale, left, top + caption_height, min(bottom, top + caption_height + 3 * PANEL))
    for index, line in enumerate(feet):
        draw.text((_MARGIN, bottom + 10 + index * round(SMALL * _LINE)), line, MUTED, small_face)
    return canvas


def _caption(draw: ImageDraw.ImageDraw, panel: Panel, x: int, y: int, width: int) -> None:
    for text, size, color in ((panel.caption, CAPTION, panel.color), (panel.note, SMALL, MUTED)):
        if text:
            draw.text((x + width / 2, y), shorten(text, font(size), width + _GAP // 2), color, font(size), anchor="ma")
            y += round(size * _LINE)


def shorten(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Cut text to ``width`` pixels, with an ellipsis where something was cut."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / max(1, count - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.99)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, step: float) -> str:
    """A tick's number with as many decimals as its distance to the next one needs."""
    decimals = 0
    while decimals < 6 and abs(round(step, decimals) - step) > 1e-6 * abs(step):
        decimals += 1
    # No minus before a zero.
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _color_bar(canvas: Image.Image, scale: Scale, left: int, top: int, bottom: int) -> None:
    draw = ImageDraw.Draw(canvas)
    height = bottom - top
    ramp = np.linspace(scale.high, scale.low, height)[:, None].repeat(_BAR, axis=1)
    canvas.paste(Image.fromarray(colors(ramp, scale)), (left, top))
    draw.rectangle((left, top, left + _BAR - 1, bottom - 1), outline=MUTED)
    face = font(SMALL)
    marks = ticks(scale.low, scale.high, 9)
    step = marks[1] - marks[0] if len(marks) > 1 else 0.1
    for value in marks:
        share = (value - scale.low) / (scale.high - scale.low) if scale.high > scale.low else 0.5
        y = bottom - 1 - share * (height - 1)
        draw.line((left + _BAR, y, left + _BAR + 5, y), fill=MUTED)
        draw.text((left + _BAR + 9, y), number(value, step), INK, face, anchor="lm")
    label = Image.new("L", (round(face.getlength(scale.label)) + 4, round(SMALL * _LINE) + 4), 0)
    ImageDraw.Draw(label).text((2, 2), scale.label, 255, face)
    upright = label.rotate(90, expand=True)
    place = (left + _BAR + _TICKS, round((top + bottom) / 2 - upright.height / 2))
    canvas.paste(Image.new("RGB", upright.size, INK), place, upright)
