"""Region features, what CLIP makes of proposed regions: of crops, or by mask attention (`lexiseg.models.maft`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from lexiseg.clip.model import CLIP
from lexiseg.regions.pooling import resize_masks

Size = tuple[int, int]

PIXELS = 1 << 23
"""Masks are brought to full resolution this many pixels at a time: a hundred of them at once take gigabytes."""


@dataclass(frozen=True)
class RegionEncoder(ABC):
    """How CLIP encodes regions. Holds options only, no weights.

    The *frame* is the padded picture, normalised for CLIP, with the padding 0; mask logits cover it, and are
    interpolated to it by ``align_corners``.
    """

    align_corners: bool

    @abstractmethod
    def encode(
        self, clip: CLIP, visual: nn.Module, frame: Tensor, size: Size, mask_logits: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encode regions.

        Args:
            clip: says what size and colours the tower wants.
            visual: the image tower, CLIP's own or a tuned copy.
            frame: (B, 3, H', W').
            size: (H, W) of the pictures in it.
            mask_logits: (B, N, h, w).
            valid: (B, N) bool, the only regions that are encoded; None: all of them.

        Returns:
            (B, N, D), not normalised, arbitrary where a region was not encoded; and (B, N) bool, False where CLIP saw
                nothing of one: its mask has no pixel above the threshold in the picture, or it is not valid.
        """

    def upsampled(self, mask_logits: Tensor, frame: Tensor) -> Tensor:
        """Mask logits (B, N, h, w) at every pixel of the frame."""
        return resize_masks(mask_logits.float(), frame.shape[-2:], self.align_corners)
