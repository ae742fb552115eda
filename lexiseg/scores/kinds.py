"""The kinds of scores: grids of patches, masks of regions, and windows of either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lexiseg.scores.base import Scores, Size, check_size
from lexiseg.scores.fields import Field, Mixture, Source, Squashed
from lexiseg.scores.mean import Mean
from lexiseg.scores.resize import cropped, resized
from lexiseg.windows import Box


@dataclass(eq=False, repr=False)
class GridScores(Scores):
    """A grid of logits (B, W, h, w), one for each word and patch; nothing is computed before it is asked for.

    The score at a pixel is, in this order: the logits interpolated bilinearly to ``resize_to``; cut to ``crop``; their
    sigmoid; minus the word's offset; interpolated bilinearly to the size asked for. Steps whose argument is not given
    are skipped. Interpolation is that of ``torch.nn.functional.interpolate`` (align_corners=False, no antialiasing).

    ZegCLIP uses all of it: logits to the crop's size, sigmoid, 0.1 subtracted from seen classes, then the picture's
    size (ZegCLIP, Sec. 3.4; the constant is in the authors' code only).

    Attributes:
        logits: (B, W, h, w), any float type and strides; decoded in float32, a tile at a time.
        word_to_class: (W,) the class of each word, non-decreasing from 0 without gaps; None: each word is a class.
        resize_to: (height, width) the logits are interpolated to before the sigmoid.
        crop: (height, width) kept of that: the part that is not padding.
        crop_place: (top, left) of that part.
        sigmoid: squash the logits into (0, 1).
        offsets: (W,) subtracted from each word's score.

    Raises:
        ValueError: shapes do not agree.
    """

    logits: Tensor
    _: KW_ONLY
    word_to_class: Tensor | None = None
    resize_to: Size | None = None
    crop: Size | None = None
    crop_place: tuple[int, int] = (0, 0)
    sigmoid: bool = False
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        logits = self.logits
        if logits.dim() != 4 or 0 in logits.shape[1:] or not logits.is_floating_point():
            raise ValueError(f"logits must be a float tensor (B, W, h, w), not {logits.dtype} {tuple(logits.shape)}")
        super().__init__(logits.shape[0], logits.shape[1], logits.device, self.word_to_class)
        _check_stages(self, logits, self.crop_place)

    def map(self, change: Callable[[Tensor], Tensor]) -> GridScores:
        return replace(self, logits=change(self.logits))

    @cached_property
    def largest(self) -> float:
        return _magnitude(self.logits)

    def field(self, picture: int, size: Size) -> Field:
        field = resized(Source(self.logits[picture].detach(), self.largest), self.resize_to)
        field = cropped(field, self.crop, self.crop_place)
        if self.sigmoid or self.offsets is not None:
            field = Squashed(field, self.sigmoid, self.offsets)
        return resized(field, size)


@dataclass(eq=False, repr=False)
class RegionScores(Scores):
    """Class scores of N regions and their masks; nothing is computed before it is asked for.

    score(pixel, word) = sum over n of class_scores[n, word] * mask_n(pixel). The masks are, in this order: interpolated
    bilinearly to ``resize_to``; cut to ``crop``; squashed by a sigmoid if they are logits (interpolated to the size
    asked for first if there is no ``resize_to``). The sum is taken there, offsets are subtracted, and the scores are
    interpolated bilinearly to the size asked for. Without regions every score is 0.

    Source: MaskFormer's semantic inference, as DeOP and MAFT (ZegFormer, ZSSeg, FreeSeg) use it.

    Attributes:
        class_scores: (B, N, W) float tensor.
        masks: (B, N, h, w) float tensor, probabilities, or logits with ``sigmoid``.
        word_to_class: (W,) the class of each word, non-decreasing from 0 without gaps; None: each word is a class.
        resize_to: (height, width) the masks are interpolated to before anything else.
        align_corners: how they are interpolated to ``resize_to`` (FreeSeg: True).
        crop: (height, width) kept of that, from the top left corner: the part that is not padding.
        sigmoid: the masks are logits.
        offsets: (W,) subtracted from each word's score.

    Raises:
        ValueError: shapes do not agree.
    """

    class_scores: Tensor
    masks: Tensor
    _: KW_ONLY
    word_to_class: Tensor | None = None
    resize_to: Size | None = None
    align_corners: bool = False
    crop: Size | None = None
    sigmoid: bool = False
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        class_scores, masks = self.class_scores, self.masks
        shapes = f"{tuple(class_scores.shape)} and {tuple(masks.shape)}"
        if class_scores.dim() != 3 or masks.dim() != 4 or class_scores.shape[:2] != masks.shape[:2]:
            raise ValueError(f"class_scores and masks must be (B, N, W) and (B, N, h, w), not {shapes}")
        if 0 in (class_scores.shape[2], *masks.shape[2:]):
            raise ValueError(f"class_scores and masks must have a word and a pixel at least, not {shapes}")
        if not (class_scores.is_floating_point() and masks.is_floating_point()):
            raise ValueError(f"class_scores and masks must be float, not {class_scores.dtype} and {masks.dtype}")
        super().__init__(class_scores.shape[0], class_scores.shape[2], masks.device, self.word_to_class)
        self.class_scores = class_scores.to(masks.device)
        _check_stages(self, masks)

    def map(self, change: Callable[[Tensor], Tensor]) -> RegionScores:
        return replace(self, class_scores=change(self.class_scores), masks=change(self.masks))

    @cached_property
    def largest(self) -> float:
        # Summed, so that one that is not finite shows.
        return _magnitude(self.masks) + _magnitude(self.class_scores)

    def field(self, picture: int, size: Size) -> Field:
        class_scores, masks = self.class_scores[picture].detach(), self.masks[picture].detach()
        if not len(masks):
            class_scores, masks = class_scores.new_zeros(1, self.num_words), masks.new_zeros(1, *masks.shape[1:])
        field = resized(Source(masks, self.largest), self.resize_to, self.align_corners)
        field = cropped(field, self.crop)
        if self.sigmoid:
            field = Squashed(field if self.resize_to is not None else resized(field, size), True, None)
        field = Mixture(field, class_scores)
        if self.offsets is not None:
            field = Squashed(field, False, self.offsets)
        return resized(field, size)


@dataclass(eq=False, repr=False)
class WindowScores(Scores):
    """Scores of windows on a canvas: at each pixel the mean of those over it, then interpolated to the size asked for.

    Each part is evaluated at the size of its window. Only the parts' own small tensors are kept.

    Source: ZegCLIP's sliding window (windows of 512, stride 426 in the authors' configurations): scores, not logits,
    are summed and divided by their count, then interpolated to the size of the picture.

    Attributes:
        parts: the scores of each window, for the same words and the same number of pictures.
        boxes: (top, left, height, width) of each window.
        canvas: (height, width) the windows lie on.

    Raises:
        ValueError: parts differ in words, pictures or device; a window leaves the canvas, or a pixel has none.
    """

    parts: Sequence[Scores]
    boxes: Sequence[Box]
    canvas: Size

    def __post_init__(self) -> None:
        parts = self.parts
        if not parts or len(parts) != len(self.boxes):
            raise ValueError(f"there must be a part for each box, and one at least: {len(parts)} and {len(self.boxes)}")
        first = parts[0]
        super().__init__(first.batch_size, first.num_words, first.device, first.word_to_class)
        kinds = {(part.num_words, part.num_classes, part.batch_size, part.device) for part in parts}
        if len(kinds) > 1:
            raise ValueError("all parts must have the same words, number of pictures and device")
        self.canvas = check_size(self.canvas, "canvas")
        self.boxes = [(int(y), int(x), int(h), int(w)) for y, x, h, w in self.boxes]
        _check_boxes(self.boxes, self.canvas)

    def map(self, change: Callable[[Tensor], Tensor]) -> WindowScores:
        return replace(self, parts=[part.map(change) for part in self.parts])

    @cached_property
    def largest(self) -> float:
        # Added up, so that one that is not finite shows.
        return sum(part.largest for part in self.parts)

    def field(self, picture: int, size: Size) -> Field:
        fields = [part.field(picture, box[2:]) for part, box in zip(self.parts, self.boxes, strict=True)]
        return resized(fields[0] if len(fields) == 1 else Mean(fields, self.boxes, *self.canvas), size)


def _magnitude(values: Tensor) -> float:
    """The largest magnitude of a tensor's values, 0 for none, NaN if one is NaN; no copy of the tensor is made."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values.detach())
    return float(torch.maximum(low.abs(), high.abs()))


def _check_stages(scores: GridScores | RegionScores, values: Tensor, place: tuple[int, int] = (0, 0)) -> None:
    """Bring what is done with ``values`` (B, N, h, w) into one form; a ValueError if they or the words do not fit."""
    size = int(values.shape[2]), int(values.shape[3])
    if scores.resize_to is not None:
        scores.resize_to = size = check_size(scores.resize_to, "resize_to")
    if scores.crop is not None:
        crop = check_size(scores.crop, "crop")
        if min(place) < 0 or place[0] + crop[0] > size[0] or place[1] + crop[1] > size[1]:
            raise ValueError(f"crop {crop} is larger than what it is taken from, {size}")
        scores.crop = None if crop == size else crop
    if scores.offsets is not None:
        offsets = scores.offsets.detach().to(scores.device, torch.float32)
        if offsets.shape != (scores.num_words,) or not bool(offsets.isfinite().all()):
            raise ValueError(
                f"offsets must be {scores.num_words} finite numbers, one per word, not {tuple(offsets.shape)}"
            )
        scores.offsets = offsets


def _check_boxes(boxes: Sequence[Box], canvas: Size) -> None:
    for y, x, height, width in boxes:
        if min(y, x) < 0 or min(height, width) < 1 or y + height > canvas[0] or x + width > canvas[1]:
            raise ValueError(f"the window {(y, x, height, width)} does not lie on the canvas {canvas}")
    # Between neighbouring edges coverage does not change, so one place of each such rectangle tells about all.
    rows = sorted({0} | {y for y, _, _, _ in boxes} | {y + h for y, _, h, _ in boxes if y + h < canvas[0]})
    columns = sorted({0} | {x for _, x, _, _ in boxes} | {x + w for _, x, _, w in boxes if x + w < canvas[1]})
    covered, row, column = np.zeros((len(rows), len(columns)), bool), np.array(rows), np.array(columns)
    for y, x, height, width in boxes:
        covered |= ((row >= y) & (row < y + height))[:, None] & ((column >= x) & (column < x + width))
    if not covered.all():
        i, j = np.argwhere(~covered)[0]
        raise ValueError(f"no window covers the pixel in row {rows[i]}, column {columns[j]} of the canvas {canvas}")
