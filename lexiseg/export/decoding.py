"""From the grids of an exported model to labels, in numpy: the same scores as `lexiseg.scores`, tile by tile.

In each tile a word whose largest possible score is below the least of another word cannot win, and is left out:
interpolation and the sigmoid keep values between those of the cells around. The rest are compared at every pixel.
"""

from collections.abc import Sequence

import numpy as np

from lexiseg.errors import LexisegError
from lexiseg.export.spec import Decode, Fit
from lexiseg.resampling import Axis
from lexiseg.windows import Box

_TILE = 64
_WORDS = 512  # compared at a time, so that memory does not grow with the words
_MARGIN = 1e-5  # of a score's magnitude: more than rounding can change
Span = tuple[int, int]


class Part:
    """A window's ``grid`` (W, h, w), and its place on the canvas.

    ``box``: where the window lies there. ``seen``: where it was cut, whose size the model saw. ``rule``, ``fit``: how
    its grid becomes scores. ``offsets``: (W,), taken off the scores. Raises LexisegError if the grid is not finite.
    """

    def __init__(
        self, grid: np.ndarray, box: Box, rule: Decode, fit: Fit, offsets: np.ndarray | None, seen: Box
    ) -> None:
        if not np.isfinite(grid).all():
            raise LexisegError("The model's scores for this picture hold NaN or infinite values; check its weights.")
        self.grid, self.box, self.sigmoid, self.offsets = grid, box, rule.sigmoid, offsets
        window, target, cells = seen[2:], box[2:], grid.shape[1:]
        size, self.crop = rule.frame(fit, window)
        frame = size or cells
        kept = window if rule.resize_to == "frame" else frame
        self.to_frame, self.to_window = _axes(cells, frame), _axes(kept, target)

    def cells(self, axis: int, span: Span) -> Span:
        """The range of the grid that a range of the window depends on."""
        start, stop = _support(self.to_window[axis], span)
        return _support(self.to_frame[axis], (start + self.crop[axis], stop + self.crop[axis]))

    def squash(self, values: np.ndarray, words: np.ndarray | slice) -> np.ndarray:
        """Numbers of words, along the first axis, as scores."""
        if self.sigmoid:
            values = 1 / (1 + np.exp(-values))
        if self.offsets is not None:
            values = values - self.offsets[words].reshape(-1, *[1] * (values.ndim - 1))
        return values

    def values(self, words: np.ndarray, rows: Span, columns: Span) -> np.ndarray:
        """Scores (words, rows, columns) in a rectangle of the window."""
        spans = (rows, columns)
        (top, bottom), (left, right) = (self.cells(axis, span) for axis, span in enumerate(spans))
        values = self.grid[words, top:bottom, left:right]
        inner = [_support(self.to_window[axis], span) for axis, span in enumerate(spans)]
        for axis, start in ((0, top), (1, left)):
            if (first := self.to_frame[axis]) is not None:
                crop = self.crop[axis]
                values = first.part(inner[axis][0] + crop, inner[axis][1] + crop).apply(values, axis + 1, start)
        values = self.squash(values, words)
        for axis, span in enumerate(spans):
            if (second := self.to_window[axis]) is not None:
                values = second.part(*span).apply(values, axis + 1, inner[axis][0])
        return values


def _axes(lengths: Sequence[int], wanted: Sequence[int]) -> list[Axis | None]:
    """The interpolation of rows and of columns; None where there is nothing to do."""
    return [None if length == to else Axis.between(length, to) for length, to in zip(lengths, wanted, strict=True)]


def _support(axis: Axis | None, span: Span) -> Span:
    return span if axis is None else (int(axis.low[span[0]]), int(axis.high[span[1] - 1]) + 1)


def decode(
    parts: Sequence[Part], canvas: tuple[int, int], size: tuple[int, int], whole: Part | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best word (H, W) int64 and its score (H, W) float32, each the mean of the parts over a place.

    Scores are those of the canvas, interpolated to ``size``. ``whole`` is a part over all of the canvas, which counts
    as much as the mean of the others. Of equal scores the first word wins.
    """
    axes = _axes(canvas, size)
    labels, scores = np.zeros(size, np.int64), np.full(size, -np.inf, np.float32)
    for y in range(0, size[0], _TILE):
        for x in range(0, size[1], _TILE):
            tile = (y, min(y + _TILE, size[0])), (x, min(x + _TILE, size[1]))
            rows, columns = (_support(axis, span) for axis, span in zip(axes, tile, strict=True))
            near = [(part, own) for part in parts if (own := _overlap(part, rows, columns))]
            words = _candidates([*near, (whole, (rows, columns))] if whole else near)
            label, score = labels[slice(*tile[0]), slice(*tile[1])], scores[slice(*tile[0]), slice(*tile[1])]
            for start in range(0, len(words), _WORDS):
                chosen = words[start : start + _WORDS]
                values = _mean(near, chosen, rows, columns)
                if whole is not None:
                    values = (values + whole.values(chosen, rows, columns)) / 2
                for axis, (span, resize) in enumerate(zip(tile, axes, strict=True)):
                    if resize is not None:
                        values = resize.part(*span).apply(values, axis + 1, (rows, columns)[axis][0])
                best = values.argmax(0)
                largest = np.take_along_axis(values, best[None], 0)[0]
                better = largest > score
                label[better], score[better] = chosen[best][better], largest[better]
    return labels, scores


def _overlap(part: Part, rows: Span, columns: Span) -> tuple[Span, Span] | None:
    """The rectangle of the canvas that lies in a window, in the window's own places."""
    top, left, height, width = part.box
    own = [
        (max(span[0] - start, 0), min(span[1] - start, length))
        for span, start, length in ((rows, top, height), (columns, left, width))
    ]
    return (own[0], own[1]) if own[0][0] < own[0][1] and own[1][0] < own[1][1] else None


def _candidates(parts: Sequence[tuple[Part, tuple[Span, Span]]]) -> np.ndarray:
    """The words that can win in a place, of which each part has a rectangle."""
    low, high = [], []
    for part, own in parts:
        (top, bottom), (left, right) = part.cells(0, own[0]), part.cells(1, own[1])
        cells = part.grid[:, top:bottom, left:right]
        low.append(part.squash(cells.min((1, 2)), slice(None)))
        high.append(part.squash(cells.max((1, 2)), slice(None)))
    floor = np.minimum.reduce(low).max()
    return np.flatnonzero(np.maximum.reduce(high) >= floor - _MARGIN * max(1.0, abs(float(floor))))


def _mean(parts: Sequence[tuple[Part, tuple[Span, Span]]], words: np.ndarray, rows: Span, columns: Span) -> np.ndarray:
    """The mean of the parts' scores at each place of a rectangle of the canvas."""
    shape = rows[1] - rows[0], columns[1] - columns[0]
    total, count = np.zeros((len(words), *shape), np.float32), np.zeros(shape, np.float32)
    for part, own in parts:
        top, left = part.box[0] + own[0][0] - rows[0], part.box[1] + own[1][0] - columns[0]
        place = slice(top, top + own[0][1] - own[0][0]), slice(left, left + own[1][1] - own[1][0])
        values = part.values(words, *own)
        if values.shape[1:] == shape and len(parts) == 1:
            return values
        total[:, place[0], place[1]] += values
        count[place] += 1
    return total / count
