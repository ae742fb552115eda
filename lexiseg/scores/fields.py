"""A field is a (words, height, width) array of scores that is never built: it yields the parts that are asked for.

Fields are composed: a grid of logits is resized, squashed, resized again, averaged with its neighbours. Each one
answers four questions, and answers them through the field below it.

- ``block``: the values in a rectangle, for some words (``lattice``: on some of its rows and columns).
- ``points``: the values at scattered places, each for one word.
- ``interval`` and ``extremes``: between which bounds do the values in a rectangle lie?
- ``gaps``: by how much does one word at least exceed another in a rectangle? What words have in common cancels.

Bilinear interpolation takes convex combinations and the sigmoid is monotone, so bounds cost no more than the values at
a few corners. They hold for real numbers; rounding moves a computed value from them by at most ``limits()[1]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lexiseg.scores.arithmetic import UNIT_ROUNDOFF, bounds_of, every, pool, shift, sigmoid, spread

Words = slice | Tensor
"""Which words a block is asked for: a range, or int64 indices."""

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WORDS = 16, 128, 1024
"""`Mixture` takes matrix products in blocks of exactly this size: a value's bits do not depend on what is asked for."""
_MOST_PLACES = 16  # of a tile whose values are compared one by one


class Field(ABC):
    """Scores of one picture: a virtual float32 array of shape (num_words, height, width)."""

    def __init__(self, num_words: int, height: int, width: int, device: torch.device) -> None:
        self.num_words = num_words
        self.height = height
        self.width = width
        self.device = device

    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """A bound on the magnitude of every value, and one on how far rounding moves it from its exact value."""

    def cells(self, axis: int) -> Tensor:
        """(height,) or (width,) int64, non-decreasing: places of one number lie between the same grid points.

        Where nothing is known between two places of the field's own raster, each is a cell.
        """
        return torch.arange(self.width if axis else self.height, device=self.device)

    @abstractmethod
    def block(self, words: Words, top: int, bottom: int, left: int, right: int) -> Tensor:
        """(words, bottom - top, right - left) values of a rectangle. The caller must not write into it."""

    def lattice(self, words: Words, rows: Tensor, columns: Tensor) -> Tensor:
        """(words, R, C) values at ascending rows and columns, such as every fourth; the bits are those of `block`."""
        top, left = int(rows[0]), int(columns[0])
        values = self.block(words, top, int(rows[-1]) + 1, left, int(columns[-1]) + 1)
        return values.index_select(1, rows - top).index_select(2, columns - left)

    @abstractmethod
    def points(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(R, C, P) values of word ``words[p]`` at the rows and columns of tile ``tiles[p]``.

        ``rows`` (R, T) and ``columns`` (C, T) hold ascending indices for each of T tiles.
        """

    @abstractmethod
    def interval(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (num_words, n, m) for every pair of a row range (2, n) and a column range (2, m).

        A range is its first and its last index; they ascend. Bounds are equal only where all values are.
        """

    @abstractmethod
    def extremes(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (n, m, P) of word ``words[p]`` in the parts of tile ``tiles[p]``.

        ``rows`` (n, 2, T) and ``columns`` (m, 2, T) hold ascending inclusive ranges for each of T tiles.
        """

    def gaps(self, leaders: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        """(num_words, n, m) by how much the word ``leaders`` (n, m) of a tile at least exceeds each word all over it.

        Tiles are those of `interval`. A negative number proves nothing; None: nothing is known.
        """
        return None

    @abstractmethod
    def local(self, top: int, bottom: int, left: int, right: int) -> Field:
        """A field with the same values in the given rectangle, for many questions: what is costly is computed now."""


class Source(Field):
    """Values that lie in memory, of any float type and strides; what is read is turned into float32."""

    def __init__(
        self, values: Tensor, magnitude: float, place: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None
    ) -> None:
        height, width = size or (values.shape[1], values.shape[2])
        super().__init__(values.shape[0], height, width, values.device)
        self.values = values
        self.magnitude = magnitude
        self.top, self.left = place
        extent = 1 + sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True))
        self._flat = values.as_strided((extent,), (1,))

    def limits(self) -> tuple[float, float]:
        return self.magnitude, 0.0

    def block(self, words: Words, top: int, bottom: int, left: int, right: int) -> Tensor:
        view = self.values[:, top - self.top : bottom - self.top, left - self.left : right - self.left]
        return (view[words] if isinstance(words, slice) else view.index_select(0, words)).float()

    def points(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        steps = self.values.stride()
        place = ((rows - self.top) * steps[1])[:, None] + ((columns - self.left) * steps[2])[None]
        place = spread(place, tiles).add_(words * steps[0])
        return self._flat.index_select(0, place.view(-1)).view(place.shape).float()

    def interval(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        first, last = int(rows[0, 0]), int(rows[1, -1])
        band = self.values[:, first - self.top : last - self.top + 1]
        low, high = pool(band, band, 1, rows - first)
        first, last = int(columns[0, 0]), int(columns[1, -1])
        window = slice(first - self.left, last - self.left + 1)
        low, high = pool(low[:, :, window], high[:, :, window], 2, columns - first)
        return low.float(), high.float()

    def extremes(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        y, x = every(rows), every(columns)
        return bounds_of(self.points(words, tiles, y.flatten(0, 1), x.flatten(0, 1)), len(y), len(x))

    def gaps(self, leaders: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        y, x = every(rows - self.top), every(columns - self.left)
        if len(y) * len(x) > _MOST_PLACES:
            return None
        smallest = torch.full((1,), torch.inf, dtype=torch.float32, device=self.device)
        for row in y:
            band = self.values.index_select(1, row).float()
            for column in x:
                values = spread(band, column)
                smallest = torch.minimum(smallest, values.gather(0, leaders[None]) - values)
        return smallest

    def local(self, top: int, bottom: int, left: int, right: int) -> Field:
        return self


class Mixture(Field):
    """Class scores of regions spread over their masks.

    value(word, place) = sum over regions n of class_scores[n, word] * mask_n(place). Source: the inference of
    MaskFormer-like systems; DeOP and MAFT use it unchanged.
    """

    def __init__(self, masks: Field, class_scores: Tensor) -> None:
        super().__init__(class_scores.shape[1], masks.height, masks.width, masks.device)
        self.masks = masks
        self.class_scores = class_scores.float()
        self.weight = float(self.class_scores.abs().sum(0).max())

    def limits(self) -> tuple[float, float]:
        magnitude, error = self.masks.limits()
        num_regions, weight = len(self.class_scores), self.weight
        return weight * magnitude, weight * (error + (num_regions + 2) * UNIT_ROUNDOFF * magnitude)

    def block(self, words: Words, top: int, bottom: int, left: int, right: int) -> Tensor:
        chunk = words if isinstance(words, slice) else slice(0, self.num_words)
        start, stop, _ = chunk.indices(self.num_words)
        out = torch.empty(stop - start, bottom - top, right - left, dtype=torch.float32, device=self.device)
        for y in range(top - top % BLOCK_ROWS, bottom, BLOCK_ROWS):
            y_end = min(y + BLOCK_ROWS, self.height)
            for x in range(left - left % BLOCK_COLUMNS, right, BLOCK_COLUMNS):
                x_end = min(x + BLOCK_COLUMNS, self.width)
                masks = self.masks.block(slice(None), y, y_end, x, x_end).reshape(-1, (y_end - y) * (x_end - x))
                rows = slice(max(y, top), min(y_end, bottom))
                columns = slice(max(x, left), min(x_end, right))
                for w in range(start - start % BLOCK_WORDS, stop, BLOCK_WORDS):
                    w_end = min(w + BLOCK_WORDS, self.num_words)
                    product = (self.class_scores[:, w:w_end].t() @ masks).view(-1, y_end - y, x_end - x)
                    inside = slice(max(w, start), min(w_end, stop))
                    out[shift(inside, start), shift(rows, top), shift(columns, left)] = product[
                        shift(inside, w), shift(rows, y), shift(columns, x)
                    ]
        return out if isinstance(words, slice) else out.index_select(0, words)

    def points(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._around(rows, columns).points(words, tiles, rows, columns)

    def interval(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return self._around(rows, columns).interval(rows, columns)

    def extremes(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return self._around(rows, columns).extremes(words, tiles, rows, columns)

    def local(self, top: int, bottom: int, left: int, right: int) -> Field:
        values = self.block(slice(None), top, bottom, left, right)
        return Source(values, self.limits()[0], (top, left), (self.height, self.width))

    def _around(self, rows: Tensor, columns: Tensor) -> Field:
        return self.local(int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1)


class Squashed(Field):
    """A sigmoid, an offset for each word taken away, or both."""

    def __init__(self, child: Field, squash: bool, offsets: Tensor | None) -> None:
        super().__init__(child.num_words, child.height, child.width, child.device)
        self.child = child
        self.squash = squash
        self.offsets = offsets

    def limits(self) -> tuple[float, float]:
        magnitude, error = self.child.limits()
        if self.squash:  # the slope of the sigmoid is at most 1/4
            magnitude, error = 1.0, error / 4 + 16 * UNIT_ROUNDOFF
        if self.offsets is not None:
            magnitude += float(self.offsets.abs().max())
        return magnitude, error + 2 * UNIT_ROUNDOFF * magnitude

    def cells(self, axis: int) -> Tensor:
        return self.child.cells(axis)

    def block(self, words: Words, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self._apply(self.child.block(words, top, bottom, left, right), words)

    def lattice(self, words: Words, rows: Tensor, columns: Tensor) -> Tensor:
        return self._apply(self.child.lattice(words, rows, columns), words)

    def points(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._apply(self.child.points(words, tiles, rows, columns), words, -1)

    def interval(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.child.interval(rows, columns)
        constant = low == high
        low, high = self._apply(low, slice(None)), self._apply(high, slice(None))
        # Where the sigmoid is flat, its last bit may differ between two values that give equal bounds.
        return low, torch.where(constant, high, high.nextafter(torch.full_like(high[:1], torch.inf)))

    def extremes(self, words: Tensor, tiles: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.child.extremes(words, tiles, rows, columns)
        return self._apply(low, words, -1), self._apply(high, words, -1)

    def gaps(self, leaders: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        gaps = self.child.gaps(leaders, rows, columns)
        if gaps is None:
            return None
        if self.squash:
            # The sigmoid of x exceeds that of x - d by at least min(d, 1) times its least slope in [x - 1, x], and
            # where it falls short, by d / 4 at most. A thousandth less makes up for the rounding of the slope itself.
            low, high = (bound.gather(0, leaders[None]) for bound in self.child.interval(rows, columns))
            decay = torch.maximum((low - 1.0).abs(), high.abs()).neg_().exp_()
            slope = 0.999 * decay / (1.0 + decay).square_()
            gaps = torch.where(gaps > 0, gaps.clamp(max=1.0) * slope, 0.25 * gaps)
        return gaps if self.offsets is None else gaps - (self.offsets[leaders] - self.offsets[:, None, None])

    def local(self, top: int, bottom: int, left: int, right: int) -> Field:
        child = self.child.local(top, bottom, left, right)
        return self if child is self.child else Squashed(child, self.squash, self.offsets)

    def _apply(self, values: Tensor, words: Words, axis: int = 0) -> Tensor:
        if self.squash:
            values = sigmoid(values)
        if self.offsets is not None:
            shape = [1, 1, 1]
            shape[axis] = values.shape[axis]
            values = values - self.offsets[words].view(shape)
        return values
