"""Pixels that a user points at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lexiseg.errors import LexisegError
from lexiseg.images import image_name
from lexiseg.words import shorten

Point = tuple[int, int]
"""Column and row of a pixel."""

_MAX_POINTS = 6


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
