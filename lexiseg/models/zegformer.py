"""ZegFormer: MaskFormer proposes, CLIP sees crops of the padded frame, and seen classes share one CLIP score.

Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022. What it shares with ZSSeg and FreeSeg is in
`lexiseg.models.region_base`; with the option ``maft`` it becomes ZegFormer + MAFT (`lexiseg.models.maft`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes, roi_align

from lexiseg.clip.model import CLIP
from lexiseg.clip.text import TextEmbedder
from lexiseg.models.base import ImageFeatures
from lexiseg.models.region_base import RegionModel, RegionModelOptions
from lexiseg.proposals.options import GeneratorOptions, MaskFormerOptions
from lexiseg.regions.crops import CropEncoder, CropOptions, Crops
from lexiseg.regions.ensemble import EnsembleOptions
from lexiseg.regions.pooling import Size, full_resolution, resize_masks, unit_or_zero
from lexiseg.scores import RegionScores
from lexiseg.templates import ZEGFORMER_32
from lexiseg.vocabulary import Vocabulary


@dataclass(frozen=True)
class ZegFormerCrops(CropEncoder):
    """Runs the tower once a region, on what RoIAlign cuts out of the padded frame, unless its options are "tight".

    The box ends *at* the last pixel, or is the whole padded frame if it has no area; what is outside the mask is 0
    after normalisation. Every mask gives a sub-image, an empty one a blank picture. The options ``matting``,
    ``expand`` and ``fill`` have no meaning.
    """

    def cut(self, clip: CLIP, frame: Tensor, size: Size, mask_logits: Tensor) -> Crops:
        options, side = self.crops, self.crops.size or clip.image_size
        if options.convention == "tight":
            return super().cut(clip, frame, size, mask_logits)
        whole = frame.new_tensor([0, 0, frame.shape[-1], frame.shape[-2]])
        small = F.interpolate(frame[None], size=(side, side), mode="bilinear", align_corners=False)
        images, boxes = [frame.new_zeros(0, 3, side, side)], []
        for logits in full_resolution(mask_logits[None], frame, self.align_corners):
            inside = logits[0].sigmoid() > options.threshold
            box, there = whole.repeat(len(inside), 1), inside.flatten(1).any(dim=1)
            box[there] = masks_to_boxes(inside[there]).to(box.dtype)
            box[(box[:, 2:] == box[:, :2]).any(dim=1)] = whole
            boxes.append(box)
            if options.merge == "mask":
                mask = resize_masks(logits, (side, side))[0].sigmoid() > options.threshold
                images.append(small * mask[:, None])
                continue
            for one, place in zip(inside, box, strict=True):
                shown = frame if options.merge == "crop" else frame * one
                images.append(roi_align(shown[None], [place[None]], (side, side), 1.0, -1, aligned=True))
        valid = torch.ones(len(mask_logits), dtype=torch.bool, device=frame.device)
        return Crops(torch.cat(images), valid, torch.cat(boxes))


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
    """ZegFormer in the form of its release.

    The class head is one layer, compared with text and with a "no object" row that is not of unit length; crops come
    from RoIAlign, an empty mask gives a blank one; the synonyms of a class are one vector, their mean; the generator's
    words and CLIP's have templates of their own; in the end 0.1 is taken from seen classes.

    Attributes:
        logit_scale: (1,), logarithm of the factor on the generator's cosines; fixed.
    """

    system = "zegformer"
    options_class = ZegFormerOptions
    options: ZegFormerOptions
    crop_encoder = ZegFormerCrops
    seen_mean = True
    logit_scale: Tensor

    def __init__(self, clip: CLIP, options: ZegFormerOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        self.register_buffer("logit_scale", torch.full((1,), math.log(self.options.temperature)))

    def no_object_row(self) -> Tensor:
        """The row (1, D) that stands for "no object", as it is."""
        return self.no_object

    def proposal_scale(self) -> Tensor:
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
                seen = index.new_zeros(count, dtype=torch.bool).scatter(0, index, seen.to(index.device).bool())
        return super().score(features, text, seen=seen)
