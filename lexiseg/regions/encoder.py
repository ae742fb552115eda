"""Region features: what CLIP makes of proposed regions, and what the ways of asking it have in common.

They are crops (`lexiseg.regions.crops`), mask attention (`lexiseg.models.maft`) and pooled patches
(`lexiseg.regions.pooled`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lexiseg.clip.model import CLIP
from lexiseg.regions.pooling import resize_masks

Size = tuple[int, int]
RegionKind = Literal["crops", "mask-attention", "pooled"]

PIXELS = 1 << 23
"""Masks are brought to full resolution this many pixels at a time: a hundred of them at once take gigabytes."""


@dataclass(frozen=True)
class RegionFeatures:
    """What CLIP made of regions.

    Attributes:
        regions: (B, N, D), not normalised; arbitrary where a region was not encoded.
        encoded: (B, N) bool, False where CLIP saw nothing of a region: its mask has no pixel above the threshold in the
            picture, or it was left out.
    """

    regions: Tensor
    encoded: Tensor


@dataclass(frozen=True)
class RegionEncoder(ABC):
    """How CLIP encodes regions. Holds options only, no weights.

    The *frame* is the padded picture, normalised for CLIP, with the padding 0; mask logits cover it.

    Attributes:
        kind: its name.
        threshold: mask probability above which a pixel is inside a region.
        align_corners: how mask logits are interpolated to the frame.
    """

    kind: ClassVar[RegionKind]
    threshold: float
    align_corners: bool

    @abstractmethod
    def encode(
        self,
        clip: CLIP,
        visual: nn.Module,
        frame: Tensor,
        size: Size,
        mask_logits: Tensor,
        chosen: Tensor | None = None,
    ) -> RegionFeatures:
        """Encode regions.

        Args:
            clip: says what size and colours the tower wants.
            visual: the image tower, CLIP's own or a tuned copy.
            frame: (B, 3, H', W').
            size: (H, W) of the pictures in it.
            mask_logits: (B, N, h, w).
            chosen: (B, N) bool, the only regions that are encoded; None: all of them.
        """

    def upsampled(self, mask_logits: Tensor, frame: Tensor) -> Tensor:
        """Mask logits (B, N, h, w) at every pixel of the frame."""
        size = (int(frame.shape[-2]), int(frame.shape[-1]))
        return resize_masks(mask_logits.float(), size, self.align_corners)

    def masks(self, mask_logits: Tensor, frame: Tensor, size: Size | None) -> Callable[[int, int], Tensor]:
        """Masks (stop - start, ...) of one picture on demand: logits on the frame, or, with a size, probabilities."""

        def masks(start: int, stop: int) -> Tensor:
            large = self.upsampled(mask_logits[None, start:stop], frame)[0]
            return large if size is None else large[:, : size[0], : size[1]].sigmoid()

        return masks


class OnePassEncoder(RegionEncoder):
    """Encodes any number of regions by one run of the tower."""

    @abstractmethod
    def embed(self, clip: CLIP, visual: nn.Module, frame: Tensor, mask_logits: Tensor) -> Tensor:
        """All regions, (B, N, D), not normalised; the arguments are those of `encode`."""

    def encode(
        self,
        clip: CLIP,
        visual: nn.Module,
        frame: Tensor,
        size: Size,
        mask_logits: Tensor,
        chosen: Tensor | None = None,
    ) -> RegionFeatures:
        """See `RegionEncoder.encode`; all regions are embedded, whichever are chosen."""
        regions = self.embed(clip, visual, frame, mask_logits)
        return RegionFeatures(regions, self.inside(mask_logits, frame, size, chosen))

    def inside(self, mask_logits: Tensor, frame: Tensor, size: Size, chosen: Tensor | None) -> Tensor:
        """Whether a region, of those chosen, has a pixel above the threshold in the picture: (B, N) bool."""
        batch, count = mask_logits.shape[:2]
        found = torch.zeros(batch, count, dtype=torch.bool, device=mask_logits.device)
        step = max(PIXELS // (frame.shape[-2] * frame.shape[-1]), 1)
        for index in range(batch):
            masks = self.masks(mask_logits[index], frame, size)
            for start in range(0, count, step):
                found[index, start : start + step] = masks(start, start + step).amax(dim=(1, 2)) > self.threshold
        return found if chosen is None else found & chosen

    def small_masks(self, mask_logits: Tensor, frame: Tensor, grid: Size) -> Tensor:
        """Masks at every pixel of the frame and then on a grid, without ever holding all of the former at once."""
        batch, count = mask_logits.shape[:2]
        masks = frame.new_zeros(batch, count, *grid)
        step = max(PIXELS // (batch * frame.shape[-2] * frame.shape[-1]), 1)
        for start in range(0, count, step):
            large = self.upsampled(mask_logits[:, start : start + step], frame).sigmoid()
            masks[:, start : start + step] = resize_masks(large, grid)
        return masks
