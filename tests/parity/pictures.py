"""Pictures of golden cases as the authors prepare them: normalised, and padded to one frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.model import OPENAI_MEAN, OPENAI_STD
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise


def normalised(image: Tensor) -> Tensor:
    """An image (3, H, W), 0..255, as the generators want it."""
    return normalise(image.float() / 255, IMAGENET_MEAN, IMAGENET_STD)


def clip_normalised(image: Tensor) -> Tensor:
    return normalise(image.float() / 255, OPENAI_MEAN, OPENAI_STD)


def padded(image: Tensor, size: Sequence[int], value: float = 0.0) -> Tensor:
    return F.pad(image, (0, size[1] - image.shape[-1], 0, size[0] - image.shape[-2]), value=value)


def batched(images: list[Tensor], stride: int = 32, value: float = 0.0) -> Tensor:
    """Images of several sizes in the smallest frame whose sides are multiples of a stride."""
    sides = (max(int(image.shape[axis]) for image in images) for axis in (-2, -1))
    size = [-(-side // stride) * stride for side in sides]
    return torch.stack([padded(image, size, value) for image in images])
