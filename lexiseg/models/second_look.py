"""Second look: ZegCLIP's model looks at the picture twice, half a patch apart, and lets colours draw the borders.

This is no paper's system but a combination found by searching what composes here, see ``docs/combination.md``. Training
is ZegCLIP's (Zhou et al., CVPR 2023) to the letter, and its weights fit. At prediction the same tower and decoder also
see the picture without a border of half a patch, so that their patches lie across the corners of the first ones; the
mask logits of both are averaged on a lattice of quarter patches; and their probabilities are smoothed where the colours
of the picture are, see `lexiseg.models.edge_aware`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.losses import exclusive_logits
from lexiseg.models.base import ImageFeatures, ModelOptions
from lexiseg.models.edge_aware import smooth
from lexiseg.models.one_stage import Head, OneStageModel
from lexiseg.models.one_stage_options import Backbone, OneStageOptions
from lexiseg.scores import GridScores

# Cells of the lattice along a patch: the second look's patches begin in the middle of the first one's.
_CELLS = 4


class SecondLookOptions(OneStageOptions):
    """Options of `SecondLook`, with those of `OneStageOptions`; ``mask_size`` is not used.

    Attributes:
        backbone: as ZegCLIP's.
        second_look: look twice; False leaves it at the first look.
        distances: of the neighbours in each pass of smoothing, in quarters of a patch; empty does not smooth.
        colour_width: the difference of colours, RGB in 0..1, beyond which neighbours stop counting, see
            `lexiseg.models.edge_aware.edge_weights`.
    """

    backbone: Backbone = "prompt"
    second_look: bool = True
    distances: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4)
    colour_width: Annotated[float, Field(gt=0)] = 0.1


class SecondLook(OneStageModel):
    """ZegCLIP's model with a second look and edge-aware scores.

    Features hold, beside those of `OneStageModel`: ``second_cls`` and ``second_patches``, the same of the second look;
    and ``colours`` (B, 3, 4 h, 4 w), RGB in 0..1, for h x w patches. In training mode there is one look only, and the
    losses are ZegCLIP's.

    Args:
        clip: the towers.
        options: see `SecondLookOptions`.
        seen_names: classes that had masks in training.

    Raises:
        LexisegError: the options do not fit the tower.
    """

    system: ClassVar[str] = "second-look"
    options_class: ClassVar[type[ModelOptions]] = SecondLookOptions
    options: SecondLookOptions

    def __init__(self, clip: CLIP, options: SecondLookOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        options = options or SecondLookOptions()
        super().__init__(clip, options, seen_names, backbone=options.backbone)
        self.query_proj, self.decoder = self.build_head()
        if options.start == "matching":
            self.start_as_matching()
        self.set_trainable()

    def heads(self) -> list[Head]:
        """One decoder, for both looks."""
        return [Head(self.query_proj, self.decoder)]

    def memories(self, features: ImageFeatures) -> list[Tensor]:
        """It sees the final patches."""
        return [features.values["patches"]]

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Run the image tower, twice unless the model is being trained; see `SegmentationModel.encode_images`.

        A side of one patch is not cut for the second look; where both are, there is none.
        """
        fitted = self.fit_to_patches(images)
        features = super().encode_images(fitted)
        size = (int(images.shape[-2]), int(images.shape[-1]))
        values = dict(features.values)
        if self.training:
            return ImageFeatures(size, values)
        patch, (height, width) = self.patch_size, fitted.shape[-2:]
        if self.options.second_look and max(height, width) > patch:
            top, left = (patch // 2 if side > patch else 0 for side in (height, width))
            bottom, right = (start + side - (patch if start else 0) for start, side in ((top, height), (left, width)))
            second = super().encode_images(fitted[..., top:bottom, left:right])
            values |= {"second_cls": second.values["cls"], "second_patches": second.values["patches"]}
        if self.options.distances:
            lattice = (_CELLS * height // patch, _CELLS * width // patch)
            mean, std = (fitted.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
            values["colours"] = F.interpolate(fitted.float(), size=lattice, mode="area") * std + mean
        return ImageFeatures(size, values)

    def patch_scores(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, C, h, w) of one look, whose sigmoid is the score of a class."""
        logits = self.grid_logits(features, text)
        return logits if self.options.mask_loss == "focal" else exclusive_logits(logits)

    def lattice_logits(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, C, 4 h, 4 w) on quarters of patches: the mean of the looks that cover a place."""
        joined = resize(self.patch_scores(features, text), _CELLS)
        values = features.values
        if "second_patches" in values:
            other = ImageFeatures(features.size, {"cls": values["second_cls"], "patches": values["second_patches"]})
            second = resize(self.patch_scores(other, text), _CELLS)
            top, left = ((a - b) // 2 for a, b in zip(joined.shape[-2:], second.shape[-2:], strict=True))
            inside = joined[..., top : top + second.shape[-2], left : left + second.shape[-1]]
            inside.add_(second).mul_(0.5)
        return joined

    @torch.no_grad()
    def score(
        self,
        features: ImageFeatures,
        text: Tensor,
        *,
        word_to_class: Tensor | None = None,
        seen_words: Tensor | None = None,
    ) -> GridScores:
        """Score words against images; see `SegmentationModel.score`.

        A score is the sigmoid of the mean of the looks' mask logits, smoothed over cells of like colour, less
        `OneStageOptions.seen_offset` for seen words. No gradient goes through it; losses take one look.
        """
        offsets = None
        if seen_words is not None and self.options.seen_offset:
            offsets = seen_words.to(text.device).float() * self.options.seen_offset
        scores, colours = self.lattice_logits(features, text), features.values.get("colours")
        if colours is not None:
            with torch.autocast(scores.device.type, enabled=False):
                scores = smooth(scores.sigmoid(), colours, self.options.distances, self.options.colour_width)
        return GridScores(scores, word_to_class=word_to_class, sigmoid=colours is None, offsets=offsets)


def resize(logits: Tensor, factor: int) -> Tensor:
    """Interpolate (B, C, h, w) bilinearly to ``factor`` times as many places a side, in memory of its own."""
    size = (int(logits.shape[-2]) * factor, int(logits.shape[-1]) * factor)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
