"""CAT-Seg as golden cases have it: whole, or the part whose parameters are there."""

from __future__ import annotations

from typing import Any

import torch

from lexiseg.clip.model import build_clip
from lexiseg.models.cat_seg import CATSeg
from lexiseg.weights.cat_seg_checkpoint import CLIP_PREFIX, read_cat_seg
from lexiseg.weights.filling import authors_key
from tests.parity.case import Case
from tests.parity.clip_build import architecture, make_clip, text_sizes, under, vision_sizes

_NAMES = {
    "hidden_dim": "hidden_dim",
    "layers": "num_layers",
    "attention_window": "window_size",
    "class_attention": "attention_type",
    "pooling": "pooling_size",
    "appearance_dim": "appearance_guidance_proj_dim",
    "text_dim": "text_guidance_proj_dim",
    "guidance_dims": "decoder_guidance_dims",
    "decoder_guidance_dims": "decoder_guidance_proj_dims",
    "decoder_dims": "decoder_dims",
    "padding": "pad_len",
    "templates": "prompt_channel",
    "prompt_length": "prompt_length",
    "prompt_depth": "prompt_depth",
}
"""Our options and what the cases' JSON calls them."""


def their_key(name: str) -> str:
    """The authors' key of a tensor of ours."""
    return str(authors_key(name, "cat-seg"))


def options_of(case: Case, **more: Any) -> dict[str, Any]:
    """The options that the JSON tells."""
    config = case.config["config"]
    found = {ours: config[theirs] for ours, theirs in _NAMES.items() if theirs in config}
    found["heads"] = config.get("num_heads", config.get("nheads", 4))
    found["prompt_depth"] = found.get("prompt_depth") or None
    if "hook_layers" in case.config:
        found["guidance_blocks"] = tuple(case.config["hook_layers"])
    trained = " ".join(entry["name"] for entry in case.config.get("optimiser", {}).get("groups", ()))
    if trained:
        modes = {".k_proj": "full", ".q_proj": "attention", "prompt_tokens": "prompt"}
        found["finetune"] = next((mode for part, mode in modes.items() if part in trained), "none")
    if "clip_resolution" in case.config:
        found["resolution"] = case.config["clip_resolution"][0]
    return {**found, "released": True, **more}


def whole(case: Case, **more: Any) -> CATSeg:
    """The model of a case with all of its parameters, read as `convert` reads it."""
    config = case.config["config"]
    model, _ = read_cat_seg(
        case.params(),
        heads=config["vision_heads"],
        text_heads=config["text_heads"],
        options=options_of(case, **more),
        name=case.name,
    )
    stated = {**vision_sizes(model.clip), "text_width": text_sizes(model.clip)["width"]}
    case.check_stated("sizes", config, {**stated, "text_layers": text_sizes(model.clip)["layers"]})
    tokens = case.input("token_ids")
    texts = [case.config["template"].replace("{}", name.split(", ")[0]) for name in case.config["class_names"]]
    case.check_that("token_ids", torch.equal(model.clip.tokenize(texts), tokens), "other tokens than the case's")
    return model


def partial(case: Case, **more: Any) -> CATSeg:
    """A model with the parameters of a case that has a part of them."""
    params, config = case.params(), case.config["config"]
    towers = under(params, CLIP_PREFIX)
    for key in [key for key in towers if key.endswith("q_proj_weight")]:
        parts = [towers.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        towers[key.replace("q_proj", "in_proj")] = torch.cat(parts)
    native = config.get("pos_grid", 1) * config.get("patch", 16)
    heads = {"heads": config.get("vision_heads", 1), "text_heads": config.get("text_heads", 1)}
    clip = make_clip(towers, native=native, **heads)
    if not towers:
        clip = build_clip(architecture({"vocab_size": 8}, output_dim=config["text_guidance_dim"]))
    model = CATSeg.build(clip, options_of(case, **{"guidance_blocks": (0, 0), **more} if not towers else more))
    own = {their_key(name): name for name in model.state_dict() if not name.startswith("clip.")}
    model.load_state_dict({own[key]: value for key, value in params.items() if key in own}, strict=False)
    known = own.keys() | {CLIP_PREFIX + key for key in under(params, CLIP_PREFIX)}
    left = [key for key in params if key not in known and not key.endswith("attn_mask")]
    case.check_that("parameters", not left, f"{left[:1]} are of no use")
    return model.eval()
