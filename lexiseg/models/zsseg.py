"""ZSSeg, which is DeOP's SimBaseline: MaskFormer proposes, CLIP looks at crops, a geometric mean joins the two.

Xu et al., "A Simple Baseline for Open-Vocabulary Semantic Segmentation with Pre-trained Vision-language Model",
ECCV 2022. The form here is that of the released code. With the option ``maft`` it is ZSSeg + MAFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lexiseg.clip.model import CLIP
from lexiseg.models.base import ModelOptions
from lexiseg.models.region_host import RegionHost
from lexiseg.models.region_host_options import RegionHostOptions


class ZSSegOptions(RegionHostOptions):
    """Options of `ZSSeg`. The defaults are those of its release for COCO-Stuff, but for the learned prompts.

    Those are the option ``prompts`` (16 vectors in front of the name); without it the words are put into templates. The
    weight of the ensemble is 0.8 on COCO-Stuff, 0.7 on VOC and ADE20K-847, 0.5 on ADE20K-150 and 0.4 on Pascal Context.
    """


class ZSSeg(RegionHost):
    """ZSSeg: what `RegionHost` does, with its defaults.

    - Proposals: MaskFormer on a ResNet-101, a two-layer class head that is compared with text.
    - Regions: *mask & crop*, the tight box around the mask, CLIP's mean colour outside, resized to a square.
    - Ensemble: A^p ^ w * A^c ^ (1 - w) for seen classes, the weights exchanged for unseen ones; a mask without a pixel
      in the picture counts as A^c = 1.

    Args:
        clip: the towers, frozen.
        options: see `ZSSegOptions`.
        seen_names: classes that had masks in training.
    """

    system: ClassVar[str] = "zsseg"
    options_class: ClassVar[type[ModelOptions]] = ZSSegOptions
    options: ZSSegOptions

    def __init__(self, clip: CLIP, options: ZSSegOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options or ZSSegOptions(), seen_names)
