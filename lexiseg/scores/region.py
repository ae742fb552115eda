"""Scores of decoupled systems: masks of regions, and class scores for each region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace

from torch import Tensor

from lexiseg.scores.base import Scores, Size, check_crop, check_offsets, check_size, largest_magnitude
from lexiseg.scores.fields import Field, Mixture, Source, Squashed
from lexiseg.scores.resize import cropped, resized


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
        self.resize_to = None if self.resize_to is None else check_size(self.resize_to, "resize_to")
        self.crop = check_crop(self.crop, self.resize_to or (masks.shape[2], masks.shape[3]))
        self.offsets = check_offsets(self.offsets, self.num_words, self.device)

    def map(self, change: Callable[[Tensor], Tensor]) -> RegionScores:
        return replace(self, class_scores=change(self.class_scores), masks=change(self.masks))

    def _magnitude(self) -> float:
        # Summed, so that one that is not finite shows.
        return largest_magnitude(self.masks) + largest_magnitude(self.class_scores)

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
