"""Run-length encoding of masks as COCO stores them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lexiseg.errors import LexisegError


def encode_rle(mask: np.ndarray, *, compressed: bool = True) -> dict[str, Any]:
    """Encode a mask as a COCO segmentation.

    Args:
        mask: bool, shape (H, W).
        compressed: COCO's compact string, which pycocotools makes; otherwise the plain list of run lengths, column by
            column, beginning with the zeros. COCO's tools read both.

    Returns:
        ``{"size": [H, W], "counts": str or list of int}``, which JSON can hold.

    Raises:
        LexisegError: ``compressed`` without pycocotools installed.
    """
    height, width = mask.shape
    if compressed:
        try:
            from pycocotools import mask as coco
        except ImportError as error:
            raise LexisegError(
                'Compressed COCO masks need pycocotools; run `pip install "lexiseg[coco]"`, or ask for plain ones.'
            ) from error
        encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)
    return {"size": [height, width], "counts": counts}


def decode_rle(encoded: dict[str, Any]) -> np.ndarray:
    """Decode a COCO segmentation with a list of run lengths into a mask: bool, shape (H, W).

    Raises:
        LexisegError: the run lengths are compressed, or do not add up to the size.
    """
    height, width = encoded["size"]
    counts = encoded["counts"]
    if not isinstance(counts, list) or sum(counts) != height * width or any(count < 0 for count in counts):
        raise LexisegError("The mask's run lengths do not fit its size; only uncompressed COCO masks are read here.")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")
