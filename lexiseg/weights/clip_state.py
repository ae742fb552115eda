"""A CLIP built from nothing but its tensors, by OpenAI's names: the part of it that every published checkpoint has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lexiseg.clip.model import CLIP, build_clip
from lexiseg.errors import LexisegError

_HEAD_WIDTH = 64
_SCALE = "logit_scale"
# The tensors whose shapes tell the architecture.
_SHAPE_KEYS = (
    "visual.conv1.weight",
    "visual.positional_embedding",
    "visual.proj",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.weight",
    "transformer.resblocks.0.mlp.c_fc.weight",
)


def missing_shape_keys(state: Mapping[str, Tensor]) -> list[str]:
    """The tensors, by OpenAI's names, without which `infer_vit_architecture` cannot do and ``state`` is."""
    return [key for key in _SHAPE_KEYS if key not in state]


def infer_vit_architecture(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    quick_gelu: bool = True,
    name: str = "the checkpoint",
) -> dict[str, Any]:
    """Read the architecture of a CLIP with a vision transformer off its shapes.

    Args:
        state: tensors by OpenAI's names (``visual.conv1.weight``, ``token_embedding.weight`` ...).
        heads: attention heads of the image tower, which no shape tells; None is one a 64 channels, as in all CLIPs.
        text_heads: the same for the text tower.
        quick_gelu: which activation the towers use; OpenAI's is QuickGELU.
        name: how errors call the file.

    Returns:
        what `lexiseg.clip.model.build_clip` takes.

    Raises:
        LexisegError: tensors that are needed are missing (all are listed), or the position table is of no square grid.
    """
    missing = missing_shape_keys(state)
    if missing:
        raise LexisegError(
            f"The CLIP in {name} lacks {', '.join(missing)}; take a complete file, with both towers in it."
        )
    conv, text_width = state["visual.conv1.weight"], state["ln_final.weight"].shape[0]
    width, patch = conv.shape[0], conv.shape[-1]
    rows = state["visual.positional_embedding"].shape[0] - 1
    side = math.isqrt(rows)
    if side * side != rows:
        raise LexisegError(f"The position table of the CLIP in {name} has {rows} rows of patches, no square grid.")
    return {
        "model_cfg": {
            "embed_dim": state["visual.proj"].shape[1],
            "quick_gelu": quick_gelu,
            "vision_cfg": {
                "image_size": side * patch,
                "patch_size": patch,
                "width": width,
                "layers": _count(state, "visual.transformer.resblocks."),
                "head_width": width // heads if heads else min(_HEAD_WIDTH, width),
                "mlp_ratio": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
            },
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": text_width,
                "heads": text_heads or max(text_width // _HEAD_WIDTH, 1),
                "layers": _count(state, "transformer.resblocks."),
                "mlp_ratio": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / text_width,
            },
        }
    }


def clip_from_state(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    tokenizer: Any = None,
    name: str = "the checkpoint",
) -> CLIP:
    """Build an OpenAI CLIP with a vision transformer from its tensors alone, in float32.

    Args:
        state: tensors by OpenAI's names; ``logit_scale`` may be missing, since nothing that is converted uses it.
        heads: see `infer_vit_architecture`.
        text_heads: see there.
        tokenizer: see `lexiseg.clip.model.build_clip`.
        name: how errors call the file.

    Raises:
        LexisegError: tensors are missing, left over or of another shape; they are listed.
    """
    architecture = infer_vit_architecture(state, heads=heads, text_heads=text_heads, name=name)
    clip = build_clip(architecture, name="clip", tokenizer=tokenizer)
    target = clip.model.state_dict()
    check_fit(target, state, f"The CLIP in {name}", optional={_SCALE})
    clip.model.load_state_dict({**target, **{key: value.to(torch.float32) for key, value in state.items()}})
    return clip


def check_fit(
    target: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, *, optional: set[str] | None = None
) -> None:
    """See that tensors have exactly the names and shapes of a state dict.

    Args:
        target: what is to be filled.
        state: what there is, by the same names.
        what: whose tensors they are, for the message.
        optional: names that may be missing.

    Raises:
        LexisegError: tensors are missing, left over or of another shape; all are listed.
    """
    missing = sorted(target.keys() - state.keys() - (optional or set()))
    extra = sorted(state.keys() - target.keys())
    wrong = [
        f"{key} is {tuple(value.shape)} instead of {tuple(target[key].shape)}"
        for key, value in state.items()
        if key in target and value.shape != target[key].shape
    ]
    if missing or extra or wrong:
        parts = [
            f"{label} {', '.join(items)}"
            for label, items in (("missing:", missing), ("left over:", extra), ("of another shape:", wrong))
            if items
        ]
        raise LexisegError(f"{what} does not fit; {'; '.join(parts)}.")


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((int(key[len(prefix) :].split(".", 1)[0]) for key in state if key.startswith(prefix)), default=-1)
