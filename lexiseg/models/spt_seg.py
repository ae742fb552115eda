"""SPT-SEG: ZegCLIP with spectral prompts and a spectral guided decoder.

Xu et al., "Spectral Prompt Tuning: Unveiling Unseen Classes for Zero-Shot Semantic Segmentation", AAAI 2024. This
follows the authors' code: a learnt filter in the frequency domain is added to the patches before the first two blocks
(`SpectralFilter`), the decoder's layers split patches into high and low frequencies (`SpectralDecoder`), and the
structural similarity of the raw mask logits takes the place of the dice loss (`lexiseg.losses.ssim`). Everything else
is as in ZegCLIP. The code works on a grid of 32 x 32 patches only; here every grid does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.models.base import ImageFeatures, ModelOptions
from lexiseg.models.one_stage import Head, OneStageModel
from lexiseg.models.one_stage_options import OneStageOptions
from lexiseg.models.spectral import SpectralOptions


class SPTSegOptions(SpectralOptions, OneStageOptions):
    """Options of `SPTSeg`: those of `OneStageOptions` and of `SpectralOptions`.

    ``decoder_heads`` makes no difference: the spectral guided decoder has its own eight.
    """


class SPTSeg(OneStageModel):
    """SPT-SEG.

    Args:
        clip: the towers; the width of the joint embedding must be a multiple of eight.
        options: see `SPTSegOptions`.
        seen_names: classes that had masks in training.

    Raises:
        LexisegError: the options do not fit the tower.
    """

    system: ClassVar[str] = "spt-seg"
    options_class: ClassVar[type[ModelOptions]] = SPTSegOptions
    options: SPTSegOptions

    def __init__(self, clip: CLIP, options: SPTSegOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        options = options or SPTSegOptions()
        super().__init__(clip, options, seen_names, spectral=options)
        self.query_proj, self.decoder = self.build_head()
        if options.start == "matching":
            self.start_as_matching()
        self.set_trainable()

    def heads(self) -> list[Head]:
        """One decoder."""
        return [Head(self.query_proj, self.decoder)]

    def memories(self, features: ImageFeatures) -> list[Tensor]:
        """It sees the final patches."""
        return [features.values["patches"]]
