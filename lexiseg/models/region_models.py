"""ZSSeg and FreeSeg, two base models that ask a frozen CLIP about each proposed region.

They differ in their proposals and in how the corners of a picture are placed; what they share, and share with
ZegFormer, is in `lexiseg.models.region_base`. With the option ``maft`` each becomes itself + MAFT
(`lexiseg.models.maft`).
"""

from lexiseg.clip.positions import Interpolation
from lexiseg.losses.proposals import ProposalWeights
from lexiseg.models.region_base import RegionModel, RegionModelOptions
from lexiseg.proposals.options import GeneratorOptions, Mask2FormerOptions
from lexiseg.regions.crops import CropOptions


class ZSSegOptions(RegionModelOptions):
    """Options of `ZSSeg`. The defaults are those of its release for COCO-Stuff, but for the learned prompts.

    Those are the option ``prompts`` (16 vectors in front of the name); without it the words are put into templates. The
    weight of the ensemble is 0.8 on COCO-Stuff, 0.7 on VOC and ADE20K-847, 0.5 on ADE20K-150 and 0.4 on Pascal Context.
    """


class ZSSeg(RegionModel):
    """ZSSeg, which is DeOP's SimBaseline: MaskFormer proposes, CLIP sees crops, a geometric mean joins the two.

    Xu et al., "A Simple Baseline for Open-Vocabulary Semantic Segmentation with Pre-trained Vision-language Model",
    ECCV 2022, in the form of its release. The proposals come from a ResNet-101 and have a two-layer class head; crops
    are *mask & crop*: the tight box around the mask, CLIP's mean colour outside, resized to a square.
    """

    system = "zsseg"
    options_class = ZSSegOptions
    options: ZSSegOptions


class FreeSegOptions(RegionModelOptions):
    """Options of `FreeSeg`. The defaults are those of its release for COCO-Stuff, but for the learned prompts.

    Those are ``prompts: {prefix: 16, task: 8}``; without them the words are put into templates, as MAFT does.
    """

    proposals: GeneratorOptions = Mask2FormerOptions()
    align_corners: bool = True
    crops: CropOptions = CropOptions(align_corners=True)
    positions: Interpolation = "bicubic-corners"
    criterion: ProposalWeights = ProposalWeights(dice_weight=5.0, skip_level_before_last=True)


class FreeSeg(RegionModel):
    """FreeSeg: a Mask2Former whose features attend to the words; crops and ensemble as ZSSeg, corners on corners.

    Qin et al., "FreeSeg: Unified, Universal and Open-Vocabulary Image Segmentation", CVPR 2023; semantic segmentation
    only, in the form of its release. The regions depend on what is asked for, so nothing of them can be kept from one
    vocabulary to the next. It is the one base model for which MAFT was released.
    """

    system = "freeseg"
    options_class = FreeSegOptions
    options: FreeSegOptions
