"""Mask proposals: MaskFormer, Mask2Former and SAM from `transformers`, and ground-truth masks."""

from lexiseg.proposals.base import (
    HARD_LOGIT,
    GeneratorOptions,
    GroundTruthOptions,
    Mask2FormerOptions,
    MaskFormerOptions,
    ProposalGenerator,
    Proposals,
    QueryOptions,
    SamOptions,
    build_generator,
)

__all__ = [
    "HARD_LOGIT",
    "GeneratorOptions",
    "GroundTruthOptions",
    "Mask2FormerOptions",
    "MaskFormerOptions",
    "ProposalGenerator",
    "Proposals",
    "QueryOptions",
    "SamOptions",
    "build_generator",
]
