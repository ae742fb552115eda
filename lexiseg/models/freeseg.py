"""FreeSeg: a Mask2Former whose features look at the words, crops for CLIP, and a geometric mean of the two.

Qin et al., "FreeSeg: Unified, Universal and Open-Vocabulary Image Segmentation", CVPR 2023; semantic segmentation only.
The form here is that of the released code. With the option ``maft`` it is FreeSeg + MAFT, the one host for which MAFT
was released: its checkpoints use CLIP's scores alone (``ensemble: {rule: region}``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.losses.proposals import ProposalWeights
from lexiseg.models.base import ModelOptions
from lexiseg.models.region_host import RegionHost
from lexiseg.models.region_host_options import RegionHostOptions
from lexiseg.proposals import GeneratorOptions, Mask2FormerOptions
from lexiseg.regions.crops import CropOptions


class FreeSegOptions(RegionHostOptions):
    """Options of `FreeSeg`. The defaults are those of its release for COCO-Stuff, but for the learned prompts.

    Those are ``prompts: {prefix: 16, task: 8}``; without them the words are put into templates, as MAFT does.
    """

    proposals: GeneratorOptions = Mask2FormerOptions()
    align_corners: bool = True
    crops: CropOptions = CropOptions(align_corners=True)
    positions: Interpolation = "bicubic-corners"
    criterion: ProposalWeights = ProposalWeights(dice_weight=5.0, skip_level_before_last=True)


class FreeSeg(RegionHost):
    """FreeSeg: what `RegionHost` does, with its defaults.

    - Proposals: Mask2Former with context interaction: its features attend to the words before masks are made, so the
      regions depend on what is asked for, and nothing of them can be kept from one vocabulary to the next.
    - Regions and ensemble: as ZSSeg, but that interpolations put corners on corners.

    Args:
        clip: the towers, frozen.
        options: see `FreeSegOptions`.
        seen_names: classes that had masks in training.
    """

    system: ClassVar[str] = "freeseg"
    options_class: ClassVar[type[ModelOptions]] = FreeSegOptions
    options: FreeSegOptions

    def __init__(self, clip: CLIP, options: FreeSegOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options or FreeSegOptions(), seen_names)
