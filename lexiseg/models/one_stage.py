"""What the one-stage systems share: a place is a patch, and mask logits on the grid of patches are scores and losses.

Where the authors' code and the papers differ the code is followed, and said so at that line, because the published
checkpoints need it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from lexiseg.losses.exclusive import exclusive_logits, exclusive_losses
from lexiseg.losses.masks import MaskLosses, mask_losses, pseudo_labels
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.models.options import Deviations, LossWeight, ModelOptions, Pixels, Triple, WindowOptions
from lexiseg.scores import GridScores
from lexiseg.windows import WindowPolicy


class OneStageOptions(WindowOptions):
    """Options of every one-stage system, with those of `WindowOptions`. The defaults are the papers', for any tower.

    Attributes:
        seen_offset: subtracted from the score of seen classes; the released code uses 0.1, and 0 after self-training.
        mask_size: side that masks of square images are upsampled to before the sigmoid (released: 512); None is the
            images' own size, as for images of other shapes.
        mask_loss: "focal" judges each class by itself (ZegCLIP's non-mutually exclusive loss, Sec. 3.2); with
            "cross-entropy" classes exclude each other, as in ZegCLIP's ablation: softmax, in loss and scores.
        mask_weight: factor on the mask loss (focal: Cascade-CLIP's Table 18 compares 10, 50, 100 and 150).
        dice_weight: factor on the dice loss, or on what takes its place.
        mean: mean of the images, RGB in 0..1; None is CLIP's. (Released: ImageNet's.)
        std: standard deviation of the images, RGB in 0..1; None is CLIP's.
        antialias: whether the resize before prediction smooths what it shrinks; the authors' (mmcv's) does not.

    ``weights_depend_on`` names the options that must be the same in a training and in the one that it starts from.
    """

    weights_depend_on: ClassVar[frozenset[str]] = frozenset({"mean", "std"})

    seen_offset: float = 0.1
    mask_size: Pixels | None = None
    mask_loss: Literal["focal", "cross-entropy"] = "focal"
    mask_weight: LossWeight = 100.0
    dice_weight: LossWeight = 1.0
    mean: Triple | None = None
    std: Deviations | None = None
    antialias: bool = True

    def window(self) -> WindowPolicy:
        """How the system is run over a picture by default."""
        return replace(super().window(), antialias=self.antialias)

    def changes_to_init(self, wanted: ModelOptions, given: dict[str, Any], name: str) -> dict[str, Any]:
        """The options that weights depend on, as the model to come has them; see `ModelOptions.changes_to_init`."""
        if not isinstance(wanted, OneStageOptions):
            return {}
        before, after = self.model_dump(mode="json"), wanted.model_dump(mode="json")
        names = sorted(self.weights_depend_on & wanted.weights_depend_on)
        return {name: after[name] for name in names if before[name] != after[name]}


class OneStageModel(SegmentationModel):
    """A system that gives mask logits (B, C, h, w) on the h x w patches of images (B, 3, H, W), for text (C, D)."""

    options: OneStageOptions
    family = "one-stage"
    weighs_classes = True

    @abstractmethod
    def grid_logits(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, C, h, w), float32, of classes ``text`` (C, D), before any resize."""

    def mask_loss(self, logits: Tensor, labels: Tensor, *, dice_weight: float) -> MaskLosses:
        """Focal loss or cross entropy, and dice, of mask logits (B, C, h, w) upsampled to labels (B, H, W).

        Focal: alpha_t (1 - p_t)^2 BCE with alpha 0.25, the mean over pixels, the sum over classes and images. Dice: 1 -
        (2 sum(p t) + 1) / (sum p + sum t + 1) of the classes in an image. Both are divided by the number of masks in
        the batch. A pixel without a class is a negative of all.
        """
        weight = self.options.mask_weight
        if self.options.mask_loss == "focal":
            return mask_losses(logits, labels, focal_weight=weight, dice_weight=dice_weight, weights=self.class_weights)
        return exclusive_losses(
            logits, labels, entropy_weight=weight, dice_weight=dice_weight, weights=self.class_weights
        )

    def class_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms of `losses`, see `mask_loss`."""
        parts = self.mask_loss(logits, labels, dice_weight=self.options.dice_weight)
        return {"loss": parts.total, "loss_mask": parts.mask, "loss_dice": parts.dice}

    def mask_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size the masks of images of ``size`` are upsampled to before the sigmoid."""
        side = self.options.mask_size
        return size if side is None or size[0] != size[1] else (side, side)

    def seen_offsets(self, seen_words: Tensor | None, text: Tensor) -> Tensor | None:
        """What is subtracted from the score of each word, (W,), or None for nothing."""
        if seen_words is None or not self.options.seen_offset:
            return None
        return seen_words.to(text.device).float() * self.options.seen_offset

    def patch_scores(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Logits (B, C, h, w) whose sigmoid is a class's score at a patch; with "cross-entropy" that is a softmax."""
        logits = self.grid_logits(features, text)
        return logits if self.options.mask_loss == "focal" else exclusive_logits(logits)

    def score_grid(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """`patch_scores`; see `SegmentationModel.score_grid`."""
        return self.patch_scores(features, text)

    def score(
        self,
        features: ImageFeatures,
        text: Tensor,
        *,
        word_to_class: Tensor | None = None,
        seen_words: Tensor | None = None,
    ) -> GridScores:
        """Score words against images; see `SegmentationModel.score`.

        A score is sigmoid(mask logit), less `OneStageOptions.seen_offset` for seen words. The papers write a softmax
        and do not mention the offset; the published numbers were measured as here.
        """
        return GridScores(
            self.score_grid(features, text),
            word_to_class=word_to_class,
            resize_to=self.mask_size(features.size),
            sigmoid=True,
            offsets=self.seen_offsets(seen_words, text),
        )

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, *, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of the class masks (ZegCLIP, Sec. 3.2; Cascade-CLIP, Eq. 3); see `SegmentationModel.losses`.

        Inductive: ``text`` holds the seen classes, ``labels`` their ranks, and pixels of unseen classes are 255 before
        they get here. Self-training: ``text`` holds all classes and ``seen`` says which had masks; pixels of other
        classes, or -1, get the model's own best unseen class.
        """
        features = self.encode_images(images)
        logits = self.grid_logits(features, text)
        size = (int(labels.shape[-2]), int(labels.shape[-1]))
        mask_size = self.mask_size(features.size)
        if self.options.mask_size is not None and mask_size != size:
            logits = F.interpolate(logits, size=mask_size, mode="bilinear", align_corners=False)
        if seen is not None:
            full = F.interpolate(logits.detach(), size=size, mode="bilinear", align_corners=False)
            labels = pseudo_labels(full, labels, seen)
        return self.class_losses(logits, labels)
