"""Dense CLIP: segmentation by CLIP alone, patch by patch, without any training.

Each patch is compared with each word. CLIP was trained on its class token only, and attention in the last block mixes
what patches know; cutting that mixing ("patch severance") keeps every patch to itself. DeOP (Han et al., ICCV 2023,
Sec. 3.3) calls the cut of all pairs GPS; with alpha = 1 only the value path is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lexiseg.clip.image import Interpolation
from lexiseg.clip.model import CLIP
from lexiseg.clip.severance import severed_attention
from lexiseg.models.base import ImageFeatures, ModelOptions, SegmentationModel, WindowOptions
from lexiseg.models.mask_decoder import unit
from lexiseg.scores import GridScores
from lexiseg.windows import WindowPolicy


class DenseCLIPOptions(WindowOptions):
    """Options of `DenseCLIP`.

    Attributes:
        severance: alpha, the share of the identity in the last block's token mixing: 1 is the value path (GPS), 0 is
            CLIP as it is.
        residual: factor on the shortcut around the last block's attention; DeOP's training-free demo uses 0.2.
        position_interpolation: how position embeddings follow the resolution.
        window_size: side of the sliding window; None runs whole pictures.
        window_stride: its stride.
        short_side: the length pictures' shorter side is resized to; None is twice the size CLIP was trained at, and 0
            keeps pictures as they are.
    """

    severance: Annotated[float, Field(ge=0, le=1)] = 1.0
    residual: Annotated[float, Field(ge=0)] = 1.0
    position_interpolation: Interpolation = "bicubic-antialias"
    short_side: Annotated[int, Field(ge=0)] | None = None


class DenseCLIP(SegmentationModel):
    """CLIP's patch tokens against text.

    The score of a word is the cosine of the angle between patch and text, -1..1: it does not depend on which other
    words are asked for, so a threshold on it means the same in every vocabulary.

    Args:
        clip: the towers.
        options: see `DenseCLIPOptions`.
        seen_names: not used: nothing was trained on masks.
    """

    system: ClassVar[str] = "dense-clip"
    options_class: ClassVar[type[ModelOptions]] = DenseCLIPOptions
    options: DenseCLIPOptions

    def __init__(self, clip: CLIP, options: DenseCLIPOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options or DenseCLIPOptions(), tuple(seen_names))
        clip.image_tower  # noqa: B018 - refuses a tower that cannot be run patch by patch
        self.set_trainable()

    @property
    def window(self) -> WindowPolicy:
        """How to run it over a picture by default."""
        options = self.options
        short_side = 2 * self.clip.image_size if options.short_side is None else options.short_side
        stride = options.window_stride or options.window_size or 0
        return WindowPolicy(options.window_size, stride, short_side or None)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Run the image tower; see `SegmentationModel.encode_images`.

        Returns:
            features with ``patches`` (B, h, w, D) of unit length.
        """
        size = (int(images.shape[-2]), int(images.shape[-1]))
        tower, options = self.clip.image_tower, self.options
        tokens, grid = tower.embed(self.fit_to_patches(images), interpolation=options.position_interpolation)
        last = tower.num_blocks - 1
        attention = severed_attention({last: options.severance})
        result = tower.run(tokens, grid, attention=attention, residual={last: options.residual})
        patches = unit(tower.project(result.tokens[:, -result.num_patches :]))
        return ImageFeatures(size, {"patches": patches.unflatten(1, grid)})

    def score(
        self,
        features: ImageFeatures,
        text: Tensor,
        *,
        word_to_class: Tensor | None = None,
        seen_words: Tensor | None = None,
    ) -> GridScores:
        """Score words against images; see `SegmentationModel.score`. ``seen_words`` makes no difference."""
        patches = features.values["patches"]
        logits = text.to(patches.dtype) @ patches.flatten(1, 2).transpose(1, 2)
        return GridScores(logits.unflatten(2, patches.shape[1:3]).float(), word_to_class=word_to_class)
