"""Models from the checkpoints of the decoupled systems' authors: which reader takes which file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lexiseg.clip import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models import SegmentationModel
from lexiseg.weights.deop_checkpoint import read_deop
from lexiseg.weights.detectron_checkpoint import System
from lexiseg.weights.region_host_checkpoint import read_region_host

DECOUPLED_NAMES = {
    "deop": "DeOP",
    "zsseg": "ZSSeg",
    "zegformer": "ZegFormer",
    "freeseg": "FreeSeg",
    "maft": "MAFT",
    "prompts": "ZSSeg's and DeOP's prompt stage",
}


@dataclass(frozen=True)
class DecoupledReport:
    """A model read from a checkpoint.

    Attributes:
        model: filled, in evaluation mode.
        unused: keys that take part in no computation and were left out.
        notes: what no shape tells and was assumed, a sentence each.
    """

    model: SegmentationModel
    unused: list[str]
    notes: tuple[str, ...]


def read_decoupled(
    system: System,
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    clip: CLIP | None = None,
    name: str = "the checkpoint",
) -> DecoupledReport:
    """Build the model of a checkpoint in detectron2's layout.

    Args:
        system: from `recognise_detectron`.
        state: the tensors by the authors' keys.
        heads: attention heads of CLIP's image tower; None is one a 64 channels.
        text_heads: of its text tower; None likewise.
        clip: for a file without one (ZegFormer's training checkpoints): the CLIP it was trained with.
        name: how errors call the file.

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
        return DecoupledReport(model, unused, tuple(notes))
    if system == "prompts":
        raise LexisegError(
            f"{name} holds a learned text prompt and CLIP but no proposals; convert a checkpoint of a later stage, "
            "which has the prompt in it."
        )
    host, unused = read_region_host(state, clip=clip, heads=heads, text_heads=text_heads, name=name)
    return DecoupledReport(host, unused, ())
