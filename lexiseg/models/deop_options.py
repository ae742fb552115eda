"""Options of DeOP: the paper's system, its baseline and every ablation of Tables 3, 4, 5, 7 and 9."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lexiseg.clip.positions import Interpolation
from lexiseg.models.base import LossWeight
from lexiseg.models.decoupled import DecoupledOptions

Fraction = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class DeOPOptions(DecoupledOptions):
    """Options of `DeOP`. The defaults are the paper's system.

    Attributes:
        severance: "gps" (Eq. 2), "mps" and "mps-sum" (Eq. 1 with and without the softmax of the released code),
            "released" (the authors' checkpoint) or "none"; see `lexiseg.clip.severance.Severance`.
        severed_blocks: 0-based indices, negative ones from the end. (Table 9 counts from 1.)
        alpha: of "gps": one number, or one for each severed block in their order (Table 4).
        released_residual: without visual prompts, the released encoder's factor 0.2 on the shortcut of block 11.
        anchors: "query", the system's; "conv" (Eq. 4) or "conv-released", see `lexiseg.regions.anchors`; "none" pools
            under the masks themselves, which is the baseline.
        anchor_layers: K (Table 5); not of "conv-released".
        anchor_heads: heads of "query".
        anchor_hidden: width of the feed-forward parts of "query", of the channels of "conv". None: 2 E and E, with E
            the width of CLIP's embeddings, which are the released 1024 and the paper's 512 for ViT-B/16.
        anchor_queries: learnt queries of "query"; None is the number of proposals.
        anchor_dropout: dropout of "query".
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
            before, with matching by masks alone; its class loss is there although the paper says it is not.
        squash: steepness of the sigmoid in the loss (released: 3); see `lexiseg.losses.regions`.
        focal_weight: factor on the focal loss (released: 2).
        dice_weight: factor on the dice loss (released: 0.8).
    """

    severance: Literal["gps", "mps", "mps-sum", "released", "none"] = "gps"
    severed_blocks: tuple[int, ...] = (-1,)
    alpha: Fraction | tuple[Fraction, ...] = 1.0
    released_residual: bool = False
    anchors: Literal["query", "conv", "conv-released", "none"] = "query"
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
