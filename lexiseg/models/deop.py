"""DeOP: proposals beside one pass of CLIP, whose patches are severed from each other and pooled under heatmaps.

Han et al., "Open-Vocabulary Semantic Segmentation with Decoupled One-Pass Network", ICCV 2023. The baseline, baseline+
and every ablation of Tables 3, 4, 5, 7 and 9 are options of the same class. Where the released code and the paper
differ both are there: the paper's form under the paper's name, the other one with "released" in its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.clip.severance import Severance, released_residual, severance_masks, severed_attention
from lexiseg.clip.templates import SCULPTURE
from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.losses.masks import pseudo_labels
from lexiseg.losses.proposals import ProposalWeights
from lexiseg.losses.regions import region_map_losses
from lexiseg.models.base import ImageFeatures
from lexiseg.models.decoupled import DecoupledModel, DecoupledOptions
from lexiseg.models.deop_prompts import AddedTables, PrependedPrompts
from lexiseg.models.options import Dropout, LossWeight, ModelOptions
from lexiseg.proposals.base import Proposals
from lexiseg.proposals.options import QueryOptions
from lexiseg.regions.anchors import Anchored, ConvAnchors, QueryAnchors, ReleasedQueryAnchors, StackedConvAnchors
from lexiseg.regions.pooling import mask_pool, patch_masks, resize_masks, unit_or_zero
from lexiseg.scores import RegionScores
from lexiseg.vocabulary import Vocabulary

_ADDED_BLOCKS = (1, 2, 3, 4, 5)
_QUERIES = 100

Anchors = ReleasedQueryAnchors | QueryAnchors | ConvAnchors | StackedConvAnchors
Fraction = Annotated[float, Field(ge=0, le=1)]


class DeOPOptions(DecoupledOptions):
    """Options of `DeOP`. The defaults are the paper's system.

    Attributes:
        severance: "gps" (Eq. 2), "mps" and "mps-sum" (Eq. 1 with and without the softmax of the released code),
            "released" (the authors' checkpoint) or "none"; see `lexiseg.clip.severance.Severance`.
        severed_blocks: 0-based indices, negative ones from the end. (Table 9 counts from 1.)
        alpha: of "gps": one number, or one for each severed block in their order (Table 4).
        released_residual: without visual prompts, the released encoder's factor 0.2 on the shortcut of block 11.
        heatmaps: "query" (Eq. 3 to the letter) or "query-released" (its output layer as released, with eight heads and
            learned projections); "conv" (Eq. 4) or "conv-released"; see `lexiseg.regions.anchors`. "none" pools under
            the masks themselves, which is the baseline.
        anchor_layers: K (Table 5); not of "conv-released".
        anchor_heads: attention heads of the decoders with queries.
        anchor_hidden: width of their feed-forward parts, and of the channels of "conv". None: 2 E and E, with E the
            width of CLIP's embeddings, which are the released 1024 and the paper's 512 for ViT-B/16.
        anchor_queries: their learned queries; None is the number of proposals.
        anchor_dropout: their dropout.
        anchor_activation: of "conv-released".
        visual_prompts: "added", "prepended" or "none" (Table 7).
        prompt_blocks: blocks with prompts of their own; None is the released 1 to 5, as far as the tower has them.
        table_side: patches per side of the added tables.
        table_start: "random" is the released initialisation. "zero" starts the added tables from CLIP as it is, which a
            short training needs.
        num_prompts: prepended prompts a block.
        prompt_dropout: on prepended prompts.
        text_prompts: "end-to-end" trains a learned prompt with the rest, "offline" keeps it as it was trained before,
            "templates" has none (Table 7).
        prompt_prefix: vectors in front of the name.
        prompt_suffix: vectors behind it.
        class_scores: "softmax" over the classes and "no object"; "cosine" is temperature * cosine, as the released code
            of the baseline has it.
        masks: what the class scores are multiplied with: "sigmoid" of the upsampled logits, or what released variants
            have: "logits" (never squashed) and "patches" (masks on the patch grid, upsampled) in the baseline's code,
            "patches-twice" (those, squashed once more) behind a switch that is off.
        clip_images: "shared" shows CLIP the pictures as the generator sees them, as released; "own" with CLIP's mean
            and standard deviation.
        position_interpolation: how CLIP's position table follows the resolution.
        train: "regions" is the last stage: everything but the proposals and the two towers. "proposals" is the stage
            before, with matching by masks alone; there is a class loss where the proposals have a class head, which the
            released ones have and the paper's have not (``proposals: {class_head: none}``).
        squash: steepness of the sigmoid in the loss (released: 3); see `lexiseg.losses.regions`.
        focal_weight: factor on the focal loss (released: 2).
        dice_weight: factor on the dice loss (released: 0.8).
    """

    severance: Literal["gps", "mps", "mps-sum", "released", "none"] = "gps"
    severed_blocks: tuple[int, ...] = (-1,)
    alpha: Fraction | tuple[Fraction, ...] = 1.0
    released_residual: bool = False
    heatmaps: Literal["query", "query-released", "conv", "conv-released", "none"] = "query"
    anchor_layers: Annotated[int, Field(ge=0)] = 1
    anchor_heads: Annotated[int, Field(ge=1)] = 8
    anchor_hidden: Annotated[int, Field(ge=1)] | None = None
    anchor_queries: Annotated[int, Field(ge=1)] | None = None
    anchor_dropout: Dropout = 0.1
    anchor_activation: Literal["sigmoid", "softmax"] = "sigmoid"
    visual_prompts: Literal["added", "prepended", "none"] = "added"
    prompt_blocks: tuple[int, ...] | None = None
    table_side: Annotated[int, Field(ge=1)] = 24
    table_start: Literal["random", "zero"] = "random"
    num_prompts: Annotated[int, Field(ge=1)] = 5
    prompt_dropout: Dropout = 0.1
    text_prompts: Literal["end-to-end", "offline", "templates"] = "end-to-end"
    prompt_prefix: Annotated[int, Field(ge=0)] = 16
    prompt_suffix: Annotated[int, Field(ge=0)] = 0
    class_scores: Literal["softmax", "cosine"] = "softmax"
    masks: Literal["sigmoid", "logits", "patches", "patches-twice"] = "sigmoid"
    clip_images: Literal["shared", "own"] = "shared"
    position_interpolation: Interpolation = "bicubic"
    train: Literal["regions", "proposals"] = "regions"
    squash: Annotated[float, Field(gt=0)] = 3.0
    focal_weight: LossWeight = 2.0
    dice_weight: LossWeight = 0.8

    def prompt_places(self) -> dict[str, int] | None:
        """See `ModelOptions.prompt_places`."""
        if self.text_prompts == "templates":
            return None
        return {"prefix": self.prompt_prefix, "suffix": self.prompt_suffix, "task": 0}


class DeOP(DecoupledModel):
    """DeOP, its baseline and what lies between; both towers stay frozen.

    Features hold, beside those of `DecoupledModel`, ``regions`` (B, N, D), the embeddings of the proposals: they do not
    depend on the words. With a generator that reads the words they are made when the words are scored. Options that do
    not fit the tower or each other are a `LexisegError`.

    Attributes:
        tables: the visual prompts, or None.
        prompt: the learned text prompt, or None.
        anchors: the heatmap decoder, or None.
    """

    system: ClassVar[str] = "deop"
    options_class: ClassVar[type[ModelOptions]] = DeOPOptions
    options: DeOPOptions

    def __init__(self, clip: CLIP, options: DeOPOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        options = options or DeOPOptions()
        super().__init__(clip, options, tuple(seen_names))
        self.default_templates = SCULPTURE
        self.severed = self._severed_blocks()
        self.tables = self._make_visual_prompts()
        self.prompt: PromptLearner | None = None
        if options.text_prompts != "templates":
            self.prompt = PromptLearner(clip.text_width, options.prompt_prefix, options.prompt_suffix)
        self.anchors: Anchors | None = self._make_anchors()
        self.set_trainable()

    def _severed_blocks(self) -> dict[int, Severance]:
        options, count = self.options, self.clip.image_tower.num_blocks
        if options.severance == "none":
            return {}
        blocks = [index + count if index < 0 else index for index in options.severed_blocks]
        if len(set(blocks)) != len(blocks) or not all(0 <= index < count for index in blocks):
            raise LexisegError(
                f"severed_blocks {list(options.severed_blocks)} do not fit a tower of {count} blocks; list each once, "
                f"from 0 to {count - 1}, or from the end with -1 to -{count}."
            )
        alphas = options.alpha if isinstance(options.alpha, tuple) else (options.alpha,) * len(blocks)
        if len(alphas) != len(blocks):
            raise LexisegError(
                f"There are {len(alphas)} numbers alpha for {len(blocks)} severed blocks; give one for each, or one."
            )
        return {block: Severance(options.severance, alpha) for block, alpha in zip(blocks, alphas, strict=True)}

    def _make_visual_prompts(self) -> AddedTables | PrependedPrompts | None:
        options, tower = self.options, self.clip.image_tower
        blocks = options.prompt_blocks
        if blocks is None:
            blocks = tuple(index for index in _ADDED_BLOCKS if index < tower.num_blocks)
        if options.visual_prompts == "added":
            tables = AddedTables(tower.width, tower.num_blocks, blocks, side=options.table_side)
            if options.table_start == "zero":
                for table in tables.parameters():
                    torch.nn.init.zeros_(table)
            return tables
        if options.visual_prompts == "prepended":
            return PrependedPrompts(
                options.num_prompts, tower.width, tower.num_blocks, tower.patch_size, blocks, options.prompt_dropout
            )
        return None

    def _make_anchors(self) -> Anchors | None:
        options, dim = self.options, self.clip.embed_dim
        if options.heatmaps in ("query", "query-released"):
            proposals = options.proposals
            given = proposals.num_queries if isinstance(proposals, QueryOptions) else _QUERIES
            return (QueryAnchors if options.heatmaps == "query" else ReleasedQueryAnchors)(
                dim,
                options.anchor_queries or given,
                options.anchor_layers,
                options.anchor_heads,
                options.anchor_hidden,
                options.anchor_dropout,
            )
        if options.heatmaps == "conv":
            return StackedConvAnchors(dim, options.anchor_layers, options.anchor_hidden)
        return ConvAnchors(dim, options.anchor_activation) if options.heatmaps == "conv-released" else None

    @property
    def learned_prompts(self) -> PromptLearner | None:
        """The learned text prompt, or None."""
        return self.prompt

    def trainable_names(self) -> tuple[str, ...]:
        """Of the last stage: prompts, anchors and "no object". Of the one before: the generator and "no object"."""
        parts = ["tables.", "anchors."] if self.options.train == "regions" else ["generator."]
        # A row or a prompt that no score depends on has nothing to learn from.
        if self.options.train == "regions" or self.generator.embed_dim is not None:
            parts.append("no_object")
            if self.options.text_prompts == "end-to-end":
                parts.append("prompt.")
        return tuple(name for name, _ in self.named_parameters() if name.startswith(tuple(parts)))

    def embed_text(self, embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
        """Text (W, D) of a vocabulary's words, with the learned prompt if there is one; remembered by ``embedder``."""
        if self.prompt is None:
            return embedder(vocabulary)
        return embedder.embed_prompted(self.prompt, vocabulary.words, disk=not self.training)

    def training_text(self, vocabulary: Vocabulary, text: Tensor) -> Tensor:
        """Text (W, D) for a training step: with gradients where the prompt is trained, else the given one."""
        if self.prompt is None or self.options.text_prompts != "end-to-end":
            return text
        return self.prompt(self.clip, vocabulary.words)

    def grid(self, padded: Tensor) -> tuple[int, int]:
        """Patches (gh, gw) of the padded frame; a part of a patch at the right or the bottom is not seen by CLIP."""
        patch = self.clip.patch_size
        return int(padded.shape[-2]) // patch, int(padded.shape[-1]) // patch

    def patches(self, padded: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
        """CLIP's patches (B, gh, gw, D), projected and not normalised, of pictures of ``size`` in a padded frame.

        Mask logits (B, N, h, w) are for the kinds of severance that read them.
        """
        options, tower, grid = self.options, self.clip.image_tower, self.grid(padded)
        images = padded if options.clip_images == "shared" else self.clip_frame(padded, size)
        images = images[..., : grid[0] * tower.patch_size, : grid[1] * tower.patch_size]
        added, hook, residual = None, None, None
        if isinstance(self.tables, AddedTables):
            added, hook = self.tables.at_input(grid), self.tables.hook(grid)
        elif isinstance(self.tables, PrependedPrompts):
            hook = self.tables.hook(grid[0] * grid[1], severed=self.severed)
        elif options.released_residual:
            residual = released_residual(self.severed)
        tokens, _ = tower.embed(images, interpolation=options.position_interpolation, by_count=True, added=added)
        needed = any(severance.needs_masks for severance in self.severed.values())
        result = tower.run(
            tokens,
            grid,
            before_block=hook,
            attention=severed_attention(self.severed, severance_masks(mask_logits, grid) if needed else None),
            residual=residual,
        )
        return tower.project(result.tokens[:, -result.num_patches :]).unflatten(1, grid)

    def pool(self, patches: Tensor, mask_logits: Tensor) -> Anchored:
        """Embed regions of mask logits (B, N, h, w), given the `patches` (B, gh, gw, D)."""
        features = unit_or_zero(patches.float())
        masks = patch_masks(mask_logits.float(), (int(patches.shape[1]), int(patches.shape[2])))
        if self.anchors is not None:
            return self.anchors(features, masks)
        pooled = mask_pool(features, masks, normalise=False)
        return Anchored(unit_or_zero(pooled), pooled, masks[:, None])

    def encode_padded(self, padded: Tensor, size: tuple[int, int]) -> ImageFeatures:
        """Propose regions and embed them; see `DecoupledModel.encode_padded`."""
        features = super().encode_padded(padded, size)
        if self.generator.needs_text:
            return features
        mask_logits = features.values["mask_logits"]
        regions = self.pool(self.patches(padded, mask_logits, size), mask_logits).embeddings
        return replace(features, values={**features.values, "regions": regions})

    def regions_of(self, features: ImageFeatures, text: Tensor) -> tuple[Proposals, Tensor]:
        """The proposals and their embeddings (B, N, D), made now from the words ``text`` if not kept."""
        proposals = self.proposals_of(features, text)
        regions = features.values.get("regions")
        if regions is None:
            padded = features.values["images"]
            patches = self.patches(padded, proposals.mask_logits, features.size)
            regions = self.pool(patches, proposals.mask_logits).embeddings
        return proposals, regions

    def class_logits(self, regions: Tensor, text: Tensor) -> Tensor:
        """Logits (B, N, C + 1) of region embeddings (B, N, D) over the text (C, D) and, last, "no object"."""
        return self.options.temperature * (regions.float() @ self.text_rows(text).float().T)

    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> RegionScores:
        """Score words against images; see `SegmentationModel.score`. Seen words are treated like all others.

        A score is sum_n softmax(logits_n)_word * sigmoid(mask_n), see `DeOPOptions` for other forms. "No object" takes
        its part of the softmax and no more: every pixel gets a class.
        """
        options = self.options
        proposals, regions = self.regions_of(features, text)
        logits = self.class_logits(regions, text)
        scores = (logits.softmax(dim=-1) if options.class_scores == "softmax" else logits)[..., :-1]
        if options.masks in ("patches", "patches-twice"):
            masks = patch_masks(proposals.mask_logits.float(), self.grid(features.values["images"]))
            proposals = replace(proposals, mask_logits=masks)
        squashed = options.masks in ("sigmoid", "patches-twice")
        return self.pixel_scores(scores, proposals, features, word_to_class=word_to_class, sigmoid=squashed)

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, *, seen: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of the stage that ``train`` names; see `SegmentationModel.losses`.

        "regions": focal and dice of the map of class scores, see `lexiseg.losses.regions`. "proposals": matching and
        mask losses, and the class loss of the generator's own embeddings, of every level. In self-training, in both,
        pixels without a label first get the unseen class with the largest score in the map.
        """
        if not self.trainable_names():
            return super().losses(images, labels, text, seen=seen)
        padded, size = self.pad(images), (int(images.shape[-2]), int(images.shape[-1]))
        if self.options.train == "proposals":
            if seen is not None:
                with torch.no_grad():
                    labels = pseudo_labels(_score_map(*self._region_map(padded, size, text), labels), labels, seen)
            return self.proposal_losses(padded, size, labels, text, ProposalWeights(cost_class=0.0))
        probabilities, masks = self._region_map(padded, size, text)
        if seen is not None:
            labels = pseudo_labels(_score_map(probabilities, masks, labels), labels, seen)
        parts = region_map_losses(
            probabilities,
            masks,
            labels,
            scale=self.options.squash,
            focal_weight=self.options.focal_weight,
            dice_weight=self.options.dice_weight,
        )
        return {"loss": parts.total, "loss_mask": parts.mask, "loss_dice": parts.dice}

    def _region_map(self, padded: Tensor, size: tuple[int, int], text: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities (B, N, C + 1) of proposals and their mask logits (B, N, h, w), without the padding."""
        features = self.encode_padded(padded, size)
        proposals, regions = self.regions_of(features, text)
        probabilities = self.class_logits(regions, text).softmax(dim=-1)
        if proposals.valid is not None:
            probabilities = probabilities * proposals.valid[..., None]
        masks = proposals.mask_logits
        if tuple(padded.shape[-2:]) != size:
            masks = self.upsampled(masks, padded)[..., : size[0], : size[1]]
        return probabilities, masks


@torch.no_grad()
def _score_map(probabilities: Tensor, mask_logits: Tensor, labels: Tensor) -> Tensor:
    """The map (B, C, H, W) of class scores at the labels' size."""
    size = (int(labels.shape[-2]), int(labels.shape[-1]))
    masks = resize_masks(mask_logits.float(), size).sigmoid()
    return (probabilities[..., :-1].transpose(1, 2) @ masks.flatten(2)).unflatten(2, size)
