"""Cascade-CLIP on SPT-SEG (its Table 10): the groups are the cascade's; prompts, decoders and losses are SPT-SEG's."""

from typing import Literal

from lexiseg.models.cascade_clip import CascadeCLIP, CascadeCLIPOptions
from lexiseg.models.spt_seg import SPTSeg, SPTSegOptions


class CascadeOnSPTOptions(CascadeCLIPOptions, SPTSegOptions):
    """Options of `CascadeOnSPT`: those of `CascadeCLIPOptions` and of `SPTSegOptions`."""

    base: Literal["zegclip", "spt-seg"] = "spt-seg"

    weights_depend_on = CascadeCLIPOptions.weights_depend_on | SPTSegOptions.weights_depend_on


class CascadeOnSPT(CascadeCLIP, SPTSeg):
    """The system "cascade-clip" with the option ``base: spt-seg``."""

    options_class = CascadeOnSPTOptions
    options: CascadeOnSPTOptions


CascadeCLIP.bases["spt-seg"] = CascadeOnSPT
