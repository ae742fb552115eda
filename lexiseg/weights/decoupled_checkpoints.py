"""Models from the checkpoints of the decoupled systems' authors: ZSSeg, ZegFormer, FreeSeg, MAFT and DeOP.

Which of them a file is of, `lexiseg.weights.detectron_checkpoint` finds out. What no shape tells, the sizes of pictures
and how scores are joined, is taken as the authors' released code has it.
"""

import copy
import math
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lexiseg.clip.model import CLIP, build_clip
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.deop import DeOP
from lexiseg.models.region_base import RegionModel
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD
from lexiseg.templates import IN_THE_SCENE, SCULPTURE, VILD_14
from lexiseg.weights.clip_state import count_blocks, infer_vit_architecture, shape_of
from lexiseg.weights.detectron_checkpoint import (
    INTERACTION,
    SECOND_ADAPTER,
    System,
    generator_source,
    infer_generator_options,
    recognise_detectron,
    used_tensors,
)
from lexiseg.weights.filling import Source, authors_key, filled, key_map

DECOUPLED_NAMES = {
    "deop": "DeOP",
    "zsseg": "ZSSeg",
    "zegformer": "ZegFormer",
    "freeseg": "FreeSeg",
    "maft": "MAFT",
    "prompts": "ZSSeg's and DeOP's prompt stage",
}

# The side that the released configurations for COCO-Stuff resize pictures' shorter side to.
_SHORT_SIDE = 640
_TEMPLATES = {"zsseg": SCULPTURE, "zegformer": IN_THE_SCENE, "freeseg": VILD_14, "maft": VILD_14}
_HEADS = 8  # of DeOP's heatmap decoder


def infer_anchor_options(own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the options of the heatmap decoder off DeOP's own tensors, by the authors' keys."""
    if "decoderConv.weight" in own:
        return {"heatmaps": "conv-released"}
    if "query_embedding.weight" not in own:
        return {"heatmaps": "none"}
    options: dict[str, Any] = {
        "heatmaps": "query-released",
        "anchor_layers": count_blocks(own, "decoder.layers."),
        "anchor_queries": shape_of(own, "query_embedding.weight", 2)[0],
        "anchor_heads": _HEADS,
    }
    first = "decoder.layers.0.linear1.weight"
    return {**options, "anchor_hidden": shape_of(own, first, 2)[0]} if first in own else options


def _deop_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    options: dict[str, Any] = {
        **infer_anchor_options(state),
        "severance": "released",
        "released_residual": True,
        "visual_prompts": "none",
        "text_prompts": "templates",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "short_side": 512,
    }
    visual = "clip_adapter.clip_model.visual."
    if (table := visual + "learned_position") in state:
        found = [
            re.fullmatch(re.escape(visual) + r"transformer\.resblocks\.(\d+)\.learned_position", key) for key in state
        ]
        side = math.isqrt(shape_of(state, table, 2)[0] - 1)
        blocks = tuple(sorted(int(block[1]) for block in found if block))
        options |= {"visual_prompts": "added", "prompt_blocks": blocks, "table_side": side}
    elif (deep := visual + "transformer.deep_prompt_embeddings") in state:
        depth, count, _ = shape_of(state, deep, 3)
        # Which blocks they belong to is not in the file; the scripts list 1, 2, ...
        options |= {"visual_prompts": "prepended", "num_prompts": count, "prompt_blocks": tuple(range(1, 1 + depth))}
    if prompts := _prompt_lengths(state, "prefix", "suffix"):
        options |= {"text_prompts": "end-to-end", **{f"prompt_{part}": length for part, length in prompts.items()}}
    return options


def _region_options(state: Mapping[str, Tensor], system: System, *, for_crops: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"short_side": _SHORT_SIDE}
    if system == "maft":
        # The released model scores by CLIP alone: its code for the ensemble does not run.
        options |= {"maft": {}, "ensemble": {"rule": "region"}}
    if prompts := _prompt_lengths(state, "prefix", "suffix", "task"):
        options["prompts"] = {**prompts, "proposals": not for_crops}
    return options


def _prompt_lengths(state: Mapping[str, Tensor], *parts: str) -> dict[str, int]:
    """The lengths of the parts of a learned text prompt; none where there is none at all."""
    keys = {part: f"clip_adapter.prompt_learner.{part}_prompt" for part in parts}
    if not any(key in state for key in keys.values()):
        return {}
    return {part: shape_of(state, key, 2)[0] if key in state else 0 for part, key in keys.items()}


def _system_of(state: Mapping[str, Tensor], kind: System | None, name: str) -> System:
    """What a checkpoint is of, as far as it has what makes a model."""
    system = kind or recognise_detectron(state)
    if system is None:
        first = ", ".join(sorted(state)[:3])
        raise LexisegError(
            f"{name} is not a checkpoint of DeOP, ZSSeg, ZegFormer, FreeSeg or MAFT (its keys begin with {first}); "
            "give a file as their authors published it."
        )
    if system == "prompts":
        raise LexisegError(
            f"{name} holds a learned text prompt and CLIP but no proposals; convert a checkpoint of a later stage, "
            "which has the prompt in it."
        )
    if system in ("freeseg", "maft") and not any(key.startswith(INTERACTION) for key in state):
        raise LexisegError(
            f"{name} has the proposals of FreeSeg but lacks {INTERACTION}*, the context interaction; take the complete "
            "file."
        )
    return system


def read_parts(
    state: Mapping[str, Tensor],
    *,
    kind: System | None = None,
    clip: CLIP | None = None,
    generator: Mapping[str, int | None] | None = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    name: str = "the checkpoint",
    **heads: Any,
) -> tuple[DecoupledModel, list[str]]:
    """Build DeOP, ZSSeg, ZegFormer, FreeSeg or FreeSeg + MAFT from the authors' tensors.

    ``kind``: what the file is of, where no tensor tells: DeOP without heatmaps looks like ZSSeg. ``clip``: for files
    without one (ZegFormer's training checkpoints): OpenAI's ViT-B/16. ``generator``: numbers of attention heads, which
    no shape tells, see `infer_generator_options`. ``options``: replace what shapes and the authors' code say.
    ``tokenizer``: see `lexiseg.clip.model.build_clip`. ``heads``: those of `infer_vit_architecture`. Returns the model,
    and the keys that take part in no computation and were left out. Raises LexisegError if it is none of these systems'
    checkpoints, it has no CLIP and none is given, or tensors are missing, left over or of another shape; they are
    listed.
    """
    system = _system_of(state, kind, name)
    used, unused = used_tensors(state, system, name)
    architecture: dict[str, Any] | None = None
    if any(".clip_model." in key for key in used):
        architecture = infer_vit_architecture(used, key_map(system, inside="clip.model."), name=name, **heads)
    elif clip is None:
        raise LexisegError(
            f"{name} has no CLIP in it; name the one it was trained with, such as --clip ViT-B-16/openai."
        )
    for_crops = any(key.startswith(SECOND_ADAPTER) for key in state)
    own = _deop_options(used) if system == "deop" else _region_options(used, system, for_crops=for_crops)
    proposals = infer_generator_options(used, **(generator or {}))
    chosen = {"proposals": proposals, **own, **(options or {})}

    def build() -> DecoupledModel:
        tower = (
            copy.deepcopy(cast(CLIP, clip)).to(torch.get_default_device())
            if architecture is None
            else build_clip(architecture, name="clip", tokenizer=tokenizer)
        )
        return cast(DecoupledModel, SYSTEMS["freeseg" if system == "maft" else system].build(tower, chosen))

    generator_keys, own_keys = generator_source(proposals), key_map(system)

    def source_of(ours: str) -> Source | None:
        part, _, rest = ours.partition(".")
        if part == "clip" and architecture is None:
            return None
        return generator_keys(rest) if part == "generator" else own_keys(ours)

    may_lack = {str(authors_key("clip.model.logit_scale", system))}
    may_lack |= {str(authors_key("no_object", system))} if system == "deop" else set()
    said = f"{name}, which looks like {DECOUPLED_NAMES[system]},"
    model, _ = filled(build, source_of, used, said, optional=may_lack)
    model.default_templates = _TEMPLATES.get(system, model.default_templates)
    return model, unused


def decoupled_notes(
    model: DecoupledModel, state: Mapping[str, Tensor], *, seen_known: bool, transductive: bool
) -> list[str]:
    """What no shape of such a file tells and `read_parts` assumed, a sentence each.

    ``seen_known``: somebody says which classes it was trained on. ``transductive``: by self-training.
    """
    if isinstance(model, DeOP):
        notes = [
            "The severance is the released one, values scaled by the masks, in the last block; the file does not say."
        ]
        if model.options.visual_prompts == "prepended":
            notes.append(f"The prepended prompts are assumed to belong to the blocks {model.options.prompt_blocks}.")
        return notes
    notes, options = [], cast(RegionModel, model).options
    if options.ensemble.rule == "region":
        notes.append(
            "Only CLIP's scores are used, as in the released code: the file does not say; the paper has an ensemble."
        )
    elif model.system != "zegformer":
        notes.append(
            f"The ensemble's weight is {options.ensemble.weight:g}, as for COCO-Stuff: the file does not say; most of "
            "the models for VOC have 0.7."
        )
    notes.append(
        f"The pictures' shorter side is {options.short_side}, as for COCO-Stuff: the file does not say; models "
        "for VOC have 512."
    )
    if model.system == "zsseg":
        notes.append(
            "This may also be DeOP's proposal stage, which is the same network: the keys do not tell them apart."
        )
    if model.system == "freeseg" and options.maft is None and options.prompts is None:
        notes.append("There are no learned prompts in the file: words are put into templates.")
    if not seen_known and options.ensemble.rule != "region":
        offset = " and no score offset applies" if model.system == "zegformer" and not transductive else ""
        notes.append(
            "The classes it was trained on are not in the file: none counts as seen, so that the ensemble treats all "
            f"as unseen{offset}."
        )
    return notes
