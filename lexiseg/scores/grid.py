"""Scores of one-stage systems: a grid of class logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace

from torch import Tensor

from lexiseg.scores.base import Scores, Size, check_crop, check_offsets, check_size, largest_magnitude
from lexiseg.scores.fields import Field, Source, Squashed
from lexiseg.scores.resize import cropped, resized


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
        self.resize_to = None if self.resize_to is None else check_size(self.resize_to, "resize_to")
        self.crop = check_crop(self.crop, self.resize_to or (logits.shape[2], logits.shape[3]), self.crop_place)
        self.offsets = check_offsets(self.offsets, self.num_words, self.device)

    def map(self, change: Callable[[Tensor], Tensor]) -> GridScores:
        return replace(self, logits=change(self.logits))

    def _magnitude(self) -> float:
        return largest_magnitude(self.logits)

    def field(self, picture: int, size: Size) -> Field:
        field = resized(Source(self.logits[picture].detach(), self.largest), self.resize_to)
        field = cropped(field, self.crop, self.crop_place)
        if self.sigmoid or self.offsets is not None:
            field = Squashed(field, self.sigmoid, self.offsets)
        return resized(field, size)
