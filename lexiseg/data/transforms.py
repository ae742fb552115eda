"""The papers' picture pipelines: random resize, crop, flip and colour for training; the test-time size.

There are two: the one-stage papers' (mmsegmentation) and the decoupled papers' (detectron2).

Every random choice is drawn from a ``numpy.random.Generator`` handed in by the caller, never from global state: a
sample is then a pure function of its seed, in any thread or process, which is what makes a resumed training exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lexiseg.data.photometric import scale_contrast, scale_saturation, shift_brightness, turn_hue
from lexiseg.label_ids import IGNORE_INDEX
from lexiseg.normalisation import normalise
from lexiseg.windows import working_size

TRAIN_SCALE = (2048, 512)
"""Long and short side of the training resize at ratio 1."""

Step = Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]
"""One step of a pipeline: image ``(3, H, W)``, label ``(H, W)`` and the random generator to image and label."""


def _scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def train_size(height: int, width: int, ratio: float, scale: tuple[int, int] = TRAIN_SCALE) -> tuple[int, int]:
    """Size of a training picture: aspect kept, fitted into ``scale * ratio``.

    ``ratio``: the random scale, drawn from 0.5..2 by the papers. ``scale``: bounds at ratio 1; the larger bounds the
    long side, the smaller the short side. Both are truncated to whole pixels after multiplication. Returns
    ``(new_height, new_width)``, each rounded half up.
    """
    bounds = [int(side * ratio) for side in scale]
    factor = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    return _scaled(height, width, factor)


def resize(image: Tensor, label: Tensor, size: tuple[int, int], *, antialias: bool = False) -> tuple[Tensor, Tensor]:
    """Resize the picture bilinearly and the label to the nearest pixel.

    The one-stage papers' loader does not antialias, the decoupled papers' (Pillow) does.
    """
    image = F.resize(tv_tensors.Image(image), list(size), interpolation=InterpolationMode.BILINEAR, antialias=antialias)
    label = F.resize(tv_tensors.Mask(label[None]), list(size), interpolation=InterpolationMode.NEAREST)[0]
    return image.as_subclass(Tensor), label.as_subclass(Tensor)


@dataclass(frozen=True)
class RandomResize:
    """Resize to :func:`train_size` with a ratio drawn uniformly from ``low..high``."""

    low: float = 0.5
    high: float = 2.0
    scale: tuple[int, int] = TRAIN_SCALE

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Resize both to one drawn size."""
        ratio = float(rng.uniform(self.low, self.high))
        return resize(image, label, train_size(image.shape[-2], image.shape[-1], ratio, self.scale))


@dataclass(frozen=True)
class RandomShortEdge:
    """Resize so that the shorter side gets one of several lengths, the longer one no more than ``longest``.

    The decoupled papers' resize (detectron2's): antialiased, the aspect kept, one length drawn uniformly.
    """

    sides: tuple[int, ...]
    longest: int | None = None

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Resize both to one drawn size."""
        side = self.sides[int(rng.integers(len(self.sides)))]
        size = working_size(image.shape[-2], image.shape[-1], side, self.longest)
        return resize(image, label, size, antialias=True)


@dataclass(frozen=True)
class TopLeft:
    """Keep the ``size x size`` pixels at the top left, or what there is of them.

    DeOP's last stage crops 640 pixels and then pads to 512: the released padding is negative there and cuts.
    """

    size: int

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Cut both."""
        return image[:, : self.size, : self.size], label[: self.size, : self.size]


@dataclass(frozen=True)
class RandomCrop:
    """Crop a window of at most ``size x size``, redrawn while one class fills too much of it.

    A window is accepted when it shows more than one class and the largest takes less than ``max_fraction`` of its
    labelled pixels; after ``attempts`` redraws the last window is taken as it is. Pixels labelled ``ignored`` do not
    count.
    """

    size: int = 512
    max_fraction: float = 0.75
    attempts: int = 10
    ignored: int = IGNORE_INDEX

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Cut the same window from both."""
        box = self._draw(image, rng)
        if self.max_fraction < 1.0:
            for _ in range(self.attempts):
                if self.accepts(label[box]):
                    break
                box = self._draw(image, rng)
        rows, columns = box
        return image[:, rows, columns], label[rows, columns]

    def _draw(self, image: Tensor, rng: np.random.Generator) -> tuple[slice, slice]:
        top, left = (int(rng.integers(0, max(side - self.size, 0) + 1)) for side in image.shape[-2:])
        return slice(top, top + self.size), slice(left, left + self.size)

    def accepts(self, label: Tensor) -> bool:
        """Whether a crop has at least two classes and none has more than ``max_fraction`` of its pixels."""
        counts = torch.bincount(label.reshape(-1), minlength=self.ignored + 1)
        counts[self.ignored] = 0
        counts = counts[counts > 0]
        return counts.numel() > 1 and counts.max().item() / counts.sum().item() < self.max_fraction


@dataclass(frozen=True)
class RandomFlip:
    """Mirror left and right with the given probability."""

    probability: float = 0.5

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mirror both or neither."""
        if rng.random() < self.probability:
            return image.flip(-1), label.flip(-1)
        return image, label


@dataclass(frozen=True)
class PhotometricDistortion:
    """Random brightness, contrast, saturation and hue, each with probability a half.

    Contrast comes before or after saturation and hue, at random. Strengths are in units of 8-bit values (brightness),
    of OpenCV's half degrees (hue: 18 is a tenth of the circle) and factors 1/2 .. 3/2 (contrast, saturation).
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Change the uint8 picture; the label stays."""
        # A crop of a decoded picture is neither in planes nor in one piece, and everything below is slow on such.
        image = image.contiguous()
        if rng.random() < 0.5:
            image = shift_brightness(image, float(rng.uniform(-self.brightness, self.brightness)))
        contrast_first = rng.random() < 0.5
        if contrast_first:
            image = self._change_contrast(image, rng)
        if rng.random() < 0.5:
            image = scale_saturation(image, float(rng.uniform(*self.saturation)))
        if rng.random() < 0.5:
            image = turn_hue(image, int(rng.integers(-self.hue, self.hue + 1)) / 180.0)
        if not contrast_first:
            image = self._change_contrast(image, rng)
        return image, label

    def _change_contrast(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if rng.random() < 0.5:
            return scale_contrast(image, float(rng.uniform(*self.contrast)))
        return image


@dataclass(frozen=True)
class Normalize:
    """Bytes to ``(x / 255 - mean) / std`` in float32; mean and std are in 0..1 units, RGB."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Turn picture bytes into floats; the label stays."""
        return normalise(image.float() / 255, self.mean, self.std), label


@dataclass(frozen=True)
class Pad:
    """Pad to ``size x size`` at the right and the bottom: ``value`` in the picture, ``label`` in the mask.

    Padding has the label 255 unless it must be told from other pixels without a class.
    """

    size: int = 512
    label: int = IGNORE_INDEX
    value: int = 0

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Fill both up; a side that is long enough stays."""
        bottom, right = (max(self.size - side, 0) for side in label.shape)
        if not bottom and not right:
            return image, label
        padding = (0, right, 0, bottom)
        return (
            torch.nn.functional.pad(image, padding, value=self.value),
            torch.nn.functional.pad(label, padding, value=self.label),
        )


@dataclass(frozen=True)
class Pipeline:
    """Steps applied one after the other with one random generator."""

    steps: tuple[Step, ...]

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Run every step; the results are contiguous."""
        for step in self.steps:
            image, label = step(image, label, rng)
        return image.contiguous(), label.contiguous()


def paper_pipeline(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop: int = 512,
    pad_label: int = IGNORE_INDEX,
    ignored: int = IGNORE_INDEX,
) -> Pipeline:
    """The papers' training pipeline: resize, crop, flip, colour, normalise, pad to ``crop x crop``.

    ``mean``: RGB mean in 0..1 units (the authors use ImageNet's: 0.485, 0.456, 0.406). ``std``: RGB deviation in 0..1
    units (0.229, 0.224, 0.225). ``crop``: side of the training crop; the resize bounds scale with it, ``(4 * crop,
    crop)``. ``pad_label``: label of the pixels that fill a picture up. ``ignored``: label of pixels without a class,
    which do not count for what a crop shows. Source: ZegCLIP, Sec. 4.2, with the constants of the authors'
    configuration.
    """
    return Pipeline(
        (
            RandomResize(scale=(4 * crop, crop)),
            RandomCrop(crop, ignored=ignored),
            RandomFlip(),
            PhotometricDistortion(),
            Normalize(mean, std),
            Pad(crop, pad_label),
        )
    )


def short_edge_pipeline(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop: int,
    sides: Sequence[int] | None = None,
    longest: int | None = None,
    cut: int | None = None,
    pad_label: int = IGNORE_INDEX,
) -> Pipeline:
    """The decoupled papers' training pipeline: resize, crop, colour, flip, pad with grey (128), normalise.

    Args:
        mean: RGB mean in 0..1 units.
        std: RGB deviation in 0..1 units.
        crop: side of the random crop, which may show a single class.
        sides: lengths of the shorter side, one of which is drawn; None is 0.5 to 1.5 times ``crop`` in steps of 0.1.
        longest: the longer side becomes no longer than this.
        cut: keep this many pixels per side of the crop, see :class:`TopLeft`; None keeps it whole.
        pad_label: label of the pixels that fill a picture up.

    Source: the released settings of ZSSeg, ZegFormer, FreeSeg, DeOP and MAFT (detectron2's mapper of MaskFormer).
    """
    lengths = tuple(sides) if sides else tuple(int(tenth * 0.1 * crop) for tenth in range(5, 16))
    steps: list[Step] = [RandomShortEdge(lengths, longest), RandomCrop(crop, max_fraction=1.0)]
    steps += [PhotometricDistortion(), RandomFlip()]
    if cut is not None:
        steps.append(TopLeft(cut))
    return Pipeline((*steps, Pad(cut or crop, pad_label, value=128), Normalize(mean, std)))


def light_pipeline(
    mean: Sequence[float], std: Sequence[float], *, crop: int, flip: float = 0.5, pad_label: int = IGNORE_INDEX
) -> Pipeline:
    """For pictures that are generated at the wanted size: crop, flip, normalise, pad.

    ``mean``: RGB mean in 0..1 units. ``std``: RGB deviation in 0..1 units. ``crop``: side of the training crop;
    pictures of this size are taken whole. ``pad_label``: label of the pixels that fill a picture up.
    """
    return Pipeline(
        (
            RandomCrop(crop, max_fraction=1.0),
            RandomFlip(flip),
            Normalize(mean, std),
            Pad(crop, pad_label),
        )
    )
