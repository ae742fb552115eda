"""Small random CLIPs for tests."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import torch

from lexiseg.clip.model import CLIP, build_clip

SMALL_PROPOSALS: dict[str, Any] = {
    "backbone": "tiny",
    "widths": (8, 8, 16, 16),
    "stem_width": 8,
    "num_queries": 6,
    "hidden_dim": 16,
    "pixel_dim": 32,
    "mask_dim": 32,
    "heads": 2,
    "decoder_layers": 2,
    "ffn_dim": 32,
    "class_hidden": 16,
    "embed_dim": 16,
}
"""Options of a tiny proposal generator, which fit the width of `small_clip`'s text."""


def small_architecture(**changes: Any) -> dict[str, Any]:
    """A CLIP of a few thousand parameters: 16-pixel-wide text, four vision blocks, patches of 8 pixels."""
    model_cfg: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 24, "layers": 4, "head_width": 6},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            model_cfg[key] = {**model_cfg.get(key, {}), **value}
        else:
            model_cfg[key] = value
    return {"model_cfg": model_cfg}


def small_clip(seed: int = 0, **changes: Any) -> CLIP:
    """Build `small_architecture` with weights large enough that every term matters."""
    clip = _small_clip(seed, json.dumps(changes, sort_keys=True))
    return copy.deepcopy(clip, {id(clip.tokenizer): clip.tokenizer})  # the tokenizer is large and does not change


@lru_cache(maxsize=8)
def _small_clip(seed: int, changes: str) -> CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = build_clip(small_architecture(**json.loads(changes)), name="small")
        for name, parameter in clip.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                torch.nn.init.normal_(parameter, mean=float("weight" in name and "ln_" in name), std=0.1)
    return clip


def unit_rows(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Random unit vectors (count, dim): stand-ins for text embeddings."""
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)
