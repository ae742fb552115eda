"""DeOP's published checkpoint: the parts that only DeOP has, and the model made of all parts.

The generator, CLIP, the prompts and "no object" are taken apart in `lexiseg.weights.detectron_checkpoint`; here are the
heatmap decoder (``decoder.*``, ``query_embedding``, or ``decoderConv``) and the added tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lexiseg.clip.load import check_state, shapes_of, sketch
from lexiseg.clip.model import build_clip
from lexiseg.errors import LexisegError
from lexiseg.models.deop import DeOP
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD
from lexiseg.weights.clip_state import count_blocks, infer_vit_architecture, shape_of
from lexiseg.weights.detectron_checkpoint import CheckpointParts, generator_tensors, split_checkpoint
from lexiseg.weights.detectron_keys import infer_generator_options

_LAYER_PARTS = {
    "self_attn.": "self_attn.",
    "cross_attn.": "multihead_attn_my.",
    "ffn_in.": "linear1.",
    "ffn_out.": "linear2.",
    "norm_self.": "norm1.",
    "norm_cross.": "norm2.",
    "norm_ffn.": "norm3.",
}
# The norm behind the decoder's layers feeds outputs that nothing reads; the copies of the convolution are one module.
_DEAD = re.compile(r"decoder\.norm\.(weight|bias)|decoderConvs\.\d+\.weight")
_HEADS = 8


def anchor_key(name: str) -> str:
    """The authors' key of a tensor of our heatmap decoder (``anchors.`` in `DeOP`).

    ``name``: in the state dict of `ReleasedQueryAnchors` or `ConvAnchors`. Raises KeyError if no released decoder has
    such a tensor.
    """
    if name == "queries":
        return "query_embedding.weight"
    if name == "weight":
        return "decoderConv.weight"
    if name.startswith("heatmap.in_proj_"):
        return name.replace("heatmap.", "decoder.outlayer.multihead_attn_my.")
    if name.startswith("heatmap.self_attn."):
        return name.replace("heatmap.", "decoder.outlayer.")
    if name.startswith("heatmap.norm."):
        return name.replace("heatmap.norm.", "decoder.outlayer.norm1.")
    found = re.fullmatch(r"layers\.(\d+)\.(\w+\.)(.+)", name)
    if found is None or found[2] not in _LAYER_PARTS:
        raise KeyError(name)
    return f"decoder.layers.{found[1]}.{_LAYER_PARTS[found[2]]}{found[3]}"


def is_dead(key: str) -> bool:
    """Say whether one of DeOP's own tensors takes part in no computation."""
    return _DEAD.fullmatch(key) is not None


def table_key(name: str) -> str:
    """The authors' key, from ``visual.`` on, of a tensor of our visual prompts (``tables.`` in `DeOP`)."""
    if name == "table":
        return "visual.learned_position"
    if name == "embeddings":
        return "visual.transformer.deep_prompt_embeddings"
    return f"visual.transformer.resblocks.{name.removeprefix('block_tables.')}.learned_position"


def authors_key(name: str) -> str | None:
    """The authors' key of a tensor of our `DeOP`, or None for those of the generator, whose keys are elsewhere."""
    part, _, rest = name.partition(".")
    if part == "clip":
        return f"clip_adapter.clip_model.{rest.removeprefix('model.')}"
    if part == "prompt":
        return f"clip_adapter.prompt_learner.{rest}"
    if part == "tables":
        return f"clip_adapter.clip_model.{table_key(rest)}"
    if part == "anchors":
        return anchor_key(rest)
    return "clip_adapter.non_object_embedding" if name == "no_object" else None


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


def infer_options(parts: CheckpointParts) -> dict[str, Any]:
    """Read the options of `DeOP` off a checkpoint; what no shape tells is as in the authors' scripts."""
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
        options |= {
            "visual_prompts": "prepended",
            "num_prompts": count,
            "prompt_blocks": tuple(range(1, 1 + depth)),
        }
    if prompt:
        options["text_prompts"] = "end-to-end"
        for name in ("prefix", "suffix"):
            key = f"{name}_prompt"
            options[f"prompt_{name}"] = shape_of(prompt, key, 2)[0] if key in prompt else 0
    return options


def read_deop(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    generator_heads: int | None = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    name: str = "the checkpoint",
) -> tuple[DeOP, list[str]]:
    """Build a `DeOP` from the authors' tensors.

    ``state``: tensors by the authors' keys, of any of its stages that has a generator. ``heads``: of the image tower,
    see `infer_vit_architecture`. ``text_heads``: of the text tower, see there. ``generator_heads``: of the generator,
    see `infer_generator_options`. ``options``: replace what `infer_options` finds. ``tokenizer``: see
    `lexiseg.clip.model.build_clip`. Returns the model, and the keys that take part in no computation and were left out.
    Raises LexisegError if tensors are missing, left over or of another shape; they are listed.
    """
    parts = split_checkpoint(state)
    if parts.left_over or parts.region_adapter is not None or parts.image_tower:
        odd = parts.left_over or ["a second adapter or image tower"]
        raise LexisegError(f"{name} looks like DeOP but has tensors that DeOP does not have: {', '.join(odd[:5])}.")
    proposals = infer_generator_options(parts.generator, heads=generator_heads)
    architecture = infer_vit_architecture(parts.adapter.clip, heads=heads, text_heads=text_heads, name=name)
    chosen = {"proposals": proposals, **infer_options(parts), **(options or {})}

    def build() -> DeOP:
        clip = build_clip(architecture, name="clip", tokenizer=tokenizer)
        return DeOP(clip, DeOP.parse_options(chosen))  # type: ignore[arg-type]

    plan = sketch(build, len(state), name)
    tensors = generator_tensors(plan.generator, parts.generator, name=name)
    found, unused = _own_tensors(plan, parts)
    shapes = {key: shape for key, shape in shapes_of(plan).items() if not key.startswith("generator.")}
    check_state(found, shapes, name, optional={"clip.model.logit_scale", "no_object"})
    model = build()
    model.generator.load_state_dict(tensors)
    model.load_state_dict({key: value.to(torch.float32) for key, value in found.items()}, strict=False)
    return model.eval(), [*parts.unused, *unused]


def _own_tensors(model: DeOP, parts: CheckpointParts) -> tuple[dict[str, Tensor], list[str]]:
    """Everything but the generator by our names, and DeOP's own keys that are left out."""
    names = {f"clip.model.{key}": value for key, value in parts.adapter.clip.items()}
    names |= {f"prompt.{key}": value for key, value in parts.adapter.prompt.items()}
    if parts.adapter.non_object is not None:
        names["no_object"] = parts.adapter.non_object
    unused = [key for key in parts.own if is_dead(key)]
    for prefix, source, key_of in (
        ("anchors.", {key: value for key, value in parts.own.items() if not is_dead(key)}, anchor_key),
        ("tables.", dict(parts.adapter.tables), table_key),
    ):
        for ours in model.state_dict():
            if ours.startswith(prefix) and (key := key_of(ours.removeprefix(prefix))) in source:
                names[ours] = source.pop(key)
        names |= source  # what nothing of ours asked for keeps its key, so that it is named as left over
    return names, unused
