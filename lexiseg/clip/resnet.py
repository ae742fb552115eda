"""CLIP's ResNets: the feature map, and the attention that pools it, for the whole image or for regions."""

import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.positions import Interpolation, resize_positions

RESNET_STRIDE = 32
"""Pixels per side of one place in the last feature map."""


def resnet_features(visual: ModifiedResNet, images: Tensor) -> Tensor:
    """Run stem and stages of a CLIP ResNet on images (B, 3, H, W): (B, C, h, w), a place for about 32 x 32 pixels.

    The batch norms behave as the module's mode says: keep the tower in evaluation mode, as CLIP's are, in training too.
    """
    x = visual.stem(images.to(visual.conv1.weight.dtype))
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = stage(x)
    return x


def attention_pool(
    pool: AttentionPool2d,
    features: Tensor,
    masks: Tensor | None = None,
    *,
    patches: bool = False,
    position_interpolation: Interpolation = "bicubic-corners",
) -> Tensor:
    """Pool a feature map (B, C, h, w) with CLIP's attention: its mean is the query; mean and map are keys and values.

    With masks (B, N, h, w), boolean, the mean is a query once per region, and places outside the region are
    masked (MAFT, Eq. 2 and 3 applied to the pool; Sec. 5.5 describes it and no code for it was released). With
    ``patches``, and no masks, every place is a query as well.

    Returns (B, N, D) with masks, (B, D) without, (B, h, w, D) with ``patches``; not normalised.
    """
    height, width = features.shape[-2:]
    if masks is not None and masks.shape[1] == 0:
        return features.new_zeros(len(features), 0, pool.c_proj.out_features)
    positions = resize_positions(pool.positional_embedding, (height, width), interpolation=position_interpolation)
    x = features.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + positions.to(x.dtype)
    asking = x if patches else x[:, :1]
    allowed = None
    if masks is not None:
        asking = asking.expand(-1, masks.shape[1], -1)
        allowed = F.pad(masks.flatten(2), (1, 0), value=True)[:, None]
    query, key, value = (
        rows.unflatten(2, (pool.num_heads, rows.shape[2] // pool.num_heads)).transpose(1, 2)
        for rows in (pool.q_proj(asking), pool.k_proj(x), pool.v_proj(x))
    )
    pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    pooled = pool.c_proj(pooled.transpose(1, 2).flatten(2))
    if patches:
        return pooled[:, 1:].unflatten(1, (height, width))
    return pooled[:, 0] if masks is None else pooled
