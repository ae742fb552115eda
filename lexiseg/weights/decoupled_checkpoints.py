"""Models from the checkpoints of the decoupled systems' authors: which reader takes which file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models import SegmentationModel
from lexiseg.models.region_base import RegionModel
from lexiseg.weights.deop_checkpoint import read_deop
from lexiseg.weights.detectron_checkpoint import System
from lexiseg.weights.region_checkpoint import read_region_model

DECOUPLED_NAMES = {
    "deop": "DeOP",
    "zsseg": "ZSSeg",
    "zegformer": "ZegFormer",
    "freeseg": "FreeSeg",
    "maft": "MAFT",
    "prompts": "ZSSeg's and DeOP's prompt stage",
}


def read_decoupled(
    system: System,
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    clip: CLIP | None = None,
    seen_known: bool = False,
    transductive: bool = False,
    name: str = "the checkpoint",
) -> tuple[SegmentationModel, list[str], list[str]]:
    """Build the model of a checkpoint in detectron2's layout.

    Args:
        system: from `recognise_detectron`.
        state: the tensors by the authors' keys.
        heads: attention heads of CLIP's image tower; None is one a 64 channels.
        text_heads: of its text tower; None likewise.
        clip: for a file without one (ZegFormer's training checkpoints): the CLIP it was trained with.
        seen_known: somebody says which classes it was trained on.
        transductive: it was trained with self-training, where seen classes have no score offset.
        name: how errors call the file.

    Returns:
        the model in evaluation mode; the keys that take part in no computation and were left out; and what no shape
        tells and was assumed, a sentence each.

    Raises:
        LexisegError: the checkpoint has no model in it, it has no CLIP and none is given, or tensors are missing, left
            over or of another shape.
    """
    if system == "deop":
        model, unused = read_deop(state, heads=heads, text_heads=text_heads, name=name)
        notes = [
            "The severance is the released one, values scaled by the masks, in the last block; the file does not say."
        ]
        if model.options.visual_prompts == "prepended":
            notes.append(f"The prepended prompts are taken to belong to the blocks {model.options.prompt_blocks}.")
        return model, unused, notes
    if system == "prompts":
        raise LexisegError(
            f"{name} holds a learned text prompt and CLIP but no proposals; convert a checkpoint of a later stage, "
            "which has the prompt in it."
        )
    options = {"seen_offset": 0.0} if transductive else {}
    region, unused = read_region_model(state, clip=clip, heads=heads, text_heads=text_heads, options=options, name=name)
    return region, unused, _region_notes(system, region, seen_known, transductive)


def _region_notes(system: System, model: RegionModel, seen_known: bool, transductive: bool) -> list[str]:
    """What the file of a region model does not say, and what was assumed."""
    options, notes = model.options, []
    if options.ensemble.rule == "region":
        notes.append(
            "CLIP alone scores, as in the released code, which the file does not say; the paper has an ensemble."
        )
    elif system != "zegformer":
        notes.append(
            f"The ensemble's weight is {options.ensemble.weight:g}, as for COCO-Stuff, which the file does not say; "
            "most of VOC's models have 0.7."
        )
    notes.append(
        f"Pictures' shorter side is {options.short_side}, as for COCO-Stuff, which the file does not say; VOC's models "
        "have 512."
    )
    if system == "zsseg":
        notes.append("The proposal stage of DeOP is the same network, so that it may be one: the keys do not tell.")
    if system == "freeseg" and options.prompts is None:
        notes.append("There are no learned prompts in the file: words are put into templates.")
    if not seen_known and options.ensemble.rule != "region":
        offset = " and no score offset applies" if system == "zegformer" and not transductive else ""
        notes.append(
            "The classes it was trained on are not in the file: none counts as seen, so that the ensemble treats all "
            f"as unseen{offset}."
        )
    return notes
