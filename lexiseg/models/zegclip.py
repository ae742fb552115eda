"""ZegCLIP: CLIP with deep prompts, a relationship descriptor and a matching decoder, one stage from patch to mask.

Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023. Where the released code
and the paper differ this file follows the code, and says so, because the published checkpoints need it. Its two
baselines, CLIP fixed and CLIP fine-tuned, are options of the same class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip import CLIP, ImageTokens
from lexiseg.clip.image import Interpolation
from lexiseg.errors import LexisegError
from lexiseg.losses import mask_losses, pixel_accuracy, pseudo_labels
from lexiseg.models.base import ImageFeatures, ModelOptions, SegmentationModel, WindowPolicy
from lexiseg.models.mask_decoder import DecoderTrace, MaskDecoder, unit
from lexiseg.models.prompts import VisualPrompts
from lexiseg.scores import GridScores

_CLASS_CHUNK = 4096
# Logits of the "matching" start are gain * cosine - offset: a cosine of 0.45 is undecided.
_MATCHING_GAIN = 20.0
_MATCHING_OFFSET = 9.0

Triple = tuple[float, float, float]


class ZegCLIPOptions(ModelOptions):
    """Options of `ZegCLIP`. The defaults are the paper's, for any tower.

    Attributes:
        backbone: "prompt" keeps CLIP frozen and learns prompts; "fixed" and "finetune" are the paper's baselines, a
            frozen tower without prompts and a tower that is trained.
        num_prompts: prompts a block (paper: 10 on VOC, 100 on COCO-Stuff).
        prompt_depth: see `VisualPrompts`; None is deep, in every block.
        prompt_dropout: dropout on the prompts.
        descriptor: use the relationship descriptor [t * cls, t] as the query (Sec. 3.3); False uses the text
            embedding t alone, the paper's ablation.
        decoder_layers: layers of the decoder.
        decoder_heads: its attention heads.
        decoder_dim: its width; None is the joint embedding's. Another width needs ``project_memory``.
        ffn_ratio: hidden width of its feed-forward part over its width.
        dropout: dropout in the decoder.
        start: "random" is the released initialisation. "matching" starts from CLIP's own comparison of patches and
            words (queries are the text embeddings, the decoder changes nothing), which a short training needs: from
            random weights a decoder takes thousands of steps to find that comparison.
        project_memory: map the patches by a linear layer and a norm before the decoder (off in all released models).
        class_embedding_twice: a quirk of the released code: the class embedding is added twice. Converted checkpoints
            need it; a model trained here does better with what CLIP was trained with.
        position_interpolation: how position embeddings follow the resolution.
        seen_offset: subtracted from the score of classes seen in training; the released code uses 0.1, and 0 for
            models trained transductively.
        mask_size: side that masks of square images are upsampled to before the sigmoid (released: 512); None is the
            images' own size, which is also what images of other shapes use.
        mask_weight: factor on the focal loss.
        dice_weight: factor on the dice loss.
        mean: mean of the images, RGB in 0..1; None is CLIP's. (Released: ImageNet's.)
        std: standard deviation of the images, RGB in 0..1; None is CLIP's.
        window_size: side of the sliding window at prediction; None runs whole pictures (released: 512).
        window_stride: its stride (released: 426).
        short_side: the length pictures' shorter side is resized to at prediction; None keeps it (released: 512).
    """

    backbone: Literal["prompt", "fixed", "finetune"] = "prompt"
    num_prompts: Annotated[int, Field(ge=1)] = 10
    prompt_depth: int | None = None
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    descriptor: bool = True
    decoder_layers: Annotated[int, Field(ge=1)] = 3
    decoder_heads: Annotated[int, Field(ge=1)] = 8
    decoder_dim: int | None = None
    ffn_ratio: Annotated[float, Field(gt=0)] = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    start: Literal["random", "matching"] = "random"
    project_memory: bool = False
    class_embedding_twice: bool = False
    position_interpolation: Interpolation = "bilinear"
    seen_offset: float = 0.1
    mask_size: int | None = None
    mask_weight: float = 100.0
    dice_weight: float = 1.0
    mean: Triple | None = None
    std: Triple | None = None
    window_size: int | None = None
    window_stride: int = 0
    short_side: int | None = None


class ZegCLIP(SegmentationModel):
    """ZegCLIP and its one-stage baselines.

    Shapes: images (B, 3, H, W) give h x w = N patches; text is (C, D); mask logits are (B, C, h, w).

    Args:
        clip: the towers. The text tower is frozen always, the image tower unless ``backbone`` is "finetune".
        options: see `ZegCLIPOptions`.
        seen_names: classes that had masks in training.

    Raises:
        LexisegError: the options do not fit the tower.
    """

    system: ClassVar[str] = "zegclip"
    options_class: ClassVar[type[ModelOptions]] = ZegCLIPOptions
    options: ZegCLIPOptions

    def __init__(self, clip: CLIP, options: ZegCLIPOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        options = options or ZegCLIPOptions()
        super().__init__(clip, options, tuple(seen_names))
        tower = clip.image_tower
        self.prompts: VisualPrompts | None = None
        if options.backbone == "prompt":
            depth = tower.num_blocks - 1 if options.prompt_depth is None else options.prompt_depth
            self.prompts = VisualPrompts(
                options.num_prompts, tower.width, tower.num_blocks, tower.patch_size, depth, options.prompt_dropout
            )
        dim = options.decoder_dim or clip.embed_dim
        if dim != clip.embed_dim and not options.project_memory:
            raise LexisegError(
                f"decoder_dim {dim} differs from the embedding's {clip.embed_dim}; "
                "set project_memory, or leave decoder_dim out."
            )
        self.memory_proj: nn.Module = nn.Identity()
        if options.project_memory:
            self.memory_proj = nn.Sequential(nn.Linear(clip.embed_dim, dim), nn.LayerNorm(dim))
        self.query_proj = nn.Linear((2 if options.descriptor else 1) * clip.embed_dim, dim)
        self.decoder = MaskDecoder(
            dim, options.decoder_layers, options.decoder_heads, options.ffn_ratio, options.dropout
        )
        if options.start == "matching":
            self._start_as_matching()
        self.set_trainable()

    @torch.no_grad()
    def _start_as_matching(self) -> None:
        if self.options.project_memory:
            raise LexisegError("start 'matching' compares patches and words directly; leave project_memory out.")
        dim = self.query_proj.out_features
        nn.init.zeros_(self.query_proj.weight)
        nn.init.eye_(self.query_proj.weight[:, -dim:])
        nn.init.zeros_(self.query_proj.bias)
        # Patches vary least along the direction that CLIP's projection amplifies least.
        direction = torch.linalg.svd(self.clip.visual.proj, full_matrices=False).Vh[-1]
        self.decoder.start_as_matching(_MATCHING_GAIN, _MATCHING_OFFSET, direction)

    @property
    def mean(self) -> Triple:
        """Mean the images are normalised with, RGB in 0..1."""
        return self.options.mean or self.clip.mean

    @property
    def std(self) -> Triple:
        """Standard deviation the images are normalised with, RGB in 0..1."""
        return self.options.std or self.clip.std

    @property
    def window(self) -> WindowPolicy:
        """How to run it over a picture by default."""
        options = self.options
        stride = options.window_stride or options.window_size or 0
        return WindowPolicy(options.window_size, stride, options.short_side)

    def trainable_names(self) -> tuple[str, ...]:
        """Everything outside CLIP; with a fine-tuned backbone CLIP's image tower as well."""
        tower = ("clip.model.visual.",) if self.options.backbone == "finetune" else ()
        return tuple(
            name for name, _ in self.named_parameters() if not name.startswith("clip.") or name.startswith(tower)
        )

    def run_tower(self, images: Tensor, *, levels: Sequence[int] = (), keep_rows: bool = False) -> ImageTokens:
        """Run the image tower with the prompts.

        Args:
            images: (B, 3, H, W), sides multiples of the patch size.
            levels: blocks whose outputs are wanted.
            keep_rows: see `VisualPrompts.hook`.
        """
        tower, options = self.clip.image_tower, self.options
        tokens, grid = tower.embed(
            images,
            interpolation=options.position_interpolation,
            class_embedding_twice=options.class_embedding_twice,
        )
        hook = None if self.prompts is None else self.prompts.hook(grid[0] * grid[1], keep_rows=keep_rows)
        return tower.run(tokens, grid, before_block=hook, levels=levels)

    def finish(self, result: ImageTokens) -> tuple[Tensor, Tensor]:
        """Turn the tower's last tokens into unit vectors: class embedding (B, D) and patches (B, N, D)."""
        tokens = torch.cat([result.tokens[:, :1], result.tokens[:, -result.num_patches :]], dim=1)
        if self.prompts is not None:
            tokens = self.prompts.norm(tokens)
        tokens = unit(self.clip.image_tower.project(tokens))
        return tokens[:, 0], tokens[:, 1:]

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Run the image tower; see `SegmentationModel.encode_images`.

        Returns:
            features with ``cls`` (B, D) and ``patches`` (B, h, w, D), both of unit length.
        """
        size = (int(images.shape[-2]), int(images.shape[-1]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.options.backbone != "fixed"):
            result = self.run_tower(self.fit_to_patches(images))
            cls, patches = self.finish(result)
        return ImageFeatures(size, {"cls": cls, "patches": patches.unflatten(1, result.grid)})

    def descriptor(self, cls: Tensor, text: Tensor) -> Tensor:
        """Relationship descriptor [t * cls, t] of class embeddings (B, D) and text (C, D): (B, C, 2 D) (Sec. 3.3)."""
        text = text.to(cls.dtype)[None]
        return torch.cat([text * cls[:, None], text.expand(len(cls), -1, -1)], dim=-1)

    def queries(self, cls: Tensor, text: Tensor) -> Tensor:
        """Class queries (B, C, dim) of class embeddings (B, D) and text (C, D)."""
        if not self.options.descriptor:
            return self.query_proj(text.to(cls.dtype)[None]).expand(len(cls), -1, -1)
        return self.query_proj(self.descriptor(cls, text))

    def mask_logits(
        self, cls: Tensor, patches: Tensor, text: Tensor, trace: list[DecoderTrace] | None = None
    ) -> Tensor:
        """Mask logits (B, C, N) of classes ``text`` (C, D) over ``patches`` (B, N, D)."""
        projected = self.decoder.project_memory(self.memory_proj(patches))
        if self.training or trace is not None or len(text) <= _CLASS_CHUNK:
            return self.decoder(self.queries(cls, text), projected, trace)
        # Queries are independent of each other: many classes are decoded in parts, into one tensor.
        logits = patches.new_empty((len(patches), len(text), patches.shape[1]))
        for start in range(0, len(text), _CLASS_CHUNK):
            part = text[start : start + _CLASS_CHUNK]
            logits[:, start : start + len(part)] = self.decoder(self.queries(cls, part), projected)
        return logits

    def grid_logits(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, C, h, w), float32, before any resize."""
        values = features.values
        patches = values["patches"]
        logits = self.mask_logits(values["cls"], patches.flatten(1, 2), text)
        return logits.unflatten(2, patches.shape[1:3]).float()

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

        A score is sigmoid(mask logit), less `ZegCLIPOptions.seen_offset` for seen words. The paper does not mention
        the offset, but the published numbers were measured with it.
        """
        offsets = None
        if seen_words is not None and self.options.seen_offset:
            offsets = seen_words.to(text.device).float() * self.options.seen_offset
        return GridScores(
            self.grid_logits(features, text),
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
        """Focal and dice loss of the class masks (Sec. 3.2).

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
            "loss_mask" and "loss_dice", weighted, and their sum "loss".

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
        parts = mask_losses(logits, labels, focal_weight=self.options.mask_weight, dice_weight=self.options.dice_weight)
        losses = {"loss": parts.total, "loss_mask": parts.focal, "loss_dice": parts.dice}
        if accuracy and full is not None:
            losses["accuracy"] = pixel_accuracy(full, labels)
        return losses
