"""Arithmetic that the fields share: bilinear weights, the sigmoid, and indices of ranges and tiles.

The first two, which every decoded score goes through, are built only from operations that IEEE 754 rounds correctly
(add, subtract, multiply, divide, round), one tensor operation each. A library's fused multiply-add or vectorised
exponential may give another last bit in the tail of a tensor than in its body; these cannot, so a score has the same
bits whichever tile it is computed in.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of one float32 operation."""


class Axis(NamedTuple):
    """Bilinear interpolation along one axis: output place i is ``w_low * x[low] + w_high * x[high]``."""

    low: Tensor  # (out,) int64, index of the lower neighbour
    high: Tensor  # (out,) int64, index of the upper neighbour, at most one more than ``low``
    w_low: Tensor  # (out,) float32 weight of the lower neighbour, in [0, 1]
    w_high: Tensor  # (out,) float32 weight of the upper neighbour, in [0, 1]

    @classmethod
    def between(cls, num_in: int, num_out: int, device: torch.device, align_corners: bool = False) -> Axis:
        """Weights from ``num_in`` to ``num_out`` places, as ``torch.nn.functional.interpolate`` defines them."""
        place = torch.arange(num_out, dtype=torch.float64, device="cpu")
        if align_corners:
            place = place * ((num_in - 1) / (num_out - 1) if num_out > 1 else 0.0)
        else:
            place = ((place + 0.5) * (num_in / num_out) - 0.5).clamp_(min=0.0)
        low = place.floor().clamp_(max=num_in - 1)
        w_high = (place - low).clamp_(0.0, 1.0)
        index = low.long()
        return cls(
            index.to(device),
            (index + 1).clamp_(max=num_in - 1).to(device),
            (1.0 - w_high).float().to(device),
            w_high.float().to(device),
        )


def mix(low: Tensor, high: Tensor, w_low: Tensor, w_high: Tensor) -> Tensor:
    """``low * w_low + high * w_high``, as three separately rounded operations."""
    return torch.mul(low, w_low).add_(torch.mul(high, w_high))


# Cephes' single-precision exponential: exp(r) = 1 + r + r^2 * polynomial(r) for |r| <= ln(2) / 2.
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2_E = 1.44269504088896341
_LN2_HIGH = 0.693359375  # so few bits that its product with a small integer is exact
_LN2_LOW = -2.12194440e-4


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of a float32 tensor, within 4 units in the last place above -87, and never below exp(-87)."""
    y = x.abs().neg_().clamp_(min=-87.0)
    n = torch.mul(y, _LOG2_E).round_()
    y.sub_(torch.mul(n, _LN2_HIGH))
    y.sub_(torch.mul(n, _LN2_LOW))
    e = torch.full_like(y, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        e.mul_(y).add_(coefficient)
    e.mul_(y).mul_(y).add_(y).add_(1.0)
    e.mul_(n.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32))
    return torch.where(x >= 0, 1.0, e).div_(e.add_(1.0))


# ---- ranges and tiles


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
