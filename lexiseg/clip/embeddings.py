"""CLIP's embeddings of whole images: the unchanged image tower, at any resolution."""

from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from lexiseg.clip.positions import Interpolation
from lexiseg.clip.resnet import attention_pool, resnet_features
from lexiseg.clip.tower import ImageTower, run_block


def image_embeddings(
    visual: nn.Module, images: Tensor, *, position_interpolation: Interpolation = "bicubic-corners"
) -> Tensor:
    """CLIP embeddings (B, D), not normalised, of whole images (B, 3, H, W), any size from one patch on and any aspect.

    ``visual`` is ``model.visual`` of an open_clip model, a vision transformer or a CLIP ResNet (else a `LexisegError`).
    Positions: "bicubic-corners" as MAFT and FreeSeg, "bicubic" as ZSSeg.
    """
    if isinstance(visual, ModifiedResNet):
        features = resnet_features(visual, images)
        return attention_pool(visual.attnpool, features, position_interpolation=position_interpolation)
    tower = ImageTower(visual)
    tokens, grid = tower.embed(whole_patches(images, tower.patch_size), interpolation=position_interpolation)
    last = tower.num_blocks - 1
    tokens = tower.run(tokens, grid, stop=last).tokens
    # Of the last block only the class token is wanted: the patches are its context, and need no queries and no MLP.
    tokens = run_block(tower.visual.transformer.resblocks[last], tokens[:, :1], tokens[:, 1:])
    return tower.project(tokens)[:, 0]


def whole_patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut off what does not fill a whole patch at the right and lower edge of images (B, 3, H, W)."""
    height, width = (side // patch_size * patch_size for side in images.shape[-2:])
    return images[..., :height, :width]
