"""The authors' checkpoints of DeOP, ZSSeg, ZegFormer, FreeSeg and MAFT: recognised by their keys and taken apart.

They have detectron2's layout: ``backbone.`` and ``sem_seg_head.`` are the proposal generator, ``clip_adapter.`` is CLIP
with OpenAI's names and what was learned around it. The parts that a system adds are passed on as they are; its
own file knows them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lexiseg.clip.load import shapes_of
from lexiseg.errors import LexisegError
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.options import Mask2FormerOptions
from lexiseg.weights.detectron_options import HEAD
from lexiseg.weights.filling import SourceOf, key_map, take_tensors

System = Literal["deop", "zsseg", "zegformer", "freeseg", "maft", "prompts"]

_ADAPTER = "clip_adapter."
_REGION_ADAPTER = "_region_clip_adapter."
_PREDICTOR = HEAD + "predictor."
_INTERACTION = HEAD + "interaction."
# The query decoders: MaskFormer's, and Mask2Former's masked one.
_DECODER, _MASKED_DECODER = _PREDICTOR + "transformer.decoder.", _PREDICTOR + "transformer_ffn_layers."
_ZEGFORMER_CLIP = _PREDICTOR + "clip_model."
_ZEGFORMER_SCORES = ("bg_feature", "logit_scale")
# DeOP's own modules beside the generator and the adapter.
_DEOP = ("decoder.", "query_embedding.", "decoderConv.", "decoderConvs.")
# Tables that DeOP adds to the tokens of CLIP's image tower, or prompts it prepends.
_TABLES = re.compile(
    r"visual\.(?:transformer\.resblocks\.\d+\.)?learned_position|visual\.transformer\.deep_prompt_embeddings"
)
# Tensors that take part in no computation of ours: class weights of a loss, constants, and embeddings of fixed tokens
# ("X." and so on), which the text tower holds anyway.
_UNUSED = re.compile(
    r"criterion\.empty_weight|pixel_(?:mean|std)"
    r"|_?(?:region_)?clip_adapter\.(?:pixel_(?:mean|std)|prompt_learner\.(?:start|dot|end|pad)_signal)"
    r"|T\..+"
)


@dataclass
class AdapterParts:
    """A CLIP and what was learned around it."""

    clip: dict[str, Tensor] = field(default_factory=dict)  # tensors by OpenAI's names; {} where the file has none
    # tables and prompts of the image tower (DeOP), by OpenAI-like names from ``visual.`` on
    tables: dict[str, Tensor] = field(default_factory=dict)
    # "prefix_prompt", "suffix_prompt", "task_prompt", as far as they were learned
    prompt: dict[str, Tensor] = field(default_factory=dict)
    non_object: Tensor | None = None  # (1, D), the row of no class; None where the file has none


@dataclass
class CheckpointParts:
    """A checkpoint taken apart. Nothing is copied."""

    # what it is a checkpoint of; "prompts" is a file of the prompt stage, CLIP and prompts alone. DeOP's proposal stage
    # cannot be told from ZSSeg, which is the same network: it says "zsseg".
    system: System
    # the proposal generator's tensors by the authors' keys, in the newest layout
    generator: dict[str, Tensor] = field(default_factory=dict)
    # CLIP and what was learned around it. ZegFormer's training checkpoints have no CLIP.
    adapter: AdapterParts = field(default_factory=AdapterParts)
    # the second adapter that some of ZSSeg's files hold, which classifies the crops
    region_adapter: AdapterParts | None = None
    # MAFT's fine-tuned image tower, OpenAI's names from ``visual.`` on
    image_tower: dict[str, Tensor] = field(default_factory=dict)
    # tensors of the system's own modules by the authors' keys: DeOP's decoder and queries, ZegFormer's ``bg_feature``
    # and ``logit_scale``
    own: dict[str, Tensor] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # keys that were recognised and take part in no computation
    left_over: list[str] = field(default_factory=list)  # keys that nothing here knows


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
    if has(_INTERACTION):
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


def split_checkpoint(state: Mapping[str, Tensor]) -> CheckpointParts:
    """Take a checkpoint apart.

    ``state``: a flat state dict, as `read_checkpoint` gives it. Raises LexisegError if it is none of these systems'
    checkpoints, or FreeSeg's or MAFT's without the context interaction, which shapes its proposals.
    """
    system = recognise_detectron(state)
    if system is None:
        first = ", ".join(sorted(state)[:3])
        raise LexisegError(
            f"The checkpoint is not one of DeOP, ZSSeg, ZegFormer, FreeSeg or MAFT (its keys begin with {first}); "
            "give a file as their authors published it."
        )
    if system in ("freeseg", "maft") and not any(key.startswith(_INTERACTION) for key in state):
        raise LexisegError(
            f"The checkpoint has the proposals of FreeSeg but lacks {_INTERACTION}*, the context interaction; take the "
            "complete file."
        )
    parts = CheckpointParts(system)
    for old, tensor in state.items():
        key = newest_key(old)
        if _UNUSED.fullmatch(key):
            parts.unused.append(old)
        elif key.startswith(_ZEGFORMER_CLIP):
            _put_clip(parts.adapter, key.removeprefix(_ZEGFORMER_CLIP), tensor)
        elif key.removeprefix(_PREDICTOR) in _ZEGFORMER_SCORES or key.startswith(_DEOP):
            parts.own[key.removeprefix(_PREDICTOR)] = tensor
        elif key.startswith(("backbone.", HEAD)):
            parts.generator[key] = tensor
        elif key.startswith("IPCLIP."):
            parts.image_tower["visual." + key.removeprefix("IPCLIP.")] = tensor
        elif key.startswith(_ADAPTER) and _put(parts.adapter, key.removeprefix(_ADAPTER), tensor):
            continue
        elif key.startswith(_REGION_ADAPTER):
            parts.region_adapter = parts.region_adapter or AdapterParts()
            if not _put(parts.region_adapter, key.removeprefix(_REGION_ADAPTER), tensor):
                parts.left_over.append(old)
        else:
            parts.left_over.append(old)
    return parts


def _put(parts: AdapterParts, key: str, tensor: Tensor) -> bool:
    if key.startswith("clip_model."):
        _put_clip(parts, key.removeprefix("clip_model."), tensor)
    elif re.fullmatch(r"prompt_learner\.(prefix|suffix|task)_prompt", key):
        parts.prompt[key.removeprefix("prompt_learner.")] = tensor
    elif key == "non_object_embedding":
        parts.non_object = tensor
    else:
        return False
    return True


def _put_clip(parts: AdapterParts, key: str, tensor: Tensor) -> None:
    (parts.tables if _TABLES.fullmatch(key) else parts.clip)[key] = tensor


def generator_tensors(
    generator: ProposalGenerator, state: Mapping[str, Tensor], *, name: str = "the checkpoint"
) -> dict[str, Tensor]:
    """The tensors of a generator, by our names and in float32, from the authors'.

    ``generator``: MaskFormer or Mask2Former; its values are not looked at. ``state``: the authors' tensors, keys
    ``backbone.`` and ``sem_seg_head.``. Raises LexisegError if tensors are missing, left over or of another shape; they
    are listed.
    """
    source = generator_source(generator)
    return take_tensors(shapes_of(generator), source, state, f"The proposal generator of {name}")


def generator_source(generator: ProposalGenerator) -> SourceOf:
    """The key map of a generator: where its tensors lie in the authors' files."""
    deep = "backbone.body.conv1.0.weight" in dict(generator.named_parameters())
    masked = isinstance(generator.options, Mask2FormerOptions)
    kind = "mask2former" if masked else "maskformer"
    return key_map("deep-stem" if deep else "stem", "resnet", kind, "generator")
