"""The segmentation systems, one file each."""

from lexiseg.models.base import ImageFeatures, ModelOptions, SegmentationModel, WindowPolicy
from lexiseg.models.dense_clip import DenseCLIP, DenseCLIPOptions
from lexiseg.models.zegclip import ZegCLIP, ZegCLIPOptions

SYSTEMS: dict[str, type[SegmentationModel]] = {ZegCLIP.system: ZegCLIP, DenseCLIP.system: DenseCLIP}

__all__ = [
    "SYSTEMS",
    "DenseCLIP",
    "DenseCLIPOptions",
    "ImageFeatures",
    "ModelOptions",
    "SegmentationModel",
    "WindowPolicy",
    "ZegCLIP",
    "ZegCLIPOptions",
]
