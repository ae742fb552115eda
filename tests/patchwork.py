"""A model that costs nothing, and pictures for it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.models.options import ModelOptions
from lexiseg.scores import GridScores
from lexiseg.segmentation import Segmentation
from lexiseg.segmenter import Segmenter
from lexiseg.windows import WindowPolicy

WORDS = "cat; tree, bush; sky"


class Patchwork(SegmentationModel):
    """Scores a patch by its mean colour: cheap, and every window sees the same thing at the same place."""

    system: ClassVar[str] = "patchwork"
    options_class: ClassVar[type[ModelOptions]] = ModelOptions

    def __init__(self, clip: CLIP, policy: WindowPolicy | None = None, seen_names: tuple[str, ...] = ()) -> None:
        super().__init__(clip, ModelOptions(), seen_names)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("mix", torch.randn(3, clip.embed_dim, generator=generator))
        self.policy = policy or WindowPolicy()
        self.num_encoded = 0
        self.batch_sizes: list[int] = []
        self.last_seen_words: Tensor | None = None

    @property
    def window(self) -> WindowPolicy:
        return self.policy

    def encode_images(self, images: Tensor) -> ImageFeatures:
        assert images.dtype == torch.float32
        self.num_encoded += len(images)
        self.batch_sizes.append(len(images))
        pooled = F.avg_pool2d(self.fit_to_patches(images), self.patch_size)
        size = int(images.shape[2]), int(images.shape[3])
        return ImageFeatures(size, {"pooled": torch.einsum("bchw,cd->bdhw", pooled, self.mix)})

    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> GridScores:
        self.last_seen_words = seen
        logits = torch.einsum("bdyx,wd->bwyx", features.values["pooled"], text)
        return GridScores(logits, word_to_class=word_to_class)


def segmenter(model: SegmentationModel, **options: Any) -> Segmenter:
    return Segmenter(model, disk_cache=False, **options)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height)))


def same(a: Segmentation, b: Segmentation) -> None:
    assert torch.equal(a.label_map, b.label_map)
    assert a.scores is not None and b.scores is not None
    torch.testing.assert_close(a.scores, b.scores)
