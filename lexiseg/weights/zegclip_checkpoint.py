"""The key layout of the authors' ZegCLIP checkpoints, and how it maps to our modules.

The authors' file holds three parts, ``backbone.``, ``text_encoder.`` and ``decode_head.``. Some of its tensors never
take part in any computation: the decoder layers' self-attention and first norm, the value path of the last layer, and
the loss's class weights. They are recognised, not needed, and reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lexiseg.clip import build_clip
from lexiseg.errors import LexisegError
from lexiseg.models.zegclip import ZegCLIP

IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)

_HEAD_WIDTH = 64
_PAIRS = (
    ("clip.model.visual.", "backbone."),
    ("prompts.embeddings", "backbone.prompt_embeddings"),
    ("prompts.deep_embeddings", "backbone.deep_prompt_embeddings"),
    ("prompts.proj.", "backbone.prompt_proj."),
    ("prompts.norm.", "backbone.prompt_norm."),
    ("query_proj.", "decode_head.q_proj."),
    ("memory_proj.0.", "decode_head.input_proj_1."),
    ("memory_proj.1.", "decode_head.proj_norm_1."),
    ("decoder.layers.", "decode_head.decoder_1.layers."),
    ("clip.model.", "text_encoder."),
)
_LAYER_PARTS = {
    "query": "multihead_attn.q",
    "key": "multihead_attn.k",
    "value": "multihead_attn.v",
    "out": "multihead_attn.proj",
    "ffn_in": "linear1",
    "ffn_out": "linear2",
    "norm_attention": "norm2",
    "norm_ffn": "norm3",
}
_NOT_STORED = frozenset({"clip.model.logit_scale"})


def authors_key(name: str) -> str | None:
    """The authors' key of one of our state dict's names, or None where their file has no such tensor."""
    if name in _NOT_STORED:
        return None
    for ours, theirs in _PAIRS:
        if name.startswith(ours):
            key = theirs + name[len(ours) :]
            break
    else:
        return None
    if key.startswith("decode_head.decoder_1.layers."):
        head, index, part, rest = re.fullmatch(r"(.*layers)\.(\d+)\.(\w+)\.(\w+)", key).groups()  # type: ignore[union-attr]
        key = f"{head}.{index}.{_LAYER_PARTS[part]}.{rest}"
    return key


def is_unused(key: str, num_layers: int, depth: int | None) -> bool:
    """Say whether a tensor of the authors' file takes no part in any computation.

    Args:
        key: the authors' key.
        num_layers: layers of the decoder.
        depth: depth of the prompts; None where there are none.
    """
    if key == "decode_head.loss_decode.criterion.empty_weight":
        return True
    if key.startswith("backbone.prompt_norm.") and depth == 0:
        return True
    layer = re.match(r"decode_head\.decoder_1\.layers\.(\d+)\.(.*)", key)
    if layer is None:
        return False
    index, rest = int(layer[1]), layer[2]
    if rest.startswith(("self_attn.", "norm1.")):
        return True
    last = ("multihead_attn.v.", "multihead_attn.proj.", "linear1.", "linear2.", "norm2.", "norm3.")
    return index == num_layers - 1 and rest.startswith(last)


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """Name the system whose checkpoint this is by its keys: "zegclip", "cascade-clip", "spt-seg", or None."""
    if "backbone.complex_weight" in state:
        return "spt-seg"
    if "decode_head.q_projs.0.weight" in state:
        return "cascade-clip"
    if "backbone.class_embedding" in state and "decode_head.q_proj.weight" in state:
        return "zegclip"
    return None


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    found = {int(key[len(prefix) :].split(".", 1)[0]) for key in state if key.startswith(prefix)}
    return max(found) + 1 if found else 0


def _get(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise LexisegError(f"The ZegCLIP checkpoint lacks {key}; take a complete file with the text encoder in it.")
    return state[key]


def infer_architecture(
    state: Mapping[str, Tensor], *, heads: int | None = None, text_heads: int | None = None
) -> dict[str, Any]:
    """Read the CLIP architecture off the shapes of a ZegCLIP checkpoint.

    Args:
        state: the authors' tensors.
        heads: attention heads of the image tower, which no shape tells; None is one a 64 channels, as in all CLIPs.
        text_heads: the same for the text tower.

    Raises:
        LexisegError: a tensor that is needed is missing, or the position table is not of a square grid.
    """
    conv = _get(state, "backbone.conv1.weight")
    width, patch = conv.shape[0], conv.shape[-1]
    rows = _get(state, "backbone.positional_embedding").shape[0] - 1
    side = math.isqrt(rows)
    if side * side != rows:
        raise LexisegError(f"The checkpoint's position table has {rows} rows of patches, which is no square grid.")
    text_width = _get(state, "text_encoder.ln_final.weight").shape[0]
    hidden = _get(state, "backbone.transformer.resblocks.0.mlp.c_fc.weight").shape[0]
    text_hidden = _get(state, "text_encoder.transformer.resblocks.0.mlp.c_fc.weight").shape[0]
    return {
        "model_cfg": {
            "embed_dim": _get(state, "backbone.proj").shape[1],
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": side * patch,
                "patch_size": patch,
                "width": width,
                "layers": _count(state, "backbone.transformer.resblocks."),
                "head_width": width // heads if heads else min(_HEAD_WIDTH, width),
                "mlp_ratio": hidden / width,
            },
            "text_cfg": {
                "context_length": _get(state, "text_encoder.positional_embedding").shape[0],
                "vocab_size": _get(state, "text_encoder.token_embedding.weight").shape[0],
                "width": text_width,
                "heads": text_heads or max(text_width // _HEAD_WIDTH, 1),
                "layers": _count(state, "text_encoder.transformer.resblocks."),
                "mlp_ratio": text_hidden / text_width,
            },
        }
    }


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the options of `ZegCLIP` off a checkpoint; what shapes cannot tell is as in the authors' configurations."""
    embed_dim = _get(state, "backbone.proj").shape[1]
    dim, inputs = _get(state, "decode_head.q_proj.weight").shape
    patch = _get(state, "backbone.conv1.weight").shape[-1]
    side = math.isqrt(_get(state, "backbone.positional_embedding").shape[0] - 1) * patch
    options: dict[str, Any] = {
        "backbone": "fixed",
        "descriptor": inputs == 2 * embed_dim,
        "decoder_layers": _count(state, "decode_head.decoder_1.layers."),
        "decoder_dim": dim,
        "project_memory": "decode_head.input_proj_1.weight" in state,
        "class_embedding_twice": True,
        "mask_size": side,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "window_size": side,
        "window_stride": side * 426 // 512,
        "short_side": side,
    }
    first = state.get("decode_head.decoder_1.layers.0.linear1.weight")
    if first is not None:
        options["ffn_ratio"] = first.shape[0] / dim
    shallow, deep = state.get("backbone.prompt_embeddings"), state.get("backbone.deep_prompt_embeddings")
    if shallow is not None or deep is not None:
        options["backbone"] = "prompt"
        if deep is None:
            options["prompt_depth"] = 0
        else:
            options["prompt_depth"] = len(deep) if shallow is not None else -len(deep)
        options["num_prompts"] = (deep if deep is not None else _get(state, "backbone.prompt_embeddings")).shape[1]
    return options


def read_zegclip(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    options: Mapping[str, Any] | None = None,
    name: str = "the checkpoint",
) -> tuple[ZegCLIP, list[str]]:
    """Build a `ZegCLIP` from the authors' tensors.

    Args:
        state: tensors by the authors' keys.
        heads: see `infer_architecture`.
        text_heads: see `infer_architecture`.
        options: replace what `infer_options` finds.
        name: what to call the file in messages.

    Returns:
        the model, and the keys that take part in no computation and were left out.

    Raises:
        LexisegError: tensors are missing, left over or of the wrong shape; all of them are listed.
    """
    architecture = infer_architecture(state, heads=heads, text_heads=text_heads)
    clip = build_clip(architecture, name="clip")
    model = ZegCLIP(clip, ZegCLIP.parse_options({**infer_options(state), **(options or {})}))  # type: ignore[arg-type]
    target = model.state_dict()
    keys = {ours: authors_key(ours) for ours in target}
    wanted = {theirs: ours for ours, theirs in keys.items() if theirs is not None}
    depth = None if model.prompts is None else model.prompts.depth
    missing = sorted(wanted.keys() - state.keys())
    unused = [key for key in state if key not in wanted and is_unused(key, model.options.decoder_layers, depth)]
    extra = sorted(state.keys() - wanted.keys() - set(unused))
    wrong = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(target[ours].shape)}"
        for key, ours in wanted.items()
        if key in state and state[key].shape != target[ours].shape
    ]
    if missing or extra or wrong:
        parts = [
            f"{label} {', '.join(items)}"
            for label, items in (("missing:", missing), ("left over:", extra), ("of another shape:", wrong))
            if items
        ]
        raise LexisegError(f"{name} looks like ZegCLIP but does not fit it; {'; '.join(parts)}.")
    model.load_state_dict({**target, **{ours: state[theirs].float() for theirs, ours in wanted.items()}})
    return model.eval(), unused
