"""Segment Anything's own checkpoints (``sam_vit_h_4b8939.pth`` ...) as folders of `transformers`, for proposals.

The network of `transformers` is the same under other names. SAM 2, and networks that replace its image encoder
(MobileSAM) or add to its decoder (SAM-HQ), are not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lexiseg.clip.load import count_parameters, shapes_of, sketch
from lexiseg.errors import LexisegError
from lexiseg.files import make_folder
from lexiseg.weights.clip_state import shape_of
from lexiseg.weights.filling import key_map, take_tensors


def _encoder(width: int, layers: int, global_layers: list[int]) -> dict[str, Any]:
    sizes = {"hidden_size": width, "mlp_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 16}
    return {"vision_config": {**sizes, "global_attn_indexes": global_layers}}


RELEASED: dict[int, dict[str, Any]] = {
    768: {},  # ViT-B
    1024: _encoder(1024, 24, [5, 11, 17, 23]),  # ViT-L
    1280: _encoder(1280, 32, [7, 15, 23, 31]),  # ViT-H
}
"""Of each released network, by the width of its image encoder, what is not as in ``SamConfig()``."""


def recognise_sam(state: Mapping[str, Tensor]) -> bool:
    """Say whether a checkpoint is a Segment Anything, by its keys."""
    return "mask_decoder.iou_token.weight" in state and any(key.startswith("image_encoder.") for key in state)


def convert_sam(state: Mapping[str, Tensor], folder: str | Path, *, name: str = "the checkpoint") -> int:
    """Write a SAM as a folder that ``proposals.weights`` takes.

    Returns the number of its parameters. Raises LexisegError if transformers is not installed, the network is of
    another size than the released ones, tensors are missing, left over or of another shape (all are listed), or the
    folder cannot be written.
    """
    from transformers import SamConfig, SamImageProcessor, SamModel

    said = f"The SAM in {name}"
    width = shape_of(state, "image_encoder.pos_embed", 4, said)[-1]
    if width not in RELEASED:
        known = ", ".join(map(str, RELEASED))
        raise LexisegError(f"{said} has an image encoder of {width} channels; lexiseg knows SAM's own, of {known}.")
    config = SamConfig(**RELEASED[width])
    model = sketch(lambda: SamModel(config), len(state), said)
    model.load_state_dict(take_tensors(shapes_of(model), key_map("sam"), state, said), assign=True)
    folder = make_folder(folder)
    model.save_pretrained(folder)
    side = config.vision_config.image_size
    low = side // 4  # the masks that the decoder makes
    processor = SamImageProcessor(
        size={"longest_edge": side},
        pad_size={"height": side, "width": side},
        mask_size={"longest_edge": low},
        mask_pad_size={"height": low, "width": low},
    )
    processor.save_pretrained(folder)
    return count_parameters(model)
