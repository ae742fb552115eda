"""The key layout of the authors' one-stage checkpoints, and how it maps to our modules.

ZegCLIP's, Cascade-CLIP's and SPT-SEG's files hold three parts, ``backbone.``, ``text_encoder.`` and ``decode_head.``.
Some of their tensors never take part in any computation: the decoder layers' self-attention and first norm, the value
path of the last layer, the loss's class weights, and in SPT-SEG the attention that the spectral guide replaced. They
are recognised, not needed, and reported. Of SPT-SEG no checkpoint was published; its layout is that of its code.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from lexiseg.clip.model import build_clip
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, CascadeCLIP
from lexiseg.models.options import format_groups
from lexiseg.models.spt_seg import SPTSeg
from lexiseg.models.zegclip import ZegCLIP
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD
from lexiseg.templates import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.weights.clip_state import count_blocks, infer_vit_architecture, require, shape_keys, shape_of
from lexiseg.weights.filling import filled, key_map

NAMES = {"zegclip": "ZegCLIP", "cascade-clip": "Cascade-CLIP", "spt-seg": "SPT-SEG"}

# Prompts a block of the papers' VOC and Context models.
_VOC_PROMPTS, _CONTEXT_PROMPTS = 10, 35
_LAYER = re.compile(r"(decode_head\.(?:decoder_1|cascade_decoders\.\d+)\.layers)\.(\d+)\.(.+)")
_CLIP = key_map("zegclip", inside="clip.model.")  # the others have the same


def is_unused(key: str, model: ZegCLIP) -> bool:
    """Say whether a tensor of the authors' file takes no part in any computation of ``model``."""
    if key == "decode_head.loss_decode.criterion.empty_weight":
        return True
    depth = None if model.prompts is None else model.prompts.depth
    spectral = isinstance(model, SPTSeg)
    dead = [".prompt_norm."] * (depth == 0) + [".proj_fre."] * spectral
    if key.startswith(tuple(f"backbone{part}" for part in dead)):
        return True
    layer = _LAYER.fullmatch(key)
    if layer is None:
        return False
    index, rest = int(layer[2]), layer[3]
    always = ("self_attn.", "norm1.", "multihead_attn.", "hlfs.h_proj.") if spectral else ("self_attn.", "norm1.")
    if rest.startswith(always):
        return True
    mixing = ("hlfs.proj.",) if spectral else ("multihead_attn.v.", "multihead_attn.proj.")
    last = (*mixing, "linear1.", "linear2.", "norm2.", "norm3.")
    return index == model.options.decoder_layers - 1 and rest.startswith(last)


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """Name the system whose checkpoint this is by its keys: "zegclip", "cascade-clip", "spt-seg", or None."""
    if any(key.startswith("decode_head.q_projs.") for key in state):
        return "cascade-clip"
    if "backbone.complex_weight" in state:
        return "spt-seg"
    if "backbone.class_embedding" in state and "decode_head.q_proj.weight" in state:
        return "zegclip"
    return None


def infer_options(state: Mapping[str, Tensor], system: str, name: str = "the checkpoint") -> dict[str, Any]:
    """Read a system's options off a checkpoint; what shapes cannot tell is as in the authors' configurations.

    Raises LexisegError if tensors are missing whose shapes are needed; all are listed.
    """
    cascade = system == "cascade-clip"
    query = f"decode_head.{'q_projs.0' if cascade else 'q_proj'}.weight"
    # The last group of blocks is one block and has no weights.
    groups = count_blocks(state, "decode_head.q_projs.", name) - 1 if cascade else 0
    weights = [f"decode_head.weights_s{index + 1}" for index in range(groups)]
    require(state, [query, *weights, *shape_keys(_CLIP)], name)
    embed_dim = shape_of(state, "backbone.proj", 2, name)[1]
    dim, inputs = shape_of(state, query, 2, name)
    patch = shape_of(state, "backbone.conv1.weight", 4, name)[-1]
    side = math.isqrt(shape_of(state, "backbone.positional_embedding", 2, name)[0] - 1) * patch
    layers = f"decode_head.{'cascade_decoders.0' if cascade else 'decoder_1'}.layers."
    options: dict[str, Any] = {
        "descriptor": inputs == 2 * embed_dim,
        "decoder_layers": count_blocks(state, layers, name),
        "class_embedding_twice": True,
        "mask_size": side,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "window_size": side,
        "window_stride": side * 426 // 512,
        "short_side": side,
        "antialias": False,
    }
    if (first := f"{layers}0.linear1.weight") in state:
        options["ffn_ratio"] = shape_of(state, first, 2, name)[0] / dim
    shallow, deep = (
        shape_of(state, key, 3, name) if key in state else None
        for key in ("backbone.prompt_embeddings", "backbone.deep_prompt_embeddings")
    )
    prompts = shallow if deep is None else deep
    if prompts is not None:
        depth = 0 if deep is None else deep[0]
        options |= {"prompt_depth": depth if shallow is not None else -depth, "num_prompts": prompts[1]}
    if system != "spt-seg":
        options["backbone"] = "fixed" if prompts is None else "prompt"
    if cascade:
        blocks = count_blocks(state, "backbone.transformer.resblocks.", name)
        options["groups"] = _infer_groups([state[key].numel() for key in weights], blocks)
    elif system == "spt-seg":
        options["filter_grid"] = shape_of(state, "backbone.complex_weight", 4, name)[0]
    return options


def _infer_groups(sizes: Sequence[int], block: int) -> str:
    """The groups of a Cascade-CLIP checkpoint of so many blocks, for which shapes give the sizes only.

    As in the released models the last group is the last block, and the others are the blocks before it.
    """
    groups: list[tuple[int, ...]] = [(block,)]
    for size in reversed(sizes):
        block -= size
        groups.insert(0, tuple(range(block, block + size)))
    return format_groups(tuple(groups))


def read_one_stage(
    state: Mapping[str, Tensor], *, options: Mapping[str, Any] | None = None, name: str = "The checkpoint", **heads: Any
) -> tuple[ZegCLIP, list[str]]:
    """Build a one-stage model from the authors' tensors.

    ``options``: replace what `infer_options` finds. ``name``: what to call the file in messages. ``heads``: those of
    `infer_vit_architecture`. Returns the model, and the keys that take part in no computation and were left out. Raises
    LexisegError if it is of none of the systems, or tensors are missing, left over or of the wrong shape; all of them
    are listed.
    """
    system = recognise(state)
    if system is None:
        raise LexisegError(
            f"{name} is not a checkpoint of {', '.join(NAMES.values())}; check that it is the authors' file."
        )
    found = {**infer_options(state, system, name), **(options or {})}
    architecture = infer_vit_architecture(state, _CLIP, name=name, **heads)

    def build() -> ZegCLIP:
        return cast(ZegCLIP, SYSTEMS[system].build(build_clip(architecture, name="clip"), found))

    said = f"{name} looks like {NAMES[system]} but"
    model, unused = filled(build, key_map(system), state, said, is_unused=is_unused)
    model.default_templates = SINGLE_TEMPLATE if model.options.num_prompts <= _VOC_PROMPTS else PAPER_TEMPLATES
    return model, unused


def one_stage_notes(model: ZegCLIP, state: Mapping[str, Tensor], *, seen_known: bool, transductive: bool) -> list[str]:
    """What such a file does not tell and was assumed, a sentence each; see `decoupled_notes` for the arguments."""
    notes = ["logit_scale is not in the checkpoint; it is not used and keeps its initial value."]
    if isinstance(model, CascadeCLIP):
        notes.append(
            f"Which blocks its groups hold is not in the file; {model.options.groups} fits its shapes and is what the "
            "released models have."
        )
        if model.options.num_prompts == _CONTEXT_PROMPTS:
            # The ids in the authors' configuration belong to another order of the classes than their labels'.
            notes.append(
                "With 35 prompts it looks like the PASCAL Context model, whose unseen classes in the authors' "
                "configuration are aeroplane, bed, bedclothes, boat, bottle, car, cloth, cow, keyboard and plate, not "
                "the papers' ten."
            )
    if not seen_known and not transductive:
        notes.append(
            "The classes it was trained on are not in the file: none counts as seen, and no score offset applies."
        )
    return notes
