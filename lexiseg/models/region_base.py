"""Regions are proposed, a frozen CLIP is asked about each, and two opinions become one: what such systems share.

How CLIP sees regions, how the two opinions are joined, and whether CLIP is tuned to masks (`lexiseg.models.maft`) are
options of all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.clip.prompt_learner import PromptLearner, PromptOptions
from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.losses.proposals import ProposalWeights
from lexiseg.models.base import ImageFeatures
from lexiseg.models.decoupled import DecoupledModel, DecoupledOptions
from lexiseg.models.decoupled_init import DecoupledInit, copied
from lexiseg.models.maft import AttentionOptions, MaftOptions, MaskAttention, check_tuned, maft_losses, tuned_names
from lexiseg.proposals.base import Proposals
from lexiseg.regions.crops import CropEncoder, CropOptions
from lexiseg.regions.ensemble import EnsembleOptions, ensemble
from lexiseg.regions.pooling import Size, unit_or_zero
from lexiseg.scores import RegionScores
from lexiseg.vocabulary import Vocabulary


class RegionModelOptions(DecoupledOptions):
    """Options of systems that ask CLIP about each region.

    Attributes:
        regions: how CLIP sees a region: "crops" (one run a region), "mask-attention" (one run for all) or "none" (the
            generator decides alone, without ``maft``). None is "crops", and "mask-attention" with ``maft``, which takes
            the place of crops that are named as well.
        crops: how crops are made.
        attention: how mask attention runs.
        positions: how CLIP's position table follows another size than it was trained at, for crops.
        ensemble: how the generator's and CLIP's scores become one; a rule's name alone keeps the system's weight.
        region_temperature: factor on CLIP's cosines; None is ``temperature``, which is the generator's factor as well.
        seen_offset: subtracted from the scores of seen classes.
        prompts: learned prompts; None uses templates.
        maft: tune a copy of CLIP's image tower to masks, which is all that is trained then; None trains the generator
            with its class head, the no-object row and the prompts.
        criterion: weights of the generator's losses, without ``maft``.
    """

    regions: Literal["crops", "mask-attention", "none"] | None = None
    crops: CropOptions = CropOptions()
    attention: AttentionOptions = AttentionOptions()
    positions: Interpolation = "bicubic"
    ensemble: EnsembleOptions = EnsembleOptions()
    region_temperature: Annotated[float, Field(gt=0)] | None = None
    seen_offset: Annotated[float, Field(ge=0)] = 0.0
    prompts: PromptOptions | None = None
    maft: MaftOptions | None = None
    criterion: ProposalWeights = ProposalWeights()

    @field_validator("ensemble", mode="before")
    @classmethod
    def _rule_by_name(cls, value: Any) -> Any:
        usual: EnsembleOptions = cls.model_fields["ensemble"].default
        return {**usual.model_dump(), "rule": value} if isinstance(value, str) else value

    def prompt_places(self) -> dict[str, int] | None:
        return None if self.prompts is None else self.prompts.model_dump(include={"prefix", "suffix", "task"})


class RegionModel(DecoupledModel):
    """Proposals, CLIP's opinion of each region, and an ensemble of the two; what such systems share.

    Features hold, beside those of `DecoupledModel`, ``regions`` (B, N, D) and ``encoded`` (B, N), see
    `CropEncoder.encode`, unless the words decide which regions there are. Text is (W, D), or (W, 2, D) where the
    generator's words (first) differ from CLIP's. Options that contradict each other are a `LexisegError`.

    Attributes:
        student: the copy of CLIP's image tower that ``maft`` tunes, or None.
        prompts: learned prompts, or None.
    """

    options: RegionModelOptions
    crop_encoder: ClassVar[type[CropEncoder]] = CropEncoder
    """How crops are cut."""
    seen_mean: ClassVar[bool] = False
    """Whether the released ensemble gives all seen classes the mean of what CLIP says of them."""

    def __init__(self, clip: CLIP, options: RegionModelOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        options = self.options
        alone = options.regions == "none"
        if alone and options.maft is not None:
            raise LexisegError("maft tunes mask attention, not regions 'none'; remove one of the two.")
        if options.crops.convention == "roi-align" and type(self.region_encoder) is CropEncoder:
            raise LexisegError(f"{self.system} does not cut by 'roi-align'; set crops.convention to 'tight'.")
        if self.generator.embed_dim is None and (alone or options.ensemble.rule == "proposal"):
            raise LexisegError(
                "These proposals have no classes, so CLIP has to classify the regions; set regions to 'crops' or "
                "'mask-attention', and the ensemble's rule to 'region'."
            )
        self.student = None if options.maft is None else copy.deepcopy(clip.visual).eval()
        places = options.prompt_places()
        self.prompts = None if places is None else PromptLearner(clip.text_width, **places)
        self.set_trainable()

    @property
    def region_encoder(self) -> CropEncoder | MaskAttention | None:
        """How CLIP sees regions, or None."""
        options = self.options
        if options.regions == "none":
            return None
        if options.regions == "mask-attention" or options.maft is not None:
            return MaskAttention(options.align_corners, options.crops.threshold, options.attention)
        return self.crop_encoder(options.align_corners, options.crops, options.positions)

    def trainable_names(self) -> tuple[str, ...]:
        """Those of the tower's copy with MAFT, else of the proposals; none for a generator that comes trained."""
        if self.student is not None and self.options.maft is not None:
            return tuple(f"student.{name}" for name in tuned_names(self.student, self.options.maft.frozen))
        parts = ["generator."]
        # Only where the proposals depend on words do "no object" and the prompts have something to learn from.
        if self.generator.embed_dim is not None or self.generator.needs_text:
            parts.append("no_object")
            if (given := self.options.prompts) is not None and given.proposals and not given.frozen:
                parts.append("prompts.")
        return tuple(name for name, _ in self.named_parameters() if name.startswith(tuple(parts)))

    def take_parts(self, other: DecoupledInit, what: str) -> tuple[str, ...]:
        parts = super().take_parts(other, what)
        tuned = isinstance(other, RegionModel) and copied(other.student, self.student)
        return (*parts, "tuned tower") if tuned else parts

    def check_start(self, *, proposals: bool, steps: int) -> None:
        super().check_start(proposals=proposals, steps=steps)
        if self.student is not None and not steps:
            check_tuned(self.student, self.clip.visual)

    def train(self, mode: bool = True) -> RegionModel:
        """Set the training mode but for CLIP and its tuned copy: a ResNet's batch norms stay as they are."""
        super().train(mode)
        self.clip.eval()
        if self.student is not None:
            self.student.eval()
        return self

    def embed_text(self, embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
        """Text rows of a vocabulary: (W, D), or (W, 2, D) where only CLIP's words are learned prompts."""
        text, given = super().embed_text(embedder, vocabulary), self.options.prompts
        return text if given is None or given.proposals else torch.stack([embedder(vocabulary), text], dim=1)

    def encode_regions(self, padded: Tensor, size: Size, proposals: Proposals) -> dict[str, Tensor]:
        """What CLIP, or its tuned copy, makes of proposals, see the class."""
        encoder = self.region_encoder
        if encoder is None:
            return {}
        visual, frame = self.student or self.clip.visual, self.clip_frame(padded, size)
        found = encoder.encode(self.clip, visual, frame, size, proposals.mask_logits, proposals.valid)
        return dict(zip(("regions", "encoded"), found, strict=True))

    def region_probabilities(self, regions: Tensor, text: Tensor, proposal_logits: Tensor | None) -> Tensor:
        """A^c (..., C): the softmax over the classes ``text`` (C, D) of what CLIP says of regions (..., D).

        ``proposal_logits`` (..., C + 1) are what the generator says, or None.
        """
        cosines = unit_or_zero(regions.float()) @ text.float().T
        return ((self.options.region_temperature or self.options.temperature) * cosines).softmax(dim=-1)

    def class_scores(self, features: ImageFeatures, text: Tensor, seen: Tensor | None = None) -> Tensor:
        values, clips = features.values, _clip_words(text)
        logits = self.proposal_logits(values["embeddings"], text) if "embeddings" in values else None
        # "No object" is dropped after the softmax, so that the classes' probabilities may sum to little.
        opinion = None if logits is None else logits.softmax(dim=-1)[..., :-1]
        said = self.region_probabilities(values["regions"], clips, logits) if "regions" in values else None
        encoded, always = values.get("encoded"), isinstance(self.region_encoder, MaskAttention)
        return ensemble(
            opinion, said, self.options.ensemble, seen=seen, encoded=encoded, always=always, seen_mean=self.seen_mean
        )

    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> RegionScores:
        """Score words against images; see `SegmentationModel.score`.

        The score of a class at a pixel is the sum over the regions of its score there times their masks.
        """
        seen = None if seen is None else seen.to(text.device).bool()
        features = self.proposed(features, text)
        scores = self.class_scores(features, text, seen)
        return self.pixel_scores(scores, features, word_to_class=word_to_class, offsets=self.seen_offsets(seen, text))

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, *, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of what is trained; see `SegmentationModel.losses`.

        Labels are as large as the images, or smaller. With ``seen`` pixels of other classes, or -1, get the model's own
        best unseen class.

        Returns:
            "loss" and its parts: "loss_ce", if the proposals know classes, "loss_mask" and "loss_dice", and those of
                earlier decoder layers with their number behind; or "loss_mask_aware" and "loss_distillation", weighted.
        """
        if not self.trainable_names():
            return super().losses(images, labels, text, seen=seen)
        features, encoder, options = self.frame(images), self.region_encoder, self.options.maft
        padded, size = features.values["images"], features.size
        if seen is not None:
            labels = self.pseudo_labels(features, labels, text, seen)
        if options is None:
            return self.proposal_losses(features, labels, text, self.options.criterion)
        assert self.student is not None and isinstance(encoder, MaskAttention)
        with torch.no_grad():
            proposals = self.propose(padded, text).levels[-1]
            logits = None if proposals.embeddings is None else self.proposal_logits(proposals.embeddings, text)

        def probabilities(found: Tensor) -> Tensor:
            return self.region_probabilities(found, _clip_words(text), logits if found.dim() == 3 else None)

        frame = self.clip_frame(padded, size)
        return maft_losses(encoder, self.clip, self.student, frame, size, proposals, labels, options, probabilities)


def _clip_words(text: Tensor) -> Tensor:
    """CLIP's words (W, D), of what `embed_text` gives; for the generator's see `DecoupledModel.text_rows`."""
    return text[:, -1] if text.dim() == 3 else text
