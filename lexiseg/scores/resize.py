"""Bilinear interpolation of a field."""

import torch
from torch import Tensor

from lexiseg.scores.arithmetic import UNIT_ROUNDOFF, Axis, bounds_of, every, mix, spread
from lexiseg.scores.fields import Field, Words


class Resized(Field):
    """Bilinear interpolation to another size, as ``torch.nn.functional.interpolate`` without antialiasing."""

    def __init__(self, child: Field, rows: Axis, columns: Axis) -> None:
        super().__init__(child.num_words, len(rows.low), len(columns.low), child.device)
        self.child = child
        self.rows = rows
        self.columns = columns

    def limits(self) -> tuple[float, float]:
        magnitude, error = self.child.limits()
        return magnitude * (1 + 8 * UNIT_ROUNDOFF), error + 32 * UNIT_ROUNDOFF * magnitude

    def cells(self, axis: int) -> Tensor:
        return self.child.cells(axis)[(self.columns if axis else self.rows).low]

    def block(self, words: Words, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self._lattice(words, _part(self.rows, top, bottom), _part(self.columns, left, right))

    def lattice(self, words: Words, rows: Tensor, columns: Tensor) -> Tensor:
        return self._lattice(words, _take(self.rows, rows), _take(self.columns, columns))

    def _lattice(self, words: Words, y: Axis, x: Axis) -> Tensor:
        """Values (words, R, C) at the places of ``y`` and ``x``, whose tensors are (R,) and (C,)."""
        if max(_steps(y), _steps(x)) <= 2:
            top, left = int(y.low[0]), int(x.low[0])
            values = self.child.block(words, top, int(y.high[-1]) + 1, left, int(x.high[-1]) + 1)
            above, below, before, after = y.low - top, y.high - top, x.low - left, x.high - left
        else:  # most of what lies between is asked for by nobody
            rows, columns = (torch.cat((axis.low, axis.high)).unique() for axis in (y, x))
            values = self.child.lattice(words, rows, columns)
            above, below = (torch.searchsorted(rows, index) for index in (y.low, y.high))
            before, after = (torch.searchsorted(columns, index) for index in (x.low, x.high))
        values = mix(values.index_select(1, above), values.index_select(1, below), y.w_low[:, None], y.w_high[:, None])
        return mix(spread(values, before), spread(values, after), x.w_low, x.w_high)

    def points(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._at(words, tiles, _take(self.rows, rows), _take(self.columns, columns))

    def interval(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return self.child.interval(_support(self.rows, rows), _support(self.columns, columns))

    def extremes(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        y, x = _turning_points(self.rows, rows), _turning_points(self.columns, columns)
        if y is None or x is None:
            return self.child.extremes(words, tiles, _support(self.rows, rows), _support(self.columns, columns))
        return bounds_of(self._at(words, tiles, y, x), len(rows), len(columns))

    def gaps(self, leaders: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        return self.child.gaps(leaders, _support(self.rows, rows), _support(self.columns, columns))

    def local(self, top: int, bottom: int, left: int, right: int) -> Field:
        y, x = _part(self.rows, top, bottom), _part(self.columns, left, right)
        child = self.child.local(int(y.low[0]), int(y.high[-1]) + 1, int(x.low[0]), int(x.high[-1]) + 1)
        return self if child is self.child else Resized(child, self.rows, self.columns)

    def _at(self, words: Tensor, tiles: Tensor, y: Axis, x: Axis) -> Tensor:
        """Values at the places of ``y`` and ``x``, whose tensors are (R, T) and (C, T)."""
        rows, above, below = _neighbours(y)
        columns, before, after = _neighbours(x)
        values = self.child.points(words, tiles, rows, columns)
        w_low, w_high = spread(y.w_low, tiles)[:, None], spread(y.w_high, tiles)[:, None]
        values = mix(_pick(values, 0, above, tiles), _pick(values, 0, below, tiles), w_low, w_high)
        w_low, w_high = spread(x.w_low, tiles)[None], spread(x.w_high, tiles)[None]
        return mix(_pick(values, 1, before, tiles), _pick(values, 1, after, tiles), w_low, w_high)


def resized(child: Field, size: tuple[int, int] | None, align_corners: bool = False) -> Field:
    """``child`` interpolated to ``size`` (height, width); itself where it has that size already, or there is none."""
    if size is None or size == (child.height, child.width):
        return child
    rows = Axis.between(child.height, size[0], child.device, align_corners)
    return Resized(child, rows, Axis.between(child.width, size[1], child.device, align_corners))


def cropped(field: Field, size: tuple[int, int] | None, place: tuple[int, int] = (0, 0)) -> Field:
    """The part of ``size`` (height, width) of a field, from ``place`` on: what is left when padding is cut off."""
    if size is None:
        return field
    rows, columns = (Axis.between(n, n, field.device) for n in (field.height, field.width))
    child = field
    if isinstance(field, Resized):
        child, rows, columns = field.child, field.rows, field.columns
    rows, columns = (_part(axis, p, p + n) for axis, n, p in zip((rows, columns), size, place, strict=True))
    return Resized(child, rows, columns)


def _steps(axis: Axis) -> float:
    """How many inputs lie between two outputs, on average."""
    return int(axis.high[-1] - axis.low[0]) / len(axis.low)


def _part(axis: Axis, start: int, stop: int) -> Axis:
    return Axis(*(values[start:stop] for values in axis))


def _take(axis: Axis, index: Tensor) -> Axis:
    return Axis(*(values.index_select(0, index.reshape(-1)).view(index.shape) for values in axis))


def _support(axis: Axis, ranges: Tensor) -> Tensor:
    """The inclusive ranges of inputs that inclusive ranges of outputs (..., 2, T) depend on."""
    return torch.stack((axis.low[ranges[..., 0, :]], axis.high[ranges[..., 1, :]]), -2)


def _turning_points(axis: Axis, ranges: Tensor) -> Axis | None:
    """Where a piecewise linear function can be largest in the inclusive ranges (n, 2, T): (n * points, T).

    These are both ends, and the knot between them if there is one; None if a range holds more than one.
    """
    ends = _take(axis, ranges)
    knots = ends.low[:, 1] - ends.low[:, 0]
    most = int(knots.max())
    if most > 1:
        return None
    if most == 1:
        first, last = (Axis(*(values[:, end] for values in ends)) for end in (0, 1))
        w_high = torch.where(knots > 0, 0.0, first.w_high)
        # Without a knot the first end is repeated.
        middle = Axis(last.low, torch.where(knots > 0, last.low, first.high), 1.0 - w_high, w_high)
        ends = Axis(*(torch.stack(values, 1) for values in zip(first, middle, last, strict=True)))
    return Axis(*(values.flatten(0, 1) for values in ends))


def _neighbours(axis: Axis) -> tuple[Tensor, Tensor | int, Tensor | int]:
    """Which inputs (S, T) the outputs (R, T) of ``axis`` need, and where among them the lower and upper ones are."""
    start = axis.low[:1]
    index = every(torch.cat((start, axis.high[-1:])))
    if len(index) == 2 and bool((axis.low == start).all()):
        return index, 0, 1
    return index, axis.low - start, axis.high - start


def _pick(values: Tensor, axis: int, index: Tensor | int, tiles: Tensor) -> Tensor:
    """Slices of ``values`` (R, C, P) along ``axis``: the same for all (kept as an axis of length 1), or (n, T)."""
    if isinstance(index, int):
        return values.narrow(axis, index, 1)
    index = spread(index, tiles)
    if axis == 0:
        return values.gather(0, index[:, None].expand(-1, values.shape[1], -1))
    return values.gather(1, index[None].expand(len(values), -1, -1))
