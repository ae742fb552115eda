"""Region features: what CLIP makes of proposed regions, from crops, by mask attention, or by pooling its patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from open_clip.modified_resnet import ModifiedResNet
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.embeddings import image_embeddings, whole_patches
from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.clip.severance import severed_attention
from lexiseg.clip.tower import ImageTower
from lexiseg.regions.crops import CropOptions, Crops, aligned_crops, in_chunks, near_duplicates, tight_crops
from lexiseg.regions.mask_attention import region_embeddings
from lexiseg.regions.pooling import mask_pool, resize_masks, unit_or_zero
from lexiseg.strict import StrictModel

Size = tuple[int, int]
RegionKind = Literal["crops", "mask-attention", "pooled"]

# MAFT gives ViT-B/16 and ViT-L/14, trained at 224, pictures of 480, and starts masking after two thirds of the blocks.
_ATTENTION_SIDE = 480 / 224
_ATTENTION_START = 2 / 3
# Masks are brought to full resolution this many pixels at a time: a hundred of them at once take gigabytes.
_PIXELS = 1 << 23


class AttentionOptions(StrictModel):
    """Options of mask attention, MAFT's IP-CLIP encoder (Sec. 4.1).

    Attributes:
        start_block: L, the number of blocks before the class token is copied, one copy a region; None is two thirds of
            them (8 of ViT-B/16's 12, 16 of ViT-L/14's 24). Without meaning for a ResNet.
        image_size: side of the square the padded frame is resized to, its aspect not kept; None is 480 for a tower
            trained at 224, and in proportion.
        positions: how the position table follows that size (released: "bicubic-corners").
    """

    start_block: Annotated[int, Field(ge=0)] | None = None
    image_size: Annotated[int, Field(ge=1)] | None = None
    positions: Interpolation = "bicubic-corners"


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
class RegionEncoder:
    """How CLIP encodes regions. Holds options only, no weights.

    The *frame* is the padded picture, normalised for CLIP, with the padding 0; mask logits cover it.

    Attributes:
        kind: "crops" runs the tower once a region, "mask-attention" once for all, "pooled" pools the patches of one
            plain run by the masks.
        crops: options of crops; their threshold is that of the other kinds as well.
        attention: options of mask attention.
        positions: how CLIP's position table follows another size than it was trained at, for crops and patches.
        align_corners: how mask logits are interpolated to the frame.
    """

    kind: RegionKind
    crops: CropOptions
    attention: AttentionOptions
    positions: Interpolation
    align_corners: bool

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
        if self.kind == "crops":
            return self._encode_crops(clip, visual, frame, size, mask_logits, chosen)
        if self.kind == "pooled":
            regions = self._pool(visual, frame, mask_logits)
        else:
            image = self.square(clip, frame)
            regions = self.attend(visual, image, self.square_masks(visual, image, frame, mask_logits))
        encoded = self.inside(mask_logits, frame, size)
        return RegionFeatures(regions, encoded if chosen is None else encoded & chosen)

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

    def inside(self, mask_logits: Tensor, frame: Tensor, size: Size) -> Tensor:
        """Whether a region has a pixel above the threshold in the picture: (B, N) bool."""
        batch, count = mask_logits.shape[:2]
        found = torch.zeros(batch, count, dtype=torch.bool, device=mask_logits.device)
        step = max(_PIXELS // (frame.shape[-2] * frame.shape[-1]), 1)
        for index in range(batch):
            masks = self.masks(mask_logits[index], frame, size)
            for start in range(0, count, step):
                found[index, start : start + step] = masks(start, start + step).amax(dim=(1, 2)) > self.crops.threshold
        return found

    # Crops.

    def cut(self, clip: CLIP, frame: Tensor, size: Size, mask_logits: Tensor) -> Crops:
        """Sub-images of the regions of one picture: frame (3, H', W'), mask logits (N, h, w)."""
        side, count = self.crops.size or clip.image_size, len(mask_logits)
        if self.crops.convention == "roi-align":
            return aligned_crops(frame, self.masks(mask_logits, frame, None), count, self.crops, size=side)
        mean, std = frame.new_tensor(clip.mean), frame.new_tensor(clip.std)
        image = frame[:, : size[0], : size[1]]
        masks = self.masks(mask_logits, frame, size)
        return tight_crops(image, masks, count, self.crops, size=side, black=-mean / std)

    def embed_crops(self, visual: nn.Module, crops: Tensor, dim: int) -> Tensor:
        """CLIP embeddings (M, dim) of crops (M, 3, S, S), not normalised."""

        def embed(images: Tensor) -> Tensor:
            return image_embeddings(visual, images, position_interpolation=self.positions)

        return in_chunks(embed, crops, dim)

    def _encode_crops(
        self, clip: CLIP, visual: nn.Module, frame: Tensor, size: Size, mask_logits: Tensor, chosen: Tensor | None
    ) -> RegionFeatures:
        batch, count = mask_logits.shape[:2]
        regions = frame.new_ones(batch, count, clip.embed_dim)
        encoded = torch.zeros(batch, count, dtype=torch.bool, device=frame.device)
        for index in range(batch):
            places = torch.arange(count, device=frame.device)
            if chosen is not None:
                places = places[chosen[index]]
            first = torch.arange(len(places), device=frame.device)
            if self.crops.duplicates is not None and len(places):
                first = near_duplicates(mask_logits[index, places], self.crops.duplicates)
            originals = first.unique()
            crops = self.cut(clip, frame[index], size, mask_logits[index, places[originals]])
            found = frame.new_ones(len(places), clip.embed_dim)
            there = torch.zeros(len(places), dtype=torch.bool, device=frame.device)
            found[originals[crops.valid]] = self.embed_crops(visual, crops.images, clip.embed_dim).to(found.dtype)
            there[originals[crops.valid]] = True
            regions[index, places], encoded[index, places] = found[first], there[first]
        return RegionFeatures(regions, encoded)

    # Mask attention.

    def square(self, clip: CLIP, frame: Tensor) -> Tensor:
        """The frame as the square picture that mask attention sees."""
        side = self.attention.image_size or max(round(clip.image_size * _ATTENTION_SIDE), clip.patch_size)
        return F.interpolate(frame, size=(side, side), mode="bilinear", align_corners=False)

    def square_masks(self, visual: nn.Module, image: Tensor, frame: Tensor, mask_logits: Tensor) -> Tensor:
        """Masks (B, N, g, g) in [0, 1] on the tower's grid of the square picture."""
        side = int(image.shape[-1])
        # A ResNet halves five times: its first convolution rounds up, everything after it down.
        places = (side + 1) // 2 // 16 if isinstance(visual, ModifiedResNet) else side // ImageTower(visual).patch_size
        return self.small_masks(mask_logits, frame, (places, places))

    def small_masks(self, mask_logits: Tensor, frame: Tensor, grid: Size) -> Tensor:
        """Masks at every pixel of the frame and then on a grid, without ever holding all of the former at once."""
        batch, count = mask_logits.shape[:2]
        masks = frame.new_zeros(batch, count, *grid)
        step = max(_PIXELS // (batch * frame.shape[-2] * frame.shape[-1]), 1)
        for start in range(0, count, step):
            large = self.upsampled(mask_logits[:, start : start + step], frame).sigmoid()
            masks[:, start : start + step] = resize_masks(large, grid)
        return masks

    def start_block(self, visual: nn.Module) -> int:
        """L for a tower."""
        if self.attention.start_block is not None:
            return self.attention.start_block
        return 0 if isinstance(visual, ModifiedResNet) else round(ImageTower(visual).num_blocks * _ATTENTION_START)

    def attend(self, visual: nn.Module, image: Tensor, masks: Tensor) -> Tensor:
        """Mask attention over the square picture: (B, N, D), not normalised."""
        start, how = self.start_block(visual), self.attention.positions
        return region_embeddings(visual, image, masks, start_block=start, position_interpolation=how)

    def whole(self, visual: nn.Module, image: Tensor) -> Tensor:
        """The tower as it is, on the square picture: (B, D), not normalised."""
        return image_embeddings(visual, image, position_interpolation=self.attention.positions)

    # Pooled patches.

    def _pool(self, visual: nn.Module, frame: Tensor, mask_logits: Tensor) -> Tensor:
        tower = ImageTower(visual)
        patch = tower.patch_size
        image = whole_patches(F.pad(frame, (0, -frame.shape[-1] % patch, 0, -frame.shape[-2] % patch)), patch)
        tokens, grid = tower.embed(image, interpolation=self.positions)
        last = tower.num_blocks - 1
        result = tower.run(tokens, grid, attention=severed_attention({last: 1.0}))
        patches = unit_or_zero(tower.project(result.tokens[:, -result.num_patches :])).unflatten(1, grid)
        return mask_pool(patches, self.small_masks(mask_logits, frame, grid), normalise=False)
