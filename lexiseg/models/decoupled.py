"""What the decoupled systems share: regions are proposed first, then each region is compared with the words.

ZSSeg, ZegFormer, FreeSeg and DeOP are compositions of a proposal generator, a region classifier and a rule that joins
the two opinions. This file holds what does not differ between them: the padded frame that everything lives in, the
text rows with the no-object row behind them, the generator's own class scores, and the way from class scores of
regions to pixels (MaskFormer's semantic inference).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.load import shapes_of
from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures, SegmentationModel, Towers
from lexiseg.models.options import Deviations, ModelOptions, Pixels, Triple, WindowOptions
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise, pixels_of
from lexiseg.proposals.base import ProposalGenerator, Proposals
from lexiseg.proposals.leftover import LeftoverOptions, add_leftover
from lexiseg.proposals.options import GeneratorOptions, MaskFormerOptions, QueryOptions
from lexiseg.regions.pooling import full_precision, resize_masks, unit_or_zero
from lexiseg.scores import RegionScores

Size = tuple[int, int]
NO_WEIGHTS = {"dropout", "frozen_dropout"}
"""Options of a generator that its weights do not depend on."""


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

    def changes_to_init(self, wanted: ModelOptions, given: dict[str, Any], name: str) -> dict[str, Any]:
        """How the proposals are built, as the model to come has them; see `ModelOptions.changes_to_init`."""
        theirs = wanted.proposals if isinstance(wanted, DecoupledOptions) else None
        # SAM is not trained, so whoever has it takes no proposals over, and only the rest has to fit.
        if not isinstance(self.proposals, QueryOptions) or not isinstance(theirs, QueryOptions):
            return {}
        before, after = self.proposals.model_dump(mode="json"), theirs.model_dump(mode="json")
        if before["kind"] != after["kind"]:
            raise LexisegError(
                f"'{name}' trains proposals of the kind '{before['kind']}', and the recipe's are of the kind "
                f"'{after['kind']}'; give both the same."
            )
        changes = {key: after[key] for key in after if key not in NO_WEIGHTS and before[key] != after[key]}
        said = given.get("proposals") or {"kind": after["kind"]}
        return {"proposals": {**said, **changes}} if changes else {}


class DecoupledModel(SegmentationModel):
    """A generator of proposals beside a CLIP.

    Images are padded at the right and the bottom, after they were normalised, with zeros to multiples of the
    generator's stride: the *padded frame*. Mask logits cover that frame. Features (`encode_images`) hold ``images`` (B,
    3, H', W'), the padded frame, and, unless the generator needs to see the words, the proposals: ``mask_logits`` (B,
    N, h, w), ``embeddings`` (B, N, E) and ``valid`` (B, N) where it gives them.

    Attributes:
        generator: proposes regions; a `LexisegError` if its class embeddings do not have CLIP's width.
        no_object: (1, D), the row "no object" behind the text rows.
    """

    options: DecoupledOptions
    family = "decoupled"

    def __init__(self, clip: CLIP, options: DecoupledOptions, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, tuple(seen_names))
        self.generator: ProposalGenerator = options.proposals.build()
        if self.generator.embed_dim not in (None, clip.embed_dim):
            raise LexisegError(
                f"The proposals' class embeddings have {self.generator.embed_dim} numbers and CLIP's text embeddings "
                f"{clip.embed_dim}; set proposals.embed_dim to {clip.embed_dim}."
            )
        self.no_object = nn.Parameter(torch.randn(1, clip.embed_dim) * clip.embed_dim**-0.5)

    @classmethod
    def check_init(
        cls, options: ModelOptions, other: type[SegmentationModel], other_options: ModelOptions, clip: Towers, name: str
    ) -> None:
        """Decoupled systems take over what fits; see `SegmentationModel.check_init`."""
        if cls.family != other.family:
            super().check_init(options, other, other_options, clip, name)

    def init_from(self, other: SegmentationModel, what: str) -> tuple[str, ...]:
        """All weights of the same form of the same system, else the parts that fit; see `SegmentationModel.init_from`.

        Proposals are taken where the generators are equal, so that one training of proposals serves all.
        """
        alike = other.system == self.system and shapes_of(other) == shapes_of(self)
        parts = self.take_parts(other, what) if isinstance(other, DecoupledModel) and not alike else ()
        return parts or super().init_from(other, what)

    def take_parts(self, other: DecoupledModel, what: str) -> tuple[str, ...]:
        """Copy the parts of ``other`` that fit, and name them; a `LexisegError` if it proposes regions differently."""
        parts: tuple[str, ...] = ()
        # SAM comes trained: there is nothing to take over, and the rest may still be of use.
        if any(True for _ in self.generator.parameters()):
            before, now = (one.options.proposals.model_dump(exclude=NO_WEIGHTS) for one in (other, self))
            if before != now:
                key = next(key for key in (*now, *before) if now.get(key) != before.get(key))
                raise LexisegError(
                    f"{what} has other proposals than the recipe: '{key}' is {before.get(key)} in the model and "
                    f"{now.get(key)} in the recipe; give both the same."
                )
            self.generator.load_state_dict(other.generator.state_dict())
            self.no_object.data.copy_(other.no_object.data)
            parts = ("proposals",)
        return (*parts, "prompts") if copied(other.learned_prompts, self.learned_prompts) else parts

    def check_start(self, *, proposals: bool, steps: int) -> None:
        """Refuse random proposals that are not trained: its loss would fall for days, and nothing would be learned."""
        if not proposals and not self.generator.trainable and any(True for _ in self.generator.parameters()):
            raise LexisegError(
                f"This training of '{self.system}' builds on proposals that it does not train itself, and they have "
                "random weights; let 'initial' name a model or a recipe that trains them, as the packaged recipes with "
                "'maft' or 'deop' in their names do."
            )

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

        ``text`` (C, D) is shown to a generator that reads words; ``size`` (H, W) is that of the pictures in the frame,
        None if they fill it.
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
        """`encode_images` of normalised pictures of ``size`` that lie in a padded frame (B, 3, H', W') already."""
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
        return resize_masks(mask_logits, (int(padded.shape[-2]), int(padded.shape[-1])), self.options.align_corners)

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
        sigmoid: bool = True,
    ) -> RegionScores:
        """Class scores (B, N, W) of regions as scores of pixels, sum_n class_scores[n] * sigmoid(mask_n).

        Proposals that are not valid take no part; ``offsets`` (W,) are subtracted from the words' scores.
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
            sigmoid=sigmoid,
            offsets=offsets,
        )

    def set_trainable(self) -> SegmentationModel:
        """Let exactly the `trainable_names` require gradients; a frozen generator is told so."""
        super().set_trainable()
        self.generator.trainable = any(parameter.requires_grad for parameter in self.generator.parameters())
        self.generator.train(self.training)
        return self


def copied(source: nn.Module | None, target: nn.Module | None) -> bool:
    """Copy weights if both modules are there and of one form; whether that was so."""
    if source is None or target is None or shapes_of(source) != shapes_of(target):
        return False
    target.load_state_dict(source.state_dict())
    return True
