"""Options that every one-stage system has: the ablation switches of ZegCLIP and Cascade-CLIP that they share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lexiseg.clip.image import Interpolation
from lexiseg.models.base import Deviations, LossWeight, Pixels, Triple, WindowOptions

Backbone = Literal["prompt", "fixed", "finetune"]

# fmt: off
WEIGHTS_DEPEND_ON = frozenset({
    "backbone", "host", "num_prompts", "prompt_depth", "descriptor", "decoder_layers", "decoder_heads", "decoder_dim",
    "project_memory", "ffn_ratio", "class_embedding_twice", "position_interpolation", "mean", "std",
    "groups", "aggregation", "sigma", "text_projection", "level_projection", "filter_blocks", "filter_grid",
})
# fmt: on
"""Options of one-stage systems that must be the same in a training and in the one that it starts from; not every system
has each of them."""


class OneStageOptions(WindowOptions):
    """Options of every one-stage system. The defaults are the papers', for any tower.

    Attributes:
        num_prompts: prompts a block (ZegCLIP: 10 on VOC, 35 on Context, 100 on COCO-Stuff; Cascade-CLIP: 10, 35, 50).
        prompt_depth: see `VisualPrompts`; None is deep, in every block. Of ZegCLIP's Table 8, "1" is 0, "1-3" is 2 and
            "4-12" is -9.
        prompt_dropout: dropout on the prompts.
        descriptor: use the relationship descriptor [t * cls, t] as the query (ZegCLIP, Sec. 3.3); False uses the text
            embedding t alone, the paper's ablation.
        decoder_layers: layers of a decoder.
        decoder_heads: its attention heads.
        ffn_ratio: hidden width of its feed-forward part over its width.
        dropout: dropout in the decoder.
        start: "random" is the released initialisation. "matching" starts from CLIP's own comparison of patches and
            words (queries are the text embeddings, the decoder changes nothing), which a short training needs: from
            random weights a decoder takes thousands of steps to find that comparison.
        class_embedding_twice: a quirk of the released code: the class embedding is added twice. Converted checkpoints
            need it; a model trained here does better with what CLIP was trained with.
        position_interpolation: how position embeddings follow the resolution.
        seen_offset: subtracted from the score of classes seen in training; the released code uses 0.1, and 0 for
            models trained transductively.
        mask_size: side that masks of square images are upsampled to before the sigmoid (released: 512); None is the
            images' own size, which is also what images of other shapes use.
        mask_loss: "focal" judges each class by itself (ZegCLIP's non-mutually exclusive loss, Sec. 3.2): focal loss,
            sigmoid. "cross-entropy" lets the classes exclude each other, as segmentation is usually trained and as
            ZegCLIP's ablation has it: softmax over the classes, in the loss and in the scores; see
            `lexiseg.losses.exclusive`.
        mask_weight: factor on the mask loss (focal: Cascade-CLIP's Table 18 compares 10, 50, 100 and 150).
        dice_weight: factor on the dice loss; on the loss in its place for SPT-SEG.
        mean: mean of the images, RGB in 0..1; None is CLIP's. (Released: ImageNet's.)
        std: standard deviation of the images, RGB in 0..1; None is CLIP's.
        window_size: side of the sliding window at prediction; None runs whole pictures (released: 512).
        window_stride: its stride (released: 426).
        short_side: the length pictures' shorter side is resized to at prediction; None keeps it (released: 512).
        antialias: whether that resize smooths what it shrinks; the authors' (mmcv's) does not.
    """

    num_prompts: Annotated[int, Field(ge=1)] = 10
    prompt_depth: int | None = None
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    descriptor: bool = True
    decoder_layers: Annotated[int, Field(ge=1)] = 3
    decoder_heads: Annotated[int, Field(ge=1)] = 8
    ffn_ratio: Annotated[float, Field(gt=0)] = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    start: Literal["random", "matching"] = "random"
    class_embedding_twice: bool = False
    position_interpolation: Interpolation = "bilinear"
    seen_offset: float = 0.1
    mask_size: Pixels | None = None
    mask_loss: Literal["focal", "cross-entropy"] = "focal"
    mask_weight: LossWeight = 100.0
    dice_weight: LossWeight = 1.0
    mean: Triple | None = None
    std: Deviations | None = None
    antialias: bool = True
