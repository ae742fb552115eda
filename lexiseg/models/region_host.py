"""What ZSSeg, ZegFormer and FreeSeg share: a frozen CLIP is shown the proposed regions, and has a say in their class.

How regions are shown to CLIP, how the two opinions become one, and whether CLIP is tuned to masks (MAFT) are options of
all three; the systems' own files say what their defaults are and what they do differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lexiseg.clip.mask_attention import trainable_names
from lexiseg.clip.model import CLIP
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.losses.mask_aware import distillation_loss
from lexiseg.losses.masks import check_labels, fill_unseen
from lexiseg.losses.proposals import proposal_losses
from lexiseg.models.base import ImageFeatures
from lexiseg.models.decoupled import DecoupledModel, Size
from lexiseg.models.maft import mask_aware_step, student_of
from lexiseg.models.region_host_options import RegionHostOptions, Regions
from lexiseg.proposals import Proposals
from lexiseg.regions.ensemble import class_probabilities, ensemble
from lexiseg.regions.pooling import resize_masks, unit_or_zero
from lexiseg.regions.viewer import RegionViewer, Views
from lexiseg.scores import RegionScores
from lexiseg.vocabulary import Vocabulary


class RegionHost(DecoupledModel):
    """Proposals, a region classifier on CLIP, and an ensemble of the two.

    Features hold, beside those of `DecoupledModel`, ``regions`` (B, N, D), what CLIP makes of each region, not
    normalised, and ``shown`` (B, N) bool, see `Views`: unless the words decide which regions there are, or which of
    them are looked at.

    Text is (W, D), or (W, 2, D) where the generator's words (first) differ from CLIP's.

    Args:
        clip: the towers, frozen.
        options: see `RegionHostOptions`.
        seen_names: classes that had masks in training.

    Attributes:
        student: the copy of CLIP's image tower that MAFT tunes, or None.
        prompts: learned prompts, or None.
        viewer: how regions are shown to CLIP, or None.

    Raises:
        LexisegError: options contradict each other.
    """

    options: RegionHostOptions

    def __init__(self, clip: CLIP, options: RegionHostOptions, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        kind: Regions = options.regions or "crops"
        # Crops are what a host does without MAFT, and MAFT takes their place: the one key has to be enough where a
        # recipe of the host says so in words.
        if options.maft is not None and kind == "crops":
            kind = "mask-attention"
        self._check(kind)
        self.viewer: RegionViewer | None = None
        if kind != "none":
            self.viewer = RegionViewer(kind, options.crops, options.attention, options.positions, options.align_corners)
        self.student: nn.Module | None = None if options.maft is None else student_of(clip.visual)
        self.prompts: PromptLearner | None = None
        if options.prompts is not None:
            given = options.prompts
            self.prompts = PromptLearner(clip.text_width, given.prefix, given.suffix, given.task)
        self.set_trainable()

    def _check(self, kind: Regions) -> None:
        options, classes = self.options, self.generator.embed_dim is not None
        if options.maft is not None and kind != "mask-attention":
            raise LexisegError(f"maft tunes mask attention, not regions '{kind}'; leave out one of the two.")
        if options.stage == "maft" and options.maft is None:
            raise LexisegError("The stage 'maft' trains what the option maft adds; give maft (it may be empty).")
        if not classes and (kind == "none" or options.ensemble.rule == "proposal"):
            raise LexisegError(
                "These proposals know no classes, so CLIP has to look at the regions; set regions to 'crops' or "
                "'mask-attention', and the ensemble's rule to 'region'."
            )
        if options.crops.min_score and not (classes and kind == "crops"):
            raise LexisegError(
                "crops.min_score goes by the classes of the proposals and spares crops, and one of the two is missing "
                "here; leave it out."
            )

    @property
    def stage(self) -> Literal["proposals", "maft"]:
        """What training trains."""
        if self.options.stage == "auto":
            return "maft" if self.options.maft is not None else "proposals"
        return self.options.stage

    def trainable_names(self) -> tuple[str, ...]:
        """The parameters of the stage, see `RegionHostOptions`; none for a generator that comes trained."""
        if self.stage == "maft" and self.student is not None and self.options.maft is not None:
            return tuple(f"student.{name}" for name in trainable_names(self.student, self.options.maft.frozen))
        prefixes = ["generator."]
        if self._words_matter:
            prefixes += self.own_parts()
        if self._prompts_train():
            prefixes.append("prompts.")
        return tuple(name for name, _ in self.named_parameters() if name.startswith(tuple(prefixes)))

    def own_parts(self) -> tuple[str, ...]:
        """Parameters outside the generator that are trained with it."""
        return ("no_object",)

    @property
    def _words_matter(self) -> bool:
        """Whether the proposals depend on words, so that "no object" and the prompts have something to learn from."""
        return self.generator.embed_dim is not None or self.generator.needs_text

    def _prompts_train(self) -> bool:
        given = self.options.prompts
        return given is not None and given.proposals and not given.frozen and self._words_matter

    def train(self, mode: bool = True) -> RegionHost:
        """Set the training mode; the tuned tower has no dropout, and a ResNet's batch norms stay as they are."""
        super().train(mode)
        if self.student is not None:
            self.student.eval()
        return self

    # Words.

    def embed_text(self, embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
        """Text rows of a vocabulary: (W, D), or (W, 2, D) where only CLIP's words are learned prompts."""
        if self.prompts is None or self.options.prompts is None:
            return embedder(vocabulary)
        learned = embedder.embed_prompted(self.prompts, vocabulary.words, disk=not self.training)
        return learned if self.options.prompts.proposals else torch.stack([embedder(vocabulary), learned], dim=1)

    def training_text(self, vocabulary: Vocabulary, text: Tensor) -> Tensor:
        """The text of a training step: with learned prompts that are being trained it is made anew in each."""
        if self.prompts is None or self.stage != "proposals" or not self._prompts_train():
            return text
        return self.prompts(self.clip, vocabulary.words)

    @staticmethod
    def texts(text: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's words (W, D) and CLIP's, of what `embed_text` gives."""
        return (text[:, 0], text[:, -1]) if text.dim() == 3 else (text, text)

    # Looking.

    def encode_padded(self, padded: Tensor, size: Size) -> ImageFeatures:
        """Propose regions and look at them, as far as that does not depend on words; see the class."""
        features = super().encode_padded(padded, size)
        if "mask_logits" in features.values and self.viewer is not None and not self.options.crops.min_score:
            values = features.values
            views = self.look(padded, size, values["mask_logits"], values.get("valid"))
            values.update(regions=views.regions, shown=views.shown)
        return features

    def look(self, padded: Tensor, size: Size, mask_logits: Tensor, chosen: Tensor | None = None) -> Views:
        """Let CLIP, or its tuned copy, look at regions; see `RegionViewer.look`."""
        if self.viewer is None:
            raise ValueError("regions are 'none': CLIP is shown nothing")
        visual = self.clip.visual if self.student is None else self.student
        return self.viewer.look(self.clip, visual, self.clip_frame(padded, size), size, mask_logits, chosen)

    # Scoring.

    def judge_with(self, *, crops: Mapping[str, Any] | None = None, ensemble: Mapping[str, Any] | None = None) -> None:
        """Change how regions are shown and how the two opinions are joined; no weight depends on either.

        Args:
            crops: options of `CropOptions` to replace.
            ensemble: options of `EnsembleOptions` to replace.
        """
        told = self.options
        changed = {
            key: type(old).model_validate({**old.model_dump(), **new})
            for key, old, new in (("crops", told.crops, crops or {}), ("ensemble", told.ensemble, ensemble or {}))
        }
        self.options = told.model_copy(update=changed)
        if self.viewer is not None:
            self.viewer = replace(self.viewer, crops=self.options.crops)

    def region_probabilities(self, regions: Tensor, text: Tensor, proposal_logits: Tensor | None) -> Tensor:
        """A^c (..., C): the softmax over the classes of what CLIP says of regions.

        Args:
            regions: (..., D).
            text: (C, D), CLIP's words.
            proposal_logits: (..., C + 1), what the generator says, or None.
        """
        cosines = unit_or_zero(regions.float()) @ text.float().T
        return ((self.options.region_temperature or self.options.temperature) * cosines).softmax(dim=-1)

    def class_scores(
        self, features: ImageFeatures, proposals: Proposals, text: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """The scores (B, N, C) of classes for the regions.

        Args:
            features: from `encode_images`.
            proposals: the regions.
            text: (C, D) or (C, 2, D).
            seen: (C,) bool or None.
        """
        own, clips = self.texts(text)
        logits = None if proposals.embeddings is None else self.proposal_logits(proposals.embeddings, own)
        opinion = None if logits is None else class_probabilities(logits)
        if self.viewer is None:
            return ensemble(opinion, None, self.options.ensemble, seen=seen)
        values, chosen, floor = features.values, proposals.valid, self.options.crops.min_score
        if floor and opinion is not None:
            good = opinion.amax(dim=-1) >= floor
            chosen = good if chosen is None else good & chosen
        if "regions" in values:
            views = Views(values["regions"], values["shown"])
        else:
            views = self.look(values["images"], features.size, proposals.mask_logits, chosen)
        probabilities = self.region_probabilities(views.regions, clips, logits)
        # Mask attention says something of every region, of one without a pixel too. MAFT's final model keeps it, and so
        # does Eq. 9, where A^c = 1 for such regions would give every unseen class the largest score there is.
        kept = opinion is None or self.options.ensemble.rule in ("region", "paper") or self.options.ensemble.weight <= 0
        shown = None if kept and self.viewer.kind == "mask-attention" else views.shown
        scores = ensemble(opinion, probabilities, self.options.ensemble, seen=seen, shown=shown)
        return scores if chosen is None else scores * chosen[..., None]

    def score(
        self,
        features: ImageFeatures,
        text: Tensor,
        *,
        word_to_class: Tensor | None = None,
        seen_words: Tensor | None = None,
    ) -> RegionScores:
        """Score words against images; see `SegmentationModel.score`.

        The score of a class at a pixel is the sum over the regions of its score there times their masks.
        """
        seen = None if seen_words is None else seen_words.to(text.device).bool()
        proposals = self.proposals_of(features, self.texts(text)[0])
        scores = self.class_scores(features, proposals, text, seen)
        offsets = None if seen is None or not self.options.seen_offset else seen.float() * self.options.seen_offset
        return self.pixel_scores(scores, proposals, features, word_to_class=word_to_class, offsets=offsets)

    # Training.

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, *, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of the stage that is trained.

        Args:
            images: (B, 3, H, W), normalised.
            labels: (B, h, w) long in 0..C-1, or 255; as large as the images, or smaller. In self-training -1 where only
                the place of an unseen pixel is known.
            text: (C, D) or (C, 2, D).
            seen: (C,) bool for self-training: pixels of other classes get the model's own best unseen class.

        Returns:
            "loss" and its parts: "loss_ce", if the proposals know classes, "loss_mask" and "loss_dice", and those of
            earlier decoder layers with their number behind; or "loss_mask_aware" and "loss_distillation", weighted.

        Raises:
            LexisegError: there is nothing to train, or a label is out of range.
        """
        if not self.trainable_names():
            return super().losses(images, labels, text, seen=seen)
        padded, size = self.pad(images), (int(images.shape[-2]), int(images.shape[-1]))
        if seen is not None:
            labels = self.pseudo_labels(padded, size, labels, text, seen)
        if self.stage == "maft":
            return self.mask_aware_losses(padded, size, labels, text)
        own = self.texts(text)[0]
        check_labels(labels, len(own))
        proposals = self.propose(padded, own)
        logits = [
            self.proposal_logits(level.embeddings, own) for level in proposals.levels if level.embeddings is not None
        ]
        frame = self.label_frame(padded, size, labels)
        weights = self.options.criterion
        return proposal_losses(proposals, logits or None, labels, weights, size=frame, num_classes=len(own))

    def mask_aware_losses(self, padded: Tensor, size: Size, labels: Tensor, text: Tensor) -> dict[str, Tensor]:
        """MAFT's losses (Sec. 4.2), on the masks of the frozen generator.

        Args:
            padded: (B, 3, H', W'), the padded frame.
            size: (H, W) of the pictures in it.
            labels: (B, h, w) long in 0..C-1, or 255.
            text: (C, D) or (C, 2, D).

        Raises:
            LexisegError: a label is out of range.
            ValueError: the option ``maft`` is not given, so that there is no tower to tune.
        """
        options = self.options.maft
        if options is None or self.student is None or self.viewer is None:
            raise ValueError("there is no tower to tune")
        own, clips = self.texts(text)
        with torch.no_grad():
            proposals = self.propose(padded, own).detach()
            logits = None if proposals.embeddings is None else self.proposal_logits(proposals.embeddings, own)
            frame = self.clip_frame(padded, size)
            image = self.viewer.square(self.clip, frame)
            masks = self.viewer.square_masks(self.student, image, frame, proposals.mask_logits)
        regions = self.viewer.attend(self.student, image, masks)
        probabilities = self.region_probabilities(regions, clips, logits)
        full = (self._masks_for(one, frame, size, labels) for one in proposals.mask_logits)
        mask_aware = mask_aware_step(probabilities, full, labels, proposals.valid, options)
        losses = {"loss": mask_aware, "loss_mask_aware": mask_aware.detach()}
        if options.distillation:
            with torch.no_grad():
                teacher = self.region_probabilities(self.viewer.whole(self.clip.visual, image), clips, None)
            student = self.region_probabilities(self.viewer.whole(self.student, image), clips, None)
            distillation = options.distillation * distillation_loss(student, teacher)
            losses |= {"loss": mask_aware + distillation, "loss_distillation": distillation.detach()}
        return losses

    def _masks_for(self, mask_logits: Tensor, frame: Tensor, size: Size, labels: Tensor) -> Tensor:
        """Masks (N, h, w) of one picture in [0, 1] at the size of its labels."""
        masks = self.upsampled(mask_logits[None], frame)[..., : size[0], : size[1]].sigmoid()
        return resize_masks(masks, (int(labels.shape[-2]), int(labels.shape[-1])))[0]

    @torch.no_grad()
    def pseudo_labels(self, padded: Tensor, size: Size, labels: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        """Fill in pixels of unseen classes with the model's own best unseen class, as ZSSeg's self-training does.

        The released code does this once, with a trained model, for the whole training set; here it is done in every
        step with the model as it is.

        Args:
            padded: (B, 3, H', W'), the padded frame.
            size: (H, W) of the pictures in it.
            labels: (B, h, w) long; ids of seen classes are kept, and 255 unless ``label_void``; all others, -1 too, are
                replaced.
            text: (C, D) or (C, 2, D) of all classes.
            seen: (C,) bool.

        Raises:
            LexisegError: every class is seen.
        """
        if bool(seen.all()):
            raise LexisegError("Self-training needs at least one unseen class; give the text of all classes.")
        unseen = (~seen).nonzero().flatten()
        features = self.encode_padded(padded, size)
        proposals = self.proposals_of(features, self.texts(text)[0])
        scores = self.class_scores(features, proposals, text, seen)[..., unseen]
        best = self.pixel_scores(scores, proposals, features).label_map((labels.shape[-2], labels.shape[-1]))
        return fill_unseen(labels, unseen[best], seen, label_void=self.options.label_void)
