"""Models from the checkpoints of the decoupled systems' authors: ZSSeg, ZegFormer, FreeSeg, MAFT and DeOP.

What a file is and what lies where in it is found in `lexiseg.weights.detectron_checkpoint`. What no shape tells, the
sizes of pictures and how scores are joined, is taken as the authors' released code has it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lexiseg.clip.load import check_state, shapes_of, sketch
from lexiseg.clip.model import CLIP
from lexiseg.clip.templates import IN_THE_SCENE, SCULPTURE, VILD_14
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.deop import DeOP
from lexiseg.models.region_base import RegionModel
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD
from lexiseg.weights.clip_state import clip_from_state, count_blocks, shape_of
from lexiseg.weights.detectron_checkpoint import (
    AdapterParts,
    CheckpointParts,
    System,
    generator_tensors,
    split_checkpoint,
)
from lexiseg.weights.detectron_options import infer_generator_options
from lexiseg.weights.filling import authors_key

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

# ---- DeOP's own parts: the heatmap decoder, and tables and prompts in CLIP's image tower

_DEOP_CLIP = "clip_adapter.clip_model."
# The norm behind the decoder's layers feeds outputs that nothing reads; the copies of the convolution are one module.
_DEAD = re.compile(r"decoder\.norm\.(weight|bias)|decoderConvs\.\d+\.weight")
_HEADS = 8


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


def _deop_options(parts: CheckpointParts) -> dict[str, Any]:
    tables, prompt = parts.adapter.tables, parts.adapter.prompt
    options: dict[str, Any] = {
        **infer_anchor_options(parts.own),
        "severance": "released",
        "released_residual": True,
        "visual_prompts": "none",
        "text_prompts": "templates",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "short_side": 512,
    }
    deep_key = "visual.transformer.deep_prompt_embeddings"
    if "visual.learned_position" in tables:
        blocks = [int(key.split(".")[3]) for key in tables if key.startswith("visual.transformer.resblocks.")]
        side = math.isqrt(shape_of(tables, "visual.learned_position", 2)[0] - 1)
        options |= {"visual_prompts": "added", "prompt_blocks": tuple(sorted(blocks)), "table_side": side}
    elif deep_key in tables:
        depth, count, _ = shape_of(tables, deep_key, 3)
        # Which blocks they belong to is not in the file; the scripts list 1, 2, ...
        options |= {"visual_prompts": "prepended", "num_prompts": count, "prompt_blocks": tuple(range(1, 1 + depth))}
    if prompt:
        options["text_prompts"] = "end-to-end"
        for name in ("prefix", "suffix"):
            key = f"{name}_prompt"
            options[f"prompt_{name}"] = shape_of(prompt, key, 2)[0] if key in prompt else 0
    return options


def _deop_tensors(model: DeOP, parts: CheckpointParts) -> tuple[dict[str, Tensor], list[str]]:
    """Everything but generator and CLIP by our names, and DeOP's own keys that are left out."""
    unused = [key for key in parts.own if _DEAD.fullmatch(key)]
    source = {key: value for key, value in parts.own.items() if key not in unused}
    source |= {_DEOP_CLIP + key: value for key, value in parts.adapter.tables.items()}
    names = {f"prompt.{key}": value for key, value in parts.adapter.prompt.items()}
    if parts.adapter.non_object is not None:
        names["no_object"] = parts.adapter.non_object
    for ours in model.state_dict():
        if (key := authors_key(ours, "deop")) in source:
            names[ours] = source.pop(str(key))
    return names | source, unused  # what nothing of ours asked for keeps its key, so that it is named as left over


# ---- the others


def _region_options(parts: CheckpointParts) -> dict[str, Any]:
    options: dict[str, Any] = {"short_side": _SHORT_SIDE}
    if parts.system == "maft":
        # The released model scores by CLIP alone: its code for the ensemble does not run.
        options |= {"maft": {}, "ensemble": {"rule": "region"}}
    prompts = parts.region_adapter.prompt if parts.region_adapter is not None else parts.adapter.prompt
    if prompts:
        counts = {
            name: shape_of(prompts, f"{name}_prompt", 2)[0] if f"{name}_prompt" in prompts else 0
            for name in ("prefix", "suffix", "task")
        }
        options["prompts"] = {**counts, "proposals": parts.region_adapter is None}
    return options


def _region_tensors(parts: CheckpointParts) -> dict[str, Tensor]:
    """Everything but the generator and CLIP, by our names."""
    prompts = parts.region_adapter.prompt if parts.region_adapter is not None else parts.adapter.prompt
    found = {f"prompts.{key}": value for key, value in prompts.items()}
    found |= {f"student.{key.removeprefix('visual.')}": value for key, value in parts.image_tower.items()}
    if parts.adapter.non_object is not None:
        found["no_object"] = parts.adapter.non_object
    for key, value in parts.own.items():
        found["no_object" if key == "bg_feature" else key] = value
    return found


# ---- all of them


def read_parts(
    state: Mapping[str, Tensor],
    *,
    kind: System | None = None,
    clip: CLIP | None = None,
    generator: Mapping[str, int | None] | None = None,
    options: Mapping[str, Any] | None = None,
    name: str = "the checkpoint",
    **sizes: Any,
) -> tuple[DecoupledModel, list[str]]:
    """Build DeOP, ZSSeg, ZegFormer, FreeSeg or FreeSeg + MAFT from the authors' tensors.

    ``kind``: what the file is of, where no tensor tells: DeOP without heatmaps looks like ZSSeg. ``clip``: for files
    without one (ZegFormer's training checkpoints): OpenAI's ViT-B/16. ``generator``: numbers of attention heads, which
    no shape tells, see `infer_generator_options`. ``options``: replace what shapes and the authors' code say.
    ``sizes``: ``heads``, ``text_heads`` and ``tokenizer`` of `clip_from_state`. Returns the model, and the keys that
    take part in no computation and were left out. Raises LexisegError if it is none of these systems' checkpoints, it
    has no CLIP and none is given, or tensors are missing, left over or of another shape; they are listed.
    """
    parts = split_checkpoint(state)
    parts.system = kind or parts.system
    if parts.system == "prompts":
        raise LexisegError(
            f"{name} holds a learned text prompt and CLIP but no proposals; convert a checkpoint of a later stage, "
            "which has the prompt in it."
        )
    deop, odd = parts.system == "deop", list(parts.left_over)
    if deop and (parts.region_adapter is not None or parts.image_tower):
        odd.append("a second adapter or image tower")
    odd += [] if deop else parts.adapter.tables
    if odd:
        said = DECOUPLED_NAMES[parts.system]
        raise LexisegError(
            f"{name} looks like {said} but has tensors that {said} does not have ({', '.join(odd[:5])}); check that "
            "it is the authors' file."
        )
    clip, dropped = _clip_of(parts, clip, name=name, **sizes)
    system = SYSTEMS["freeseg" if parts.system == "maft" else parts.system]
    proposals = infer_generator_options(parts.generator, **(generator or {}))
    chosen = {"proposals": proposals, **(_deop_options if deop else _region_options)(parts), **(options or {})}

    def build(clip: CLIP) -> DecoupledModel:
        return cast(DecoupledModel, system.build(clip, chosen))

    plan = sketch(lambda: build(copy.deepcopy(clip).to("meta")), len(state), name)
    tensors = generator_tensors(plan.generator, parts.generator, name=name)
    found, unused = _deop_tensors(plan, parts) if isinstance(plan, DeOP) else (_region_tensors(parts), [])
    shapes = {key: shape for key, shape in shapes_of(plan).items() if not key.startswith(("generator.", "clip."))}
    check_state(found, shapes, name, optional={"no_object"} if deop else ())
    model = build(clip)
    model.generator.load_state_dict(tensors)
    model.load_state_dict({key: value.to(torch.float32) for key, value in found.items()}, strict=False)
    model.default_templates = _TEMPLATES.get(parts.system, model.default_templates)
    return model.eval(), [*parts.unused, *unused, *dropped]


def _clip_of(parts: CheckpointParts, clip: CLIP | None, *, name: str, **sizes: Any) -> tuple[CLIP, list[str]]:
    """The CLIP of a checkpoint, and the keys of a second copy of it."""
    if parts.adapter.clip:
        found = clip_from_state(parts.adapter.clip, name=name, **sizes)
    elif clip is not None:
        found = clip
    else:
        raise LexisegError(
            f"{name} has no CLIP in it, as {parts.system}'s training checkpoints have none; give the CLIP it was "
            "trained with (OpenAI's ViT-B/16) beside it."
        )
    second = parts.region_adapter
    if second is None:
        return found, []
    if not _same(parts.adapter, second):
        raise LexisegError(
            f"The two CLIPs in {name}, of the proposals and of the crops, are not the same; lexiseg keeps one for both."
        )
    return found, [f"_region_clip_adapter.clip_model.{key}" for key in second.clip]


def _same(first: AdapterParts, second: AdapterParts) -> bool:
    if first.clip.keys() != second.clip.keys():
        return False
    return all(torch.equal(value.float(), second.clip[key].float()) for key, value in first.clip.items())


def decoupled_notes(system: System, model: DecoupledModel, seen_known: bool, transductive: bool) -> list[str]:
    """What no shape of such a file tells and `read_parts` assumed, a sentence each.

    ``seen_known``: somebody says which classes it was trained on. ``transductive``: by self-training.
    """
    if isinstance(model, DeOP):
        notes = [
            "The severance is the released one, values scaled by the masks, in the last block; the file does not say."
        ]
        if model.options.visual_prompts == "prepended":
            notes.append(f"The prepended prompts are taken to belong to the blocks {model.options.prompt_blocks}.")
        return notes
    notes, options = [], cast(RegionModel, model).options
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
