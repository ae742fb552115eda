"""Masks in the forms that other tools read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lexiseg.errors import LexisegError

Ring = list[list[float]]
"""(x, y) of its corners in pixels, counted from the picture's top left corner; not closed."""


def polygons_of(mask: NDArray[np.bool_], tolerance: float = 1.0) -> list[list[Ring]]:
    """The outlines of a mask.

    Args:
        mask: (H, W) bool.
        tolerance: how far, in pixels, a simplified outline may lie from the mask's edge; 0 keeps every corner, and then
            exactly the mask's pixels have their centres inside.

    Returns:
        Polygons as lists of rings, the first ring outside and the others holes. Parts that simplification leaves with
        fewer than three corners are left out.

    Raises:
        LexisegError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise LexisegError("Polygons need OpenCV; install it with pip install 'lexiseg[polygons]'.") from error
    if not mask.any():
        return []
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    inside = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].astype(np.uint8)
    # OpenCV's contours run through the centres of border pixels. At twice the size these lie a quarter of a pixel
    # inside the mask's edge, on the outside as around holes, so that no centre of a pixel changes sides.
    doubled = inside.repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    polygons: dict[int, list[Ring]] = {}
    for index, (contour, links) in enumerate(zip(contours, tree[0], strict=True)):
        ring = _ring(cv2, contour, tolerance, left, top)
        parent = int(links[3])
        if parent < 0 and ring:
            polygons[index] = [ring]
        elif ring and parent in polygons:
            polygons[parent].append(ring)
    return list(polygons.values())


def _ring(cv2: Any, contour: NDArray[np.generic], tolerance: float, left: int, top: int) -> Ring:
    simple = cv2.approxPolyDP(contour, 2 * tolerance, True) if tolerance > 0 else contour
    if len(simple) < 3:
        # A single pixel, or a line of them, is worth keeping as it is.
        simple = contour
    corners = simple[:, 0].astype(float) / 2 + (left + 0.25, top + 0.25)
    return corners.tolist() if len(corners) >= 3 else []
