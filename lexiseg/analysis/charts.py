"""A bar chart with groups, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from lexiseg.analysis.canvas import CAPTION, GRID, INK, MUTED, PAPER, SMALL, Color, font, number, ticks

_SERIES: tuple[Color, ...] = ((176, 186, 197), (44, 113, 142), (200, 30, 40))
_LEFT, _TOP, _BELOW, _HEIGHT = 78, 56, 70, 360
_APART = 10


@dataclass(frozen=True)
class Group:
    """Bars that belong together.

    Attributes:
        name: under the bars.
        labels: under each place of bars.
        values: a list for each series, one value a label.
    """

    name: str
    labels: Sequence[str]
    values: Sequence[Sequence[float]]


def bar_chart(groups: Sequence[Group], *, series: Sequence[str], y_label: str, width: int) -> Image.Image:
    """Draw bars side by side for each series, label and group, with their values above them.

    Args:
        groups: from left to right; at least one.
        series: names for the legend, in the order of the values.
        y_label: what the height means.
        width: of the picture in pixels; it grows where the labels need more.

    Raises:
        ValueError: there is no group.
    """
    if not groups:
        raise ValueError("a bar chart needs at least one group")
    values = [value for group in groups for row in group.values for value in row]
    low, high = min(0.0, *values), max(0.0, *values)
    high, low = high + 0.12 * (high - low or 1.0), low - (0.12 * (high - low) if low < 0 else 0.0)
    marks = ticks(low, high, 6)
    small, face = font(SMALL), font(CAPTION)
    places = sum(len(group.labels) for group in groups) + len(groups)
    longest = max(small.getlength(text) for group in groups for text in group.labels)
    width = max(width, _LEFT + round(places * (longest + _APART)))
    canvas = Image.new("RGB", (width, _TOP + _HEIGHT + _BELOW), PAPER)
    draw = ImageDraw.Draw(canvas)

    def y_of(value: float) -> float:
        return _TOP + _HEIGHT * (1 - (value - low) / (high - low))

    for value in marks:
        draw.line((_LEFT, y_of(value), width, y_of(value)), fill=GRID)
        draw.text((_LEFT - 8, y_of(value)), number(value, marks[1] - marks[0]), MUTED, small, anchor="rm")
    label = Image.new("RGB", (round(small.getlength(y_label)) + 4, 24), PAPER)
    ImageDraw.Draw(label).text((2, 2), y_label, MUTED, small)
    upright = label.rotate(90, expand=True)
    canvas.paste(upright, (2, round(_TOP + _HEIGHT / 2 - upright.height / 2)))
    x = float(_LEFT)
    for index, name in enumerate(series):
        draw.rectangle((x, 12, x + 18, 30), fill=_SERIES[index % len(_SERIES)])
        draw.text((x + 26, 21), name, INK, small, anchor="lm")
        x += 26 + small.getlength(name) + 30
    step = (width - _LEFT) / places
    bar = step * 0.8 / len(series)
    number_face = font(max(11, min(SMALL, int(bar / 2.4))))
    x = _LEFT + step / 2
    for group in groups:
        start = x
        for place, text in enumerate(group.labels):
            for index, row in enumerate(group.values):
                left = x + step * 0.1 + index * bar
                top, bottom = sorted((y_of(row[place]), y_of(0.0)))
                draw.rectangle((left, top, left + bar - 2, bottom), fill=_SERIES[index % len(_SERIES)])
                end, anchor = (top - 3, "md") if row[place] >= 0 else (bottom + 3, "ma")
                draw.text((left + bar / 2 - 1, end), f"{row[place]:.2f}", INK, number_face, anchor=anchor)
            draw.text((x + step / 2, _TOP + _HEIGHT + 8), text, INK, small, anchor="ma")
            x += step
        draw.text(((start + x) / 2, _TOP + _HEIGHT + 36), group.name, INK, face, anchor="ma")
        x += step
    draw.line((_LEFT, y_of(0.0), width, y_of(0.0)), fill=INK)
    return canvas
