"""ZegCLIP: CLIP with deep prompts, a relationship descriptor and a matching decoder, one stage from patch to mask.

Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023. The tower with its
prompts, the descriptor, the losses and the scores are in `lexiseg.models.one_stage`. The paper's two baselines, CLIP
fixed and CLIP fine-tuned, are options of the same class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures, ModelOptions
from lexiseg.models.one_stage import Head, OneStageModel
from lexiseg.models.one_stage_options import Backbone, OneStageOptions


class ZegCLIPOptions(OneStageOptions):
    """Options of `ZegCLIP`, with those of `OneStageOptions`.

    Attributes:
        backbone: "prompt" keeps CLIP frozen and learns prompts; "fixed" and "finetune" are the paper's baselines, a
            frozen tower without prompts and a tower that is trained.
        decoder_dim: width of the decoder; None is the joint embedding's. Another width needs ``project_memory``.
        project_memory: map the patches by a linear layer and a norm before the decoder (off in all released models).
    """

    backbone: Backbone = "prompt"
    decoder_dim: Annotated[int, Field(ge=1)] | None = None
    project_memory: bool = False


class ZegCLIP(OneStageModel):
    """ZegCLIP and its one-stage baselines.

    Args:
        clip: the towers.
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
        super().__init__(clip, options, seen_names, backbone=options.backbone)
        dim = options.decoder_dim or clip.embed_dim
        if dim != clip.embed_dim and not options.project_memory:
            raise LexisegError(
                f"decoder_dim {dim} differs from the embedding's {clip.embed_dim}; "
                "set project_memory, or leave decoder_dim out."
            )
        self.memory_proj: nn.Module = nn.Identity()
        if options.project_memory:
            self.memory_proj = nn.Sequential(nn.Linear(clip.embed_dim, dim), nn.LayerNorm(dim))
        self.query_proj, self.decoder = self.build_head(dim)
        if options.start == "matching":
            if options.project_memory:
                raise LexisegError("start 'matching' compares patches and words directly; leave project_memory out.")
            self.start_as_matching()
        self.set_trainable()

    def heads(self) -> list[Head]:
        """One decoder."""
        return [Head(self.query_proj, self.decoder)]

    def memories(self, features: ImageFeatures) -> list[Tensor]:
        """It sees the final patches."""
        return [self.memory_proj(features.values["patches"])]
