"""ZegFormer: MaskFormer proposes, CLIP looks at crops of the padded frame, and seen classes share one CLIP score.

Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022. The form here is that of the released code. With
the option ``maft`` it is ZegFormer + MAFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.clip.templates import ZEGFORMER_32
from lexiseg.clip.text import TextEmbedder
from lexiseg.models.base import ImageFeatures, ModelOptions
from lexiseg.models.mask_decoder import unit
from lexiseg.models.region_host import RegionHost
from lexiseg.models.region_host_options import RegionHostOptions
from lexiseg.proposals import GeneratorOptions, MaskFormerOptions
from lexiseg.regions.crops import CropOptions
from lexiseg.regions.ensemble import EnsembleOptions
from lexiseg.regions.pooling import unit_or_zero
from lexiseg.scores import RegionScores
from lexiseg.vocabulary import Vocabulary


class ZegFormerOptions(RegionHostOptions):
    """Options of `ZegFormer`. The defaults are those of its release.

    Attributes:
        region_templates: templates of the words that CLIP compares regions with; those of the vocabulary are the
            generator's. (Released: 32 strings whatever else is set.)
        region_no_object: let CLIP's softmax over the classes have the generator's "no object" logit as one more entry.
    """

    proposals: GeneratorOptions = MaskFormerOptions(backbone="r101", class_head="linear")
    crops: CropOptions = CropOptions(convention="roi-align")
    ensemble: EnsembleOptions = EnsembleOptions(rule="zegformer", weight=2 / 3)
    seen_offset: Annotated[float, Field(ge=0)] = 0.1
    region_templates: tuple[str, ...] = ZEGFORMER_32
    region_no_object: bool = True


class ZegFormer(RegionHost):
    """ZegFormer.

    - Proposals: MaskFormer on a ResNet-101; its class head is one layer, compared with text and with a "no object" row
      that is not of unit length.
    - Regions: RoIAlign of the padded frame, 0 outside the mask; every mask is shown, an empty one as a blank picture.
    - Words: the synonyms of a class are one vector, their mean; the generator's words and CLIP's have templates of
      their own.
    - Ensemble: see `EnsembleOptions`, rule "zegformer"; then 0.1 is taken from seen classes.

    Args:
        clip: the towers, frozen.
        options: see `ZegFormerOptions`.
        seen_names: classes that had masks in training.

    Attributes:
        logit_scale: (1,), logarithm of the factor on the generator's cosines; fixed.
    """

    system: ClassVar[str] = "zegformer"
    options_class: ClassVar[type[ModelOptions]] = ZegFormerOptions
    options: ZegFormerOptions
    logit_scale: Tensor

    def __init__(self, clip: CLIP, options: ZegFormerOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        options = options or ZegFormerOptions()
        super().__init__(clip, options, seen_names)
        self.register_buffer("logit_scale", torch.full((1,), math.log(options.temperature)))

    def no_object_row(self) -> Tensor:
        """The row (1, D) that stands for "no object", as it is."""
        return self.no_object

    def proposal_scale(self) -> Tensor:
        """Factor on the cosines of the generator's class embeddings."""
        return self.logit_scale.exp()

    def embed_text(self, embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
        """Text rows (W, 2, D), the generator's and CLIP's: the words of one class have the same rows, their mean.

        A class's row is the mean over all its synonyms in all templates, normalised. A name such as "building, edifice"
        is two synonyms, as in the released code.
        """
        groups = [
            # A class whose words are in its name and beside it as well has each once.
            tuple(dict.fromkeys(part for word in entry.words for part in word.split(", ")))
            for entry in vocabulary.classes
        ]
        own, clips = (
            embedder.embed_joined(groups, templates)
            for templates in (vocabulary.templates, self.options.region_templates)
        )
        return torch.stack([own, clips], dim=1)[vocabulary.word_to_class.to(own.device)]

    def region_probabilities(self, regions: Tensor, text: Tensor, proposal_logits: Tensor | None) -> Tensor:
        """A^c (..., C): CLIP's own scale, and the generator's "no object" logit takes part in the softmax."""
        logits = self.clip.model.logit_scale.detach().exp() * (unit_or_zero(regions.float()) @ text.float().T)
        if proposal_logits is None or not self.options.region_no_object:
            return logits.softmax(dim=-1)
        return torch.cat([logits, proposal_logits[..., -1:]], dim=-1).softmax(dim=-1)[..., :-1]

    def score(
        self,
        features: ImageFeatures,
        text: Tensor,
        *,
        word_to_class: Tensor | None = None,
        seen_words: Tensor | None = None,
    ) -> RegionScores:
        """Score classes against images; see `SegmentationModel.score`. Synonyms are not scored one by one."""
        if word_to_class is not None:
            index = word_to_class.to(text.device, torch.long)
            count = int(index[-1]) + 1
            text = unit(text.new_zeros(count, *text.shape[1:]).index_add_(0, index, text))
            if seen_words is not None:
                seen = torch.zeros(count, dtype=torch.bool, device=text.device)
                seen_words = seen.index_put_((index,), seen_words.to(text.device).bool(), accumulate=False)
        return super().score(features, text, seen_words=seen_words)
