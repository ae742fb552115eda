"""A CLIP built from its tensors alone, which every kind of checkpoint holds under its own names."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.weights.filling import SourceOf, key_map
from lexiseg.words import printable, shorten

_HEAD_WIDTH = 64
# open_clip's image towers of more channels than this (ViT-H, g, bigG, e) all have 16 wider heads.
_WIDEST, _WIDE_HEADS = 1024, 16
_MOST_BLOCKS = 400
# The tensors whose shapes tell the architecture, with their number of dimensions.
_SHAPE_KEYS = {
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "visual.proj": 2,
    "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
    "token_embedding.weight": 2,
    "positional_embedding": 2,
    "ln_final.weight": 1,
    "transformer.resblocks.0.mlp.c_fc.weight": 2,
}

transformers_source = key_map("transformers")
"""The key map of the ``CLIPModel`` of `transformers`, from OpenAI's names, which are ours."""


def count_blocks(state: Mapping[str, Any], prefix: str, what: str = "the checkpoint") -> int:
    """How many blocks a file has whose keys begin with ``prefix`` and a number.

    Raises LexisegError if numbers are left out, or there are more than any model has.
    """
    rests = (key[len(prefix) :].split(".", 1)[0] for key in state if key.startswith(prefix))
    numbers = {int(rest) for rest in rests if rest.isdecimal() and len(rest) < 9}
    last = max(numbers, default=-1)
    if last >= _MOST_BLOCKS or last + 1 != len(numbers):
        raise LexisegError(f"{what} has {len(numbers)} of the tensors {prefix}0 to {prefix}{last}; it is damaged.")
    return len(numbers)


def shape_of(state: Mapping[str, Tensor], key: str, dimensions: int, what: str = "the checkpoint") -> tuple[int, ...]:
    """The shape of a tensor that tells how a model is built.

    Raises LexisegError if the tensor is missing, has another number of dimensions, or an empty one.
    """
    if key not in state:
        raise LexisegError(f"{what} lacks {key}, without which the model cannot be rebuilt; take a complete file.")
    shape = tuple(state[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise LexisegError(
            f"{printable(shorten(key))} in {what} has the shape {shape}, not {dimensions} sizes above 0; get the file "
            "again."
        )
    return shape


def require(state: Mapping[str, Any], keys: Iterable[str], what: str) -> None:
    """Raise LexisegError if a file lacks any of these tensors, with all of them; ``what`` begins the sentence."""
    if missing := [key for key in keys if key not in state]:
        raise LexisegError(f"{what} lacks {', '.join(missing)}; take a complete file.")


def shape_keys(source_of: SourceOf) -> list[str]:
    """The tensors, by the file's keys, without which `infer_vit_architecture` cannot do."""
    return [source.keys[0] for key in _SHAPE_KEYS if (source := source_of(key)) is not None]


def infer_vit_architecture(
    state: Mapping[str, Tensor],
    source_of: SourceOf,
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    quick_gelu: bool = True,
    name: str = "the checkpoint",
) -> dict[str, Any]:
    """Read the architecture of a CLIP with a vision transformer off its shapes.

    ``source_of``: where a tensor by OpenAI's name (``visual.conv1.weight``, ``token_embedding.weight`` ...) lies there.
    ``heads``: attention heads of the image tower, which no shape tells; None is one per 64 channels, and 16 where there
    are more than 1,024, as in all CLIPs of OpenAI and open_clip.
    ``text_heads``: the same for the text tower. ``quick_gelu``: which activation the towers use; OpenAI's is QuickGELU.
    Returns what `lexiseg.clip.model.build_clip` takes. Raises LexisegError if tensors that are needed are missing (all
    are listed) or of no sensible shape.
    """
    require(state, shape_keys(source_of), f"The CLIP in {name}")
    sizes: dict[str, tuple[int, ...]] = {}
    layers: dict[str, int] = {}
    for ours, dimensions in _SHAPE_KEYS.items():
        source = source_of(ours)
        key = ours if source is None else source.keys[0]
        shape = shape_of(state, key, dimensions, name)
        sizes[ours] = shape[::-1] if source is not None and source.transposed else shape
        if ".resblocks.0." in ours:
            layers[ours] = count_blocks(state, key.split(".0.")[0] + ".", name)
    width, _, _, patch = sizes["visual.conv1.weight"]
    text_width = sizes["ln_final.weight"][0]
    rows = sizes["visual.positional_embedding"][0] - 1
    side = math.isqrt(rows)
    if side * side != rows or not side:
        raise LexisegError(
            f"The position table of the CLIP in {name} has {rows} rows of patches, which is not a square grid; give a "
            "CLIP of square pictures."
        )
    for channels, number in ((width, heads), (text_width, text_heads)):
        if number is not None and (number < 1 or channels % number):
            raise LexisegError(
                f"The CLIP in {name} has {channels} channels, which cannot be split into {number} heads; give another "
                "number."
            )
    if heads is None and width > _WIDEST:
        heads = _WIDE_HEADS
    block, text_block = layers
    return {
        "model_cfg": {
            "embed_dim": sizes["visual.proj"][1],
            "quick_gelu": quick_gelu,
            "vision_cfg": {
                "image_size": side * patch,
                "patch_size": patch,
                "width": width,
                "layers": layers[block],
                "head_width": width // heads if heads else min(_HEAD_WIDTH, width),
                "mlp_ratio": sizes[block][0] / width,
            },
            "text_cfg": {
                "context_length": sizes["positional_embedding"][0],
                "vocab_size": sizes["token_embedding.weight"][0],
                "width": text_width,
                "heads": text_heads or max(text_width // _HEAD_WIDTH, 1),
                "layers": layers[text_block],
                "mlp_ratio": sizes[text_block][0] / text_width,
            },
        }
    }


def transformers_architecture(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    name: str,
    *,
    heads: int | None = None,
    text_heads: int | None = None,
) -> dict[str, Any]:
    """The architecture of a ``CLIPModel``: its shapes, and of its ``config.json`` what no shape tells.

    ``state``: its tensors by its own keys. ``config``: of the folder; {} where it is not known, which is taken for
    OpenAI's. ``heads`` and ``text_heads`` go before what it says. Raises LexisegError; see `infer_vit_architecture`; or
    its activation is neither QuickGELU nor GELU.
    """
    given = (config.get("vision_config"), config.get("text_config"))
    parts = [part if isinstance(part, dict) else {} for part in given]
    activations = {part.get("hidden_act", "quick_gelu") for part in parts}
    if not activations <= {"quick_gelu", "gelu"} or len(activations) > 1:
        raise LexisegError(
            f"{name} has activations other than QuickGELU or GELU in its config.json; give another CLIP."
        )
    stated = [part.get("num_attention_heads") for part in parts]
    if any(type(number) not in (int, type(None)) for number in stated):
        raise LexisegError(
            f"The config.json beside {name} does not give the numbers of heads; copy the original again."
        )
    return infer_vit_architecture(
        state,
        transformers_source,
        heads=heads or stated[0],
        text_heads=text_heads or stated[1],
        quick_gelu=activations == {"quick_gelu"},
        name=name,
    )


def is_transformers(state: Mapping[str, Any]) -> bool:
    """Say by its keys whether a state dict is a ``CLIPModel`` of `transformers`."""
    return "vision_model.embeddings.patch_embedding.weight" in state and any(
        key.startswith("text_model.encoder.") for key in state
    )


def is_openai(state: Mapping[str, Any]) -> bool:
    """Say by its keys whether a state dict is OpenAI's or open_clip's."""
    return "visual.conv1.weight" in state and "token_embedding.weight" in state
