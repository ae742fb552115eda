"""The published checkpoints of ZSSeg, ZegFormer and FreeSeg, and of MAFT on FreeSeg: the model made of their parts.

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
from lexiseg.models.region_base import RegionModel
from lexiseg.models.region_models import FreeSeg, ZegFormer, ZSSeg
from lexiseg.weights.clip_state import clip_from_state, shape_of
from lexiseg.weights.detectron_checkpoint import AdapterParts, CheckpointParts, generator_tensors, split_checkpoint
from lexiseg.weights.detectron_keys import infer_generator_options

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
