"""The segmentation systems, one file each."""

from lexiseg.models.base import SegmentationModel
from lexiseg.models.cascade_clip import CascadeCLIP, CascadeCLIPOptions
from lexiseg.models.cascade_on_spt import CascadeOnSPT as CascadeOnSPT
from lexiseg.models.cat_seg import CATSeg, CATSegOptions
from lexiseg.models.dense_clip import DenseCLIP, DenseCLIPOptions
from lexiseg.models.deop import DeOP, DeOPOptions
from lexiseg.models.region_models import FreeSeg, FreeSegOptions, ZSSeg, ZSSegOptions
from lexiseg.models.second_look import SecondLook, SecondLookOptions
from lexiseg.models.spt_seg import SPTSeg, SPTSegOptions
from lexiseg.models.zegclip import ZegCLIP, ZegCLIPOptions
from lexiseg.models.zegformer import ZegFormer, ZegFormerOptions

SYSTEMS: dict[str, type[SegmentationModel]] = {
    system.system: system
    for system in (ZegCLIP, DenseCLIP, CascadeCLIP, SPTSeg, CATSeg, SecondLook, ZSSeg, ZegFormer, FreeSeg, DeOP)
}

__all__ = [
    "SYSTEMS",
    "CATSeg",
    "CATSegOptions",
    "CascadeCLIP",
    "CascadeCLIPOptions",
    "DeOP",
    "DeOPOptions",
    "DenseCLIP",
    "DenseCLIPOptions",
    "FreeSeg",
    "FreeSegOptions",
    "SPTSeg",
    "SPTSegOptions",
    "SecondLook",
    "SecondLookOptions",
    "SegmentationModel",
    "ZSSeg",
    "ZSSegOptions",
    "ZegCLIP",
    "ZegCLIPOptions",
    "ZegFormer",
    "ZegFormerOptions",
]
