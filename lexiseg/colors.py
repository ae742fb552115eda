"""Colours for classes: the users' own, and distinct ones for the rest."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from lexiseg.errors import LexisegError

BACKGROUND_COLOR = (0, 0, 0)
IGNORED_COLOR = (224, 224, 192)
"""The colour in which the PASCAL VOC palette shows ignored pixels."""

_GOLDEN = 0.6180339887498949
_LIGHTNESS = (0.70, 0.58, 0.80, 0.64, 0.52, 0.75)
_CHROMA = (0.17, 0.15, 0.12)
_OKLAB_TO_LMS = np.array([[0.3963377774, 0.2158037573], [-0.1055613458, -0.0638541728], [-0.0894841775, -1.2914855480]])
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def parse_color(value: Any, what: str) -> tuple[int, int, int]:
    """Read a colour.

    ``value``: three whole numbers in 0..255, or text such as ``#ff8800``. ``what``: whose colour it is, for the error.
    Raises LexisegError if the value is neither.
    """
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        value = list(bytes.fromhex(value[1:]))
    numbers: list[int] = []
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes) and len(value) == 3:
        with suppress(TypeError, ValueError, OverflowError):
            numbers = [int(part) for part in value if not isinstance(part, bool) and float(part) == int(part)]
    if len(numbers) != 3 or not all(0 <= number <= 255 for number in numbers):
        raise LexisegError(f"The colour of {what} must be three whole numbers in 0..255 or text such as #ff8800.")
    return numbers[0], numbers[1], numbers[2]


def distinct_colors(given: Sequence[tuple[int, int, int] | None]) -> np.ndarray:
    """Fill the gaps in a list of colours with colours that are easy to tell apart.

    Neighbours in the list differ by the golden ratio in hue and cycle through lightness and chroma, in OKLCH (B.
    Ottosson, "A perceptual color space for image processing", 2020), where equal steps look equal. No colour is
    handed out twice.

    ``given``: a colour or None for each class. Returns uint8, shape (C, 3): red, green, blue.
    """
    count = len(given)
    index = np.arange(count)
    hue = 2 * np.pi * ((0.08 + index * _GOLDEN) % 1.0)
    lightness = np.array(_LIGHTNESS)[index % len(_LIGHTNESS)]
    chroma = np.array(_CHROMA)[(index // len(_LIGHTNESS)) % len(_CHROMA)]
    colors = _oklch_to_srgb(lightness, chroma, hue)
    taken = {color for color in given if color is not None}
    for position, color in enumerate(given):
        if color is None:
            color = _free_color(tuple(int(part) for part in colors[position]), taken)
            taken.add(color)
        colors[position] = color
    return colors


def _free_color(color: tuple[int, ...], taken: set[tuple[int, int, int]]) -> tuple[int, int, int]:
    code = int.from_bytes(bytes(color), "big")
    while (free := (code >> 16, (code >> 8) & 255, code & 255)) in taken and len(taken) < 2**24:
        code = (code + 0x050301) % 2**24
    return free


def _oklch_to_srgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    plane = np.stack([chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    linear = np.clip((lightness[:, None] + plane @ _OKLAB_TO_LMS.T) ** 3 @ _LMS_TO_RGB.T, 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)
