"""Index arithmetic on ranges and tiles that the fields share."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def spread(values: Tensor, index: Tensor) -> Tensor:
    """``values[..., index]`` for a one-dimensional index, several times as fast as ``index_select``."""
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def every(ranges: Tensor) -> Tensor:
    """(..., S, T) every index of the inclusive ranges (..., 2, T); shorter ones repeat their last."""
    first, last = ranges[..., :1, :], ranges[..., 1:, :]
    length = int((last - first).max()) + 1
    return torch.minimum(first + torch.arange(length, device=ranges.device)[:, None], last)


def bounds_of(values: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum (n, m, P) of values (n * R, m * C, P)."""
    low = high = values.view(num_rows, len(values) // num_rows, *values.shape[1:])
    low, high = reduce(torch.minimum, low.unbind(1)), reduce(torch.maximum, high.unbind(1))
    shape = num_rows, num_columns, values.shape[1] // num_columns, values.shape[2]
    low, high = low.view(shape), high.view(shape)
    return reduce(torch.minimum, low.unbind(2)), reduce(torch.maximum, high.unbind(2))


def pool(low: Tensor, high: Tensor, axis: int, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum of ``low`` and maximum of ``high`` over inclusive index ranges (2, n) along ``axis``."""

    def take(values: Tensor, index: Tensor) -> Tensor:
        return spread(values, index) if axis == 2 else values.index_select(axis, index)

    index = every(ranges).unbind(0)
    smallest, largest = take(low, index[0]), take(high, index[0])
    for step in index[1:]:
        smallest = torch.minimum(smallest, take(low, step))
        largest = torch.maximum(largest, take(high, step))
    return smallest, largest


def shift(part: slice, start: int) -> slice:
    """``part`` counted from ``start``."""
    return slice(part.start - start, part.stop - start)
