"""A second image encoder beside CLIP, whose features tell which places belong together (ProxyCLIP)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lexiseg.clip.foreign import timm_model
from lexiseg.clip.library_towers import TimmTower
from lexiseg.clip.positions import Interpolation
from lexiseg.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise

Feature = Literal["out", "q", "k", "v"]


class Proxy(nn.Module):
    """A timm vision transformer that returns a feature map.

    Args:
        model: with plain blocks (DINO, DINOv2) or any with ``forward_features`` that gives tokens (DINOv3).
        positions: how its authors resize the position table; None is timm's way.
        feature: the normalised output, or queries, keys or values of the last block.
    """

    def __init__(self, model: Any, positions: Interpolation | None = None, feature: Feature = "out") -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.positions = positions
        self.feature = feature
        config = getattr(model, "pretrained_cfg", None) or {}
        self.mean = tuple(config.get("mean", IMAGENET_MEAN))
        self.std = tuple(config.get("std", IMAGENET_STD))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.model.patch_embed.patch_size[0])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels, RGB in 0..1, as the encoder wants them."""
        return normalise(pixels, self.mean, self.std)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in 0..1, brought to multiples of the patch: (B, C, h2, w2), not normalised."""
        patch = self.patch_size
        size = [max(round(int(side) / patch), 1) * patch for side in pixels.shape[-2:]]
        if size != list(pixels.shape[-2:]):
            pixels = nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        return self.features(self.normalise(pixels))

    def features(self, images: Tensor) -> Tensor:
        """Features (B, C, h2, w2) of images (B, 3, H, W) that are normalised; sides multiples of the patch."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        if getattr(self.model, "pos_embed", None) is None or getattr(self.model, "rope", None) is not None:
            tokens = self.model.forward_features(images)
        else:
            tower = TimmTower(self.model, self.positions)
            tokens, _ = tower.embed(images)
            last = len(tower.blocks) - 1
            tokens, _ = tower.run(tokens, stop=last)
            if self.feature == "out":
                tokens = tower.project(tower.run(tokens, last)[0])
            else:
                tokens = tower.blocks[last].qkv(tokens)["qkv".index(self.feature)].transpose(1, 2).flatten(2)
        return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def positions_of(name: str) -> Interpolation | None:
    """How the authors of a model of timm resize its position table, where that is not timm's way: by an offset."""
    return "bicubic-offset" if name.endswith(".dino") or ("dinov2" in name and "_reg" not in name) else None


def load_proxy(name: str) -> Proxy:
    """Load a second encoder, such as ``"vit_base_patch8_224.dino"`` or ``"vit_base_patch14_reg4_dinov2.lvd142m"``.

    A `LexisegError` says that timm has no such weights, or that they cannot be had.
    """
    return Proxy(timm_model(name), positions_of(name))
