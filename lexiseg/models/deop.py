"""DeOP: proposals beside one pass of CLIP, whose patches are severed from each other and pooled under heatmaps.

Han et al., "Open-Vocabulary Semantic Segmentation with Decoupled One-Pass Network", ICCV 2023. Every ablation of Tables
3, 4, 5, 7 and 9 is an option of the same class: baseline+ has ``severance`` and ``heatmaps`` "none", the baseline also
``visual_prompts`` "none", ``text_prompts`` "offline" and ``class_scores`` "cosine". Where the released code and the
paper differ both are there: the paper's form under the paper's name, the other one with "released" in its name. Text
prompts are trained first, by a recipe of the kind ``prompts``, then the proposals, then the rest (``train``).

Read `DeOP.encode_regions` (called by `DecoupledModel.encode_images`, behind the proposals) and `DeOP.score`.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lexiseg.clip.embeddings import whole_patches
from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import resize_positions
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.clip.tower import BeforeBlock, block_attention, token_values
from lexiseg.errors import LexisegError
from lexiseg.losses.proposals import ProposalWeights
from lexiseg.losses.regions import region_map_losses
from lexiseg.models.base import ImageFeatures
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.deop_ablations import (
    RELEASED_RESIDUAL,
    AblationOptions,
    ConvAnchors,
    PrependedPrompts,
    ReleasedConvAnchors,
    ReleasedQueryAnchors,
    mask_severance,
)
from lexiseg.models.options import Count, Dropout, LossWeight
from lexiseg.proposals.base import Proposals
from lexiseg.regions.anchors import QueryAnchors, pool
from lexiseg.regions.pooling import Size, resize_masks, unit_or_zero
from lexiseg.scores import RegionScores
from lexiseg.templates import SCULPTURE

Anchors = QueryAnchors | ConvAnchors | ReleasedConvAnchors
Fraction = Annotated[float, Field(ge=0, le=1)]


class DeOPOptions(AblationOptions):
    """Options of `DeOP`, with those of `AblationOptions`. The defaults are the paper's system.

    Attributes:
        severance: "gps" (Eq. 2, see `patch_severance`) or "none"; "mps", "mps-sum" (Eq. 1 with and without the released
            softmax) or "released" (the authors' checkpoint), see `lexiseg.models.deop_ablations.mix_by_masks`.
        severed_blocks: 0-based indices, negative ones from the end. (Table 9 counts from 1.)
        alpha: of "gps": one number, or one for each severed block in their order (Table 4).
        heatmaps: "query" (Eq. 3 to the letter) or "query-released" (its output layer as released, with eight heads and
            learned projections); "conv" (Eq. 4) or "conv-released"; see `lexiseg.regions.anchors`. "none" pools under
            the masks themselves, which is the baseline.
        anchor_layers: K (Table 5); not of "conv-released".
        anchor_heads: attention heads of the decoders with queries.
        anchor_hidden: width of their feed-forward parts, and of the channels of "conv". None: 2 E and E, with E the
            width of CLIP's embeddings, which are the released 1024 and the paper's 512 for ViT-B/16.
        anchor_queries: their learned queries; None is the number of proposals.
        anchor_dropout: their dropout.
        visual_prompts: "added", "prepended" or "none" (Table 7).
        prompt_blocks: blocks with prompts of their own; None is the released 1 to 5, as far as the tower has them.
        table_side: patches per side of the added tables.
        text_prompts: "end-to-end" trains a learned prompt with the rest, "offline" keeps it as it was trained before,
            "templates" has none (Table 7).
        prompt_prefix: vectors in front of the name.
        prompt_suffix: vectors behind it.
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
    heatmaps: Literal["query", "query-released", "conv", "conv-released", "none"] = "query"
    anchor_layers: Annotated[int, Field(ge=0)] = 1
    anchor_heads: Count = 8
    anchor_hidden: Count | None = None
    anchor_queries: Count | None = None
    anchor_dropout: Dropout = 0.1
    visual_prompts: Literal["added", "prepended", "none"] = "added"
    prompt_blocks: tuple[int, ...] | None = None
    table_side: Count = 24
    text_prompts: Literal["end-to-end", "offline", "templates"] = "end-to-end"
    prompt_prefix: Annotated[int, Field(ge=0)] = 16
    prompt_suffix: Annotated[int, Field(ge=0)] = 0
    train: Literal["regions", "proposals"] = "regions"
    squash: Annotated[float, Field(gt=0)] = 3.0
    focal_weight: LossWeight = 2.0
    dice_weight: LossWeight = 0.8

    def prompt_places(self) -> dict[str, int] | None:
        if self.text_prompts == "templates":
            return None
        return {"prefix": self.prompt_prefix, "suffix": self.prompt_suffix, "task": 0}


def patch_severance(
    attention: nn.MultiheadAttention, x: Tensor, context: Tensor | None = None, *, alpha: float = 1.0
) -> Tensor:
    """General patch severance, in the place of a block's token mixing softmax(q k^T / sqrt(d)) v (DeOP, Eq. 2).

    With v the values of the tokens it is alpha v + (1 - alpha) softmax(q k^T / sqrt(d)) v, so that patches keep to what
    they show; everything else in the block stays. ``alpha`` 0 is ordinary attention, 1 the value path, where each token
    keeps to itself.
    """
    own: Tensor = attention.out_proj(token_values(attention, x))
    return own if alpha == 1.0 else alpha * own + (1.0 - alpha) * block_attention(attention, x, context)


class AddedTables(nn.Module):
    """Learnt tables added to the tokens, class token included: one at the input and one at each of several ``blocks``.

    DeOP's prompts of the kind "adding" (released option LEARN_POSITION). The table at the input joins CLIP's position
    table before the first norm; that of a block is added where the tokens enter the block, so it stays in the residual
    stream. Tables of ``side`` patches a side (DeOP: 24, for 384 pixels) are resized to the patch grid bicubically, but
    only if their number of rows is another: the released code does not look at the shape of the grid.
    """

    def __init__(self, width: int, blocks: Collection[int], side: int = 24) -> None:
        super().__init__()

        def table() -> nn.Parameter:
            # The released initial values: a normal distribution with deviation W^-0.5, not zero.
            return nn.Parameter(torch.randn(1 + side**2, width) * width**-0.5)

        self.table = table()
        self.block_tables = nn.ParameterDict({str(index): table() for index in blocks})

    def forward(self, grid: tuple[int, int]) -> tuple[Tensor, BeforeBlock]:
        """For a patch grid (h, w) the input's table (1 + h * w, W), and what adds the blocks' tables before them."""
        resized = partial(resize_positions, grid=grid, interpolation="bicubic", by_count=True)

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            if str(index) in self.block_tables:
                tokens = tokens + resized(self.block_tables[str(index)]).to(tokens.dtype)
            return tokens, None

        return resized(self.table), before_block


class DeOP(DecoupledModel):
    """DeOP, its baseline and what lies between; both towers stay frozen.

    Features hold, beside those of `DecoupledModel`, ``regions`` (B, N, D), the embeddings of the proposals: they do not
    depend on the words, unless the proposals do. Options that do not fit the tower or each other are a `LexisegError`.

    Attributes:
        severed: alpha by severed block.
        tables: the visual prompts, or None.
        prompt: the learned text prompt, or None; found by `SegmentationModel.learned_prompts`, which makes the text.
        anchors: the heatmap decoder, or None.
    """

    system = "deop"
    options_class = DeOPOptions
    options: DeOPOptions

    def __init__(self, clip: CLIP, options: DeOPOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        self.default_templates = SCULPTURE
        self.severed = self._severed_blocks()
        self.tables = self._make_visual_prompts()
        places = self.options.prompt_places()
        self.prompt = None if places is None else PromptLearner(clip.text_width, **places)
        self.anchors: Anchors | None = self._make_anchors()
        self.set_trainable()

    def _blocks(self, listed: Sequence[int], option: str) -> list[int]:
        """Indices of the tower's blocks, of which negative ones count from the end."""
        count = self.clip.image_tower.num_blocks
        blocks = [index + count if index < 0 else index for index in listed]
        if len(set(blocks)) != len(blocks) or not all(0 <= index < count for index in blocks):
            raise LexisegError(
                f"{option} {list(listed)} do not fit a tower of {count} blocks; list each once, from 0 to {count - 1}, "
                f"or from the end with -1 to -{count}."
            )
        return blocks

    def _severed_blocks(self) -> dict[int, float]:
        options = self.options
        if options.severance == "none":
            return {}
        blocks = self._blocks(options.severed_blocks, "severed_blocks")
        alphas = options.alpha if isinstance(options.alpha, tuple) else (options.alpha,) * len(blocks)
        if len(alphas) != len(blocks):
            raise LexisegError(
                f"There are {len(alphas)} numbers alpha for {len(blocks)} severed blocks; give one for each, or one."
            )
        return dict(zip(blocks, alphas, strict=True))

    def _make_visual_prompts(self) -> AddedTables | PrependedPrompts | None:
        options, tower = self.options, self.clip.image_tower
        if options.visual_prompts == "none":
            return None
        released = range(1, min(6, tower.num_blocks))
        places = self._blocks(released if options.prompt_blocks is None else options.prompt_blocks, "prompt_blocks")
        if options.visual_prompts == "prepended":
            return PrependedPrompts(tower, places, self.severed, options.num_prompts, options.prompt_dropout)
        tables = AddedTables(tower.width, places, options.table_side)
        if options.table_start == "zero":
            for table in tables.parameters():
                nn.init.zeros_(table)
        return tables

    def _make_anchors(self) -> Anchors | None:
        options, dim = self.options, self.clip.embed_dim
        if options.heatmaps in ("query", "query-released"):
            kind = QueryAnchors if options.heatmaps == "query" else ReleasedQueryAnchors
            # The paper's 100 where proposals come without a number, as SAM's do.
            queries = options.anchor_queries or int(getattr(options.proposals, "num_queries", 100))
            sizes = (queries, options.anchor_layers, options.anchor_heads, options.anchor_hidden)
            return kind(dim, *sizes, options.anchor_dropout)
        if options.heatmaps == "conv":
            return ConvAnchors(dim, options.anchor_layers, options.anchor_hidden)
        return ReleasedConvAnchors(dim) if options.heatmaps == "conv-released" else None

    def trainable_names(self) -> tuple[str, ...]:
        """Of the last stage: prompts, anchors and "no object". Of the one before: the generator and "no object"."""
        parts = ["tables.", "anchors."] if self.options.train == "regions" else ["generator."]
        # A row or a prompt that no score depends on has nothing to learn from.
        if self.options.train == "regions" or self.generator.embed_dim is not None:
            parts.append("no_object")
            if self.options.text_prompts == "end-to-end":
                parts.append("prompt.")
        return tuple(name for name, _ in self.named_parameters() if name.startswith(tuple(parts)))

    def grid(self, padded: Tensor) -> tuple[int, int]:
        """Patches (gh, gw) of the padded frame; a part of a patch at the right or the bottom is not seen by CLIP."""
        return padded.shape[-2] // self.clip.patch_size, padded.shape[-1] // self.clip.patch_size

    def patches(self, padded: Tensor, mask_logits: Tensor, size: Size) -> Tensor:
        """CLIP's patches (B, gh, gw, D), projected and not normalised, of pictures of ``size`` in a padded frame.

        Mask logits (B, N, h, w) are for the kinds of severance that read them.
        """
        options, tower, grid = self.options, self.clip.image_tower, self.grid(padded)
        images = padded if options.clip_images == "shared" else self.clip_frame(padded, size)
        added, hook = (None, None) if self.tables is None else self.tables(grid)
        released = options.released_residual and self.tables is None and RELEASED_RESIDUAL.keys() <= self.severed.keys()
        residual = RELEASED_RESIDUAL if released else {}
        images = whole_patches(images, tower.patch_size)
        tokens, _ = tower.embed(images, interpolation="bicubic", by_count=True, added=added)
        severed = {block: partial(patch_severance, alpha=alpha) for block, alpha in self.severed.items()}
        if self.severed and options.severance != "gps":
            # Masks that sever are resized before the sigmoid, those that are pooled under after it.
            masks = resize_masks(mask_logits, grid).sigmoid()
            severed = dict.fromkeys(severed, partial(mask_severance, masks=masks, kind=options.severance))
        result = tower.run(tokens, grid, before_block=hook, attention=severed, residual=residual)
        return tower.project(result.tokens[:, -result.num_patches :]).unflatten(1, grid)

    def region_heatmaps(self, features: Tensor, mask_logits: Tensor) -> Tensor:
        """Heatmaps (B, heads, N, gh, gw) over patches (B, gh, gw, D) of unit length, given mask logits (B, N, h, w)."""
        masks = resize_masks(mask_logits.float().sigmoid(), features.shape[1:3])
        return masks[:, None] if self.anchors is None else self.anchors(features, masks)

    def encode_regions(self, padded: Tensor, size: Size, proposals: Proposals) -> dict[str, Tensor]:
        features = unit_or_zero(self.patches(padded, proposals.mask_logits, size).float())
        pooled = pool(features, self.region_heatmaps(features, proposals.mask_logits))
        return {"regions": pooled if self.options.heatmaps == "conv-released" else unit_or_zero(pooled)}

    def class_logits(self, regions: Tensor, text: Tensor) -> Tensor:
        """Logits (B, N, C + 1) of region embeddings (B, N, D) over the text (C, D) and, last, "no object"."""
        return self.options.temperature * (regions.float() @ self.text_rows(text).float().T)

    def class_scores(self, features: ImageFeatures, text: Tensor, seen: Tensor | None = None) -> Tensor:
        logits = self.class_logits(features.values["regions"], text)
        return (logits.softmax(dim=-1) if self.options.class_scores == "softmax" else logits)[..., :-1]

    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> RegionScores:
        """Score words against images; see `SegmentationModel.score`. Seen words are treated like all others.

        A score is sum_n softmax(logits_n)_word * sigmoid(mask_n), see `AblationOptions` for other forms. "No object"
        takes its part of the softmax and no more: every pixel gets a class.
        """
        options, features = self.options, self.proposed(features, text)
        if options.masks in ("patches", "patches-twice"):
            grid = self.grid(features.values["images"])
            masks = resize_masks(features.values["mask_logits"].float().sigmoid(), grid)
            features = replace(features, values={**features.values, "mask_logits": masks})
        squashed = options.masks in ("sigmoid", "patches-twice")
        scores = self.class_scores(features, text)
        return self.pixel_scores(scores, features, word_to_class=word_to_class, sigmoid=squashed)

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, *, seen: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of the stage that ``train`` names; see `SegmentationModel.losses`.

        "regions": focal and dice of the map of class scores, see `lexiseg.losses.regions`. "proposals": matching and
        mask losses, and the class loss of the generator's own embeddings, of every level. In self-training, in both,
        pixels without a label first get the unseen class with the largest score.
        """
        if not self.trainable_names():
            return super().losses(images, labels, text, seen=seen)
        options, features = self.options, self.frame(images)
        if options.train == "regions":
            features = self.proposed(features, text)
        if seen is not None:
            labels = self.pseudo_labels(features, labels, text, seen)
        if options.train == "proposals":
            return self.proposal_losses(features, labels, text, ProposalWeights(cost_class=0.0))
        values, masks = features.values, features.values["mask_logits"]
        probabilities = self.class_logits(values["regions"], text).softmax(dim=-1)
        if "valid" in values:
            probabilities = probabilities * values["valid"][..., None]
        if values["images"].shape[-2:] != features.size:  # masks cover the padding; without it the loss resizes
            masks = self.upsampled(masks, values["images"])[..., : features.size[0], : features.size[1]]
        weights = {"focal_weight": options.focal_weight, "dice_weight": options.dice_weight}
        parts = region_map_losses(probabilities, masks, labels, scale=options.squash, **weights)
        return {"loss": parts.total, "loss_mask": parts.mask, "loss_dice": parts.dice}
