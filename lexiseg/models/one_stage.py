"""What the one-stage systems share: mask logits on the grid of patches, and the scores and losses made of them.

A decoder (`MaskDecoder`) makes such logits: class queries attend to the patches, and the attention logits of the last
layer are the mask logits. Where the papers leave out what their numbers were measured with, the authors' code is
followed, and the docstring there says so.
"""

from abc import abstractmethod
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.losses.masks import MaskLosses, exclusive_logits, exclusive_losses, mask_losses, pseudo_labels
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.models.options import Deviations, LossWeight, Pixels, Triple, WindowOptions
from lexiseg.scores import GridScores


class DecoderLayer(nn.Module):
    """Cross-attention from queries to patches (ZegCLIP, Sec. 3.3), residual and norm, and an FFN likewise.

    The patches' keys and values, its memory, do not depend on the queries and are computed once for all classes. With
    ``logits_only`` only what the mask logits need is built, because nothing uses the queries that the last layer would
    return. (The authors' checkpoints hold those weights, untrained.) A subclass may have another attention.
    """

    def __init__(self, dim: int, num_heads: int, ffn_ratio: float, dropout: float, *, logits_only: bool) -> None:
        super().__init__()
        self.num_heads, self.logits_only = num_heads, logits_only
        if not logits_only:
            hidden = int(dim * ffn_ratio)
            self.out = nn.Linear(dim, dim)
            self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.ffn_in, self.ffn_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
            self.dropout = nn.Dropout(dropout)
        self.build_attention(dim)

    def build_attention(self, dim: int) -> None:
        """Make the linear maps of the attention."""
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if not self.logits_only:
            self.value = nn.Linear(dim, dim)

    def project_memory(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """The patches (B, N, D) of a grid (h, w) and, where queries are updated, their keys and values."""
        return (patches,) if self.logits_only else (patches, self.key(patches), self.value(patches))

    def mask_logits(self, queries: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """Mean over the heads of the scaled attention logits, (B, C, N), of queries (B, C, D).

        The sum over heads is one product of D numbers: one matrix product, and no logits per head. The map to keys goes
        to whichever side is shorter, queries or patches: q (m K)^T and (q K^T) m^T are the same.
        """
        patches = memory[0]
        scale = (queries.shape[-1] // self.num_heads) ** -0.5 / self.num_heads
        mapped = self.query(queries) * scale
        # (An exported graph, whose number of queries is open, takes the branch for fewer queries than patches.)
        if not torch.compiler.is_compiling() and mapped.shape[1] >= patches.shape[1]:
            return mapped @ self.key(patches).transpose(1, 2)
        return (mapped @ self.key.weight) @ patches.transpose(1, 2) + (mapped @ self.key.bias)[..., None]

    def attend(self, queries: Tensor, memory: tuple[Tensor, ...], dropout: float) -> Tensor:
        """The patches' values that queries (B, C, D) attend to, (B, C, D), before the output projection."""
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (self.query(queries), *memory[1:])
        )
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)

    def forward(self, queries: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """Update queries (B, C, D) with what `project_memory` made of the patches."""
        mixed = self.attend(queries, memory, self.dropout.p if self.training else 0.0)
        queries = self.norm_attention(queries + self.dropout(self.out(mixed)))
        hidden = self.ffn_out(self.dropout(F.relu(self.ffn_in(queries))))
        return self.norm_ffn(queries + self.dropout(hidden))


class MaskDecoder(nn.Module):
    """A stack of layers; the mask logits of the last one are the result (ZegCLIP, Sec. 3.3, Eq. 3 to 5).

    Queries do not see each other, so classes can be decoded in any order and in parts. Patches come as they are,
    without positions, and inner layers have no loss of their own. A `LexisegError` says that the heads do not divide
    the width ``dim``.
    """

    def __init__(
        self, layer: type[DecoderLayer], num_layers: int, dim: int, num_heads: int, ffn_ratio: float, dropout: float
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise LexisegError(f"A decoder of width {dim} cannot have {num_heads} heads; take a divisor of it.")
        last = (index == num_layers - 1 for index in range(num_layers))
        self.layers = nn.ModuleList(layer(dim, num_heads, ffn_ratio, dropout, logits_only=is_last) for is_last in last)
        # Released decoders start as copies of their first layer.
        prototype = self.layers[0].state_dict()
        for copy in self.layers:
            copy.load_state_dict({key: prototype[key] for key in copy.state_dict()})

    def project_memory(self, patches: Tensor) -> list[tuple[Tensor, ...]]:
        """What each layer sees of patches (B, h, w, D), once for all classes."""
        grid = (patches.shape[1], patches.shape[2])
        return [cast(DecoderLayer, layer).project_memory(patches.flatten(1, 2), grid) for layer in self.layers]

    def forward(self, queries: Tensor, memory: list[tuple[Tensor, ...]]) -> Tensor:
        """Mask logits (B, C, N) of class queries (B, C, D) over the patches of a memory from `project_memory`."""
        *inner, last = (cast(DecoderLayer, layer) for layer in self.layers)
        for layer, part in zip(inner, memory[:-1], strict=True):
            queries = layer(queries, part)
        return last.mask_logits(queries, memory[-1])


class OneStageOptions(WindowOptions):
    """Options of every one-stage system, with those of `WindowOptions`. The defaults are the papers', for any tower.

    Attributes:
        seen_offset: subtracted from the score of seen classes; the released code uses 0.1, and 0 after self-training.
        mask_size: side that the masks of square images are upsampled to before the sigmoid (released: 512); None, and
            any image that is not square, takes the image's own size.
        mask_loss: "focal" judges each class by itself (ZegCLIP's non-mutually exclusive loss, Sec. 3.2); with
            "cross-entropy" classes exclude each other, as in ZegCLIP's ablation: softmax, in loss and scores.
        mask_weight: factor on the mask loss (focal: Cascade-CLIP's Table 18 compares 10, 50, 100 and 150).
        dice_weight: factor on the dice loss, or on what takes its place.
        mean: mean of the images, RGB in 0..1; None is CLIP's. (Released: ImageNet's.)
        std: standard deviation of the images, RGB in 0..1; None is CLIP's.
        antialias: whether images are shrunk with antialiasing before prediction; the authors' (mmcv's) resize does not.
    """

    weights_depend_on = frozenset({"mean", "std"})

    seen_offset: float = 0.1
    mask_size: Pixels | None = None
    mask_loss: Literal["focal", "cross-entropy"] = "focal"
    mask_weight: LossWeight = 100.0
    dice_weight: LossWeight = 1.0
    mean: Triple | None = None
    std: Deviations | None = None
    antialias: bool = True


class OneStageModel(SegmentationModel):
    """A system that gives mask logits (B, C, h, w) on the h x w patches of images (B, 3, H, W), for text (C, D)."""

    options: OneStageOptions
    family = "one-stage"
    weighs_classes = True

    @abstractmethod
    def grid_logits(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, C, h, w), float32, of classes ``text`` (C, D), before any resize."""

    def mask_and_dice(self, logits: Tensor, labels: Tensor, dice_weight: float) -> MaskLosses:
        """Focal loss or cross entropy, and dice, of mask logits (B, C, h, w) upsampled to labels (B, H, W).

        Mask c is that of class c: nothing is matched. A pixel without a class is a negative of all.
        Focal: alpha_t (1 - p_t)^2 BCE, alpha_t 0.25 for positives and 0.75 for negatives, the mean over pixels, the sum
        over classes and images. Dice: 1 - (2 sum(p t) + 1) / (sum p + sum t + 1) of the classes in an image. Both are
        divided by the number of masks, of (image, class) pairs, in the batch.
        """
        losses = mask_losses if self.options.mask_loss == "focal" else exclusive_losses
        return losses(logits, labels, self.options.mask_weight, dice_weight, self.class_weights)

    def class_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms of `losses`, see `mask_and_dice`."""
        parts = self.mask_and_dice(logits, labels, self.options.dice_weight)
        return {"loss": parts.total, "loss_mask": parts.mask, "loss_dice": parts.dice}

    def mask_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size the masks of images of ``size`` are upsampled to before the sigmoid."""
        side = self.options.mask_size
        return size if side is None or size[0] != size[1] else (side, side)

    def score_grid(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Logits (B, C, h, w) whose sigmoid is a class's score at a patch; with "cross-entropy" that is a softmax."""
        logits = self.grid_logits(features, text)
        return logits if self.options.mask_loss == "focal" else exclusive_logits(logits)

    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
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
            offsets=self.seen_offsets(seen, text),
        )

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, *, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of the class masks (ZegCLIP, Sec. 3.2; Cascade-CLIP, Eq. 3); see `SegmentationModel.losses`.

        Inductive: ``text`` holds the seen classes, ``labels`` index it, and pixels of unseen classes are already 255.
        Self-training: ``text`` holds all classes and ``seen`` says which had masks; pixels of the others, or -1, are
        labelled with the unseen class that the model itself scores highest there.
        """
        features = self.encode_images(images)
        logits = self.grid_logits(features, text)
        size = (int(labels.shape[-2]), int(labels.shape[-1]))
        mask_size = self.mask_size(features.size)
        if self.options.mask_size is not None and mask_size != size:  # else the loss upsamples, image by image
            logits = F.interpolate(logits, size=mask_size, mode="bilinear", align_corners=False)
        if seen is not None:
            full = F.interpolate(logits.detach(), size=size, mode="bilinear", align_corners=False)
            labels = pseudo_labels(full, labels, seen)
        return self.class_losses(logits, labels)
