"""What the decoupled systems share: regions are proposed first, then each region is compared with the words.

That is the padded frame that everything lives in, the text rows with "no object" behind them, the generator's own class
scores, and the way from class scores of regions to pixels (MaskFormer's semantic inference).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.losses.masks import fill_unseen, unseen_of
from lexiseg.losses.proposals import ProposalWeights, full_precision, label_frame, mask_targets, proposal_losses
from lexiseg.models.base import ImageFeatures
from lexiseg.models.decoupled_init import DecoupledInit, DecoupledInitOptions
from lexiseg.models.options import Deviations, Pixels, Triple
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise, pixels_of
from lexiseg.proposals.base import Proposals
from lexiseg.proposals.leftover import LeftoverOptions, add_leftover
from lexiseg.regions.pooling import Size, resize_masks, unit_or_zero
from lexiseg.scores import RegionScores


class DecoupledOptions(DecoupledInitOptions):
    """Options that every decoupled system has, beside its ``proposals``.

    Attributes:
        leftover: adds what no proposal claims at prediction, see `lexiseg.proposals.leftover`; by default nothing.
        temperature: factor on cosines before a softmax over classes (released: 100, whatever CLIP's own scale is).
        align_corners: how mask logits are interpolated to the padded frame (FreeSeg and MAFT: True).
        mean: mean of the images, RGB in 0..1. The generators' backbones were trained with ImageNet's.
        std: their standard deviation.
        short_side: see `WindowOptions` (released: 640 or 512).
        long_side: then the longer side becomes no longer than this (released: 2560 on COCO-Stuff, else 2048).
    """

    leftover: LeftoverOptions = LeftoverOptions()
    temperature: Annotated[float, Field(gt=0)] = 100.0
    align_corners: bool = False
    mean: Triple = IMAGENET_MEAN
    std: Deviations = IMAGENET_STD
    long_side: Pixels | None = None


class DecoupledModel(DecoupledInit):
    """A generator of proposals beside a CLIP.

    Images are padded at the right and the bottom, after they were normalised, with zeros to multiples of the
    generator's stride: the *padded frame*. Mask logits cover that frame. Features (`encode_images`) hold ``images`` (B,
    3, H', W'), the padded frame, and, unless the generator needs to see the words, the proposals: ``mask_logits`` (B,
    N, h, w), ``embeddings`` (B, N, E) and ``valid`` (B, N) where it gives them, and what the system makes of them
    (`encode_regions`).

    Attributes:
        generator: proposes regions; a `LexisegError` if its class embeddings do not have CLIP's width.
        no_object: (1, D), the row "no object" behind the text rows.
    """

    options: DecoupledOptions
    no_graph = "is a decoupled system, whose regions and crops depend on the picture"

    def __init__(self, clip: CLIP, options: DecoupledOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        self.generator = self.options.proposals.build()
        if self.generator.embed_dim not in (None, clip.embed_dim):
            raise LexisegError(
                f"The proposals' class embeddings have {self.generator.embed_dim} numbers and CLIP's text embeddings "
                f"{clip.embed_dim}; set proposals.embed_dim to {clip.embed_dim}."
            )
        self.no_object = nn.Parameter(torch.randn(1, clip.embed_dim) * clip.embed_dim**-0.5)

    def pad(self, images: Tensor) -> Tensor:
        """Put normalised images (B, 3, H, W) into the padded frame: zeros at the right and the bottom."""
        stride = self.generator.stride
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % stride, 0, -height % stride))

    def clip_frame(self, padded: Tensor, size: Size) -> Tensor:
        """The padded frame (B, 3, H', W') of pictures of ``size`` normalised for CLIP, the padding 0 again."""
        height, width = size
        pixels = pixels_of(padded[..., :height, :width], self.mean, self.std)
        inside = normalise(pixels, self.clip.mean, self.clip.std)
        return F.pad(inside, (0, padded.shape[-1] - width, 0, padded.shape[-2] - height))

    def no_object_row(self) -> Tensor:
        """The row (1, D) that stands for "no object"; of unit length."""
        return unit_or_zero(self.no_object)

    def text_rows(self, text: Tensor) -> Tensor:
        """The generator's words and, last, "no object": text (C, D), or (C, S, D) with those first, to (C + 1, D)."""
        row = self.no_object_row()
        return torch.cat([(text[:, 0] if text.dim() == 3 else text).to(row.dtype), row])

    def proposal_scale(self) -> Tensor | float:
        """Factor on the cosines of the generator's class embeddings."""
        return self.options.temperature

    def proposal_logits(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """What the generator itself says of its regions: embeddings (B, N, D) and text to logits (B, N, C + 1).

        The last column is "no object". An embedding of 0 says nothing: all its logits are 0.
        """
        cosines = unit_or_zero(full_precision(embeddings)) @ full_precision(self.text_rows(text)).T
        return self.proposal_scale() * cosines

    def propose(self, padded: Tensor, text: Tensor | None = None, size: Size | None = None) -> Proposals:
        """Run the generator on the padded frame, in which the pictures have the ``size`` (H, W); None if they fill it.

        ``text`` is shown to a generator that reads words. Outside training leftover proposals are added, as configured.
        """
        rows = self.text_rows(text) if self.generator.needs_text and text is not None else None
        proposals: Proposals = self.generator(padded, rows)
        frame = padded.shape[-2:]
        return proposals if self.training else add_leftover(proposals, self.options.leftover, frame, size or frame)

    def frame(self, images: Tensor) -> ImageFeatures:
        """Features of normalised images (B, 3, H, W) that hold their padded frame and nothing else yet."""
        return ImageFeatures((int(images.shape[-2]), int(images.shape[-1])), {"images": self.pad(images)})

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Pad the images and, if the words do not matter for that, propose regions; see the class."""
        features = self.frame(images)
        return features if self.generator.needs_text else self.proposed(features)

    def with_proposals(self, features: ImageFeatures, proposals: Proposals) -> ImageFeatures:
        """The frame of ``features`` with these proposals, and with what the system makes of them."""
        named = {name: getattr(proposals, name) for name in ("mask_logits", "embeddings", "valid")}
        values = {"images": features.values["images"], **{name: x for name, x in named.items() if x is not None}}
        return replace(features, values=values | self.encode_regions(values["images"], features.size, proposals))

    @abstractmethod
    def encode_regions(self, padded: Tensor, size: Size, proposals: Proposals) -> dict[str, Tensor]:
        """What the system makes of proposals for pictures of ``size`` in a padded frame, as named tensors."""

    @abstractmethod
    def class_scores(self, features: ImageFeatures, text: Tensor, seen: Tensor | None = None) -> Tensor:
        """The scores (B, N, C) of classes for the regions in ``features``."""

    def proposed(self, features: ImageFeatures, text: Tensor | None = None) -> ImageFeatures:
        """``features`` as they are if they hold proposals, else with those for the words of ``text``."""
        if "mask_logits" in features.values:
            return features
        return self.with_proposals(features, self.propose(features.values["images"], text, features.size))

    def upsampled(self, mask_logits: Tensor, padded: Tensor) -> Tensor:
        """Mask logits (B, N, h, w) at every pixel of the padded frame: (B, N, H', W')."""
        return resize_masks(mask_logits, padded.shape[-2:], self.options.align_corners)

    def proposal_losses(
        self, features: ImageFeatures, labels: Tensor, text: Tensor, weights: ProposalWeights
    ) -> dict[str, Tensor]:
        """MaskFormer's criterion over every level of the generator, see `lexiseg.losses.proposals`.

        Of ``features`` the padded frame counts; labels (B, h, w) may be smaller than the pictures.
        """
        padded = features.values["images"]
        targets = mask_targets(labels, label_frame(padded.shape[-2:], features.size, labels), len(text))
        proposals = self.propose(padded, text)
        logits = [self.proposal_logits(x.embeddings, text) for x in proposals.levels if x.embeddings is not None]
        return proposal_losses(proposals, logits or None, targets, weights)

    @torch.no_grad()
    def pseudo_labels(self, features: ImageFeatures, labels: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        """Give pixels of unseen classes the model's own best unseen class (self-training); see `fill_unseen`.

        The released codes do this once, with a trained model; here every step does. A `LexisegError` if all are seen.
        """
        unseen, features = unseen_of(seen), self.proposed(features, text)
        scores = self.class_scores(features, text, seen)[..., unseen]
        best = self.pixel_scores(scores, features).label_map((labels.shape[-2], labels.shape[-1]))
        return fill_unseen(labels, unseen[best], seen)

    def pixel_scores(
        self, class_scores: Tensor, features: ImageFeatures, *, sigmoid: bool = True, **words: Any
    ) -> RegionScores:
        """Class scores (B, N, W) of the regions as scores of pixels, sum_n class_scores[n] * sigmoid(mask_n).

        Proposals that are not valid take no part. Without ``sigmoid`` masks are taken as they are. What `RegionScores`
        takes of words is in ``words``.
        """
        values = features.values
        if "valid" in values:
            class_scores = class_scores * values["valid"][..., None].to(class_scores.dtype)
        padded = values["images"].shape
        return RegionScores(
            class_scores.float(),
            values["mask_logits"].float(),
            resize_to=(int(padded[-2]), int(padded[-1])),
            align_corners=self.options.align_corners,
            crop=features.size,
            sigmoid=sigmoid,
            **words,
        )
