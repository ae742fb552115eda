"""The image tower: an open_clip VisionTransformer's weights, run at any resolution, with prompts, levels and severance.

Tokens are laid out ``[class, prompts ..., patches ...]``: the class token is always first and the patches are always
the last h x w tokens, so that nobody needs to know how many prompts there are to find either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.blocks import run_block
from lexiseg.errors import LexisegError

Interpolation = Literal["bilinear", "bicubic", "bicubic-antialias"]

# Called before block i with the tokens (B, L, W); returns the tokens that enter the block and, or None, tokens
# (B or 1, P, W) that are attended to in this block only. Deep prompts, added tables and filters all have this form.
BeforeBlock = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class ImageTokens:
    """What the image blocks leave behind.

    Attributes:
        tokens: output of the last block (B, L, W), before the final norm; ``[class, prompts ..., patches ...]``.
        levels: outputs of the blocks asked for, by block index, in the same layout.
        grid: (h, w), the patches per side.
    """

    tokens: Tensor
    levels: dict[int, Tensor]
    grid: tuple[int, int]

    @property
    def num_patches(self) -> int:
        """Number of patch tokens, h * w."""
        return self.grid[0] * self.grid[1]


def resize_positions(
    table: Tensor,
    grid: tuple[int, int],
    source: tuple[int, int] | None = None,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Resize a position table to another patch grid; row 0, the class token's, is copied.

    Args:
        table: (1 + h0 * w0, W).
        grid: the target (h, w).
        source: (h0, w0); None means a square grid.
        interpolation: "bilinear" is what ZegCLIP does at every forward (align_corners False, no antialias);
            "bicubic" is DeOP's; "bicubic-antialias" is open_clip's when it loads weights.

    Returns:
        (1 + h * w, W); the table itself when the grids agree.

    Raises:
        LexisegError: the rows do not form the source grid.
    """
    rows = table.shape[0] - 1
    if source is None:
        side = round(rows**0.5)
        source = (side, side)
    if source[0] * source[1] != rows:
        raise LexisegError(
            f"A position table of {table.shape[0]} rows is not 1 + {source[0]} x {source[1]}; "
            "check the image size and the patch size of the tower."
        )
    if source == grid:
        return table
    patches = table[1:].reshape(1, source[0], source[1], -1).permute(0, 3, 1, 2)
    mode, antialias = ("bicubic", True) if interpolation == "bicubic-antialias" else (interpolation, False)
    patches = F.interpolate(patches.float(), size=grid, mode=mode, align_corners=False, antialias=antialias)
    patches = patches.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(table.dtype)
    return torch.cat([table[:1], patches])


class ImageTower:
    """An open_clip VisionTransformer seen as tokens in, tokens out. Holds no weights of its own.

    Args:
        visual: ``model.visual`` of an open_clip model.

    Raises:
        LexisegError: the tower is not a plain vision transformer with a class token (a ResNet, a timm model, an
            attention pooler or blocks with unusual attention).
    """

    def __init__(self, visual: nn.Module) -> None:
        if not isinstance(visual, VisionTransformer):
            raise LexisegError(
                f"The image tower is a {type(visual).__name__}, not an open_clip vision transformer; "
                "choose a ViT such as 'ViT-B-16/openai'."
            )
        blocks = visual.transformer.resblocks
        plain = all(isinstance(block, ResidualAttentionBlock) for block in blocks) and visual.attn_pool is None
        if not plain or visual.patch_size[0] != visual.patch_size[1]:
            raise LexisegError(
                "The image tower pools with attention, has unusual blocks or patches that are not square, which "
                "lexiseg cannot run patch by patch; choose a plain ViT such as 'ViT-B-16/openai'."
            )
        self.visual = visual

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.visual.transformer.resblocks)

    @property
    def width(self) -> int:
        """Width W of the tokens."""
        return int(self.visual.conv1.out_channels)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.visual.patch_size[0])

    def embed(
        self, images: Tensor, *, interpolation: Interpolation = "bilinear", class_embedding_twice: bool = False
    ) -> tuple[Tensor, tuple[int, int]]:
        """Turn images into the tokens that enter the first block.

        Args:
            images: (B, 3, H, W) normalised; H and W multiples of the patch size, any aspect.
            interpolation: how the position table is resized to the grid, see `resize_positions`.
            class_embedding_twice: add the class embedding to its position once more, so that 2 e + p_0 enters. The
                released ZegCLIP code does this and its checkpoints were trained with it; CLIP itself does not.

        Returns:
            tokens (B, 1 + h * w, W) after the first norm, and the grid (h, w).

        Raises:
            LexisegError: a side is not a multiple of the patch size.
        """
        visual, patch = self.visual, self.patch_size
        height, width = images.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise LexisegError(
                f"An image of {height} x {width} does not divide into {patch} x {patch} patches; "
                f"resize it to multiples of {patch}."
            )
        grid = (height // patch, width // patch)
        patches = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        positions = resize_positions(visual.positional_embedding, grid, tuple(visual.grid_size), interpolation)
        positions = positions.to(patches.dtype)
        class_embedding = visual.class_embedding.to(patches.dtype)
        first = class_embedding + positions[0]
        if class_embedding_twice:
            first = first + class_embedding
        tokens = torch.cat([first.expand(patches.shape[0], 1, -1), patches + positions[1:]], dim=1)
        return visual.ln_pre(tokens), grid

    def run(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        *,
        before_block: BeforeBlock | None = None,
        levels: Collection[int] = (),
        masks: Mapping[int, Tensor] | None = None,
        severance: Mapping[int, float] | None = None,
        residual: Mapping[int, float] | None = None,
    ) -> ImageTokens:
        """Run all blocks.

        Args:
            tokens: from `embed`.
            grid: from `embed`.
            before_block: see `BeforeBlock`.
            levels: indices (0-based) of the blocks whose outputs are wanted.
            masks: attention mask per block index, see `blocks.block_attention`.
            severance: alpha per block index, see `blocks.block_attention`.
            residual: shortcut factor per block index, see `blocks.run_block`.
        """
        kept: dict[int, Tensor] = {}
        wanted = set(levels)
        for index, block in enumerate(self.visual.transformer.resblocks):
            context = None
            if before_block is not None:
                tokens, context = before_block(index, tokens)
            tokens = run_block(
                block,
                tokens,
                context,
                mask=None if masks is None else masks.get(index),
                severance=0.0 if severance is None else severance.get(index, 0.0),
                residual=1.0 if residual is None else residual.get(index, 1.0),
            )
            if index in wanted:
                kept[index] = tokens
        return ImageTokens(tokens, kept, grid)

    def project(self, tokens: Tensor) -> Tensor:
        """Apply CLIP's final norm and projection to each token: (B, L, W) to (B, L, D), not normalised."""
        tokens = self.visual.ln_post(tokens)
        return tokens if self.visual.proj is None else tokens @ self.visual.proj
