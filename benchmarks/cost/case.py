"""What the cost table needs to know about a system: its full size, and how its paper's figures were counted."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lexiseg.clip.model import CLIP, build_clip
from lexiseg.clip.tower import block_attention, run_block
from lexiseg.models import SegmentationModel

Model = TypeVar("Model", bound=SegmentationModel)

VIT_B_16: dict[str, Any] = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
"""The size of the papers' tower. Tables of cost fill it with random weights: cost does not depend on their values."""

VIT_L_14_336: dict[str, Any] = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 336, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}
"""The tower of CAT-Seg's large model."""

SIDE = 512
CLASSES = 171


@dataclass(frozen=True)
class Published:
    """What a paper prints about a system's cost; None where it prints nothing.

    Attributes:
        parameters_m: parameters in millions.
        trainable_m: of them trained, in millions.
        gmac: what it calls GFLOPs.
        frames_per_s: on its own machine.
        source: which table.
        code_gmac: multiply-adds (1e9) of the authors' code in the paper's convention, measured by running it.
        code_parameters_m: parameters of the authors' modules.
        code_trainable_m: of them trained.
    """

    parameters_m: float | None = None
    trainable_m: float | None = None
    gmac: float | None = None
    frames_per_s: float | None = None
    source: str = ""
    code_gmac: float | None = None
    code_parameters_m: float | None = None
    code_trainable_m: float | None = None


@dataclass(frozen=True)
class Step:
    """One term of the paper's figure, most of them counted in lexiseg's own modules.

    Attributes:
        what: what is counted.
        macs: multiply-adds it adds; negative where the paper's count lacks them.
    """

    what: str
    macs: int


class CostCase(ABC):
    """One row of the table.

    Attributes:
        name: of the row.
        published: the paper's figures.
        convention: how they come about, in a sentence.
        runs: whether a prediction is run, to be counted and timed; otherwise the terms of `further` are its count.
    """

    name: ClassVar[str]
    published: ClassVar[Published] = Published()
    convention: ClassVar[str] = ""
    runs: ClassVar[bool] = True

    @abstractmethod
    def build(self, side: int) -> SegmentationModel:
        """Build the system at the paper's size, with random weights, for pictures of ``side`` x ``side`` pixels."""

    def authors_parameters(self, model: SegmentationModel) -> tuple[int, int]:
        """All parameters and the trainable ones as the authors count them: dead weights are in both."""
        return model.num_parameters(), model.num_parameters(trainable=True)

    def steps(self, model: SegmentationModel) -> list[Step]:
        """From lexiseg's count of the paper's setting to the paper's figure; empty where the paper has none."""
        return []

    def further(self, model: SegmentationModel) -> list[Step]:
        """Other counts of lexiseg's modules that `convention` names, every operation counted."""
        return []


def shapes_of(model: Model) -> Model:
    """A copy of the model whose tensors have shapes but no values, so that running it takes no time.

    Only for passes whose course does not depend on values.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    shapes.requires_grad_(False)
    return shapes


@lru_cache(maxsize=4)
def shared_clip(image_size: int) -> CLIP:
    """A ViT-B/16 with random weights, made once: the frozen towers of all rows can be the same."""
    vision = {**VIT_B_16["vision_cfg"], "image_size": image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_clip({"model_cfg": {**VIT_B_16, "vision_cfg": vision}}, name="ViT-B-16 (random)")


def text_pass(clip: CLIP, classes: int) -> Callable[[], Tensor]:
    """The text tower over ``classes`` texts at its full length, as the authors' code runs it."""

    def run() -> Tensor:
        tower = clip.model
        width = tower.token_embedding.embedding_dim
        tokens = torch.empty(classes, clip.context_length, width, device=clip.device)
        for block in tower.transformer.resblocks:
            tokens = run_block(block, tokens, attention=partial(block_attention, causal=True))
        return tower.ln_final(tokens)[:, -1] @ tower.text_projection

    return run
