"""What the decoupled systems share: regions are proposed first, then each region is compared with the words.

ZSSeg, ZegFormer, FreeSeg and DeOP are compositions of a proposal generator, a region classifier and a rule that joins
the two opinions. This file holds what does not differ between them: the padded frame that everything lives in, the
text rows with the no-object row behind them, the generator's own class scores, and the way from class scores of
regions to pixels (MaskFormer's semantic inference).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models.base import (
    Deviations,
    ImageFeatures,
    ModelOptions,
    Pixels,
    SegmentationModel,
    Triple,
    WindowOptions,
)
from lexiseg.models.mask_decoder import unit
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD
from lexiseg.proposals.base import ProposalGenerator, Proposals
from lexiseg.proposals.build import build_generator
from lexiseg.proposals.leftover import LeftoverOptions, add_leftover
from lexiseg.proposals.options import GeneratorOptions, MaskFormerOptions
from lexiseg.regions.pooling import full_precision, unit_or_zero
from lexiseg.scores import RegionScores
from lexiseg.windows import WindowPolicy

Size = tuple[int, int]


class DecoupledOptions(WindowOptions):
    """Options that every decoupled system has.

    Attributes:
        proposals: which generator proposes the regions, and how it is built.
        leftover: what no proposal claims as proposals of their own, see `lexiseg.proposals.leftover`; the default adds
            none. They are there at prediction, and take no part in any training.
        temperature: factor on cosines before a softmax over classes. The released code has 100 in it and does not look
            at CLIP's own scale.
        align_corners: how mask logits are interpolated to the padded frame (FreeSeg and MAFT: True).
        mean: mean of the images, RGB in 0..1. The generators' backbones were trained with ImageNet's.
        std: their standard deviation.
        short_side: length that pictures' shorter side is resized to at prediction (released: 640 or 512); None keeps
            the picture's size.
        long_side: then the longer side becomes no longer than this (released: 2560 on COCO-Stuff, else 2048).
        window_size: side of a sliding window at prediction; None runs whole pictures, as all released systems do.
        window_stride: its stride.
    """

    proposals: GeneratorOptions = MaskFormerOptions()
    leftover: LeftoverOptions = LeftoverOptions()
    temperature: Annotated[float, Field(gt=0)] = 100.0
    align_corners: bool = False
    mean: Triple = IMAGENET_MEAN
    std: Deviations = IMAGENET_STD
    long_side: Pixels | None = None


class DecoupledModel(SegmentationModel):
    """A generator of proposals beside a CLIP.

    Images are padded at the right and the bottom, after they were normalised, with zeros to multiples of the
    generator's stride: the *padded frame*. Mask logits cover that frame.

    Features (`encode_images`) hold ``images`` (B, 3, H', W'), the padded frame, and, unless the generator needs to see
    the words, the proposals: ``mask_logits`` (B, N, h, w), ``embeddings`` (B, N, E) and ``valid`` (B, N) where it gives
    them.

    Args:
        clip: the towers.
        options: see `DecoupledOptions`.
        seen_names: classes that had masks in training.

    Attributes:
        generator: proposes regions.
        no_object: (1, D), the row "no object" behind the text rows.

    Raises:
        LexisegError: the generator's class embeddings do not have CLIP's width.
    """

    options: DecoupledOptions
    options_class: ClassVar[type[ModelOptions]] = DecoupledOptions

    def __init__(self, clip: CLIP, options: DecoupledOptions, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, tuple(seen_names))
        self.generator: ProposalGenerator = build_generator(options.proposals)
        if self.generator.embed_dim not in (None, clip.embed_dim):
            raise LexisegError(
                f"The proposals' class embeddings have {self.generator.embed_dim} numbers and CLIP's text embeddings "
                f"{clip.embed_dim}; set proposals.embed_dim to {clip.embed_dim}."
            )
        self.no_object = nn.Parameter(torch.randn(1, clip.embed_dim) * clip.embed_dim**-0.5)

    @property
    def mean(self) -> Triple:
        """Mean the images are normalised with, RGB in 0..1."""
        return self.options.mean

    @property
    def std(self) -> Triple:
        """Standard deviation the images are normalised with, RGB in 0..1."""
        return self.options.std

    @property
    def window(self) -> WindowPolicy:
        """How to run it over a picture by default."""
        options = self.options
        stride = options.window_stride or options.window_size or 0
        return WindowPolicy(options.window_size, stride, options.short_side, options.long_side)

    def pad(self, images: Tensor) -> Tensor:
        """Put normalised images (B, 3, H, W) into the padded frame: zeros at the right and the bottom."""
        stride = self.generator.stride
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % stride, 0, -height % stride))

    def pixels(self, images: Tensor) -> Tensor:
        """Undo the normalisation: images (B, 3, H, W) in 0..1."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return images * std + mean

    def clip_normalise(self, pixels: Tensor) -> Tensor:
        """Normalise pixels (..., 3, H, W) in 0..1 as CLIP wants them."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.clip.mean, self.clip.std))
        return (pixels - mean) / std

    def clip_frame(self, padded: Tensor, size: Size) -> Tensor:
        """The padded frame (B, 3, H', W') as CLIP wants it: normalised for CLIP, the padding 0 again.

        Args:
            padded: see `pad`.
            size: (H, W) of the picture in it.
        """
        height, width = size
        inside = self.clip_normalise(self.pixels(padded[..., :height, :width]))
        return F.pad(inside, (0, padded.shape[-1] - width, 0, padded.shape[-2] - height))

    def no_object_row(self) -> Tensor:
        """The row (1, D) that stands for "no object"; of unit length."""
        return unit(self.no_object)

    def text_rows(self, text: Tensor) -> Tensor:
        """Classes and, last, "no object": text (C, D) to (C + 1, D)."""
        row = self.no_object_row()
        return torch.cat([text.to(row.dtype), row])

    def proposal_scale(self) -> Tensor | float:
        """Factor on the cosines of the generator's class embeddings."""
        return self.options.temperature

    def proposal_logits(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """What the generator itself says of its regions: embeddings (B, N, D), text (C, D), logits (B, N, C + 1).

        The last column is "no object". An embedding of 0 says nothing: all its logits are 0.
        """
        return self.proposal_scale() * (
            unit_or_zero(full_precision(embeddings)) @ full_precision(self.text_rows(text)).T
        )

    def propose(self, padded: Tensor, text: Tensor | None = None, size: Size | None = None) -> Proposals:
        """Run the generator on the padded frame, and outside training add what it leaves over, if that is asked for.

        Args:
            padded: (B, 3, H', W').
            text: (C, D), what a generator that reads words is shown.
            size: (H, W) of the pictures in the frame; None: they fill it.
        """
        rows = self.text_rows(text) if self.generator.needs_text and text is not None else None
        proposals: Proposals = self.generator(padded, rows)
        if self.training:
            return proposals
        height, width = size or (int(padded.shape[-2]), int(padded.shape[-1]))
        inside = (height / padded.shape[-2], width / padded.shape[-1])
        return add_leftover(proposals, self.options.leftover, inside)

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Pad the images and, if the words do not matter for that, propose regions; see the class."""
        size = (int(images.shape[-2]), int(images.shape[-1]))
        return self.encode_padded(self.pad(images), size)

    def encode_padded(self, padded: Tensor, size: Size) -> ImageFeatures:
        """`encode_images` of images (B, 3, H', W') that already lie in a padded frame, as in a batch of several sizes.

        Args:
            padded: normalised; 0 where there is no picture.
            size: (H, W) of the pictures.
        """
        values = {"images": padded}
        if not self.generator.needs_text:
            values |= self.kept(self.propose(padded, None, size))
        return ImageFeatures(size, values)

    @staticmethod
    def kept(proposals: Proposals) -> dict[str, Tensor]:
        """Proposals as named tensors, without the earlier levels."""
        values = {"mask_logits": proposals.mask_logits}
        if proposals.embeddings is not None:
            values["embeddings"] = proposals.embeddings
        if proposals.valid is not None:
            values["valid"] = proposals.valid
        return values

    def proposals_of(self, features: ImageFeatures, text: Tensor) -> Proposals:
        """The proposals kept in ``features``; made now, from the words ``text`` (C, D), if they are not."""
        values = features.values
        if "mask_logits" not in values:
            return self.propose(values["images"], text, features.size)
        return Proposals(values["mask_logits"], values.get("embeddings"), values.get("valid"))

    def upsampled(self, mask_logits: Tensor, padded: Tensor) -> Tensor:
        """Mask logits (B, N, h, w) at every pixel of the padded frame: (B, N, H', W')."""
        size = (int(padded.shape[-2]), int(padded.shape[-1]))
        if not mask_logits.shape[1]:
            return mask_logits.new_zeros(len(mask_logits), 0, *size)
        return F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=self.options.align_corners)

    @staticmethod
    def label_frame(padded: Tensor, size: Size, labels: Tensor) -> Size:
        """The size of the padded frame in pixels of the labels, which may be smaller than the pictures."""
        height, width = (
            max(round(int(full) * int(part) / whole), int(part))
            for full, part, whole in zip(padded.shape[-2:], labels.shape[-2:], size, strict=True)
        )
        return height, width

    def pixel_scores(
        self,
        class_scores: Tensor,
        proposals: Proposals,
        features: ImageFeatures,
        *,
        word_to_class: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> RegionScores:
        """Class scores of regions as scores of pixels, sum_n class_scores[n] * sigmoid(mask_n).

        Args:
            class_scores: (B, N, W).
            proposals: the regions; those that are not valid take no part.
            features: the padded frame and the size of the pictures in it.
            word_to_class: see `SegmentationModel.score`.
            offsets: (W,) subtracted from the words' scores.
        """
        if proposals.valid is not None:
            class_scores = class_scores * proposals.valid[..., None].to(class_scores.dtype)
        padded = features.values["images"].shape
        return RegionScores(
            class_scores.float(),
            proposals.mask_logits.float(),
            word_to_class=word_to_class,
            resize_to=(int(padded[-2]), int(padded[-1])),
            align_corners=self.options.align_corners,
            crop=features.size,
            sigmoid=True,
            offsets=offsets,
        )

    @abstractmethod
    def score(
        self,
        features: ImageFeatures,
        text: Tensor,
        *,
        word_to_class: Tensor | None = None,
        seen_words: Tensor | None = None,
    ) -> RegionScores:
        """Score words against images; see `SegmentationModel.score`."""

    def set_trainable(self) -> SegmentationModel:
        """Let exactly the `trainable_names` require gradients; a frozen generator is told so."""
        super().set_trainable()
        self.generator.trainable = any(parameter.requires_grad for parameter in self.generator.parameters())
        self.generator.train(self.training)
        return self
