"""Second look: ZegCLIP with half-patch-shift test-time augmentation and edge-aware smoothing of its scores.

This is not a paper's system but a combination found by a search, see ``docs/combination.md``. Training
is exactly ZegCLIP's (Zhou et al., CVPR 2023), and its weights fit. At prediction the same tower and decoder also
see the picture without a border of half a patch, so that their patches lie across the corners of the first ones; the
mask logits of both are averaged on a lattice of quarter patches; and their probabilities are smoothed within the
picture's edges, see `lexiseg.smoothing`.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lexiseg.models.base import ImageFeatures
from lexiseg.models.options import Count
from lexiseg.models.zegclip import ZegCLIP, ZegCLIPOptions
from lexiseg.normalisation import pixels_of
from lexiseg.scores import GridScores
from lexiseg.smoothing import smooth

# Cells of the lattice along a patch: the shifted patches begin in the middle of the first ones.
_CELLS = 4


class SecondLookOptions(ZegCLIPOptions):
    """Options of `SecondLook`, with those of `ZegCLIPOptions`; ``mask_size`` is not used.

    Attributes:
        half_patch_shift: also run the picture shifted by half a patch.
        smoothing_distances: of the neighbours in each pass of smoothing, in quarters of a patch; empty does not smooth.
        colour_width: colour difference, RGB in 0..1, beyond which neighbours stop counting, see
            `lexiseg.smoothing.edge_weights`.
    """

    half_patch_shift: bool = True
    smoothing_distances: tuple[Count, ...] = (1, 2, 4)
    colour_width: Annotated[float, Field(gt=0)] = 0.1


class SecondLook(ZegCLIP):
    """ZegCLIP's model, run twice, with edge-aware scores.

    Features hold, beside those of `ZegCLIP`: ``shifted_cls`` and ``shifted_patches``, the same of the shifted picture;
    and ``colours`` (B, 3, 4 h, 4 w), RGB in 0..1, for h x w patches. In training mode there is no shifted run, and the
    losses are ZegCLIP's.
    """

    system = "second-look"
    options_class = SecondLookOptions
    options: SecondLookOptions

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Run the image tower, twice unless the model is being trained; see `SegmentationModel.encode_images`.

        A side of only one patch is not cut for the shifted run; if both sides are, there is no shifted run.
        """
        fitted = self.fit_to_patches(images)
        size = (images.shape[-2], images.shape[-1])
        values = dict(super().encode_images(fitted).values)
        if self.training:
            return ImageFeatures(size, values)
        patch, (height, width) = self.patch_size, fitted.shape[-2:]
        if self.options.half_patch_shift and max(height, width) > patch:
            top, left = (patch // 2 if side > patch else 0 for side in (height, width))
            bottom, right = (start + side - (patch if start else 0) for start, side in ((top, height), (left, width)))
            shifted = super().encode_images(fitted[..., top:bottom, left:right])
            values |= {f"shifted_{name}": value for name, value in shifted.values.items()}
        if self.options.smoothing_distances:
            lattice = (_CELLS * height // patch, _CELLS * width // patch)
            if patch % _CELLS:
                small = F.interpolate(fitted.float(), size=lattice, mode="area")
            else:  # the same, which exporters can follow at any size
                small = F.avg_pool2d(fitted.float(), patch // _CELLS)
            values["colours"] = pixels_of(small, self.mean, self.std)
        return ImageFeatures(size, values)

    def lattice_logits(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, C, 4 h, 4 w) on quarters of patches: the mean of the runs that cover a place."""
        joined = _on_lattice(super().score_grid(features, text))
        values = features.values
        if "shifted_patches" in values:
            other = ImageFeatures(features.size, {"cls": values["shifted_cls"], "patches": values["shifted_patches"]})
            shifted = _on_lattice(super().score_grid(other, text))
            top, left = ((a - b) // 2 for a, b in zip(joined.shape[-2:], shifted.shape[-2:], strict=True))
            inside = joined[..., top : top + shifted.shape[-2], left : left + shifted.shape[-1]]
            inside.add_(shifted).mul_(0.5)
        return joined

    @property
    def exports_any_size(self) -> bool:
        """Where cells are whole pixels."""
        return not self.options.smoothing_distances or self.patch_size % _CELLS == 0

    def score_grid(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """The smoothed probabilities, or without smoothing the `lattice_logits`."""
        scores, colours = self.lattice_logits(features, text), features.values.get("colours")
        if colours is None:
            return scores
        with torch.autocast(scores.device.type, enabled=False):
            return smooth(scores.sigmoid(), colours, self.options.smoothing_distances, self.options.colour_width)

    @torch.no_grad()
    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> GridScores:
        """Score words against images; see `SegmentationModel.score`.

        A score is the sigmoid of the mean of both runs' mask logits, smoothed over cells of similar colour, less
        `OneStageOptions.seen_offset` for seen words. No gradient goes through it; losses take one run.
        """
        scores, offsets = self.score_grid(features, text), self.seen_offsets(seen, text)
        sigmoid = "colours" not in features.values
        return GridScores(scores, word_to_class=word_to_class, sigmoid=sigmoid, offsets=offsets)


def _on_lattice(logits: Tensor) -> Tensor:
    return F.interpolate(logits, scale_factor=float(_CELLS), mode="bilinear", align_corners=False)
