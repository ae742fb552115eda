"""Colour changes of pictures in bytes, made for speed: each runs in the training's loader on every picture.

All take and give uint8 ``(3, H, W)``, red, green, blue. They work on whole planes, which a picture decoded from a file
(colours side by side) is not; the caller makes it contiguous once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_bytes(values: Tensor) -> Tensor:
    """Floats to bytes: clipped to 0..255 in place, then cut off."""
    return values.clamp_(0, 255).to(torch.uint8)


def shift_brightness(image: Tensor, amount: float) -> Tensor:
    """Add ``amount``, in units of 8-bit values."""
    return to_bytes(image.float().add_(amount))


def scale_contrast(image: Tensor, factor: float) -> Tensor:
    """Multiply by ``factor``."""
    return to_bytes(image.float().mul_(factor))


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply HSV's saturation by ``factor``; it stops at 1, where the smallest channel reaches 0."""
    # In HSV every channel is V - S * (V - channel) / S, so scaling S scales the distance to V.
    values = image.float()
    brightest, darkest = _extremes(values)
    saturation = (brightest - darkest).div_(brightest.clamp(min=1e-6))
    scale = saturation.clamp_(min=1e-6).reciprocal_().clamp_(max=factor)
    return to_bytes(torch.sub(brightest, values, out=values).mul_(scale).neg_().add_(brightest).round_())


def turn_hue(image: Tensor, turn: float) -> Tensor:
    """Turn the hue by ``turn`` of the circle, -0.5..0.5.

    The same as torchvision's ``adjust_hue`` within a step of 1, without going to HSV and back: value and chroma stay,
    so a channel is the value less the chroma times a wave of the hue (the usual closed form of HSV to RGB).
    """
    values = image.float()
    red, green, blue = values
    brightest, darkest = _extremes(values)
    chroma = brightest - darkest
    safe = chroma.clamp(min=1e-6)
    # In sixths of the circle: red 0, green 2, blue 4.
    hue = torch.where(
        brightest == red,
        (green - blue).div_(safe),
        torch.where(brightest == green, (blue - red).div_(safe).add_(2), (red - green).div_(safe).add_(4)),
    ).add_(6 * turn)
    wave = torch.stack((hue + 5, hue + 3, hue + 1)).remainder_(6)
    wave = torch.minimum(wave, 4 - wave).clamp_(0, 1)
    # torchvision cuts off at 255.999 / 255 of the value.
    return to_bytes(wave.mul_(chroma).neg_().add_(brightest).mul_(255.999 / 255))


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    red, green, blue = values
    return torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
