"""The authors' checkpoints of DeOP, ZSSeg, ZegFormer, FreeSeg and MAFT: what they are, and what their tensors say.

They have detectron2's layout: ``backbone.`` and ``sem_seg_head.`` are the proposal generator, ``clip_adapter.`` is CLIP
with OpenAI's names and what was learned around it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.proposals.options import Mask2FormerOptions, MaskFormerOptions, QueryOptions
from lexiseg.weights.clip_state import count_blocks, shape_of
from lexiseg.weights.filling import SourceOf, key_map

System = Literal["deop", "zsseg", "zegformer", "freeseg", "maft", "prompts"]

_ADAPTER = "clip_adapter."
SECOND_ADAPTER = "_region_clip_adapter."
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
# The query decoders: MaskFormer's, and Mask2Former's masked one.
_DECODER, _MASKED_DECODER = _PREDICTOR + "transformer.decoder.", _PREDICTOR + "transformer_ffn_layers."
# DeOP's own modules beside the generator and the adapter.
_DEOP = ("decoder.", "query_embedding.", "decoderConv.", "decoderConvs.")
# Tables that DeOP adds to the tokens of CLIP's image tower, or prompts it prepends.
_TABLES = re.compile(
    r"visual\.(?:transformer\.resblocks\.\d+\.)?learned_position|visual\.transformer\.deep_prompt_embeddings"
)
# Tensors that take part in no computation of ours: class weights of a loss, constants, embeddings of fixed tokens ("X."
# and so on), which the text tower holds anyway, and of DeOP's decoder the norm behind its layers, which feeds outputs
# that nothing reads, and the copies of its convolution, which are one module.
_UNUSED = re.compile(
    r"criterion\.empty_weight|pixel_(?:mean|std)"
    r"|_?(?:region_)?clip_adapter\.(?:pixel_(?:mean|std)|prompt_learner\.(?:start|dot|end|pad)_signal)"
    r"|T\..+|decoder\.norm\.(?:weight|bias)|decoderConvs\.\d+\.weight"
)


def recognise_detectron(state: Mapping[str, Tensor]) -> System | None:
    """Tell by its keys what a checkpoint is of; None if it is none of these."""

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in state)

    if not has("backbone.stem.", HEAD):
        learned = has(_ADAPTER + "prompt_learner.") and has(_ADAPTER + "clip_model.")
        return "prompts" if learned and not has(*_DEOP) else None
    if has("IPCLIP."):
        return "maft"
    if has(*_DEOP) or any(_TABLES.fullmatch(key.removeprefix(_ADAPTER + "clip_model.")) for key in state):
        return "deop"
    if has(_PREDICTOR + "projection_layer.", _PREDICTOR + "bg_feature"):
        return "zegformer"
    if has(INTERACTION):
        return "freeseg"
    if not (has(_PREDICTOR + "class_embed.") and has(_ADAPTER)):
        return None
    # Of the systems with such a class head the decoder tells which: a FreeSeg that has lost its interaction is damaged.
    return "freeseg" if has(_MASKED_DECODER) else "zsseg" if has(_DECODER) else None


def newest_key(key: str) -> str:
    """Bring a key to the newest layout.

    Old MaskFormer files have the pixel decoder's tensors directly under ``sem_seg_head.``; files that were saved again
    without their version note may have its prefix twice.
    """
    if not key.startswith(HEAD) or key.startswith((_PREDICTOR, INTERACTION)):
        return key
    return _PIXEL + re.sub(r"^(pixel_decoder\.)+", "", key.removeprefix(HEAD))


def used_tensors(state: Mapping[str, Tensor], system: System, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors by the keys of the newest layout, and the keys that take part in no computation.

    Some of ZSSeg's files hold a second adapter, which classifies the crops: its prompts take the place of the first
    one's. Raises LexisegError if its CLIP is another one; ``name`` says whose.
    """
    keys = {key: newest_key(key) for key in state}
    used = {newest: state[key] for key, newest in keys.items() if not _UNUSED.fullmatch(newest)}
    unused = [key for key, newest in keys.items() if _UNUSED.fullmatch(newest)]
    second = {key: used.pop(key) for key in [*used] if key.startswith(SECOND_ADAPTER) and system != "deop"}
    for key in [key for key in used if second and key.startswith(_ADAPTER + "prompt_learner.")]:
        del used[key]
        unused.append(key)
    for key, tensor in second.items():
        first = key.replace(SECOND_ADAPTER, _ADAPTER)
        if ".clip_model." in key and (first not in used or not torch.equal(tensor.float(), used[first].float())):
            raise LexisegError(
                f"The two CLIPs in {name}, of the proposals and of the crops, are not the same; lexiseg keeps one for "
                "both."
            )
        if first in used:
            unused.append(key)
        else:
            used[first] = tensor
    return used, unused


def generator_source(options: QueryOptions) -> SourceOf:
    """The key map of a generator with these options: where its tensors lie in the authors' files."""
    kind = "mask2former" if isinstance(options, Mask2FormerOptions) else "maskformer"
    return key_map("deep-stem" if options.backbone.endswith("c") else "stem", "resnet", kind, "generator")


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
