"""Cascade-CLIP: groups of the image tower's blocks are each matched with the words by a decoder, and the logits summed.

Li et al., "Cascade-CLIP: Cascaded Vision-Language Embeddings Alignment for Zero-Shot Semantic Segmentation", ICML 2024.
Everything but the groups comes from the system it builds on: ZegCLIP, prompted, frozen or fine-tuned, or SPT-SEG. Each
block's features are normalised, projected and brought to unit length, except the last block's, which are CLIP's own
final features; a group's features are aggregated (neighborhood Gaussian aggregation, Eq. 4), each group has a decoder,
and their mask logits are summed (Eq. 2). The paper's baselines are groups as well, such as "{12},{12},{12}" (Table 7),
or "{6-12}" with "concat" (Table 1).
"""

from __future__ import annotations

from itertools import count
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.models.one_stage import MaskDecoder
from lexiseg.models.options import BlockGroups, Count, parse_groups
from lexiseg.models.similarity_init import patch_directions
from lexiseg.models.zegclip import Head, ZegCLIP, ZegCLIPOptions

AggregationRule = Literal["nga", "nga-fixed", "nga-printed", "sum", "trainable-sum", "concat", "self-attention"]
LevelProjection = Literal["released", "clip", "trained"]


class CascadeCLIPOptions(ZegCLIPOptions):
    """Options of `CascadeCLIP`, with those of the system it is built on.

    Attributes:
        base: what the cascade is built on (Table 10): "zegclip", with the ``backbone`` "prompt", "fixed" (the paper's
            frozen CLIP) or "finetune"; or "spt-seg", see `lexiseg.models.cascade_on_spt`.
        groups: the groups of blocks, counted from 1, shallow to deep in each, one decoder per group (Tables 5, 6, 15).
        aggregation: how the blocks of a group are aggregated (Table 8): "nga", "nga-fixed", "sum", "trainable-sum",
            "concat", "self-attention", and "nga-printed", with the initial weights that Eq. 4 prints.
        aggregate: what is aggregated: "projected", each block's features after its norm and projection, as in the
            authors' code; "raw", the tokens as the blocks leave them, as in Eq. 4, followed by one norm and projection
            per group.
        sigma: width of the Gaussian of "nga" (Table 16 compares 0.8, 1 and 1.2).
        text_projection: "independent" projects the words for each decoder, "shared" once for all (Table 9).
        level_projection: norm and projection of intermediate blocks. "released": random and frozen, as in the authors'
            code; "clip": copies of CLIP's final ones, frozen; "trained": such copies, trained.
        predict_with: the decoders, counted from 1, that are summed at prediction (Fig. 1 and 6); None is all.
    """

    weights_depend_on = ZegCLIPOptions.weights_depend_on | {
        *("base", "groups", "aggregation", "aggregate", "sigma", "text_projection", "level_projection"),
    }

    base: Literal["zegclip", "spt-seg"] = "zegclip"
    groups: BlockGroups = "{6-8},{9-11},{12}"
    aggregation: AggregationRule = "nga"
    aggregate: Literal["projected", "raw"] = "projected"
    sigma: Annotated[float, Field(gt=0)] = 1.0
    text_projection: Literal["independent", "shared"] = "independent"
    level_projection: LevelProjection = "released"
    predict_with: tuple[Count, ...] | None = None

    @model_validator(mode="after")
    def _count_groups(self) -> CascadeCLIPOptions:
        count, chosen = len(self.blocks), self.predict_with
        if chosen is not None and (not chosen or len(set(chosen)) < len(chosen) or max(chosen) > count):
            raise ValueError(f"predict_with is {list(chosen)}; name decoders from 1 to {count}, each once")
        return self

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The groups as tuples of block numbers, counted from 1."""
        return parse_groups(self.groups)


class LevelProjections(nn.Module):
    """Norms and projections of ``count`` intermediate blocks: patches of width W become unit vectors of width D.

    With ``init`` "released" norms have weight one and projections are N(0, 1) / sqrt(W), drawn once and never trained,
    so that they must come from the checkpoint. "clip" and "trained" copy the final ones of the tower ``visual``.
    """

    def __init__(self, count: int, visual: Any, init: LevelProjection) -> None:
        super().__init__()
        width, dim = visual.proj.shape
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for _ in range(count))
        self.projections = nn.Parameter(torch.randn(count, width, dim) * width**-0.5)
        if init != "released":
            for level in self.norms:
                level.load_state_dict(visual.ln_post.state_dict())
            self.projections.data.copy_(visual.proj.detach().expand_as(self.projections))

    def forward(self, index: int, patches: Tensor) -> Tensor:
        """Unit vectors (B, N, D) of patches (B, N, W) by the norm and projection ``index``."""
        return F.normalize(self.norms[index](patches) @ self.projections[index], dim=-1)


class WeightedSum(nn.Module):
    """Z = sum of w_l f_l over the ``count`` blocks of a group, without normalising the weights.

    Neighborhood Gaussian aggregation (Eq. 4) starts from w_l = exp(-(d - l)^2 / (2 sigma^2)) for the l-th of d blocks:
    0.135, 0.607, 1 for three, as in the code and in Tables 16 and 17. The paper prints d - l + 1 in the exponent, which
    makes them 0.011, 0.135, 0.607: ``nearest`` is then 1. Without a ``sigma`` all weights start from 1.
    """

    def __init__(self, count: int, sigma: float | None, nearest: int = 0) -> None:
        super().__init__()
        distance = torch.arange(count - 1 + nearest, nearest - 1, -1, dtype=torch.float32)
        self.weights = nn.Parameter(torch.ones(count) if sigma is None else torch.exp(-0.5 * (distance / sigma) ** 2))

    def forward(self, levels: Tensor) -> Tensor:
        """Join levels (d, B, N, D) into one (B, N, D)."""
        return torch.tensordot(self.weights.to(levels.dtype), levels, 1)


class Concatenation(nn.Module):
    """The ``count`` blocks' features side by side, mapped back to D by a linear layer (Table 8, "Concat")."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(count * dim, dim)

    def forward(self, levels: Tensor) -> Tensor:
        """Join levels (d, B, N, D) into one (B, N, D)."""
        return self.proj(levels.movedim(0, 2).flatten(2))


class LevelAttention(nn.MultiheadAttention):
    """Self-attention among a patch's features from the blocks of a group, summed; the paper only names it (Table 8).

    Here the d features of one patch attend to each other, and the result is added to them and summed.
    """

    def forward(self, levels: Tensor) -> Tensor:  # type: ignore[override]
        """Join levels (d, B, N, D) into one (B, N, D)."""
        x = levels.flatten(1, 2)
        return (x + super().forward(x, x, x, need_weights=False)[0]).sum(dim=0).unflatten(0, levels.shape[1:3])


class CascadeCLIP(ZegCLIP):
    """Cascade-CLIP; a `LexisegError` says that the options do not fit the tower or each other.

    Features hold ``cls`` (B, D), the final class embedding, and the joined patches of each group, ``group_0`` (B, h, w,
    D) and so on. The paper's figure suggests a descriptor for each stage; its code, and this one, take the final class
    embedding for all.
    """

    system = "cascade-clip"
    options_class = CascadeCLIPOptions
    options: CascadeCLIPOptions

    bases: ClassVar[dict[str, type[CascadeCLIP]]] = {}  # those on another system than ZegCLIP, by the option ``base``

    @classmethod
    def variant(cls, options: dict[str, Any]) -> type[SegmentationModel]:
        return cls.bases.get(str(options.get("base")), cls)

    def build_heads(self) -> None:
        """Make the groups' norms, projections, aggregations and heads."""
        options, clip = self.options, self.clip
        self.last = clip.image_tower.num_blocks
        beyond = max(block for group in options.blocks for block in group)
        if beyond > self.last:
            raise LexisegError(
                f"The groups {options.groups} name block {beyond}, but the image tower has {self.last} blocks; set "
                "groups to blocks it has."
            )
        self.level_blocks = tuple(sorted({block - 1 for group in options.blocks for block in group} - {self.last - 1}))
        count, width = len(self.level_blocks), clip.embed_dim
        if options.aggregate == "raw":
            count, width = sum(group != (self.last,) for group in options.blocks), clip.image_tower.width
        self.levels = LevelProjections(count, clip.visual, options.level_projection) if count else None
        self.aggregations = nn.ModuleList(self.build_aggregator(len(group), width) for group in options.blocks)
        if options.level_projection != "trained":
            self.frozen_prefixes += ("levels.",)
        if options.aggregation in ("nga-fixed", "sum"):
            self.frozen_prefixes += ("aggregations.",)
        projections = 1 if options.text_projection == "shared" else len(options.blocks)
        self.query_projs = nn.ModuleList(self.build_query_proj() for _ in range(projections))
        self.decoders = nn.ModuleList(self.build_decoder() for _ in options.blocks)

    def build_aggregator(self, count: int, width: int) -> nn.Module:
        """Make the module that joins ``count`` levels of a ``width``; a single one needs none."""
        rule = self.options.aggregation
        if count == 1:
            return nn.Identity()
        if rule == "concat":
            return Concatenation(count, width)
        if rule == "self-attention":
            return LevelAttention(width, self.options.decoder_heads)
        return WeightedSum(count, self.options.sigma if rule.startswith("nga") else None, int(rule == "nga-printed"))

    def init_from_clip_similarity(self) -> None:
        """Let the deepest group start from CLIP's own comparison of patches and words, and the others from zero."""
        options, groups, basis = self.options, self.options.blocks, patch_directions(self.clip.visual.proj)
        deepest = max(range(len(groups)), key=lambda i: (groups[i][-1], -len(groups[i]), i))
        random = options.level_projection == "released" and groups[deepest][-1] != self.last
        if random or (len(groups[deepest]) > 1 and options.aggregation in ("concat", "self-attention")):
            raise LexisegError(
                f"init 'clip-similarity' compares patches with words, which the deepest of the groups {options.groups} "
                "cannot do; put the last block in a group of its own."
            )
        for index, head in enumerate(self.heads()):
            self.init_decoder(head.decoder, head.query_proj, basis, zero=index != deepest)

    def project_level(self, index: int, patches: Tensor) -> Tensor:
        """Unit vectors (B, N, D) of patches (B, N, W), by the prompts' norm, then the norm and projection ``index``."""
        assert self.levels is not None
        return cast(Tensor, self.levels(index, patches if self.prompts is None else self.prompts.norm(patches)))

    def encode_images(self, images: Tensor) -> ImageFeatures:
        result = self.run_tower(self.fit_to_patches(images), levels=(*self.level_blocks, self.last - 1))
        cls, final = self.project_tokens(result)
        values, raw = {"cls": cls}, self.options.aggregate == "raw"
        projections = count()  # indices in `LevelProjections`: of the blocks in order or, with "raw", of the groups
        levels = {block: tokens[:, -result.num_patches :] for block, tokens in result.levels.items()}
        if not raw:
            projected = {block: self.project_level(next(projections), levels[block]) for block in self.level_blocks}
            levels = {**projected, self.last - 1: final}
        for index, (join, group) in enumerate(zip(self.aggregations, self.options.blocks, strict=True)):
            found = [levels[block - 1] for block in group]
            joined = join(torch.stack(found)) if len(group) > 1 else found[0]
            if raw:
                joined = final if group == (self.last,) else self.project_level(next(projections), joined)
            values[f"group_{index}"] = joined.unflatten(1, result.grid)
        return ImageFeatures((images.shape[-2], images.shape[-1]), values)

    def heads(self) -> list[Head]:
        """One decoder per group: all of them in training, at prediction those of ``predict_with``."""
        numbers = (not self.training and self.options.predict_with) or range(1, len(self.decoders) + 1)
        projs = cast(list[nn.Linear], list(self.query_projs) * len(self.decoders))  # one may serve all
        decoders = cast(list[MaskDecoder], list(self.decoders))
        return [Head(decoders[number - 1], projs[number - 1], f"group_{number - 1}") for number in numbers]
