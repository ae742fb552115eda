"""The released checkpoints of CAT-Seg: recognised by their keys, in detectron2's layout, and turned into a model."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lexiseg.clip.model import build_clip
from lexiseg.models.cat_seg import CATSeg, CATSegOptions
from lexiseg.weights.clip_state import count_blocks, infer_vit_architecture, require, shape_of
from lexiseg.weights.filling import filled, key_map

CLIP_PREFIX = "sem_seg_head.predictor.clip_model."
AGGREGATOR = "sem_seg_head.predictor.transformer."
_CLIP = key_map("cat-seg", inside="clip.model.")
_PROMPTS = CLIP_PREFIX + "visual.transformer.prompt_tokens"
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


def recognise_cat_seg(state: Mapping[str, Tensor]) -> str | None:
    """Return "cat-seg" if the keys are those of a CAT-Seg: a cost aggregation beside a CLIP; else None."""
    swin = any(key.startswith(f"{AGGREGATOR}layers.0.swin_") for key in state)
    return "cat-seg" if swin and f"{AGGREGATOR}conv1.weight" in state else None


def infer_options(state: Mapping[str, Tensor], name: str = "the checkpoint") -> dict[str, Any]:
    """Read the options of a CAT-Seg off its shapes; what no shape tells is as in the released models.

    Raises LexisegError if tensors are missing whose shapes are needed; all are listed.
    """
    require(state, _SHAPES, f"{name} looks like CAT-Seg but")
    shape = {key.removeprefix(AGGREGATOR): shape_of(state, key, 2 if "text_g" in key else 4, name) for key in _SHAPES}
    masks = [key for key in state if _MASK.fullmatch(key)]
    options: dict[str, Any] = {
        "templates": shape["conv1.weight"][1],
        "hidden_dim": shape["conv1.weight"][0],
        "layers": count_blocks(state, f"{AGGREGATOR}layers.", name),
        "attention_window": round(shape_of(state, masks[0], 3, name)[-1] ** 0.5) if masks else 12,
        "padding": 256 if f"{AGGREGATOR}layers.0.attention.padding_tokens" in state else 0,
        "appearance_dim": shape["guidance_projection.0.weight"][0],
        "text_dim": shape["text_guidance_projection.0.weight"][0],
        "guidance_dims": (shape["upsample1.weight"][1], shape["upsample2.weight"][1]),
        "decoder_guidance_dims": tuple(shape[f"decoder_guidance_projection.{i}.0.weight"][0] for i in (0, 1)),
        "decoder_dims": tuple(shape[f"decoder{i}.conv.double_conv.0.weight"][0] for i in (1, 2)),
    }
    if _PROMPTS in state:
        depth, length, _ = shape_of(state, _PROMPTS, 3, name)
        options |= {"finetune": "prompt", "prompt_depth": depth, "prompt_length": length}
    return options


def read_cat_seg(
    state: Mapping[str, Tensor], *, options: Mapping[str, Any] | None = None, name: str = "The checkpoint", **heads: Any
) -> tuple[CATSeg, list[str]]:
    """Build a CAT-Seg from the authors' tensors.

    ``options``: replace what `infer_options` finds and the released way of prediction. ``name``: what to call the file
    in messages. ``heads``: those of `infer_vit_architecture`. Returns the model, and the keys that take part in no
    computation and were left out. Raises LexisegError if tensors are missing, left over or of another shape; all of
    them are listed.
    """
    architecture = infer_vit_architecture(state, _CLIP, name=name, **heads)
    patch = architecture["model_cfg"]["vision_cfg"]["patch_size"]
    found = {**_RELEASED, "resolution": _GRID * patch, **infer_options(state, name), **(options or {})}

    def build() -> CATSeg:
        return CATSeg(build_clip(architecture, name="clip"), CATSegOptions.model_validate(CATSeg.parse_options(found)))

    said = f"{name}, which looks like CAT-Seg,"
    return filled(build, key_map("cat-seg"), state, said, is_unused=lambda key, _: bool(_MASK.fullmatch(key)))


def cat_seg_notes(model: CATSeg, state: Mapping[str, Tensor], **_: bool) -> list[str]:
    """What such a file does not tell and was assumed, a sentence each."""
    notes = [
        f"It predicts as the released code does: a window scores at most {model.options.padding} classes; the option "
        "released: false in config.json lifts that limit."
    ]
    if not any(key.endswith("attn_mask") for key in state):
        notes.append(
            "The side of its attention windows is not in the file; it is assumed to be 12 patches, as released."
        )
    return notes
