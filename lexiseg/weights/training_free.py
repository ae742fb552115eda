"""Training-free models by name: ``METHOD/TOWER/WEIGHTS``, with ``+PROXY`` behind it for ProxyCLIP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexiseg.errors import LexisegError
from lexiseg.hub import cached, download_folder

if TYPE_CHECKING:
    from lexiseg.models.base import SegmentationModel
    from lexiseg.models.sam3 import SAM3

METHODS = ("maskclip", "clip", "sclip", "clearclip", "naclip", "resclip", "proxyclip", "gem")
TRAINING_FREE = (*METHODS, "dense-clip", "sam3")
"""First parts of the names of training-free models; ``dense-clip`` is MaskCLIP under its old name."""
SAM3_WEIGHTS = "facebook/sam3"


def load_training_free(name: str) -> SegmentationModel:
    """Load a training-free model.

    ``name``: a method and what `lexiseg.clip.load.load_clip` takes, such as ``"naclip/ViT-B-16/openai"``,
    ``"maskclip/transformers:google/tipsv2-b14"`` or ``"proxyclip/ViT-B-16/openai+vit_base_patch8_224.dino"``; or
    ``"sam3"``, with a folder or a name of the hub behind a ``/`` where it is not Meta's own. Raises LexisegError if the
    name lacks a part, there are no such weights, or the method cannot run on them.
    """
    method, _, tower = name.partition("/")
    if method == "sam3":
        return load_sam3(tower or SAM3_WEIGHTS)
    from lexiseg.clip.load import load_clip
    from lexiseg.models.dense_clip import DenseCLIP

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


def load_sam3(name: str = SAM3_WEIGHTS) -> SAM3:
    """Load SAM 3.

    Before anything is downloaded it says on stderr which licence the weights are under. ``name``: a folder of
    transformers, or ``OWNER/NAME`` on the hub. Raises LexisegError if the weights cannot be had, are gated, damaged or
    of another model.
    """
    from lexiseg.clip.foreign import read_kind, read_transformers

    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name == SAM3_WEIGHTS and cached(name, ("model.safetensors",)) is None:
            print(
                f"sam3: the weights of {name} are gated and under the SAM License, which is not an open-source "
                "licence: accept it on the hub, then log in with `hf auth login`; about 3,360 MB to download.",
                file=sys.stderr,
            )
        folder = download_folder(name, name)
    kind = read_kind(folder, name)
    if kind not in ("sam3", "sam3_video"):
        raise LexisegError(f"'{name}' is a {kind}, not a SAM 3; write sam3/{SAM3_WEIGHTS}, or a folder of it.")
    from transformers import Sam3Model

    from lexiseg.models.sam3 import SAM3, SAM3Towers

    return SAM3(SAM3Towers(*read_transformers(folder, name, Sam3Model), f"sam3/{name}"))
