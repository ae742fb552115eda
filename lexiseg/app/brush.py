"""Label Studio's brush format: run lengths of RGBA bytes, packed bit by bit (thi.ng's rle-pack format).

A stream starts with the number of values (32 bits), their width in bits less one (5), and four widths of run lengths,
each less one (4 bits each). Then runs follow: one bit that says whether the value repeats, two bits that choose the
width of the run's length, the length less one in that width, and the values: one where it repeats, else all of the run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WIDTHS = (3, 4, 8, 16)
_LONGEST = 1 << _WIDTHS[-1]


def encode_brush(mask: NDArray[np.bool_]) -> list[int]:
    """A mask (H, W) as the bytes of Label Studio's ``rle``: RGBA pixels, 255 in all four where the mask is set."""
    flat = mask.reshape(-1)
    bits = [f"{flat.size * 4:032b}", f"{7:05b}", *(f"{width - 1:04b}" for width in _WIDTHS)]
    edges = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate(([0], edges)) if flat.size else np.empty(0, np.int64)
    lengths = np.diff(np.concatenate((starts, [flat.size]))) * 4
    for value, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        byte = "11111111" if value else "00000000"
        while length:
            run = min(length, _LONGEST)
            choice = next(index for index, width in enumerate(_WIDTHS) if run <= 1 << width)
            bits.append(f"1{choice:02b}{run - 1:0{_WIDTHS[choice]}b}{byte}")
            length -= run
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0")).tolist()
