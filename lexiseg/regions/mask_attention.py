"""Mask attention: one class token for each region, in one run of CLIP's image tower (MAFT's IP-CLIP encoder).

Up to a block L the tower is CLIP itself. There its class token becomes N copies, one for each region mask, and from
there on a class token attends to itself and to the patches inside its mask, while the patches attend to each other
only. So the patches do not depend on the masks: they run once, and a region costs one query a block.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from lexiseg.clip.embeddings import whole_patches
from lexiseg.clip.positions import Interpolation
from lexiseg.clip.resnet import attention_pool, resnet_features
from lexiseg.clip.tower import ImageTower, block_attention, run_block
from lexiseg.errors import LexisegError
from lexiseg.regions.pooling import resize_masks

INSIDE = 0.5
"""A patch belongs to a region if the mask is at least this on the patch grid."""

FROZEN_UNITS = ("conv", "cls", "pos", "ln_pre", "mlp", "proj")
"""What the authors' code keeps of CLIP, by the names of the paper's ablation (MAFT, Table 4d; ln_pre is not in it)."""


def attention_mask(inside: Tensor) -> Tensor:
    """What each region's class token may attend to: itself and the patches inside, of (B, N, gh, gw) boolean.

    Returns:
        (B, 1, N, N + gh * gw) boolean, True = may attend; equal for all heads. No row is empty.
    """
    count = inside.shape[1]
    own = torch.eye(count, dtype=torch.bool, device=inside.device).expand(len(inside), -1, -1)
    return torch.cat([own, inside.flatten(2)], dim=2)[:, None]


def attend_regions(
    tower: ImageTower,
    tokens: Tensor,
    grid: tuple[int, int],
    inside: Tensor,
    *,
    start_block: int,
    stop: int | None = None,
) -> Tensor:
    """Run the blocks from ``start_block`` on with a class token for each region (MAFT, Sec. 4.1).

    Args:
        tower: the image tower.
        tokens: (B, L, W), what enters block ``start_block``: class token first, the gh * gw patches last. Tokens
            between them (prompts) are dropped.
        grid: (gh, gw).
        inside: (B, N, gh, gw) boolean, the patches of each region; any N, and a region may be empty.
        start_block: index (0-based) of the first block with masks, L in the paper; none such is a `LexisegError`.
        stop: index of the first block that is not run; None runs all.

    Returns:
        (B, N, W), the regions' class tokens, before the final norm.
    """
    if not 0 <= start_block < tower.num_blocks:
        raise LexisegError(
            f"Mask attention cannot start at block {start_block} of a tower of {tower.num_blocks} blocks; "
            f"choose one from 0 to {tower.num_blocks - 1}, for example {tower.num_blocks * 2 // 3}."
        )
    regions, rows = tokens[:, :1].expand(-1, inside.shape[1], -1), tokens[:, -grid[0] * grid[1] :]
    inside_only = partial(block_attention, mask=attention_mask(inside))
    *blocks, last = list(tower.visual.transformer.resblocks)[start_block:stop] if inside.shape[1] else [None]
    for block in blocks:
        # The patches' keys and values are computed here and in their own run: a sixth of a block more, and worth one
        # function for every kind of block.
        regions, rows = run_block(block, regions, rows, attention=inside_only), run_block(block, rows)
    return regions if last is None else run_block(last, regions, rows, attention=inside_only)


def region_embeddings(
    visual: nn.Module,
    images: Tensor,
    masks: Tensor,
    *,
    start_block: int,
    position_interpolation: Interpolation = "bicubic-corners",
) -> Tensor:
    """CLIP embeddings (B, N, D) of regions, not normalised, in one run of the image tower for any number of them.

    Args:
        visual: ``model.visual`` of an open_clip model: a vision transformer or a CLIP ResNet.
        images: (B, 3, H, W) normalised, any aspect and any size from one patch on; what is left over of whole patches
            at the right and lower edge is cut off.
        masks: (B, N, h, w) in 0..1 over the same frame, any h and w; N may be 0.
        start_block: first block (0-based) with masks, L in the paper: 8 for ViT-B/16, 16 for ViT-L/14. A ResNet has
            none: there the masks act in the attention pool.
        position_interpolation: "bicubic-corners" as MAFT and FreeSeg, "bicubic" as ZSSeg.

    Raises:
        LexisegError: the tower is of another kind, there is no block ``start_block``, or an image is too small.
    """
    if isinstance(visual, ModifiedResNet):
        features = resnet_features(visual, images)
        inside = resize_masks(masks, (features.shape[-2], features.shape[-1])) >= INSIDE
        return attention_pool(visual.attnpool, features, inside, position_interpolation=position_interpolation)
    tower = ImageTower(visual)
    tokens, grid = tower.embed(whole_patches(images, tower.patch_size), interpolation=position_interpolation)
    tokens = tower.run(tokens, grid, stop=start_block).tokens
    inside = resize_masks(masks, grid) >= INSIDE
    return tower.project(attend_regions(tower, tokens, grid, inside, start_block=start_block))


def trainable_names(visual: nn.Module, frozen: Collection[str] = FROZEN_UNITS) -> tuple[str, ...]:
    """Names of the parameters that mask-aware fine-tuning changes, as in ``visual.named_parameters()``.

    By default those of the authors' code: attention and both norms of every block, those before the first masked block
    included, and the norm behind the last. The paper's default trains the projection as well: leave ``"proj"`` out of
    ``frozen`` (of `FROZEN_UNITS`, else a `LexisegError`) for that. Of a CLIP ResNet the pool's four maps are trained
    (our choice: nobody says what the authors trained there).
    """
    unknown = sorted(set(frozen) - set(FROZEN_UNITS))
    if unknown:
        raise LexisegError(f"There is no unit '{unknown[0]}' to freeze; the units are {', '.join(FROZEN_UNITS)}.")
    resnet = isinstance(visual, ModifiedResNet)
    unit_of = _resnet_unit if resnet else _transformer_unit
    return tuple(name for name, _ in visual.named_parameters() if unit_of(name) not in frozen)


def _transformer_unit(name: str) -> str:
    first = name.split(".", 1)[0]
    if ".mlp." in name:
        return "mlp"
    units = {"conv1": "conv", "class_embedding": "cls", "positional_embedding": "pos"}
    return units.get(first, first)


def _resnet_unit(name: str) -> str:
    if not name.startswith("attnpool."):
        return "conv"
    return "pos" if "positional" in name else "attention"
