"""Figures of panels in rows, drawn by matplotlib."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lexiseg.errors import LexisegError, need, warn
from lexiseg.fonts import Lettering
from lexiseg.images import image_name
from lexiseg.words import printable, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Point = tuple[int, int]
"""Column and row of a pixel."""

ACCENT, INK, MUTED = "#c81e28", "#212121", "#6e6e6e"
_PANEL, _WIDE = 2.6, 4.2
_BAR = 0.34
_MAX_POINTS = 6


@dataclass(frozen=True)
class Panel:
    """One picture of a figure."""

    # (H, W, 3) uint8 for a picture, (H, W) float for a heat map in the colours of the figure's scale
    image: NDArray[np.generic]
    caption: str  # above it
    note: str = ""  # a smaller line under the caption
    color: str = INK  # of the caption
    # (left, top, right, bottom) as fractions of the panel, framed in red
    box: tuple[float, float, float, float] | None = None
    extent: float | None = None  # height over width it is shown with; None is the image's own
    bars: tuple[tuple[str, float, str], ...] = ()  # names, values and colours, listed below it

    @property
    def aspect(self) -> float:
        """Height over width."""
        return self.image.shape[0] / self.image.shape[1] if self.extent is None else self.extent


@dataclass(frozen=True)
class Scale:
    """What the colours of heat maps mean."""

    low: float  # value of the darkest colour
    high: float  # value of the brightest
    label: str  # what the values are


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches. Raises LexisegError if matplotlib is not installed."""
    figure = need("matplotlib.figure", "Figures need matplotlib", "plots").Figure
    return figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")


def set_title(figure: Figure, title: str, subtitle: str) -> None:
    """Write title and subtitle; text is taken as it is, never as mathematics."""
    figure.suptitle(_lines(title, subtitle), fontsize=11, color=INK, parse_math=False, wrap=True)
    _make_legible(figure)


def _make_legible(figure: Figure) -> None:
    """Write letters that matplotlib's font lacks in this machine's fonts; what none has becomes ?, with a note."""
    from matplotlib import font_manager, text

    written: list[Any] = figure.findobj(text.Text)
    face = Lettering((one.get_text() for one in written), 10, font_manager.findfont(font_manager.FontProperties()))
    families = ["sans-serif"]
    for file in face.files:
        font_manager.fontManager.addfont(file)
        families.append(font_manager.FontProperties(fname=file).get_name())
    for one in written if face.files or face.missing else ():
        one.set_fontfamily(families)
        one.set_text(_without(one.get_text(), face.missing))
    if face.missing:
        letters = shorten("".join(sorted(face.missing)))
        warn(f"No font on this machine has the letters '{letters}', so the figure has ? for each; install one.")


def _without(text: str, missing: set[str]) -> str:
    """A text with ? for the letters that are missing, and for the marks that they carry."""
    shown = ""
    for letter in text:
        if letter in missing:
            shown += "?"
        elif not (shown.endswith("?") and unicodedata.category(letter) in ("Mn", "Me", "Cf")):
            shown += letter
    return shown


def _lines(*texts: str) -> str:
    """Texts below each other, names of files among them as they may be shown."""
    return "\n".join(map(printable, "\n".join(filter(None, texts)).split("\n")))


def compose(title: str, rows: Sequence[Sequence[Panel]], *, scale: Scale | None = None, subtitle: str = "") -> Figure:
    """Put panels into a figure.

    ``scale``: of the heat maps, drawn as a colour bar on the right. Raises LexisegError if matplotlib is not installed.
    """
    columns = max(map(len, rows))
    width = _PANEL if max(panel.aspect for row in rows for panel in row) >= 0.25 else _WIDE
    heights: list[float] = []
    for row in rows:
        heights.append(min(max(width * max(panel.aspect for panel in row), 0.5), 3 * width) + 0.5)
        heights.append(_BAR * max(len(panel.bars) for panel in row))
    figure = new_figure(columns * width + (1.0 if scale else 0.2), sum(heights) + 0.8)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=[max(height, 1e-3) for height in heights])
    shown = None
    drawn: list[Axes] = []
    for index, row in enumerate(rows):
        for column, panel in enumerate(row):
            axes = figure.add_subplot(grid[2 * index, column])
            drawn.append(axes)
            mapped = _draw(axes, panel, scale)
            shown = shown or mapped
            if panel.bars:
                _draw_bars(figure.add_subplot(grid[2 * index + 1, column]), panel.bars)
    if scale is not None and shown is not None:
        figure.colorbar(shown, ax=drawn, label=scale.label, fraction=0.04, pad=0.01)
    set_title(figure, title, subtitle)
    return figure


def _draw(axes: Axes, panel: Panel, scale: Scale | None) -> AxesImage | None:
    look: dict[str, Any] = {"extent": (0, 1, 1, 0), "aspect": panel.aspect}
    mapped = panel.image.ndim == 2
    if scale is not None and mapped:
        look |= {"vmin": scale.low, "vmax": scale.high, "interpolation": "bilinear"}
    shown = axes.imshow(panel.image, **look)
    axes.set_axis_off()
    axes.set_title(_lines(panel.caption, panel.note), fontsize=8, color=panel.color, parse_math=False, wrap=True)
    if panel.box is not None:
        from matplotlib.patches import Rectangle

        left, top, right, bottom = panel.box
        # A patch may be a pixel or two of a small panel: the frame around it stays visible.
        grow_x, grow_y = (max(0.0, (0.03 - span) / 2) for span in (right - left, bottom - top))
        corner, size = (left - grow_x, top - grow_y), (right - left + 2 * grow_x, bottom - top + 2 * grow_y)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=3))
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=ACCENT, linewidth=1.5))
    return shown if scale is not None and mapped else None


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, float, str]]) -> None:
    _, values, colors = zip(*bars, strict=True)
    left, right = min(0.0, *values), max(1e-9, *values)
    axes.barh(range(len(bars)), values, color=[MUTED if color == INK else color for color in colors], height=0.25)
    axes.set_xlim(left, right)
    axes.set_ylim(len(bars) - 0.2, -0.8)
    axes.set_axis_off()
    for place, (name, value, color) in enumerate(bars):
        axes.text(left, place - 0.2, name, fontsize=8, color=color, clip_on=True, parse_math=False)
        axes.text(right, place - 0.2, f"{value:.2f}", fontsize=8, color=color, ha="right")


def chosen_points(points: Sequence[Point], size: tuple[int, int], image: str | Path) -> list[Point]:
    """The points, or the middle where none is given.

    ``size``: width and height of the picture. Raises LexisegError if there are too many, or one lies outside the
    picture.
    """
    width, height = size
    chosen = list(points) or [(width // 2, height // 2)]
    if len(chosen) > _MAX_POINTS:
        raise LexisegError(f"{len(chosen)} points are too many for one figure; choose at most {_MAX_POINTS}.")
    for column, row in chosen:
        if not (0 <= column < width and 0 <= row < height):
            raise LexisegError(
                f"The point {column},{row} lies outside '{shorten(image_name(image), 200)}', which has {width} x "
                f"{height} pixels; columns go from 0 to {width - 1} and rows from 0 to {height - 1}."
            )
    return chosen
