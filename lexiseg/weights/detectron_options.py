"""What the shapes of the authors' checkpoints, which have detectron2's layout, say of their proposal generators.

That is DeOP, ZSSeg and ZegFormer (MaskFormer) and for FreeSeg and MAFT (Mask2Former with interaction).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.proposals.options import Mask2FormerOptions, MaskFormerOptions
from lexiseg.weights.clip_state import count_blocks, shape_of

HEAD = "sem_seg_head."
_PIXEL = HEAD + "pixel_decoder."
_PREDICTOR = HEAD + "predictor."
# The heads of the released models; no tensor's shape tells them.
_HEADS = 8
_POINTS = 4
_LEVELS = 3
# The third stage's blocks tell the depth.
_BACKBONES = {23: "r101", 6: "r50"}
INTERACTION = HEAD + "interaction."


def infer_generator_options(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    encoder_heads: int | None = None,
    interaction_heads: int | None = None,
) -> MaskFormerOptions | Mask2FormerOptions:
    """Read a generator's options off the shapes of the authors' tensors.

    ``state``: the authors' tensors, keys ``backbone.`` and ``sem_seg_head.``. ``heads``: attention heads of the query
    decoder; None: 8, as in all released models. No shape tells. ``encoder_heads``: heads of Mask2Former's deformable
    encoder; None: as many as its tensors say with 4 points each. ``interaction_heads``: heads of the context
    interaction; None: as ``heads``. Raises LexisegError if tensors that every such file has are missing, or the
    backbone is of an unknown depth.
    """
    heads = heads or _HEADS

    def shape(key: str, dimensions: int = 2) -> tuple[int, ...]:
        return shape_of(state, key, dimensions, "The proposal generator")

    deep = "backbone.stem.conv3.weight" in state
    blocks = count_blocks(state, "backbone.res4.")
    depth = _BACKBONES.get(blocks)
    if depth is None:
        raise LexisegError(
            f"The checkpoint's backbone has {blocks} blocks in res4; lexiseg supports ResNet-50 (6) and 101 (23)."
        )
    queries = shape(_PREDICTOR + "query_embed.weight")
    masks = max(count_blocks(state, _PREDICTOR + "mask_embed.layers."), 1) - 1
    common: dict[str, Any] = {
        "backbone": depth + ("c" if deep else ""),
        "widths": tuple(shape(f"backbone.res{stage}.0.conv1.weight", 4)[0] for stage in (2, 3, 4, 5)),
        "stem_width": shape(f"backbone.stem.conv{3 if deep else 1}.weight", 4)[0],
        "num_queries": queries[0],
        "hidden_dim": queries[1],
        "pixel_dim": shape(_PIXEL + "adapter_1.weight", 4)[0],
        "mask_dim": shape(f"{_PREDICTOR}mask_embed.layers.{masks}.weight")[0],
        "heads": heads,
        **_infer_class_head(state, shape),
    }
    layers = _PREDICTOR + "transformer.decoder.layers."
    if any(key.startswith(layers) for key in state):
        ffn_dim = shape(f"{layers}0.linear1.weight")[0]
        return MaskFormerOptions(**common, decoder_layers=count_blocks(state, layers), ffn_dim=ffn_dim)
    encoder = _PIXEL + "transformer.encoder.layers."
    pairs = shape(f"{encoder}0.self_attn.attention_weights.weight")[0] // _LEVELS
    encoder_heads = encoder_heads or max(pairs // _POINTS, 1)
    interaction = INTERACTION + "gamma" in state
    if interaction:
        inner, text = shape(INTERACTION + "attn.k_proj.weight")
        common |= {"interaction_dim": inner, "text_dim": text, "interaction_heads": interaction_heads or heads}
    ffn = _PREDICTOR + "transformer_ffn_layers."
    return Mask2FormerOptions(
        **common,
        decoder_layers=count_blocks(state, ffn),
        ffn_dim=shape(f"{ffn}0.linear1.weight")[0],
        encoder_layers=count_blocks(state, encoder),
        encoder_ffn_dim=shape(f"{encoder}0.linear1.weight")[0],
        encoder_heads=encoder_heads,
        encoder_points=pairs // encoder_heads,
        interaction=interaction,
    )


def _infer_class_head(state: Mapping[str, Tensor], shape: Callable[[str], tuple[int, ...]]) -> dict[str, Any]:
    if (key := _PREDICTOR + "projection_layer.weight") in state:
        return {"class_head": "linear", "embed_dim": shape(key)[0]}
    if (key := _PREDICTOR + "class_embed.layers.0.weight") in state:
        embed_dim = shape(_PREDICTOR + "class_embed.layers.1.weight")[0]
        return {"class_head": "cosine-mlp", "class_hidden": shape(key)[0], "embed_dim": embed_dim}
    return {"class_head": "none"}
