"""open_clip's transformers run by our own forward: a block, and the image tower at any resolution, with prompts.

The weights stay in open_clip's modules; only the order of operations is ours. So one function serves prompts that are
attended to but not updated, attention masks, and other attentions, without a copy of the tower for each system. Image
tokens are laid out ``[class, prompts ..., patches ...]``: the class token first and the h x w patches last, so that
nobody needs to know how many prompts there are to find either.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.positions import Interpolation, resize_positions
from lexiseg.errors import LexisegError
from lexiseg.matmul import linear

# What mixes the tokens of a block: the block's ``nn.MultiheadAttention``, its normalised tokens (B, L, W) and, or None,
# normalised tokens (B or 1, P, W) that are keys and values only; gives (B, L, W), after the output projection.
Attention = Callable[[nn.MultiheadAttention, Tensor, Tensor | None], Tensor]
# Called before block i with the tokens (B, L, W); returns the tokens that enter the block and, or None, tokens
# (B or 1, P, W) that are attended to in this block only. Deep prompts, added tables and filters all have this form.
BeforeBlock = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]


def block_attention(
    attention: nn.MultiheadAttention,
    x: Tensor,
    context: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Multi-head self-attention with open_clip's packed weights: normalised tokens (B, L, W) to (B, L, W), projected.

    ``context`` (B or 1, P, W) holds further normalised tokens that are keys and values only. ``mask`` is added to the
    logits, or boolean with True = may attend; broadcast to (B, heads, L, L + P). ``causal``, which goes with neither,
    lets token i attend to tokens 0..i.
    """
    width, num_heads = attention.embed_dim, attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query, key, value = linear(x, weight, bias).chunk(3, dim=-1)
    if context is not None:
        rows = F.linear(context, weight[width:], None if bias is None else bias[width:])
        more_keys, more_values = rows.expand(x.shape[0], -1, -1).chunk(2, dim=-1)
        key, value = torch.cat([key, more_keys], dim=1), torch.cat([value, more_values], dim=1)
    query, key, value = (rows.unflatten(2, (num_heads, -1)).transpose(1, 2) for rows in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return linear(mixed.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)


def token_values(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Each token's own value (B, L, W), all heads side by side: what attention mixes."""
    width, bias = attention.embed_dim, attention.in_proj_bias
    return linear(x, attention.in_proj_weight[2 * width :], None if bias is None else bias[2 * width :])


def run_block(
    block: Any, x: Tensor, context: Tensor | None = None, *, attention: Attention = block_attention, residual: float = 1
) -> Tensor:
    """Run one pre-norm residual block of an open_clip tower: tokens (B, L, W) to (B, L, W).

    ``context`` (B or 1, P, W) is attended to and has no output: prompts whose outputs would be thrown away cost no
    queries and no MLP so. ``attention`` mixes the tokens, ``residual`` is a factor on the shortcut around it.
    """
    # `lexiseg.training.engine.shard` gives a block this forward, to be called with the hooks that gather its weights.
    run = block if "forward" in vars(block) else partial(run_plain, block)
    return run(x, context, attention, residual)


def run_plain(block: Any, x: Tensor, context: Tensor | None, attention: Attention, residual: float) -> Tensor:
    """`run_block`, past the hooks of the module."""
    mixed = attention(block.attn, block.ln_1(x), None if context is None else block.ln_1(context))
    x = (x if residual == 1.0 else residual * x) + block.ls_1(mixed)
    expand, shrink = block.mlp.c_fc, block.mlp.c_proj
    hidden = block.mlp.gelu(linear(block.ln_2(x), expand.weight, expand.bias))
    return x + block.ls_2(linear(hidden, shrink.weight, shrink.bias))


@dataclass(frozen=True)
class ImageTokens:
    """What the blocks leave behind."""

    tokens: Tensor  # (B, L, W) of the last one, before the final norm
    levels: dict[int, Tensor]  # the outputs of those asked for, by index (0-based)
    grid: tuple[int, int]  # (h, w), of the patches

    @property
    def num_patches(self) -> int:
        """Number of patch tokens, h * w."""
        return self.grid[0] * self.grid[1]


def patch_grid(images: Tensor, patch: int) -> tuple[int, int]:
    """The patches a side (h, w) of images (..., H, W); sides that are no multiples of one are a `LexisegError`."""
    height, width = images.shape[-2:]
    if height % patch or width % patch or not height or not width:
        raise LexisegError(
            f"An image of {height} x {width} does not divide into {patch} x {patch} patches; "
            f"resize it to multiples of {patch}."
        )
    return height // patch, width // patch


class ImageTower:
    """An open_clip VisionTransformer (``model.visual``) seen as tokens in, tokens out. Holds no weights of its own.

    A `LexisegError` says that it is no plain vision transformer.

    Attributes:
        num_blocks: number of transformer blocks.
        width: width W of the tokens.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, visual: nn.Module) -> None:
        plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None and len(set(visual.patch_size)) == 1
        self.visual = cast(VisionTransformer, visual)
        if not plain or not all(isinstance(b, ResidualAttentionBlock) for b in self.visual.transformer.resblocks):
            raise LexisegError(
                f"The image tower is a {type(visual).__name__}, not an open_clip vision transformer with plain blocks "
                "and square patches, or has no patches; choose a ViT such as 'ViT-B-16/openai'."
            )
        self.num_blocks, self.width = len(self.visual.transformer.resblocks), int(self.visual.conv1.out_channels)
        self.patch_size = int(self.visual.patch_size[0])

    def embed(
        self,
        images: Tensor,
        *,
        interpolation: Interpolation = "bilinear",
        by_count: bool = False,
        added: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Turn normalised images (B, 3, H, W) into tokens (B, 1 + h * w, W) for the first block, and the grid (h, w).

        Args:
            images: H and W multiples of the patch size, else a `LexisegError`; any aspect.
            interpolation: how the position table is resized to the grid, see `resize_positions`.
            by_count: see `resize_positions`.
            added: (R, W), added to the first R tokens together with the positions, before the first norm.
        """
        visual, grid = self.visual, patch_grid(images, self.patch_size)
        patches = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        table, source = visual.positional_embedding, tuple(visual.grid_size)
        positions = resize_positions(table, grid, source, interpolation, by_count=by_count)
        if added is not None:
            positions = torch.cat([positions[: len(added)] + added, positions[len(added) :]])
        first = (visual.class_embedding + positions[0]).to(patches.dtype)
        patches = patches + positions[1:].to(patches.dtype)
        return visual.ln_pre(torch.cat([first.expand(patches.shape[0], 1, -1), patches], dim=1)), grid

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
        for index, block in list(enumerate(self.visual.transformer.resblocks))[first:stop]:
            tokens, context = (tokens, None) if before_block is None else before_block(index, tokens)
            mixing = attention.get(index, block_attention)
            tokens = run_block(block, tokens, context, attention=mixing, residual=residual.get(index, 1.0))
            if index in levels:
                kept[index] = tokens
        return ImageTokens(tokens, kept, grid)

    def project(self, tokens: Tensor) -> Tensor:
        """Apply CLIP's final norm and projection to each token: (B, L, W) to (B, L, D), not normalised."""
        tokens = self.visual.ln_post(tokens)
        return tokens if self.visual.proj is None else tokens @ self.visual.proj
