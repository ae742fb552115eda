"""How a picture is cut up for a model: its working size and the windows that cover it."""

from dataclasses import dataclass, replace
from numbers import Integral

from lexiseg.errors import LexisegError

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""

MIN_SIDE = 2
LONGEST_SIDE = 65536
MAX_ASPECT = 64
_ENLARGED_ASPECT = 4
_MAX_WINDOWS = 10_000


@dataclass(frozen=True)
class WindowPolicy:
    """How a model is run over a whole picture unless the caller says otherwise."""

    size: int | None = None  # side of the square sliding window in pixels; None runs the whole picture at once
    stride: int = 0  # distance between windows in pixels
    # the picture is first resized, keeping its aspect, so that its shorter side has this length; None keeps the
    # picture's size
    short_side: int | None = None
    # a limit to the longer side, at which the shorter one becomes shorter than ``short_side``; None sets none
    long_side: int | None = None
    # whether that resize smooths what it shrinks. mmcv's does not, detectron2's (Pillow's) does.
    antialias: bool = True
    # the picture is then stretched to this (height, width), on which the windows lie; None keeps its size
    canvas: tuple[int, int] | None = None
    # the whole picture, stretched to one window, is run as well, and a score is the mean of it and of what the windows
    # say
    whole: bool = False


def check_policy(window: WindowPolicy) -> WindowPolicy:
    """A policy as somebody wrote it, with a stride where it has a window.

    Raises ValueError if no picture can be run so; what reads the file makes a sentence of it.
    """
    sides = [side for side in (window.size, window.short_side, window.long_side) if side is not None]
    if window.canvas is not None:
        height, width = window.canvas
        sides += [height, width]
    if not all(isinstance(side, Integral) and 1 <= side <= LONGEST_SIDE for side in sides):
        raise ValueError(f"sides must be from 1 to {LONGEST_SIDE} pixels")
    if window.long_side is not None and window.short_side is None:
        raise ValueError("'long_side' limits the resize to 'short_side', which is missing; name it")
    if window.size is not None and not (isinstance(window.stride, Integral) and 0 <= window.stride <= window.size):
        raise ValueError(
            f"a stride of {window.stride} leaves gaps between windows of {window.size}; use 1 to {window.size}"
        )
    return replace(window, stride=window.stride or window.size or 0)


def working_size(height: int, width: int, short_side: int | None, long_side: int | None = None) -> tuple[int, int]:
    """The size at which a picture is segmented.

    ``short_side``: length of the shorter side afterwards; the longer one follows. A picture is enlarged no further than
    to a longer side of 4 times this (MMSegmentation's scale of 2048 x 512), so that a strip of a few pixels costs no
    more than a picture. None keeps the size. ``long_side``: the longer side becomes no longer than this, and the
    shorter one follows (detectron2's largest test size); None sets no limit. Returns height and width, rounded half up.
    """
    if short_side is None:
        return height, width
    longest = max(height, width)
    factor = min(short_side / min(height, width), max(1.0, _ENLARGED_ASPECT * short_side / longest))
    if long_side is not None:
        factor = min(factor, long_side / longest)
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def check_proportions(height: int, width: int, what: str = "The picture") -> None:
    """Refuse pictures that are too narrow to segment.

    ``what``: begins the sentence. Raises LexisegError if a side has one pixel, or one side is more than 64 times the
    other. Resized to the short side of 512 pixels that models want, such a line would grow to gigapixels.
    """
    if min(height, width) < MIN_SIDE:
        few = f"{what} has {width} x {height} pixels, too few to segment"
        raise LexisegError(f"{few}; both sides need at least {MIN_SIDE}.")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise LexisegError(
            f"{what} has {width} x {height} pixels, too narrow to segment; crop it until one side is at most "
            f"{MAX_ASPECT} times the other."
        )


def cover(height: int, width: int, size: int | None, stride: int) -> list[Box]:
    """Windows that cover a canvas, row by row.

    The sliding window of MMSegmentation, with which ZegCLIP evaluates: the i-th window begins at ``i * stride``, the
    last is shifted back so that it ends at the border.

    ``size``: side of a window; None covers the canvas with one. ``stride``: distance of neighbouring windows, 1..size.
    Returns Boxes within the canvas. A side shorter than ``size`` is taken whole. Raises LexisegError if the windows
    would be more than 10,000.
    """
    if size is None:
        return [(0, 0, height, width)]
    rows, columns = _starts(height, size, stride), _starts(width, size, stride)
    if len(rows) * len(columns) > _MAX_WINDOWS:
        raise LexisegError(
            f"Windows of {size} pixels with a stride of {stride} would be {len(rows) * len(columns):,} of {width} x "
            f"{height} pixels, more than {_MAX_WINDOWS:,}; use larger ones."
        )
    return [(top, left, min(size, height), min(size, width)) for top in rows for left in columns]


def _starts(length: int, size: int, stride: int) -> list[int]:
    count = max(length - size + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - size), 0) for index in range(count)]
