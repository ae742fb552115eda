"""ZSSeg, ZegFormer and FreeSeg, three base models that ask a frozen CLIP about each proposed region.

They differ in their proposals, in how regions are cut out for CLIP and in the rule of the ensemble; what they share is
in `lexiseg.models.region_base`. With the option ``maft`` each becomes itself + MAFT (`lexiseg.models.maft`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.clip.templates import ZEGFORMER_32
from lexiseg.clip.text import TextEmbedder
from lexiseg.losses.proposals import ProposalWeights
from lexiseg.models.base import ImageFeatures
from lexiseg.models.options import ModelOptions
from lexiseg.models.region_base import RegionModel, RegionModelOptions
from lexiseg.proposals.options import GeneratorOptions, Mask2FormerOptions, MaskFormerOptions
from lexiseg.regions.crops import CropOptions
from lexiseg.regions.ensemble import EnsembleOptions
from lexiseg.regions.pooling import unit_or_zero
from lexiseg.scores import RegionScores
from lexiseg.vocabulary import Vocabulary


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

    system: ClassVar[str] = "zsseg"
    options_class: ClassVar[type[ModelOptions]] = ZSSegOptions
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

    system: ClassVar[str] = "freeseg"
    options_class: ClassVar[type[ModelOptions]] = FreeSegOptions
    options: FreeSegOptions


class ZegFormerOptions(RegionModelOptions):
    """Options of `ZegFormer`. The defaults are those of its release.

    Attributes:
        region_templates: templates of the words that CLIP compares regions with; those of the vocabulary are the
            generator's. (Released: 32 strings whatever else is set.)
        region_no_object: let CLIP's softmax over the classes have the generator's "no object" logit as one more entry.
    """

    proposals: GeneratorOptions = MaskFormerOptions(backbone="r101", class_head="linear")
    crops: CropOptions = CropOptions(convention="roi-align")
    ensemble: EnsembleOptions = EnsembleOptions(weight=2 / 3)
    seen_offset: Annotated[float, Field(ge=0)] = 0.1
    region_templates: tuple[str, ...] = ZEGFORMER_32
    region_no_object: bool = True


class ZegFormer(RegionModel):
    """ZegFormer: MaskFormer proposes, CLIP sees crops of the padded frame, and seen classes share one CLIP score.

    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022, in the form of its release. The class head is
    one layer, compared with text and with a "no object" row that is not of unit length; crops come from RoIAlign, an
    empty mask gives a blank one; the synonyms of a class are one vector, their mean; the generator's words and CLIP's
    have templates of their own; in the end 0.1 is taken from seen classes.

    Attributes:
        logit_scale: (1,), logarithm of the factor on the generator's cosines; fixed.
    """

    system: ClassVar[str] = "zegformer"
    options_class: ClassVar[type[ModelOptions]] = ZegFormerOptions
    options: ZegFormerOptions
    seen_mean: ClassVar[bool] = True
    logit_scale: Tensor

    def __init__(self, clip: CLIP, options: ZegFormerOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        self.register_buffer("logit_scale", torch.full((1,), math.log(self.options.temperature)))

    def no_object_row(self) -> Tensor:
        """The row (1, D) that stands for "no object", as it is."""
        return self.no_object

    def proposal_scale(self) -> Tensor:
        """Factor on the cosines of the generator's class embeddings."""
        return self.logit_scale.exp()

    def embed_text(self, embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
        """Text rows (W, 2, D), the generator's and CLIP's: the words of one class have the same rows, their mean.

        A class's row is the mean over all its synonyms in all templates. A name such as "building, edifice" is two
        synonyms, as in the released code.
        """
        groups = [
            # A class whose words are in its name and beside it as well has each once.
            tuple(dict.fromkeys(part for word in entry.words for part in word.split(", ")))
            for entry in vocabulary.classes
        ]
        templates = (vocabulary.templates, self.options.region_templates)
        own, clips = (embedder.embed_joined(groups, each) for each in templates)
        return torch.stack([own, clips], dim=1)[vocabulary.word_to_class.to(own.device)]

    def region_probabilities(self, regions: Tensor, text: Tensor, proposal_logits: Tensor | None) -> Tensor:
        """A^c (..., C): CLIP's own scale, and the generator's "no object" logit takes part in the softmax."""
        logits = self.clip.model.logit_scale.detach().exp() * (unit_or_zero(regions.float()) @ text.float().T)
        if proposal_logits is None or not self.options.region_no_object:
            return logits.softmax(dim=-1)
        return torch.cat([logits, proposal_logits[..., -1:]], dim=-1).softmax(dim=-1)[..., :-1]

    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> RegionScores:
        """Score classes against images; see `SegmentationModel.score`. Synonyms are not scored one by one."""
        if word_to_class is not None:
            index = word_to_class.to(text.device, torch.long)
            count = int(index[-1]) + 1
            text = unit_or_zero(text.new_zeros(count, *text.shape[1:]).index_add_(0, index, text))
            if seen is not None:
                classes = torch.zeros(count, dtype=torch.bool, device=text.device)
                seen = classes.index_put_((index,), seen.to(text.device).bool(), accumulate=False)
        return super().score(features, text, seen=seen)
