"""Models from the checkpoints of the decoupled systems' authors: ZSSeg, ZegFormer, FreeSeg and MAFT here, DeOP beside.

What a file is and what lies where in it is found in `lexiseg.weights.detectron_checkpoint`. What no shape tells, the
sizes of pictures and how scores are joined, is taken as the authors' released code has it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lexiseg.clip.load import check_state, shapes_of, sketch
from lexiseg.clip.model import CLIP
from lexiseg.clip.templates import IN_THE_SCENE, SCULPTURE, VILD_14
from lexiseg.errors import LexisegError
from lexiseg.models import SegmentationModel
from lexiseg.models.region_base import RegionModel
from lexiseg.models.region_models import FreeSeg, ZegFormer, ZSSeg
from lexiseg.weights.clip_state import clip_from_state, shape_of
from lexiseg.weights.deop_checkpoint import read_deop
from lexiseg.weights.detectron_checkpoint import (
    AdapterParts,
    CheckpointParts,
    System,
    generator_tensors,
    split_checkpoint,
)
from lexiseg.weights.detectron_keys import infer_generator_options

DECOUPLED_NAMES = {
    "deop": "DeOP",
    "zsseg": "ZSSeg",
    "zegformer": "ZegFormer",
    "freeseg": "FreeSeg",
    "maft": "MAFT",
    "prompts": "ZSSeg's and DeOP's prompt stage",
}
SYSTEMS: dict[str, type[RegionModel]] = {
    "zsseg": ZSSeg,
    "zegformer": ZegFormer,
    "freeseg": FreeSeg,
    "maft": FreeSeg,
}

# The side that the released configurations for COCO-Stuff resize pictures' shorter side to.
_SHORT_SIDE = 640
_TEMPLATES = {"zsseg": SCULPTURE, "zegformer": IN_THE_SCENE, "freeseg": VILD_14, "maft": VILD_14}


def infer_options(parts: CheckpointParts) -> dict[str, Any]:
    """Read the options of the system off a checkpoint; what no shape tells is as in the authors' code."""
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


def read_region_model(
    state: Mapping[str, Tensor],
    *,
    clip: CLIP | None = None,
    heads: int | None = None,
    text_heads: int | None = None,
    generator_heads: int | None = None,
    encoder_heads: int | None = None,
    interaction_heads: int | None = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    name: str = "the checkpoint",
) -> tuple[RegionModel, list[str]]:
    """Build ZSSeg, ZegFormer, FreeSeg or FreeSeg + MAFT from the authors' tensors.

    ``clip``: for files without one (ZegFormer's training checkpoints): OpenAI's ViT-B/16. ``heads``: of the image
    tower, see `infer_vit_architecture`. ``text_heads``: of the text tower, see there. ``generator_heads``: of the
    generator, see `infer_generator_options`. ``options``: replace what `infer_options` finds. ``tokenizer``: see
    `lexiseg.clip.model.build_clip`. Returns the model, and the keys that take part in no computation and were left out.
    Raises LexisegError if it is none of these systems' checkpoints, it has no CLIP and none is given, or tensors are
    missing, left over or of another shape; they are listed.
    """
    parts = split_checkpoint(state)
    if parts.system not in SYSTEMS:
        raise LexisegError(f"{name} is a checkpoint of {parts.system}, not of ZSSeg, ZegFormer, FreeSeg or MAFT.")
    if parts.left_over or parts.adapter.tables:
        odd = parts.left_over or list(parts.adapter.tables)
        raise LexisegError(f"{name} has tensors that {parts.system} does not have: {', '.join(odd[:5])}.")
    unused = list(parts.unused)
    clip, dropped = _clip_of(parts, clip, heads=heads, text_heads=text_heads, tokenizer=tokenizer, name=name)
    proposals = infer_generator_options(
        parts.generator, heads=generator_heads, encoder_heads=encoder_heads, interaction_heads=interaction_heads
    )
    system = SYSTEMS[parts.system]
    chosen = {"proposals": proposals, **infer_options(parts), **(options or {})}

    def build(clip: CLIP) -> RegionModel:
        return cast(RegionModel, system.build(clip, chosen))

    found = _own_tensors(parts)
    plan = sketch(lambda: build(copy.deepcopy(clip).to("meta")), len(state), name)
    shapes = {key: shape for key, shape in shapes_of(plan).items() if not key.startswith(("generator.", "clip."))}
    check_state(found, shapes, name)
    tensors = generator_tensors(plan.generator, parts.generator, name=name)
    model = build(clip)
    model.generator.load_state_dict(tensors)
    model.load_state_dict({key: value.to(torch.float32) for key, value in found.items()}, strict=False)
    model.default_templates = _TEMPLATES[parts.system]
    return model.eval(), [*unused, *dropped]


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


def _own_tensors(parts: CheckpointParts) -> dict[str, Tensor]:
    """Everything but the generator and CLIP, by our names."""
    prompts = parts.region_adapter.prompt if parts.region_adapter is not None else parts.adapter.prompt
    found = {f"prompts.{key}": value for key, value in prompts.items()}
    found |= {f"student.{key.removeprefix('visual.')}": value for key, value in parts.image_tower.items()}
    if parts.adapter.non_object is not None:
        found["no_object"] = parts.adapter.non_object
    for key, value in parts.own.items():
        found["no_object" if key == "bg_feature" else key] = value
    return found


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

    ``system``: from `recognise_detectron`. ``heads``, ``text_heads``: attention heads of CLIP's towers; None is one for
    every 64 channels. ``clip``: for a file without one (ZegFormer's training checkpoints). ``seen_known``: somebody
    says which classes it was trained on. ``transductive``: by self-training, where seen classes have no score offset.

    Returns the model; the keys that take part in no computation and were left out; and what no shape tells and was
    assumed, a sentence each. Raises LexisegError if the checkpoint has no model or no CLIP in it, or tensors are
    missing, left over or of another shape.
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
