"""Segment Anything's own checkpoints (``sam_vit_h_4b8939.pth`` ...) as folders of `transformers`, for proposals.

The network of `transformers` is the same under other names. SAM 2, and networks that replace its image encoder
(MobileSAM) or add to its decoder (SAM-HQ), are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lexiseg.clip.load import count_parameters, shapes_of, sketch
from lexiseg.errors import LexisegError
from lexiseg.files import make_folder
from lexiseg.weights.clip_state import count_blocks, require, shape_of
from lexiseg.weights.filling import key_map, take_tensors

_BLOCKS = "image_encoder.blocks."
_DECODER = "mask_decoder.transformer.layers."
_IOU_HEAD = "mask_decoder.iou_prediction_head.layers."
_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
# Of the decoder; no shape tells it, and all released files have the same.
_DECODER_HEADS = 8
# The tensors whose shapes tell the configuration.
_SHAPE_KEYS = (
    "image_encoder.pos_embed",
    "image_encoder.patch_embed.proj.weight",
    f"{_BLOCKS}0.attn.rel_pos_h",
    f"{_BLOCKS}0.mlp.lin1.weight",
    "image_encoder.neck.0.weight",
    _POSITIONS,
    "prompt_encoder.mask_downscaling.3.weight",
    f"{_DECODER}0.mlp.lin1.weight",
    f"{_DECODER}0.cross_attn_token_to_image.q_proj.weight",
    "mask_decoder.mask_tokens.weight",
    f"{_IOU_HEAD}0.weight",
)


def recognise_sam(state: Mapping[str, Tensor]) -> bool:
    """Say whether a checkpoint is a Segment Anything, by its keys."""
    return "mask_decoder.iou_token.weight" in state and any(key.startswith("image_encoder.") for key in state)


def infer_config(state: Mapping[str, Tensor], name: str = "the checkpoint") -> dict[str, dict[str, Any]]:
    """Read the configuration of ``SamConfig`` off the shapes of a checkpoint.

    Raises LexisegError if tensors are missing whose shapes are needed; all are listed.
    """
    require(state, _SHAPE_KEYS, f"The SAM in {name}")

    def shape(key: str, dimensions: int = 2) -> tuple[int, ...]:
        return shape_of(state, key, dimensions, f"The SAM in {name}")

    width, _, patch, _ = shape("image_encoder.patch_embed.proj.weight", 4)
    grid = shape("image_encoder.pos_embed", 4)[1]
    layers = count_blocks(state, _BLOCKS, name)
    # A table of relative positions has 2 n - 1 rows for a window of n patches; the whole picture is a window as well.
    tables = [f"{_BLOCKS}{index}.attn.rel_pos_h" for index in range(layers)]
    windows = [(shape(table)[0] + 1) // 2 if table in state else grid for table in tables]
    channels = shape("image_encoder.neck.0.weight", 4)[0]
    num_tokens, decoder_width = shape("mask_decoder.mask_tokens.weight")
    cross = shape(f"{_DECODER}0.cross_attn_token_to_image.q_proj.weight")[0]
    return {
        "vision_config": {
            "hidden_size": width,
            "output_channels": channels,
            "num_hidden_layers": layers,
            "num_attention_heads": width // shape(f"{_BLOCKS}0.attn.rel_pos_h")[1],
            "image_size": grid * patch,
            "patch_size": patch,
            "mlp_dim": shape(f"{_BLOCKS}0.mlp.lin1.weight")[0],
            "window_size": min(windows),
            "global_attn_indexes": [index for index, window in enumerate(windows) if window == grid],
            "num_pos_feats": shape(_POSITIONS)[1],
        },
        "prompt_encoder_config": {
            "hidden_size": channels,
            "image_size": grid * patch,
            "patch_size": patch,
            "mask_input_channels": shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        },
        "mask_decoder_config": {
            "hidden_size": decoder_width,
            "mlp_dim": shape(f"{_DECODER}0.mlp.lin1.weight")[0],
            "num_hidden_layers": count_blocks(state, _DECODER, name),
            "num_attention_heads": _DECODER_HEADS,
            "attention_downsample_rate": decoder_width // cross,
            "num_multimask_outputs": num_tokens - 1,
            "iou_head_depth": count_blocks(state, _IOU_HEAD, name),
            "iou_head_hidden_dim": shape(f"{_IOU_HEAD}0.weight")[0],
        },
    }


def convert_sam(state: Mapping[str, Tensor], folder: str | Path, *, name: str = "the checkpoint") -> int:
    """Write a SAM as a folder that ``proposals.weights`` takes.

    Returns the number of its parameters. Raises LexisegError if transformers is not installed, tensors are missing,
    left over or of another shape (all are listed), or the folder cannot be written.
    """
    from transformers import SamConfig, SamImageProcessor, SamModel

    config = infer_config(state, name)
    try:
        model = sketch(lambda: SamModel(SamConfig(**config)), len(state), f"The SAM in {name}")
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:  # wherever sizes first disagree
        raise LexisegError(f"The SAM in {name} has shapes that do not match; download it again.") from error

    tensors = take_tensors(shapes_of(model), key_map("sam"), state, f"The SAM in {name}")
    model.load_state_dict(tensors, assign=True)
    folder = make_folder(folder)
    model.save_pretrained(folder)
    side = config["vision_config"]["image_size"]
    low = side // 4  # the masks that the decoder makes
    processor = SamImageProcessor(
        size={"longest_edge": side},
        pad_size={"height": side, "width": side},
        mask_size={"longest_edge": low},
        mask_pad_size={"height": low, "width": low},
    )
    processor.save_pretrained(folder)
    return count_parameters(model)
