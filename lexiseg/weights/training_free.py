"""Training-free models by name: ``METHOD/TOWER/WEIGHTS``, with ``+PROXY`` behind it for ProxyCLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from lexiseg.models.base import SegmentationModel

METHODS = ("maskclip", "clip", "sclip", "clearclip", "naclip", "resclip", "proxyclip", "gem")
TRAINING_FREE = (*METHODS, "dense-clip")
"""First parts of the names of training-free models; ``dense-clip`` is MaskCLIP under its old name."""


def load_training_free(name: str) -> SegmentationModel:
    """Load a training-free model.

    ``name``: a method and what `lexiseg.clip.load.load_clip` takes, such as ``"naclip/ViT-B-16/openai"``,
    ``"maskclip/transformers:google/tipsv2-b14"`` or ``"proxyclip/ViT-B-16/openai+vit_base_patch8_224.dino"``. Raises
    LexisegError if the name lacks a part, there are no such weights, or the method cannot run on them.
    """
    from lexiseg.clip.load import load_clip
    from lexiseg.models.dense_clip import DenseCLIP

    method, _, tower = name.partition("/")
    method = "maskclip" if method == "dense-clip" else method
    if not tower:
        raise LexisegError(f"'{name}' lacks a tower; write for example '{method}/ViT-B-16/openai'.")
    options: dict[str, Any] = {"method": method}
    if method == "proxyclip":
        tower, plus, proxy = tower.rpartition("+")
        if not plus or not tower or not proxy:
            raise LexisegError(
                f"'{name}' lacks the second encoder; write for example "
                "'proxyclip/ViT-B-16/openai+vit_base_patch8_224.dino'."
            )
        options["proxy"] = proxy
    clip = load_clip(tower)
    if clip.packaged:
        # The picture world's CLIP does best at the size it was trained at, and its results are reported there.
        options["short_side"] = clip.image_size
    return DenseCLIP.build(clip, options)
