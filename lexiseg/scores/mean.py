"""The mean of fields that overlap."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lexiseg.scores.arithmetic import UNIT_ROUNDOFF, shift, spread
from lexiseg.scores.fields import Field, Words

Place = tuple[slice, slice, slice]


class Mean(Field):
    """The mean, at each place of a canvas, of the fields whose boxes (top, left, height, width) cover it."""

    def __init__(
        self, parts: Sequence[Field], boxes: Sequence[tuple[int, int, int, int]], height: int, width: int
    ) -> None:
        super().__init__(parts[0].num_words, height, width, parts[0].device)
        self.parts = list(zip(parts, boxes, strict=True))

    def limits(self) -> tuple[float, float]:
        limits = [part.limits() for part, _ in self.parts]
        magnitude = max(limit[0] for limit in limits)
        return magnitude, max(limit[1] for limit in limits) + (len(limits) + 4) * UNIT_ROUNDOFF * magnitude

    def cells(self, axis: int) -> Tensor:
        # Where parts overlap, the cells of the first one are as good as any: cells guide the tiling, no more.
        change = torch.zeros(self.width if axis else self.height, dtype=torch.long, device=self.device)
        for part, box in reversed(self.parts):
            start, length = box[axis], box[2 + axis]
            cells = part.cells(axis)
            change[start] = 1
            change[start + 1 : start + length] = (cells[1:] != cells[:-1]).long()
            change[start + length : start + length + 1] = 1
        return change.cumsum(0)

    def block(self, words: Words, top: int, bottom: int, left: int, right: int) -> Tensor:
        count = len(range(*words.indices(self.num_words))) if isinstance(words, slice) else len(words)
        total = torch.zeros(count, bottom - top, right - left, dtype=torch.float32, device=self.device)
        num_parts = torch.zeros(total.shape[1:], dtype=torch.float32, device=self.device)
        for part, (y, x, height, width) in self.parts:
            rows = slice(max(top, y), min(bottom, y + height))
            columns = slice(max(left, x), min(right, x + width))
            if rows.start < rows.stop and columns.start < columns.stop:
                values = part.block(words, rows.start - y, rows.stop - y, columns.start - x, columns.stop - x)
                total[:, shift(rows, top), shift(columns, left)] += values
                num_parts[shift(rows, top), shift(columns, left)] += 1
        return total.div_(num_parts)

    def points(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        total = torch.zeros(len(rows), len(columns), len(words), dtype=torch.float32, device=self.device)
        num_parts = torch.zeros_like(total)
        for part, (y, x, height, width) in self.parts:
            row_inside = (rows >= y) & (rows < y + height)
            column_inside = (columns >= x) & (columns < x + width)
            pairs, part_tiles, touched = _touched(row_inside.any(0) & column_inside.any(0), tiles)
            if len(pairs):
                part_rows = (rows[:, touched] - y).clamp_(0, height - 1)
                part_columns = (columns[:, touched] - x).clamp_(0, width - 1)
                values = part.points(words[pairs], part_tiles, part_rows, part_columns)
                inside = spread(row_inside[:, None, touched] & column_inside[None, :, touched], part_tiles)
                total[:, :, pairs] += torch.where(inside, values, 0.0)
                num_parts[:, :, pairs] += inside
        return total.div_(num_parts)

    def interval(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        bounds = _Bounds(self.num_words, rows.shape[1], columns.shape[1], device=self.device)
        for part, place, part_rows, part_columns, whole in self._touching(rows, columns):
            bounds.add(place, *part.interval(part_rows, part_columns), torch.ones_like(whole), whole)
        return bounds.result()

    def extremes(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        bounds = _Bounds(len(rows), len(columns), len(words), device=self.device)
        for part, (y, x, height, width) in self.parts:
            row_touch = (rows[:, 1] >= y) & (rows[:, 0] < y + height)
            column_touch = (columns[:, 1] >= x) & (columns[:, 0] < x + width)
            pairs, part_tiles, touched = _touched(row_touch.any(0) & column_touch.any(0), tiles)
            if len(pairs):
                whole_rows = (rows[:, 0, touched] >= y) & (rows[:, 1, touched] < y + height)
                whole_columns = (columns[:, 0, touched] >= x) & (columns[:, 1, touched] < x + width)
                whole = spread(whole_rows[:, None] & whole_columns[None], part_tiles)
                touch = spread(row_touch[:, None, touched] & column_touch[None, :, touched], part_tiles)
                part_rows = (rows[..., touched] - y).clamp_(0, height - 1)
                part_columns = (columns[..., touched] - x).clamp_(0, width - 1)
                low, high = part.extremes(words[pairs], part_tiles, part_rows, part_columns)
                bounds.add((slice(None), slice(None), pairs), low, high, touch, whole)
        return bounds.result()

    def gaps(self, leaders: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        # The smallest gap of any part bounds their mean, whichever parts cover a place.
        smallest = torch.full((self.num_words, *leaders.shape), torch.inf, dtype=torch.float32, device=self.device)
        for part, place, part_rows, part_columns, _ in self._touching(rows, columns):
            gaps = part.gaps(leaders[place[1:]], part_rows, part_columns)
            if gaps is None:
                return None
            smallest[place] = torch.minimum(smallest[place], gaps)
        return smallest

    def _touching(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[Field, Place, Tensor, Tensor, Tensor]]:
        """The parts that touch some of the tiles, which tiles, the part's own ranges, and whether it covers them."""
        for part, (y, x, height, width) in self.parts:
            i, j = _overlap(rows, y, height), _overlap(columns, x, width)
            if i.start < i.stop and j.start < j.stop:
                part_rows = (rows[:, i] - y).clamp_(0, height - 1)
                part_columns = (columns[:, j] - x).clamp_(0, width - 1)
                whole = (part_rows == rows[:, i] - y).all(0)[:, None] & (part_columns == columns[:, j] - x).all(0)
                yield part, (slice(None), i, j), part_rows, part_columns, whole

    def local(self, top: int, bottom: int, left: int, right: int) -> Field:
        parts: list[Field] = []
        boxes: list[tuple[int, int, int, int]] = []
        for part, box in self.parts:
            y, x, height, width = box
            rows = max(top, y) - y, min(bottom, y + height) - y
            columns = max(left, x) - x, min(right, x + width) - x
            if rows[0] < rows[1] and columns[0] < columns[1]:
                parts.append(part.local(*rows, *columns))
                boxes.append(box)
        return Mean(parts, boxes, self.height, self.width)


class _Bounds:
    """Bounds of a mean, from those of its parts.

    Where every part that touches a place covers it whole, the mean of the bounds bounds the mean. Elsewhere the parts
    that are averaged change within the place, and only the lowest and the highest bound are certain.
    """

    def __init__(self, *shape: int, device: torch.device) -> None:
        self.lowest = torch.full(shape, torch.inf, dtype=torch.float32, device=device)
        self.highest = -self.lowest
        self.low_sum, self.high_sum, self.count = torch.zeros(3, *shape, dtype=torch.float32, device=device)
        self.split, self.varies = torch.zeros(2, *shape, dtype=torch.bool, device=device)

    def add(
        self, place: tuple[slice, slice, slice | Tensor], low: Tensor, high: Tensor, touch: Tensor, whole: Tensor
    ) -> None:
        """Add a part's bounds; ``touch`` and ``whole`` say where it has a share in the place, and covers all of it."""
        self.lowest[place] = torch.minimum(self.lowest[place], torch.where(touch, low, torch.inf))
        self.highest[place] = torch.maximum(self.highest[place], torch.where(touch, high, -torch.inf))
        self.low_sum[place] += torch.where(touch, low, 0.0)
        self.high_sum[place] += torch.where(touch, high, 0.0)
        self.count[place] += touch
        self.split[place] |= touch & ~whole
        self.varies[place] |= touch & (low != high)

    def result(self) -> tuple[Tensor, Tensor]:
        """The lower and upper bounds."""
        low = torch.where(self.split, self.lowest, self.low_sum.div_(self.count))
        high = torch.where(self.split, self.highest, self.high_sum.div_(self.count))
        # Sums of different bounds may be rounded to the same number.
        return low, torch.where(self.varies, high.nextafter(torch.full_like(high[:1], torch.inf)), high)


def _overlap(ranges: Tensor, start: int, length: int) -> slice:
    """Which of the ascending inclusive ranges (2, n) touch [start, start + length)."""
    touched = ((ranges[1] >= start) & (ranges[0] < start + length)).nonzero().view(-1)
    return slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 0)


def _touched(touch: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs lie in a tile that ``touch`` (T,) marks, their tiles' new numbers, and the old numbers of those."""
    touched = touch.nonzero().view(-1)
    pairs = touch[tiles].nonzero().view(-1)
    return pairs, (touch.cumsum(0) - 1)[tiles[pairs]], touched
