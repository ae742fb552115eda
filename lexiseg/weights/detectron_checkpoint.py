"""The authors' checkpoints of DeOP, ZSSeg, ZegFormer, FreeSeg and MAFT: what they are, and which tensors count.

They have detectron2's layout: ``backbone.`` and ``sem_seg_head.`` are the proposal generator, ``clip_adapter.`` is CLIP
with OpenAI's names and what was learned around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.proposals.options import Mask2FormerOptions, QueryOptions
from lexiseg.weights.detectron_options import HEAD, INTERACTION
from lexiseg.weights.filling import SourceOf, key_map

System = Literal["deop", "zsseg", "zegformer", "freeseg", "maft", "prompts"]

_ADAPTER = "clip_adapter."
SECOND_ADAPTER = "_region_clip_adapter."
_PREDICTOR = HEAD + "predictor."
# The query decoders: MaskFormer's, and Mask2Former's masked one.
_DECODER, _MASKED_DECODER = _PREDICTOR + "transformer.decoder.", _PREDICTOR + "transformer_ffn_layers."
# DeOP's own modules beside the generator and the adapter.
_DEOP = ("decoder.", "query_embedding.", "decoderConv.", "decoderConvs.")
# Tables that DeOP adds to the tokens of CLIP's image tower, or prompts it prepends.
_TABLES = re.compile(
    r"visual\.(?:transformer\.resblocks\.\d+\.)?learned_position|visual\.transformer\.deep_prompt_embeddings"
)
# Tensors that take part in no computation of ours: class weights of a loss, constants, embeddings of fixed tokens ("X."
# and so on), which the text tower holds anyway, and of DeOP's decoder the norm behind its layers, which feeds outputs
# that nothing reads, and the copies of its convolution, which are one module.
_UNUSED = re.compile(
    r"criterion\.empty_weight|pixel_(?:mean|std)"
    r"|_?(?:region_)?clip_adapter\.(?:pixel_(?:mean|std)|prompt_learner\.(?:start|dot|end|pad)_signal)"
    r"|T\..+|decoder\.norm\.(?:weight|bias)|decoderConvs\.\d+\.weight"
)


def recognise_detectron(state: Mapping[str, Tensor]) -> System | None:
    """Tell by its keys what a checkpoint is of; None if it is none of these."""

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in state)

    if not has("backbone.stem.", HEAD):
        learned = has(_ADAPTER + "prompt_learner.") and has(_ADAPTER + "clip_model.")
        return "prompts" if learned and not has(*_DEOP) else None
    if has("IPCLIP."):
        return "maft"
    if has(*_DEOP) or any(_TABLES.fullmatch(key.removeprefix(_ADAPTER + "clip_model.")) for key in state):
        return "deop"
    if has(_PREDICTOR + "projection_layer.", _PREDICTOR + "bg_feature"):
        return "zegformer"
    if has(INTERACTION):
        return "freeseg"
    if not (has(_PREDICTOR + "class_embed.") and has(_ADAPTER)):
        return None
    # Of the systems with such a class head the decoder tells which: a FreeSeg that has lost its interaction is damaged.
    return "freeseg" if has(_MASKED_DECODER) else "zsseg" if has(_DECODER) else None


def newest_key(key: str) -> str:
    """Bring a key to the newest layout.

    Old MaskFormer files have the pixel decoder's tensors directly under ``sem_seg_head.``; files that were saved again
    without their version note may have its prefix twice.
    """
    rest = key.removeprefix(HEAD)
    if rest == key:
        return key
    if rest.startswith("pixel_decoder."):
        while rest.startswith("pixel_decoder.pixel_decoder."):
            rest = rest.removeprefix("pixel_decoder.")
        return HEAD + rest
    if rest.startswith(("predictor.", "interaction.")):
        return key
    return f"{HEAD}pixel_decoder.{rest}"


def used_tensors(state: Mapping[str, Tensor], system: System, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors by the keys of the newest layout, and the keys that take part in no computation.

    Some of ZSSeg's files hold a second adapter, which classifies the crops: its prompts take the place of the first
    one's. Raises LexisegError if its CLIP is another one; ``name`` says whose.
    """
    keys = {key: newest_key(key) for key in state}
    used = {newest: state[key] for key, newest in keys.items() if not _UNUSED.fullmatch(newest)}
    unused = [key for key, newest in keys.items() if _UNUSED.fullmatch(newest)]
    second = {key: used.pop(key) for key in [*used] if key.startswith(SECOND_ADAPTER) and system != "deop"}
    for key in [key for key in used if second and key.startswith(_ADAPTER + "prompt_learner.")]:
        del used[key]
        unused.append(key)
    for key, tensor in second.items():
        first = key.replace(SECOND_ADAPTER, _ADAPTER)
        if ".clip_model." in key and (first not in used or not torch.equal(tensor.float(), used[first].float())):
            raise LexisegError(
                f"The two CLIPs in {name}, of the proposals and of the crops, are not the same; lexiseg keeps one for "
                "both."
            )
        if first in used:
            unused.append(key)
        else:
            used[first] = tensor
    return used, unused


def generator_source(options: QueryOptions) -> SourceOf:
    """The key map of a generator with these options: where its tensors lie in the authors' files."""
    kind = "mask2former" if isinstance(options, Mask2FormerOptions) else "maskformer"
    return key_map("deep-stem" if options.backbone.endswith("c") else "stem", "resnet", kind, "generator")
