"""Regions as sums of CLIP's patches, of one run of the tower for any number of regions (DeOP's baseline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.embeddings import patch_embeddings
from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.regions.encoder import OnePassEncoder, RegionKind
from lexiseg.regions.pooling import mask_pool, unit_or_zero


@dataclass(frozen=True)
class PooledPatches(OnePassEncoder):
    """Pools the patches by the masks; ``positions`` is how CLIP's position table follows the frame."""

    kind: ClassVar[RegionKind] = "pooled"
    positions: Interpolation

    def embed(self, clip: CLIP, visual: nn.Module, frame: Tensor, mask_logits: Tensor) -> Tensor:
        """See `OnePassEncoder.embed`."""
        patch = clip.patch_size
        image = F.pad(frame, (0, -frame.shape[-1] % patch, 0, -frame.shape[-2] % patch))
        patches = unit_or_zero(patch_embeddings(visual, image, position_interpolation=self.positions))
        grid = (int(patches.shape[1]), int(patches.shape[2]))
        return mask_pool(patches, self.small_masks(mask_logits, frame, grid), normalise=False)
