"""The released checkpoints of CAT-Seg: recognised by their keys, in detectron2's layout, and turned into a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lexiseg.clip.model import build_clip
from lexiseg.errors import LexisegError
from lexiseg.models.cat_seg import CATSeg, CATSegOptions
from lexiseg.weights.clip_state import check_fit, infer_vit_architecture, missing_shape_keys

CLIP_PREFIX = "sem_seg_head.predictor.clip_model."
AGGREGATOR = "sem_seg_head.predictor.transformer."
_PROMPTS = CLIP_PREFIX + "visual.transformer.prompt_tokens"
_PREFIXES = (("clip.model.", CLIP_PREFIX), ("aggregator.", AGGREGATOR))
# The masks of the shifted windows are computed here.
_MASK = re.compile(re.escape(AGGREGATOR) + r"layers\.\d+\.swin_block\.block_2\.attn_mask")
# The grid of patches of both released models, and their windows at prediction.
_GRID = 24
_RELEASED = {
    "released": True,
    "window_size": 384,
    "window_stride": 256,
    "short_side": 640,
    "long_side": 2560,
    "canvas": (640, 640),
    "whole": True,
}
_SHAPES = (
    f"{AGGREGATOR}conv1.weight",
    f"{AGGREGATOR}guidance_projection.0.weight",
    f"{AGGREGATOR}text_guidance_projection.0.weight",
    "upsample1.weight",
    "upsample2.weight",
    *(f"{AGGREGATOR}decoder_guidance_projection.{index}.0.weight" for index in (0, 1)),
    *(f"{AGGREGATOR}decoder{index}.conv.double_conv.0.weight" for index in (1, 2)),
)


def authors_key(name: str) -> str:
    """The authors' key of one of our state dict's names."""
    if name == "prompt_tokens":
        return _PROMPTS
    return next((theirs + name[len(ours) :] for ours, theirs in _PREFIXES if name.startswith(ours)), name)


def is_cat_seg(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a CAT-Seg: a cost aggregation beside a CLIP."""
    return f"{AGGREGATOR}conv1.weight" in state and any(key.startswith(f"{AGGREGATOR}layers.0.swin_") for key in state)


def infer_options(state: Mapping[str, Tensor], name: str = "the checkpoint") -> dict[str, Any]:
    """Read the options of a CAT-Seg off its shapes; what no shape tells is as in the released models.

    Raises:
        LexisegError: tensors are missing whose shapes are needed; all are listed.
    """
    missing = [key for key in _SHAPES if key not in state]
    if missing:
        raise LexisegError(f"{name} looks like CAT-Seg but lacks {', '.join(missing)}; take a complete file.")
    shape = {key.removeprefix(AGGREGATOR): state[key].shape for key in _SHAPES}
    masks = [value for key, value in state.items() if _MASK.fullmatch(key)]
    prompts = state.get(_PROMPTS)
    options: dict[str, Any] = {
        "templates": shape["conv1.weight"][1],
        "hidden_dim": shape["conv1.weight"][0],
        "layers": len({key.split(".")[4] for key in state if key.startswith(f"{AGGREGATOR}layers.")}),
        "attention_window": round(masks[0].shape[-1] ** 0.5) if masks else 12,
        "padding": 256 if f"{AGGREGATOR}layers.0.attention.padding_tokens" in state else 0,
        "appearance_dim": shape["guidance_projection.0.weight"][0],
        "text_dim": shape["text_guidance_projection.0.weight"][0],
        "guidance_dims": (shape["upsample1.weight"][1], shape["upsample2.weight"][1]),
        "decoder_guidance_dims": tuple(shape[f"decoder_guidance_projection.{i}.0.weight"][0] for i in (0, 1)),
        "decoder_dims": tuple(shape[f"decoder{i}.conv.double_conv.0.weight"][0] for i in (1, 2)),
    }
    if prompts is not None:
        options |= {"finetune": "prompt", "prompt_depth": prompts.shape[0], "prompt_length": prompts.shape[1]}
    return options


def read_cat_seg(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    options: Mapping[str, Any] | None = None,
    name: str = "The checkpoint",
) -> tuple[CATSeg, list[str]]:
    """Build a CAT-Seg from the authors' tensors.

    Args:
        state: tensors by the authors' keys.
        heads: attention heads of the image tower, which no shape tells; None is one a 64 channels, as in all CLIPs.
        text_heads: the same for the text tower.
        options: replace what `infer_options` finds and the released way of prediction.
        name: what to call the file in messages.

    Returns:
        the model, and the keys that take part in no computation and were left out.

    Raises:
        LexisegError: tensors are missing, left over or of another shape; all of them are listed.
    """
    towers = {key.removeprefix(CLIP_PREFIX): value for key, value in state.items() if key.startswith(CLIP_PREFIX)}
    lacking = [CLIP_PREFIX + key for key in missing_shape_keys(towers)]
    if lacking:
        raise LexisegError(f"{name} looks like CAT-Seg but lacks {', '.join(lacking)}; take a complete file.")
    architecture = infer_vit_architecture(towers, heads=heads, text_heads=text_heads, name=name)
    found = {**_RELEASED, "resolution": _GRID * towers["visual.conv1.weight"].shape[-1], **infer_options(state, name)}
    clip = build_clip(architecture, name="clip")
    model = CATSeg(clip, CATSegOptions.model_validate(CATSeg.parse_options({**found, **(options or {})})))
    unused = [key for key in state if _MASK.fullmatch(key)]
    ours = {authors_key(own): own for own in model.state_dict()}
    target = {authors_key(own): value for own, value in model.state_dict().items()}
    given = {key: value for key, value in state.items() if key not in unused}
    check_fit(target, given, f"{name}, which looks like CAT-Seg,")
    model.load_state_dict({ours[key]: value.float() for key, value in given.items()})
    return model.eval(), unused
