"""Where the tensors of our proposal generators lie in the authors' checkpoints, which have detectron2's layout.

The keys hold for DeOP, ZSSeg and ZegFormer (MaskFormer) and for FreeSeg and MAFT (Mask2Former with interaction).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.proposals.options import Mask2FormerOptions, MaskFormerOptions
from lexiseg.weights.clip_state import count_blocks, shape_of
from lexiseg.weights.filling import Source, renamed

HEAD = "sem_seg_head."
_PIXEL = HEAD + "pixel_decoder."
_PREDICTOR = HEAD + "predictor."
# The heads of the released models; no tensor's shape tells them.
_HEADS = 8
_POINTS = 4
_LEVELS = 3
# The third stage's blocks tell the depth.
_BACKBONES = {23: "r101", 6: "r50"}


_BODY, _STEM = r"backbone\.body\.", "backbone.stem."
# A convolution and the norm behind it are two modules of ours, and one with the norm inside it there.
_CONV_NORM = ((0, ""), (1, "norm."))
_BACKBONE = (
    *((rf"{_BODY}layer{stage}\.(\d+)\.{ours}", rf"backbone.res{stage + 1}.\1.{theirs}")
      for stage in (1, 2, 3, 4)
      for ours, theirs in ((r"conv(\d)\.(.+)", r"conv\2.\3"), (r"bn(\d)\.(.+)", r"conv\2.norm.\3"),
                           (r"downsample\.0\.(.+)", r"shortcut.\2"), (r"downsample\.1\.(.+)", r"shortcut.norm.\2"))),
    *((rf"{_BODY}conv1\.{3 * index + part}\.(.+)", rf"{_STEM}conv{index + 1}.{norm}\1")
      for index in (0, 1, 2)
      for part, norm in _CONV_NORM),
    (_BODY + r"conv1\.(.+)", _STEM + r"conv1.\1"),
)  # fmt: skip
_ATTENTION = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_LAYER = r"transformer\.decoder\.layers\.(\d+)\."
_THEIR_LAYER = _PREDICTOR + r"transformer.decoder.layers.\1."
# Ours count from the coarsest: stem is their layer 4, layers.0 their layer 3 and adapter 3.
_FPN = (
    ("stem", "layer_4"),
    *((rf"layers\.{index}\.proj", f"adapter_{3 - index}") for index in (0, 1, 2)),
    *((rf"layers\.{index}\.block", f"layer_{3 - index}") for index in (0, 1, 2)),
)
_MASKFORMER = (
    *(
        (rf"pixel_decoder\.fpn\.{ours}\.{part}\.(.+)", rf"{_PIXEL}{theirs}.{norm}\1")
        for ours, theirs in _FPN
        for part, norm in _CONV_NORM
    ),
    (r"pixel_decoder\.mask_projection\.(.+)", _PIXEL + r"mask_features.\1"),
    (r"transformer\.queries_embedder\.(.+)", _PREDICTOR + r"query_embed.\1"),
    (r"transformer\.input_projection\.(.+)", _PREDICTOR + r"input_proj.\1"),
    (r"transformer\.decoder\.layernorm\.(.+)", _PREDICTOR + r"transformer.decoder.norm.\1"),
    (_LAYER + r"mlp\.fc(\d)\.(.+)", _THEIR_LAYER + r"linear\2.\3"),
    (_LAYER + r"self_attn_layer_norm\.(.+)", _THEIR_LAYER + r"norm1.\2"),
    (_LAYER + r"encoder_attn_layer_norm\.(.+)", _THEIR_LAYER + r"norm2.\2"),
    (_LAYER + r"final_layer_norm\.(.+)", _THEIR_LAYER + r"norm3.\2"),
    (_LAYER + r"self_attn\.o_proj\.(.+)", _THEIR_LAYER + r"self_attn.out_proj.\2"),
    (_LAYER + r"encoder_attn\.o_proj\.(.+)", _THEIR_LAYER + r"multihead_attn.out_proj.\2"),
    (r"mask_embed\.(\d)\.0\.(.+)", _PREDICTOR + r"mask_embed.layers.\1.\2"),
)
_CLASS_HEAD = (
    (r"class_embed\.layers\.(\d)\.(.+)", _PREDICTOR + r"class_embed.layers.\1.\2"),
    (r"class_embed\.(weight|bias)", _PREDICTOR + r"projection_layer.\1"),
)
_OUR_ENCODER = r"pixel_decoder\.encoder\.layers\.(\d+)\."
_ENCODER = _PIXEL + r"transformer.encoder.layers.\1."
_SELF = _PREDICTOR + r"transformer_self_attention_layers.\1."
_CROSS = _PREDICTOR + r"transformer_cross_attention_layers.\1."
_FFN = _PREDICTOR + r"transformer_ffn_layers.\1."
_INTERACTION = HEAD + "interaction."
_MASK2FORMER = (
    *((rf"pixel_decoder\.((?:adapter|layer)_\d)\.{part}\.(.+)", rf"{_PIXEL}\1.{norm}\2") for part, norm in _CONV_NORM),
    (r"pixel_decoder\.mask_projection\.(.+)", _PIXEL + r"mask_features.\1"),
    (r"pixel_decoder\.input_projections\.(.+)", _PIXEL + r"input_proj.\1"),
    (r"pixel_decoder\.level_embed", _PIXEL + "transformer.level_embed"),
    (_OUR_ENCODER + r"self_attn_layer_norm\.(.+)", _ENCODER + r"norm1.\2"),
    (_OUR_ENCODER + r"final_layer_norm\.(.+)", _ENCODER + r"norm2.\2"),
    (_OUR_ENCODER + r"fc(\d)\.(.+)", _ENCODER + r"linear\2.\3"),
    (_OUR_ENCODER + r"(self_attn\..+)", _ENCODER + r"\2"),
    (r"transformer\.queries_features\.(.+)", _PREDICTOR + r"query_feat.\1"),
    (r"transformer\.queries_embedder\.(.+)", _PREDICTOR + r"query_embed.\1"),
    (r"transformer\.level_embed\.(.+)", _PREDICTOR + r"level_embed.\1"),
    (r"transformer\.input_projections\.(.+)", _PREDICTOR + r"input_proj.\1"),
    (r"transformer\.decoder\.layernorm\.(.+)", _PREDICTOR + r"decoder_norm.\1"),
    (r"transformer\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.(.+)", _PREDICTOR + r"mask_embed.layers.\1.\2"),
    (_LAYER + r"self_attn\.out_proj\.(.+)", _SELF + r"self_attn.out_proj.\2"),
    (_LAYER + r"self_attn_layer_norm\.(.+)", _SELF + r"norm.\2"),
    (_LAYER + r"cross_attn\.(.+)", _CROSS + r"multihead_attn.\2"),
    (_LAYER + r"cross_attn_layer_norm\.(.+)", _CROSS + r"norm.\2"),
    (_LAYER + r"fc(\d)\.(.+)", _FFN + r"linear\2.\3"),
    (_LAYER + r"final_layer_norm\.(.+)", _FFN + r"norm.\2"),
    (r"interaction\.norm_features\.(.+)", _INTERACTION + r"layer_norm_q_1.\1"),
    (r"interaction\.norm_text\.(.+)", _INTERACTION + r"layer_norm_k_1.\1"),
    (r"interaction\.query\.(.+)", _INTERACTION + r"attn.q_proj.\1"),
    (r"interaction\.key\.(.+)", _INTERACTION + r"attn.k_proj.\1"),
    (r"interaction\.value\.(.+)", _INTERACTION + r"attn.v_proj.\1"),
    (r"interaction\.out\.(.+)", _INTERACTION + r"attn.out_proj.\1"),
    (r"interaction\.gamma", _INTERACTION + "gamma"),
)


def source_of(name: str, *, deep_stem: bool, masked: bool) -> Source:
    """Where a tensor of a generator lies in the authors' file.

    ``name``: its name in our generator's state dict. ``deep_stem``: the backbone has a stem of three convolutions.
    ``masked``: the generator is Mask2Former, not MaskFormer. Raises KeyError if no generator has such a tensor.
    """
    if (attention := _query_key_value(name, masked)) is not None:
        return attention
    stem = (_BODY + r"bn1\.(.+)", rf"{_STEM}conv{3 if deep_stem else 1}.norm.\1")
    key = renamed(name, (stem, *_BACKBONE, *(_MASK2FORMER if masked else _MASKFORMER), *_CLASS_HEAD))
    if key is None:
        raise KeyError(name)
    return Source((key,))


def _query_key_value(name: str, masked: bool) -> Source | None:
    """Our separate query, key and value projections are one tensor in the authors' attention."""
    found = re.fullmatch(_LAYER + r"(self|encoder)_attn\.([qkv]_proj)\.(weight|bias)", name)
    if found is None:
        return None
    layer, attention, part, kind = found.groups()
    if masked:
        where = f"{_PREDICTOR}transformer_self_attention_layers.{layer}.self_attn"
    else:
        where = f"{_PREDICTOR}transformer.decoder.layers.{layer}."
        where += "self_attn" if attention == "self" else "multihead_attn"
    return Source((f"{where}.in_proj_{kind}",), _ATTENTION[part])


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
            f"The checkpoint's backbone has {blocks} blocks in res4; lexiseg knows ResNet-50 (6) and 101 (23)."
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
    interaction = _INTERACTION + "gamma" in state
    if interaction:
        inner, text = shape(_INTERACTION + "attn.k_proj.weight")
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
