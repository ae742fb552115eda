"""Image towers of any library, block by block: what segmentation without training needs of them.

A tower turns images into tokens, runs its blocks, lets a caller replace the token mixing of a block, and says how its
patch tokens become comparable with text. Weights stay in the library's own modules; only the order of operations is
ours, so that one function serves open_clip, timm and transformers (`lexiseg.clip.library_towers`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.positions import Interpolation

Module = Callable[[Tensor], Tensor]
Grid = tuple[int, int]
QueriesKeys = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Block:
    """A pre-norm transformer block, whatever its library calls the parts."""

    heads: int  # number of attention heads
    norm1: Module  # before the attention
    project_in: Callable[[Tensor], Sequence[Tensor]]  # normalised tokens to queries, keys and values, each (B, T, W)
    project_out: Module  # the projection after the attention, with the layer scale behind it
    feed_forward: Module  # the second half, norm, MLP and layer scale, without the shortcut
    # norms of the queries and the keys (B, heads, T, d); identities in most towers
    norm_heads: tuple[Module, Module] = (nn.Identity(), nn.Identity())

    def qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, T, d) of the tokens (B, T, W) that enter the block."""
        parts = self.project_in(self.norm1(tokens))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.norm_heads[0](query), self.norm_heads[1](key), value

    def output(self, mixed: Tensor) -> Tensor:
        """Mixed values (B, heads, T, d) through the output projection: (B, T, W)."""
        return self.project_out(mixed.transpose(1, 2).flatten(2))

    def finish(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """The block's output, given the tokens that entered it and the mixed values."""
        tokens = tokens + self.output(mixed)
        return tokens + self.feed_forward(tokens)


class PatchTower(ABC):
    """An image tower as tokens in, tokens out; it holds no weights of its own.

    Tokens are laid out ``[prefix ..., patches ...]``: the class token, if there is one, and registers come first.
    """

    blocks: list[Block]  # in their order
    patch_size: int  # side of a patch in pixels
    num_prefix: int  # how many tokens stand in front of the patches
    width: int  # W, of the tokens
    positions: Interpolation  # how the tower's own library resizes its position table

    @abstractmethod
    def embed(
        self, images: Tensor, *, interpolation: Interpolation | None = None, by_count: bool = False
    ) -> tuple[Tensor, Grid]:
        """Images (B, 3, H, W), sides multiples of the patch, to the tokens that enter the first block, and the grid.

        ``interpolation`` says how the position table follows the grid, None in the tower's own way; for ``by_count``
        see `resize_positions`.
        """

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Bring each of the tokens (B, T, W) into the space of the text embeddings: (B, T, D), not normalised."""

    def run(
        self, tokens: Tensor, first: int = 0, stop: int | None = None, *, attending: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, QueriesKeys]]:
        """Run the blocks from ``first`` up to and without ``stop`` as the library does, on tokens (B, T, W).

        Returns the tokens, and the queries and keys (B, heads, T, d) of the blocks in ``attending``, by block.
        """
        kept: dict[int, QueriesKeys] = {}
        for index in range(first, len(self.blocks) if stop is None else stop):
            block = self.blocks[index]
            query, key, value = block.qkv(tokens)
            if index in attending:
                kept[index] = (query, key)
            tokens = block.finish(tokens, F.scaled_dot_product_attention(query, key, value))
        return tokens, kept

    def grid(self, images: Tensor) -> Grid:
        """The patches a side (h, w) of images, whose sides are multiples of the patch."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
