"""From options to a generator of mask proposals."""

from __future__ import annotations

from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.options import GeneratorOptions, Mask2FormerOptions, MaskFormerOptions, SamOptions


def build_generator(options: GeneratorOptions) -> ProposalGenerator:
    """Build a generator, with random weights but for SAM, which loads the weights it names when it is first run.

    Raises:
        LexisegError: a library it needs is missing, or the options contradict each other.
    """
    if isinstance(options, MaskFormerOptions):
        from lexiseg.proposals.maskformer import MaskFormer

        return MaskFormer(options)
    if isinstance(options, Mask2FormerOptions):
        from lexiseg.proposals.mask2former import Mask2Former

        return Mask2Former(options)
    if isinstance(options, SamOptions):
        from lexiseg.proposals.sam import Sam

        return Sam(options)
    from lexiseg.proposals.given import GroundTruth

    return GroundTruth()
