"""The image tower: an open_clip VisionTransformer's weights, run at any resolution, with prompts and levels.

Tokens are laid out ``[class, prompts ..., patches ...]``: the class token first and the h x w patches last, so that
nobody needs to know how many prompts there are to find either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from lexiseg.clip.blocks import Attention, block_attention, run_block
from lexiseg.clip.positions import Interpolation, resize_positions
from lexiseg.errors import LexisegError

# Called before block i with the tokens (B, L, W); returns the tokens that enter the block and, or None, tokens
# (B or 1, P, W) that are attended to in this block only. Deep prompts, added tables and filters all have this form.
BeforeBlock = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class ImageTokens:
    """What the blocks leave behind.

    ``tokens`` (B, L, W) of the last one, before the final norm; ``levels``, outputs of the blocks asked for by index
    (0-based); and the ``grid`` (h, w) of patches.
    """

    tokens: Tensor
    levels: dict[int, Tensor]
    grid: tuple[int, int]

    @property
    def num_patches(self) -> int:
        """Number of patch tokens, h * w."""
        return self.grid[0] * self.grid[1]


class ImageTower:
    """An open_clip VisionTransformer (``model.visual``) seen as tokens in, tokens out. Holds no weights of its own.

    A `LexisegError` says that it is no plain vision transformer.
    """

    def __init__(self, visual: nn.Module) -> None:
        plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None and len(set(visual.patch_size)) == 1
        self.visual = cast(VisionTransformer, visual)
        if not plain or not all(isinstance(b, ResidualAttentionBlock) for b in self.visual.transformer.resblocks):
            raise LexisegError(
                f"The image tower is a {type(visual).__name__}, not an open_clip vision transformer with plain blocks "
                "and square patches, or has no patches; choose a ViT such as 'ViT-B-16/openai'."
            )

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
        self,
        images: Tensor,
        *,
        interpolation: Interpolation = "bilinear",
        by_count: bool = False,
        added: Tensor | None = None,
        class_embedding_twice: bool = False,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Turn normalised images (B, 3, H, W) into tokens (B, 1 + h * w, W) for the first block, and the grid (h, w).

        Args:
            images: H and W multiples of the patch size, else a `LexisegError`; any aspect.
            interpolation: how the position table is resized to the grid, see `resize_positions`.
            by_count: see `resize_positions`.
            added: (1 + h * w, W), added to the tokens together with the positions, before the first norm.
            class_embedding_twice: let 2 e + p_0 enter, as in the released ZegCLIP code and its checkpoints; not in
                CLIP's.
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
        table, source = visual.positional_embedding, tuple(visual.grid_size)
        positions = resize_positions(table, grid, source, interpolation, by_count=by_count)
        positions = (positions if added is None else positions + added).to(patches.dtype)
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
        attention: Mapping[int, Attention] | None = None,
        residual: Mapping[int, float] | None = None,
        first: int = 0,
        stop: int | None = None,
    ) -> ImageTokens:
        """Run all blocks on tokens (B, L, W), or those from ``first`` up to and without ``stop``.

        ``before_block`` is called before each, see `BeforeBlock`; ``levels`` are the blocks whose outputs are wanted;
        ``attention`` (what mixes the tokens) and ``residual`` (a factor on the shortcut around it) replace CLIP's, by
        block.
        """
        kept: dict[int, Tensor] = {}
        attention, residual = attention or {}, residual or {}
        blocks = self.visual.transformer.resblocks
        for index in range(first, len(blocks) if stop is None else stop):
            context = None
            if before_block is not None:
                tokens, context = before_block(index, tokens)
            mixing = attention.get(index, block_attention)
            tokens = run_block(blocks[index], tokens, context, attention=mixing, residual=residual.get(index, 1.0))
            if index in levels:
                kept[index] = tokens
        return ImageTokens(tokens, kept, grid)

    def project(self, tokens: Tensor) -> Tensor:
        """Apply CLIP's final norm and projection to each token: (B, L, W) to (B, L, D), not normalised."""
        tokens = self.visual.ln_post(tokens)
        return tokens if self.visual.proj is None else tokens @ self.visual.proj
