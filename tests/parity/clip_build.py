"""CLIPs of the sizes that golden cases have, filled with their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lexiseg.clip.model import CLIP, build_clip
from tests.parity.case import UnsupportedError


def under(params: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}


def depth(params: dict[str, Tensor]) -> int:
    return 1 + max(int(key.split(".")[2]) for key in params if key.startswith("transformer.resblocks."))


def architecture(text: dict[str, Any], output_dim: int = 8, **vision: Any) -> dict[str, Any]:
    """A CLIP as small as can be, but for the sizes given."""
    small = {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8, **vision}
    text_cfg = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1, **text}
    return {"model_cfg": {"embed_dim": output_dim, "quick_gelu": True, "vision_cfg": small, "text_cfg": text_cfg}}


class IdTokenizer:
    """A tokenizer for the toy vocabularies of some cases: the ids of each text are given."""

    def __init__(self, texts: dict[str, Tensor]) -> None:
        self.texts = texts

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        return torch.stack([self.texts[text][:context_length] for text in texts])


def make_clip(
    params: dict[str, Tensor], *, heads: int = 1, native: int = 16, text_heads: int = 1, tokenizer: Any = None
) -> CLIP:
    """Build a CLIP whose towers have the sizes of ``params`` (OpenAI's names), as far as they are there."""
    visual = under(params, "visual.")
    text = {key: value for key, value in params.items() if not key.startswith("visual.")}
    vision_cfg: dict[str, Any] = {}
    text_cfg: dict[str, Any] = {}
    embed_dim = 8
    if "attnpool.c_proj.weight" in visual:
        stages = [sum(f"layer{stage}.{index}.conv1.weight" in visual for index in range(200)) for stage in range(1, 5)]
        width = 2 * visual["conv1.weight"].shape[0]
        # open_clip has width * 32 // head_width heads in the pool
        vision_cfg = {"image_size": native, "layers": stages, "width": width, "head_width": width * 32 // heads}
        embed_dim = visual["attnpool.c_proj.weight"].shape[0]
    elif visual:
        width, _, patch, _ = visual["conv1.weight"].shape
        embed_dim = visual["proj"].shape[1]
        layers = depth(visual)
        vision_cfg = {"image_size": native, "patch_size": patch, "width": width, "layers": layers}
        vision_cfg["head_width"] = width // heads
    text = text if "text_projection" in text else {}
    if text:
        vocabulary, width = text["token_embedding.weight"].shape
        text_cfg = {"context_length": len(text["positional_embedding"]), "vocab_size": vocabulary, "width": width}
        text_cfg |= {"heads": text_heads, "layers": depth(text)}
        embed_dim = text["text_projection"].shape[1]
    clip = build_clip(architecture(text_cfg, embed_dim, **vision_cfg), tokenizer=tokenizer)
    state = clip.model.state_dict()
    found = {key: value for key, value in params.items() if key in state}
    whole = (("visual.", visual), ("", text))
    for prefix, part in whole:
        missing = [key for key in state if key.startswith("visual.") == bool(prefix) and key not in params]
        if part and set(missing) - {"logit_scale"}:
            raise UnsupportedError(f"the case lacks {missing[0]}")
    clip.model.load_state_dict(found, strict=False)
    return clip


def adapter_clip(adapter: dict[str, Tensor], config: dict[str, Any], tokenizer: Any = None) -> CLIP:
    """The CLIP among the parameters of a host's adapter, with what only the JSON tells of it."""
    return make_clip(
        under(adapter, "clip_model."),
        heads=config.get("vision_heads", config.get("vh", 1)),
        native=config.get("native", config.get("res", 16)),
        text_heads=config.get("text_heads", config.get("th", 1)),
        tokenizer=tokenizer,
    )


def text_sizes(clip: CLIP) -> dict[str, Any]:
    """Sizes of the text tower under the names that the cases' JSON has for them."""
    tower = clip.model
    count, width = tower.token_embedding.weight.shape
    return {
        "vocab": count,
        "width": width,
        "text_width": width,
        "layers": len(tower.transformer.resblocks),
        "text_layers": len(tower.transformer.resblocks),
        "embed_dim": clip.embed_dim,
        "embed": clip.embed_dim,
        "context_length": clip.context_length,
        "context": clip.context_length,
    }


def toy_sizes(clip: CLIP, *, vision: bool = True, stated: int | None = None) -> dict[str, Any]:
    """Both towers' sizes under the short names of the cases of DeOP and SimBaseline."""
    text = text_sizes(clip)
    sizes = {"tw": text["width"], "tl": text["layers"], "V": text["vocab"], "E": clip.embed_dim}
    if vision:
        seen = vision_sizes(clip, stated)
        sizes |= {"vw": seen["width"], "vl": seen["layers"], "res": seen["native"]}
    return sizes


def native_size(clip: CLIP, stated: int | None) -> int:
    """The side of the pictures a tower was made for, as stated: pixels that fill no patch leave no trace in it."""
    patch = clip.image_tower.patch_size
    grid = round((len(clip.visual.positional_embedding) - 1) ** 0.5)
    return stated if stated is not None and stated // patch == grid else patch * grid


def vision_sizes(clip: CLIP, stated: int | None = None) -> dict[str, Any]:
    """The same for the image tower, a transformer; ``stated`` is what the JSON says it was made for."""
    tower = clip.image_tower
    native = native_size(clip, stated)
    return {
        "native": native,
        "input_resolution": native,
        "width": tower.width,
        "vision_width": tower.width,
        "layers": tower.num_blocks,
        "vision_layers": tower.num_blocks,
        "patch": tower.patch_size,
        "patch_size": tower.patch_size,
        "output_dim": clip.embed_dim,
        "out": clip.embed_dim,
        "embed": clip.embed_dim,
    }
