"""The segmentation systems, one file each, which is imported when its system is asked for."""

from __future__ import annotations

from collections import UserDict
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lexiseg.models.base import SegmentationModel

if TYPE_CHECKING:
    from lexiseg.models.cascade_clip import CascadeCLIP, CascadeCLIPOptions
    from lexiseg.models.cat_seg import CATSeg, CATSegOptions
    from lexiseg.models.dense_clip import DenseCLIP, DenseCLIPOptions
    from lexiseg.models.deop import DeOP, DeOPOptions
    from lexiseg.models.region_models import FreeSeg, FreeSegOptions, ZSSeg, ZSSegOptions
    from lexiseg.models.second_look import SecondLook, SecondLookOptions
    from lexiseg.models.spt_seg import SPTSeg, SPTSegOptions
    from lexiseg.models.zegclip import ZegCLIP, ZegCLIPOptions
    from lexiseg.models.zegformer import ZegFormer, ZegFormerOptions

_HOMES = {
    "zegclip": "zegclip.ZegCLIP",
    "dense-clip": "dense_clip.DenseCLIP",
    "cascade-clip": "cascade_on_spt.CascadeCLIP",  # with its variant on SPT-SEG, which makes itself known to it
    "spt-seg": "spt_seg.SPTSeg",
    "cat-seg": "cat_seg.CATSeg",
    "second-look": "second_look.SecondLook",
    "zsseg": "region_models.ZSSeg",
    "zegformer": "zegformer.ZegFormer",
    "freeseg": "region_models.FreeSeg",
    "deop": "deop.DeOP",
}
"""The file and the class of every system."""


class _Systems(UserDict[str, Any]):
    def __getitem__(self, name: str) -> type[SegmentationModel]:
        found = super().__getitem__(name)
        return _named(found, found.partition(".")[2]) if isinstance(found, str) else found


SYSTEMS = _Systems(_HOMES)
"""The systems by their names."""


def _named(home: str, name: str) -> Any:
    return getattr(import_module(f"{__name__}.{home.partition('.')[0]}"), name)


def __getattr__(name: str) -> Any:
    home = next((home for home in _HOMES.values() if home.partition(".")[2] == name.removesuffix("Options")), None)
    if home is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _named(home, name)


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
