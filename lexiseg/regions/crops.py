"""Regions as pictures of their own, for a CLIP that knows whole pictures only (MAFT, App. A, "merge operation").

The papers name three ways to make a sub-image of a region: *mask* (the whole picture, what is outside painted over),
*crop* (the box around the region) and *mask & crop*. Two conventions are in use, and they differ in the box, the paint
and the resize:

- ``tight`` (ZSSeg, FreeSeg): the box around the pixels above the threshold, its right and lower edge excluded, in the
  picture without its padding; outside is CLIP's mean colour; a bicubic resize that does not keep the aspect. A mask
  without such a pixel is skipped.
- ``roi-align`` (ZegFormer), see `lexiseg.models.zegformer`.

Source: methods as released by the authors of ZSSeg, ZegFormer and FreeSeg; neither pads a crop to a square, though
MAFT's figure 6 shows it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from lexiseg.clip.embeddings import image_embeddings
from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.regions.duplicates import near_duplicates
from lexiseg.regions.pooling import Size, full_resolution
from lexiseg.strict import StrictModel

# What a processor's caches hold; larger batches take longer (benchmarks/decoupled_speed.py).
CPU_CHUNK = 4
_CHUNK = 32


class CropOptions(StrictModel):
    """How sub-images are made of regions.

    Attributes:
        convention: "tight" or, of ZegFormer alone, "roi-align"; see the module.
        merge: the paper's three operations.
        size: side of the sub-images; None is the size CLIP was trained at (released: 224, which it is there).
        threshold: mask probability above which a pixel is inside (released: 0.5; ZSSeg across datasets 0.4 or 0.3).
        fill: what is outside in the tight convention: "mean" is CLIP's mean colour, "zero" black.
        matting: paint over by the soft mask instead of the binary one (tight only).
        expand: factor on the box's sides about its centre (tight only).
        align_corners: how the bicubic resize places its corners (FreeSeg: True; tight only).
        duplicates: a region whose mask has at least this IoU with an earlier one takes over that one's embedding
            instead of another run of the tower; None runs it for each, as the released code does.
    """

    convention: Literal["tight", "roi-align"] = "tight"
    merge: Literal["mask-crop", "crop", "mask"] = "mask-crop"
    size: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    fill: Literal["mean", "zero"] = "mean"
    matting: bool = False
    expand: Annotated[float, Field(gt=0)] = 1.0
    align_corners: bool = False
    duplicates: Annotated[float, Field(gt=0, le=1)] | None = None


@dataclass(frozen=True)
class Crops:
    """Sub-images of M of the N regions of one picture."""

    images: Tensor  # (M, 3, S, S), normalised for CLIP
    valid: Tensor  # (N,) bool, which of the regions they are of, in order
    boxes: Tensor  # (M, 4) float, x1, y1, x2, y2 of the boxes as found, before they were expanded


def tight_crops(image: Tensor, masks: Iterable[Tensor], options: CropOptions, *, size: int, black: Tensor) -> Crops:
    """Sub-images of size S of the regions of one picture in the convention of ZSSeg and FreeSeg.

    The image (3, H, W) is normalised for CLIP, so that its mean colour is 0, and without padding; ``masks`` are the
    regions' mask probabilities, some (n, H, W) at a time; ``black`` (3,) is black after normalisation.
    """
    images, valid, boxes = [image.new_zeros(0, 3, size, size)], [], []
    for soft in masks:
        inside = soft > options.threshold
        there = inside.flatten(1).any(dim=1)
        box = masks_to_boxes(inside[there]) + image.new_tensor([0, 0, 1, 1])
        images += [
            F.interpolate(part[None], size=(size, size), mode="bicubic", align_corners=options.align_corners)
            for part in painted_boxes(image, soft[there], box, options, black)
        ]
        valid.append(there)
        boxes.append(box)
    return Crops(torch.cat(images), torch.cat(valid), torch.cat(boxes))


def painted_boxes(image: Tensor, masks: Tensor, boxes: Tensor, options: CropOptions, black: Tensor) -> Iterator[Tensor]:
    """The box (3, h, w) of each mask (M, H, W) as `tight_crops` cuts and paints it, before the resize."""
    height, width = image.shape[-2:]
    paint = (black if options.fill == "zero" else torch.zeros_like(black))[:, None, None]
    # One transfer for all boxes: their corners are Python numbers from here on.
    for soft, box in zip(masks, boxes.long().tolist(), strict=True):
        left, top, right, bottom = (
            (0, 0, width, height) if options.merge == "mask" else _expand(box, options.expand, width, height)
        )
        part, mask = image[:, top:bottom, left:right], soft[top:bottom, left:right]
        if options.merge != "crop":
            mask = (mask if options.matting else mask > options.threshold).to(part.dtype)
            part = part * mask + paint * (1 - mask)
        yield part


def _expand(box: list[int], ratio: float, width: int, height: int) -> tuple[int, int, int, int]:
    """A box (right and bottom excluded) grown about its centre, cut to the picture; at least one pixel."""
    left, top, right, bottom = box
    x, y = 0.5 * (left + right), 0.5 * (top + bottom)
    half_width, half_height = 0.5 * (right - left) * ratio, 0.5 * (bottom - top) * ratio
    left = min(max(int(x - half_width), 0), width - 1)
    top = min(max(int(y - half_height), 0), height - 1)
    return left, top, max(min(int(x + half_width), width), left + 1), max(min(int(y + half_height), height), top + 1)


@dataclass(frozen=True)
class CropEncoder:
    """How CLIP encodes regions: the tower is run once a region, on its crop. Holds options only, no weights.

    The *frame* is the padded picture, normalised for CLIP, with the padding 0; mask logits cover it, and are
    interpolated to it by ``align_corners``. The other attributes are options of `RegionModelOptions`.
    """

    align_corners: bool
    crops: CropOptions
    positions: Interpolation

    def cut(self, clip: CLIP, frame: Tensor, size: Size, mask_logits: Tensor) -> Crops:
        """Sub-images of the regions of one picture: frame (3, H', W'), mask logits (N, h, w)."""
        inside = ..., slice(size[0]), slice(size[1])
        masks = (part[0][inside].sigmoid() for part in full_resolution(mask_logits[None], frame, self.align_corners))
        black = -frame.new_tensor(clip.mean) / frame.new_tensor(clip.std)
        return tight_crops(frame[inside], masks, self.crops, size=self.crops.size or clip.image_size, black=black)

    def embed_crops(self, visual: nn.Module, crops: Tensor) -> Tensor:
        """CLIP embeddings (M, D) of crops (M, 3, S, S), not normalised.

        Those that repeat, such as the blank ones that empty masks leave, are run once.
        """
        distinct, place = torch.unique(crops.flatten(1), dim=0, return_inverse=True)
        repeats = len(distinct) < len(crops)
        shown = distinct.unflatten(1, crops.shape[1:]) if repeats else crops
        parts = shown.split(CPU_CHUNK if crops.device.type == "cpu" else _CHUNK)
        found = torch.cat([image_embeddings(visual, part, position_interpolation=self.positions) for part in parts])
        return found[place] if repeats else found

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
        batch, count = mask_logits.shape[:2]
        regions = frame.new_ones(batch, count, clip.embed_dim)
        encoded = torch.zeros(batch, count, dtype=torch.bool, device=frame.device)
        for index, masks in enumerate(mask_logits):
            places = torch.arange(count, device=frame.device) if valid is None else valid[index].nonzero().flatten()
            first = near_duplicates(masks[places], self.crops.duplicates)
            originals = places[first.unique()]
            crops = self.cut(clip, frame[index], size, masks[originals])
            shown = originals[crops.valid]
            if len(shown):
                regions[index, shown] = self.embed_crops(visual, crops.images).to(regions.dtype)
                encoded[index, shown] = True
            # A near-duplicate takes over what became of the first one.
            regions[index, places], encoded[index, places] = (x[index, places[first]] for x in (regions, encoded))
        return regions, encoded
