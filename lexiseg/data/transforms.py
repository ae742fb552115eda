"""The papers' picture pipelines: random resize, crop, flip and colour for training; the test-time size.

There are two: the one-stage papers' (mmsegmentation) and the decoupled papers' (detectron2). The functions that build
them take the mean and the deviation of RGB in 0..1 units, ``crop``, the side of the training crop, and ``pad_label``,
the label of the pixels that fill a picture up.

Every random choice is drawn from a ``numpy.random.Generator`` handed in by the caller, never from global state: a
sample is then a pure function of its seed, in any thread or process, which is what makes a resumed training exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lexiseg.label_ids import IGNORE_INDEX
from lexiseg.normalisation import normalise
from lexiseg.windows import working_size

TRAIN_SCALE = (2048, 512)
"""Long and short side of the training resize at ratio 1."""

Pair = tuple[Tensor, Tensor]
"""An image ``(3, H, W)`` and its label ``(H, W)``."""

Step = Callable[[Tensor, Tensor, Generator], Pair]
"""One step of a pipeline: image, label and the random generator to image and label."""


def train_size(height: int, width: int, ratio: float, scale: tuple[int, int] = TRAIN_SCALE) -> tuple[int, int]:
    """Size of a training picture: aspect kept, fitted into ``scale * ratio``.

    ``ratio``: the random scale, drawn from 0.5..2 by the papers. ``scale``: bounds at ratio 1; the larger bounds the
    long side, the smaller the short side. Both are truncated to whole pixels after multiplication. Returns
    ``(new_height, new_width)``, each rounded half up.
    """
    bounds = [int(side * ratio) for side in scale]
    factor = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize(image: Tensor, label: Tensor, size: tuple[int, int], *, antialias: bool = False) -> Pair:
    """Resize the picture bilinearly and the label to the nearest pixel.

    The one-stage papers' loader does not antialias, the decoupled papers' (Pillow) does.
    """
    image = F.resize(tv_tensors.Image(image), list(size), interpolation=InterpolationMode.BILINEAR, antialias=antialias)
    label = F.resize(tv_tensors.Mask(label[None]), list(size), interpolation=InterpolationMode.NEAREST)[0]
    return image.as_subclass(Tensor), label.as_subclass(Tensor)


def random_resize(image: Tensor, label: Tensor, rng: Generator, *, scale: tuple[int, int] = TRAIN_SCALE) -> Pair:
    """Resize to :func:`train_size` with a ratio drawn uniformly from 0.5..2."""
    ratio = float(rng.uniform(0.5, 2.0))
    return resize(image, label, train_size(image.shape[-2], image.shape[-1], ratio, scale))


def random_short_edge(
    image: Tensor, label: Tensor, rng: Generator, *, short_edge_length: Sequence[int], max_size: int | None = None
) -> Pair:
    """Resize so that the shorter side gets one of several lengths, the longer one no more than ``max_size``.

    The decoupled papers' resize (detectron2's): antialiased, the aspect kept, one length drawn uniformly.
    """
    side = short_edge_length[int(rng.integers(len(short_edge_length)))]
    return resize(image, label, working_size(image.shape[-2], image.shape[-1], side, max_size), antialias=True)


def top_left(image: Tensor, label: Tensor, rng: Generator, *, size: int) -> Pair:
    """Keep the ``size x size`` pixels at the top left, or what there is of them.

    DeOP's last stage crops 640 pixels and then pads to 512: the released padding is negative there and cuts.
    """
    return image[:, :size, :size], label[:size, :size]


def random_crop(
    image: Tensor, label: Tensor, rng: Generator, *, size: int, max_fraction: float = 0.75, ignored: int = IGNORE_INDEX
) -> Pair:
    """Crop a window of at most ``size x size``, redrawn while one class fills too much of it.

    A window is accepted when :func:`is_varied`; after 10 redraws the last one is taken as it is. A
    ``max_fraction`` of 1 takes the first.
    """

    def draw() -> tuple[slice, slice]:
        top, left = (int(rng.integers(0, max(side - size, 0) + 1)) for side in image.shape[-2:])
        return slice(top, top + size), slice(left, left + size)

    box = draw()
    for _ in range(10):
        if max_fraction >= 1.0 or is_varied(label[box], max_fraction, ignored):
            break
        box = draw()
    rows, columns = box
    return image[:, rows, columns], label[rows, columns]


def is_varied(label: Tensor, max_fraction: float = 0.75, ignored: int = IGNORE_INDEX) -> bool:
    """Whether a label has at least two classes and none has ``max_fraction`` of its pixels or more.

    Pixels labelled ``ignored`` do not count.
    """
    counts = torch.bincount(label.reshape(-1), minlength=ignored + 1)
    counts[ignored] = 0
    counts = counts[counts > 0]
    return counts.numel() > 1 and counts.max().item() / counts.sum().item() < max_fraction


def random_flip(image: Tensor, label: Tensor, rng: Generator, *, probability: float = 0.5) -> Pair:
    """Mirror left and right with the given probability."""
    return (image.flip(-1), label.flip(-1)) if rng.random() < probability else (image, label)


def distort_colours(image: Tensor, label: Tensor, rng: Generator) -> Pair:
    """Random brightness, contrast, saturation and hue of a uint8 picture, each with probability a half.

    Contrast comes before or after saturation and hue, at random. Brightness changes by up to 32 8-bit values, hue by up
    to 18 of OpenCV's half degrees, contrast and saturation by a factor of 1/2 .. 3/2.
    """

    def change_contrast(image: Tensor) -> Tensor:
        return _to_bytes(image.float().mul_(float(rng.uniform(0.5, 1.5)))) if rng.random() < 0.5 else image

    # A crop of a decoded picture is neither in planes nor in one piece, and everything below is slow on such.
    image = image.contiguous()
    if rng.random() < 0.5:
        image = _to_bytes(image.float().add_(float(rng.uniform(-32.0, 32.0))))
    contrast_first = rng.random() < 0.5
    if contrast_first:
        image = change_contrast(image)
    if rng.random() < 0.5:
        image = scale_saturation(image, float(rng.uniform(0.5, 1.5)))
    if rng.random() < 0.5:
        image = turn_hue(image, int(rng.integers(-18, 19)) / 180.0)
    return image if contrast_first else change_contrast(image), label


def normalise_bytes(
    image: Tensor, label: Tensor, rng: Generator, *, mean: Sequence[float], std: Sequence[float]
) -> Pair:
    """Bytes to ``(x / 255 - mean) / std`` in float32; mean and std are in 0..1 units, RGB."""
    return normalise(image.float() / 255, mean, std), label


def pad_to(
    image: Tensor, label: Tensor, rng: Generator, *, size: int, pad_label: int = IGNORE_INDEX, value: int = 0
) -> Pair:
    """Pad to ``size x size`` at the right and the bottom: ``value`` in the picture, ``pad_label`` in the mask.

    Padding has the label 255 unless it must be told from other pixels without a class. A side that is long enough
    stays.
    """
    bottom, right = (max(size - side, 0) for side in label.shape)
    if not bottom and not right:
        return image, label
    padding = (0, right, 0, bottom)
    return pad(image, padding, value=value), pad(label, padding, value=pad_label)


@dataclass(frozen=True)
class Pipeline:
    """Steps applied one after the other with one random generator."""

    steps: tuple[Step, ...]

    def __call__(self, image: Tensor, label: Tensor, rng: Generator) -> Pair:
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

    The authors' mean and deviation are ImageNet's: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225. The resize bounds scale
    with ``crop``, ``(4 * crop, crop)``. ``ignored``: label of pixels without a class, which do not count for what a
    crop shows. Source: ZegCLIP, Sec. 4.2, with the constants of the authors' configuration.
    """
    return Pipeline(
        (
            partial(random_resize, scale=(4 * crop, crop)),
            partial(random_crop, size=crop, ignored=ignored),
            random_flip,
            distort_colours,
            partial(normalise_bytes, mean=mean, std=std),
            partial(pad_to, size=crop, pad_label=pad_label),
        )
    )


def short_edge_pipeline(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop: int,
    short_edge_length: Sequence[int] | None = None,
    max_size: int | None = None,
    top_left_crop: int | None = None,
    pad_label: int = IGNORE_INDEX,
) -> Pipeline:
    """The decoupled papers' training pipeline: resize, crop, colour, flip, pad with grey (128), normalise.

    The crop may show a single class. ``short_edge_length``: lengths of the shorter side, one of which is drawn; None
    is 0.5 to 1.5 times ``crop`` in steps of 0.1. ``max_size``: the longer side becomes no longer than this.
    ``top_left_crop``: keep this many pixels per side of the crop, see :func:`top_left`; None keeps it whole. Source:
    the released settings of ZSSeg, ZegFormer, FreeSeg, DeOP and MAFT (detectron2's mapper of MaskFormer).
    """
    lengths = tuple(short_edge_length or (int(tenth * 0.1 * crop) for tenth in range(5, 16)))
    steps: list[Step] = [
        partial(random_short_edge, short_edge_length=lengths, max_size=max_size),
        partial(random_crop, size=crop, max_fraction=1.0),
        distort_colours,
        random_flip,
    ]
    if top_left_crop is not None:
        steps.append(partial(top_left, size=top_left_crop))
    steps.append(partial(pad_to, size=top_left_crop or crop, pad_label=pad_label, value=128))
    return Pipeline((*steps, partial(normalise_bytes, mean=mean, std=std)))


def light_pipeline(
    mean: Sequence[float], std: Sequence[float], *, crop: int, flip: float = 0.5, pad_label: int = IGNORE_INDEX
) -> Pipeline:
    """For pictures that are generated at the wanted size: crop, flip, normalise, pad.

    Pictures of the size of the crop are taken whole.
    """
    return Pipeline(
        (
            partial(random_crop, size=crop, max_fraction=1.0),
            partial(random_flip, probability=flip),
            partial(normalise_bytes, mean=mean, std=std),
            partial(pad_to, size=crop, pad_label=pad_label),
        )
    )


# Colour changes of pictures in bytes, (3, H, W), made for speed: they run in the loader on every picture. They work on
# whole planes, which a picture decoded from a file (colours side by side) is not; the caller makes it contiguous once.


def _to_bytes(values: Tensor) -> Tensor:
    """Floats to bytes: clipped to 0..255 in place, then cut off."""
    return values.clamp_(0, 255).to(torch.uint8)


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply HSV's saturation by ``factor``; it stops at 1, where the smallest channel reaches 0."""
    # In HSV every channel is V - S * (V - channel) / S, so scaling S scales the distance to V.
    values = image.float()
    brightest, darkest = _extremes(values)
    saturation = (brightest - darkest).div_(brightest.clamp(min=1e-6))
    scale = saturation.clamp_(min=1e-6).reciprocal_().clamp_(max=factor)
    return _to_bytes(torch.sub(brightest, values, out=values).mul_(scale).neg_().add_(brightest).round_())


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
    return _to_bytes(wave.mul_(chroma).neg_().add_(brightest).mul_(255.999 / 255))


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    red, green, blue = values
    return torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
