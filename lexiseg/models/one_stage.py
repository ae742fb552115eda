"""What the one-stage systems share: a CLIP tower with prompts, class queries, decoders, and a grid of mask logits.

A place is a patch. The tower runs once (`lexiseg.models.one_stage_tower`); one or more decoders, each with a projection
of the queries of its own, turn patches and words into mask logits, which are summed. A system is a file that says which
patches each decoder sees. Where the authors' code and the papers differ the code is followed, and said so at that
line, because the published checkpoints need it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.losses import (
    exclusive_logits,
    exclusive_losses,
    mask_losses,
    pixel_accuracy,
    pseudo_labels,
    ssim_loss,
)
from lexiseg.models.base import ImageFeatures
from lexiseg.models.mask_decoder import DecoderTrace, MaskDecoder
from lexiseg.models.one_stage_tower import OneStageTower
from lexiseg.models.spectral_decoder import SpectralDecoder
from lexiseg.scores import GridScores

_CLASS_CHUNK = 4096
# Logits of the "matching" start are gain * cosine - offset: a cosine of 0.45 is undecided.
_MATCHING_GAIN = 20.0
_MATCHING_OFFSET = 9.0

Decoder = MaskDecoder | SpectralDecoder


@dataclass(frozen=True)
class Head:
    """A decoder, and the linear map that makes its queries of descriptors or text."""

    query_proj: nn.Linear
    decoder: Decoder


class OneStageModel(OneStageTower):
    """The one-stage systems: a tower, and heads whose mask logits are summed.

    Shapes: images (B, 3, H, W) give h x w = N patches; text is (C, D); mask logits are (B, C, h, w). It is built as
    `OneStageTower` says.
    """

    def build_head(self, dim: int | None = None) -> tuple[nn.Linear, Decoder]:
        """Make the modules of a `Head`; ``dim`` is the decoder's width, None that of the joint embedding."""
        options, embed_dim = self.options, self.clip.embed_dim
        dim = dim or embed_dim
        query_proj = nn.Linear((2 if options.descriptor else 1) * embed_dim, dim)
        if self.spectral_options is not None:
            return query_proj, SpectralDecoder(dim, options.decoder_layers, options.ffn_ratio, options.dropout)
        decoder = MaskDecoder(dim, options.decoder_layers, options.decoder_heads, options.ffn_ratio, options.dropout)
        return query_proj, decoder

    @abstractmethod
    def heads(self) -> list[Head]:
        """The decoders whose mask logits are summed."""

    @abstractmethod
    def memories(self, features: ImageFeatures) -> list[Tensor]:
        """The patches (B, h, w, dim) that each of the `heads` sees."""

    @torch.no_grad()
    def start_as_matching(self, loud: int = 0) -> None:
        """Let the head ``loud`` start from CLIP's own comparison of patches and words, and the others from zero."""
        # Patches vary least along the direction that CLIP's projection amplifies least.
        basis = torch.linalg.svd(self.clip.visual.proj.float(), full_matrices=True).Vh
        for index, head in enumerate(self.heads()):
            silent = index != loud
            head.decoder.start_as_matching(head.query_proj, _MATCHING_GAIN, _MATCHING_OFFSET, basis, silent=silent)

    def descriptor(self, cls: Tensor, text: Tensor) -> Tensor:
        """Relationship descriptor [t * cls, t] of class embeddings (B, D) and text (C, D): (B, C, 2 D).

        Source: ZegCLIP, Sec. 3.3. Cascade-CLIP's figure suggests a descriptor for each of its stages; its code, and
        this one, take the final class embedding for all.
        """
        text = text.to(cls.dtype)[None]
        return torch.cat([text * cls[:, None], text.expand(len(cls), -1, -1)], dim=-1)

    def queries(self, cls: Tensor, text: Tensor) -> list[Tensor]:
        """Class queries (B, C, dim) of each of the `heads`, of class embeddings (B, D) and text (C, D)."""
        if self.options.descriptor:
            inputs = self.descriptor(cls, text)
            return [head.query_proj(inputs) for head in self.heads()]
        inputs = text.to(cls.dtype)[None]
        return [head.query_proj(inputs).expand(len(cls), -1, -1) for head in self.heads()]

    def mask_logits(
        self, features: ImageFeatures, text: Tensor, traces: list[list[DecoderTrace]] | None = None
    ) -> Tensor:
        """Mask logits (B, C, h, w) of classes ``text`` (C, D), before any resize.

        Args:
            features: from `encode_images`.
            text: (C, D).
            traces: a list that receives the trace of each head, for comparisons.

        Raises:
            LexisegError: the system has no heads.
        """
        cls, heads, memories = features.values["cls"], self.heads(), self.memories(features)
        grid = (int(memories[0].shape[1]), int(memories[0].shape[2]))
        projected = [
            head.decoder.project_memory(memory.flatten(1, 2), grid)
            for head, memory in zip(heads, memories, strict=True)
        ]
        if traces is not None:
            traces.extend([] for _ in heads)

        def decode(part: Tensor) -> Tensor:
            total: Tensor | None = None
            for index, (head, queries) in enumerate(zip(heads, self.queries(cls, part), strict=True)):
                logits = head.decoder(queries, projected[index], None if traces is None else traces[index])
                # A sum, not a mean, and no loss of its own for any head (Cascade-CLIP, Eq. 2).
                total = logits if total is None else total + logits
            if total is None:
                raise LexisegError(f"{self.system} has no decoder.")
            return total

        if self.training or traces is not None or len(text) <= _CLASS_CHUNK:
            return decode(text).unflatten(2, grid)
        # Queries are independent of each other: many classes are decoded in parts, into one tensor.
        logits = cls.new_empty((len(cls), len(text), grid[0] * grid[1]))
        for start in range(0, len(text), _CLASS_CHUNK):
            part = text[start : start + _CLASS_CHUNK]
            logits[:, start : start + len(part)] = decode(part)
        return logits.unflatten(2, grid)

    def grid_logits(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, C, h, w), float32, before any resize."""
        return self.mask_logits(features, text).float()

    def mask_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size the masks of images of ``size`` are upsampled to before the sigmoid."""
        side = self.options.mask_size
        return size if side is None or size[0] != size[1] else (side, side)

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
        over the logits and do not mention the offset; the published numbers were measured as here. A model trained with
        ``mask_loss`` "cross-entropy" has the softmax: at each patch a score is its probability among the words.
        """
        offsets = None
        if seen_words is not None and self.options.seen_offset:
            offsets = seen_words.to(text.device).float() * self.options.seen_offset
        logits = self.grid_logits(features, text)
        return GridScores(
            logits if self.options.mask_loss == "focal" else exclusive_logits(logits),
            word_to_class=word_to_class,
            resize_to=self.mask_size(features.size),
            sigmoid=True,
            offsets=offsets,
        )

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        text: Tensor,
        *,
        seen: Tensor | None = None,
        accuracy: bool = False,
    ) -> dict[str, Tensor]:
        """Focal and dice loss of the class masks (ZegCLIP, Sec. 3.2; Cascade-CLIP, Eq. 3), for SPT-SEG focal and SSIM.

        With ``mask_loss`` "cross-entropy" the cross entropy of a softmax stands in the focal loss's place.

        Inductive training: ``text`` holds the seen classes, ``labels`` their ranks, and pixels of unseen classes are
        255 before they get here, which makes them negatives of every class. Transductive training
        (self-training): ``text`` holds all classes and ``seen`` says which had masks; pixels of other classes, or -1,
        get the model's own best unseen class (see `lexiseg.losses.pseudo_labels`).

        Args:
            images: (B, 3, H, W), normalised.
            labels: (B, h, w) long; any size, the masks are resized to it.
            text: (C, D).
            seen: (C,) bool for self-training, else None.
            accuracy: add "accuracy", the percentage of labelled pixels whose class has the largest logit.

        Returns:
            "loss_mask" and "loss_dice", or "loss_ssim", weighted, and their sum "loss".

        Raises:
            LexisegError: a label is out of range.
        """
        features = self.encode_images(images)
        logits = self.grid_logits(features, text)
        size = (int(labels.shape[-2]), int(labels.shape[-1]))
        mask_size = self.mask_size(features.size)
        if self.options.mask_size is not None and mask_size != size:
            logits = F.interpolate(logits, size=mask_size, mode="bilinear", align_corners=False)
        full = None
        if accuracy or seen is not None:
            full = F.interpolate(logits.detach(), size=size, mode="bilinear", align_corners=False)
        if full is not None and seen is not None:
            labels = pseudo_labels(full, labels, seen)
        losses = self._class_losses(logits, labels)
        if accuracy and full is not None:
            losses["accuracy"] = pixel_accuracy(full, labels)
        return losses

    def _class_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms of `losses` for mask logits (B, C, h, w) and labels (B, H, W)."""
        options, spectral = self.options, self.spectral_options is not None
        dice_weight = 0.0 if spectral else options.dice_weight
        if options.mask_loss == "focal":
            parts = mask_losses(logits, labels, focal_weight=options.mask_weight, dice_weight=dice_weight)
        else:
            parts = exclusive_losses(logits, labels, entropy_weight=options.mask_weight, dice_weight=dice_weight)
        if not spectral:
            return {"loss": parts.total, "loss_mask": parts.mask, "loss_dice": parts.dice}
        ssim = ssim_loss(logits, labels, weight=options.dice_weight)
        return {"loss": parts.total + ssim, "loss_mask": parts.mask, "loss_ssim": ssim.detach()}
