"""Bilinear interpolation of numpy arrays, as torch's, for models that run without torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image


class Axis(NamedTuple):
    """Interpolation along one axis: output place i is ``x[low[i]] * (1 - weight[i]) + x[high[i]] * weight[i]``."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @classmethod
    def between(cls, num_in: int, num_out: int) -> Axis:
        """From ``num_in`` to ``num_out`` places, as ``torch.nn.functional.interpolate`` with align_corners=False."""
        place = np.maximum((np.arange(num_out) + 0.5) * (num_in / num_out) - 0.5, 0.0)
        low = np.minimum(place.astype(np.int64), num_in - 1)
        return cls(low, np.minimum(low + 1, num_in - 1), (place - low).clip(0, 1).astype(np.float32))

    def part(self, start: int, stop: int) -> Axis:
        """The output places from ``start`` up to and without ``stop``."""
        return Axis(self.low[start:stop], self.high[start:stop], self.weight[start:stop])

    def apply(self, values: np.ndarray, axis: int, first: int = 0) -> np.ndarray:
        """Interpolate along ``axis`` of values whose place 0 is the input's place ``first``."""
        shape = [1] * values.ndim
        shape[axis] = -1
        weight = self.weight.reshape(shape)
        low = values.take(self.low - first, axis)
        return low + (values.take(self.high - first, axis) - low) * weight


def resize_floats(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (..., H, W) bilinearly and without smoothing: float32 (..., h, w)."""
    image = image.astype(np.float32)
    for axis, length in zip((-2, -1), size, strict=True):
        if image.shape[axis] != length:
            image = Axis.between(image.shape[axis], length).apply(image, image.ndim + axis)
    return image


def resize_bytes(image: np.ndarray, size: tuple[int, int], antialias: bool = True) -> np.ndarray:
    """Resize bytes (3, H, W) bilinearly, smoothing what is shrunk or not: uint8 (3, h, w).

    torch's filter for bytes is modelled on Pillow's; a byte may differ by one.
    """
    if not antialias:  # along one axis and then the other, each rounded to bytes
        across = np.floor(resize_floats(image, (image.shape[1], size[1])) + 0.5)
        return np.floor(resize_floats(across, size) + 0.5).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return np.array(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
