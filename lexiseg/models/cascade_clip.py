"""Cascade-CLIP: groups of blocks of the image tower are matched with the words by decoders of their own, and added.

Li et al., "Cascade-CLIP: Cascaded Vision-Language Embeddings Alignment for Zero-Shot Semantic Segmentation", ICML 2024.
The mechanism is general: any host (ZegCLIP's prompted tower, a frozen or fine-tuned one, SPT-SEG's), any groups. The
blocks' features are unit vectors made by a norm and a projection each, except the last block's, which is CLIP's own
final feature; a group's features are joined (`lexiseg.models.levels`), and the groups' mask logits summed (Eq. 2).

The two comparisons of the paper's Table 7 are groups too: "{12},{12},{12}" gives several decoders the last layer, and
"{6-12},{6-12},{6-12}" with the aggregation "sum" gives each the direct fusion of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from lexiseg.clip.image import ImageTokens
from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures, ModelOptions
from lexiseg.models.levels import (
    Aggregation,
    Groups,
    LevelProjection,
    LevelProjections,
    aggregate,
    build_aggregation,
    check_groups,
    format_groups,
    parse_groups,
)
from lexiseg.models.one_stage import Decoder, Head, OneStageModel
from lexiseg.models.one_stage_options import Backbone, OneStageOptions
from lexiseg.models.spectral import SpectralOptions

Host = Literal["zegclip", "frozen", "finetune", "spt-seg"]
_BACKBONES: dict[Host, Backbone] = {
    "zegclip": "prompt",
    "frozen": "fixed",
    "finetune": "finetune",
    "spt-seg": "prompt",
}


_FIXED = ("nga-fixed", "sum")  # sums whose weights do not train


class CascadeCLIPOptions(SpectralOptions, OneStageOptions):
    """Options of `CascadeCLIP`: its own, those of `OneStageOptions`, and with the host "spt-seg" `SpectralOptions`.

    Attributes:
        host: what the cascade is built on (Table 10): "zegclip", a tower with deep prompts; "frozen", a fixed tower
            without; "finetune", a tower that trains; "spt-seg", with spectral prompts, decoders and loss.
        groups: the groups of blocks, counted from 1, shallow to deep in each, one decoder a group (Tables 5, 6, 15).
        aggregation: how a group of several blocks is joined (Table 8), one word for all groups or a list of one each:
            "nga", "nga-fixed", "sum", "trainable-sum", "concat", "self-attention".
        sigma: width of the Gaussian of "nga" (Table 16 compares 0.8, 1 and 1.2).
        text_projection: "independent" projects the words for each decoder, "shared" once for all (Table 9).
        level_projection: norm and projection of intermediate blocks. "released": random and frozen, as in the authors'
            code; "clip": copies of CLIP's final ones, frozen; "trained": such copies, trained.
    """

    host: Host = "zegclip"
    groups: str = "{6-8},{9-11},{12}"
    aggregation: Aggregation | tuple[Aggregation, ...] = "nga"
    sigma: Annotated[float, Field(gt=0)] = 1.0
    text_projection: Literal["independent", "shared"] = "independent"
    level_projection: LevelProjection = "released"

    @field_validator("groups", mode="before")
    @classmethod
    def _write_groups(cls, value: Any) -> Any:
        return format_groups(parse_groups(value)) if isinstance(value, str | list | tuple) else value

    @model_validator(mode="after")
    def _count_aggregations(self) -> CascadeCLIPOptions:
        if not isinstance(self.aggregation, str) and len(self.aggregation) != len(self.blocks):
            raise ValueError(f"{len(self.aggregation)} aggregations are given for {len(self.blocks)} groups")
        return self

    @property
    def blocks(self) -> Groups:
        """The groups as tuples of block numbers, counted from 1."""
        return parse_groups(self.groups)

    @property
    def aggregations(self) -> tuple[Aggregation, ...]:
        """How each group is joined."""
        return (self.aggregation,) * len(self.blocks) if isinstance(self.aggregation, str) else self.aggregation


class CascadeCLIP(OneStageModel):
    """Cascade-CLIP on any host.

    Args:
        clip: the towers.
        options: see `CascadeCLIPOptions`.
        seen_names: classes that had masks in training.

    Raises:
        LexisegError: the options do not fit the tower, or the start "matching" has nothing to compare.
    """

    system: ClassVar[str] = "cascade-clip"
    options_class: ClassVar[type[ModelOptions]] = CascadeCLIPOptions
    options: CascadeCLIPOptions

    def __init__(self, clip: CLIP, options: CascadeCLIPOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        options = options or CascadeCLIPOptions()
        spectral = options if options.host == "spt-seg" else None
        super().__init__(clip, options, seen_names, backbone=_BACKBONES[options.host], spectral=spectral)
        last = clip.image_tower.num_blocks
        check_groups(options.blocks, last)
        self._last = last
        blocks = sorted({block - 1 for group in options.blocks for block in group} - {last - 1})
        visual = clip.visual
        self.levels: LevelProjections | None = None
        if blocks:
            self.levels = LevelProjections(blocks, visual.ln_post, visual.proj, options.level_projection)
        self.aggregations = nn.ModuleList(
            build_aggregation(kind, len(group), clip.embed_dim, sigma=options.sigma, num_heads=options.decoder_heads)
            for kind, group in zip(options.aggregations, options.blocks, strict=True)
        )
        parts = [self.build_head() for _ in options.blocks]
        shared = options.text_projection == "shared"
        self.query_projs = nn.ModuleList([parts[0][0]] if shared else [query_proj for query_proj, _ in parts])
        self.decoders = nn.ModuleList(decoder for _, decoder in parts)
        if options.start == "matching":
            self.start_as_matching(self._loudest())
        self.set_trainable()

    def _loudest(self) -> int:
        """The group that a matching start compares with the words: the deepest, and the last of those."""
        groups = self.options.blocks
        index = max(range(len(groups)), key=lambda i: (groups[i][-1], -len(groups[i]), i))
        if groups[index][-1] != self._last and self.options.level_projection == "released":
            raise LexisegError(
                f"start 'matching' compares patches with words, but no group of {self.options.groups} has the last "
                "block and the projections of the others are random; set level_projection to 'clip'."
            )
        if self.options.aggregations[index] in ("concat", "self-attention") and len(groups[index]) > 1:
            raise LexisegError(
                f"start 'matching' compares patches with words, which the aggregation "
                f"'{self.options.aggregations[index]}' of the deepest group changes; put the last block in a group of "
                "its own."
            )
        return index

    def frozen_names(self) -> tuple[str, ...]:
        """The level projections unless they train, and the weights of fixed sums."""
        frozen = super().frozen_names() + (() if self.options.level_projection == "trained" else ("levels.",))
        fixed = (f"aggregations.{i}." for i, kind in enumerate(self.options.aggregations) if kind in _FIXED)
        return (*frozen, *fixed)

    def heads(self) -> list[Head]:
        """One decoder a group."""
        projs = list(self.query_projs) * (len(self.decoders) if len(self.query_projs) == 1 else 1)
        pairs = zip(projs, self.decoders, strict=True)
        return [Head(cast(nn.Linear, proj), cast(Decoder, decoder)) for proj, decoder in pairs]

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """The intermediate blocks (0-based) that are in a group."""
        return () if self.levels is None else self.levels.blocks

    def level_features(self, result: ImageTokens) -> dict[int, Tensor]:
        """Unit vectors (B, N, D) of the patches that each of the `level_blocks` left.

        Prompts' norm comes first, the same one at every block. The class tokens of these blocks are not needed: every
        decoder's queries are made with the final one, as in the authors' code.
        """
        features: dict[int, Tensor] = {}
        if self.levels is not None:
            for index, block in enumerate(self.levels.blocks):
                patches = result.levels[block][:, -result.num_patches :]
                if self.prompts is not None:
                    patches = self.prompts.norm(patches)
                features[block] = self.levels(index, patches)
        return features

    def collect(self, result: ImageTokens, patches: Tensor) -> dict[str, Tensor]:
        """The joined patches of each group, ``group_0`` (B, h, w, D) and so on."""
        features = {**self.level_features(result), self._last - 1: patches}
        joined = {}
        for index, (module, group) in enumerate(zip(self.aggregations, self.options.blocks, strict=True)):
            levels = [features[block - 1] for block in group]
            joined[f"group_{index}"] = aggregate(module, levels).unflatten(1, result.grid)
        return joined

    def memories(self, features: ImageFeatures) -> list[Tensor]:
        """Each decoder sees its group."""
        return [features.values[f"group_{index}"] for index in range(len(self.decoders))]
