"""DeOP's two kinds of visual prompts: tables added to the tokens, and tokens put behind the class token."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lexiseg.clip.positions import resize_positions
from lexiseg.clip.tower import BeforeBlock
from lexiseg.errors import LexisegError


def _check_blocks(blocks: Sequence[int], num_blocks: int, what: str) -> tuple[int, ...]:
    wrong = [index for index in blocks if not 0 <= index < num_blocks]
    if wrong or len(set(blocks)) != len(blocks):
        raise LexisegError(
            f"{what} are asked for at the blocks {list(blocks)}; list each block once, from 0 to {num_blocks - 1}."
        )
    return tuple(blocks)


class AddedTables(nn.Module):
    """Learnt tables added to the tokens, class token included: one at the input and one at each of several ``blocks``.

    DeOP's prompts of the kind "adding" (released option LEARN_POSITION). The table at the input joins CLIP's position
    table before the first norm; that of a block is added where the tokens enter the block, so it stays in the residual
    stream. Tables of ``side`` patches a side (DeOP: 24, for 384 pixels) are resized to the patch grid bicubically
    (align_corners False, row 0 copied), unless their number of rows is right already: the released code looks at the
    number only, not at the shape of the grid.
    """

    def __init__(
        self, width: int, num_blocks: int, blocks: Sequence[int] = (), *, side: int = 24, block_side: int | None = None
    ) -> None:
        super().__init__()
        block_side = side if block_side is None else block_side
        if side < 1 or block_side < 1:
            raise LexisegError(f"An added table of {min(side, block_side)} patches a side is empty; take at least 1.")
        self.blocks = _check_blocks(blocks, num_blocks, "Added tables")
        # The released initial values: a normal distribution with deviation W^-0.5, not zero.
        self.table = nn.Parameter(torch.randn(1 + side**2, width) * width**-0.5)
        self.block_tables = nn.ParameterDict(
            {str(index): nn.Parameter(torch.randn(1 + block_side**2, width) * width**-0.5) for index in self.blocks}
        )

    def at_input(self, grid: tuple[int, int]) -> Tensor:
        """The input's table for a patch grid (h, w): (1 + h * w, W), what `ImageTower.embed` takes as ``added``."""
        return resize_positions(self.table, grid, interpolation="bicubic", by_count=True)

    def hook(self, grid: tuple[int, int]) -> BeforeBlock:
        """Make the function that adds the blocks' tables in an image tower run on the patch grid (h, w)."""

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            if index in self.blocks:
                table = self.block_tables[str(index)]
                tokens = tokens + resize_positions(table, grid, interpolation="bicubic", by_count=True).to(tokens.dtype)
            return tokens, None

        return before_block


class PrependedPrompts(nn.Module):
    """Learnt tokens behind the class token, fresh ones at each listed block (deep visual prompt tuning).

    DeOP's prompts of the kind "prepending" (released option LEARN_TOKEN). Before a listed block its prompts take the
    place of the previous block's if that was listed as well, and are inserted otherwise; behind the last listed block
    they go on as tokens. A severed block drops them. They have no positions. Where the next block drops or replaces
    them, they are given to the block as keys and values only, which changes nothing else.
    """

    def __init__(
        self,
        num_prompts: int,
        width: int,
        num_blocks: int,
        patch_size: int,
        blocks: Sequence[int],
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_prompts < 1:
            raise LexisegError(f"{num_prompts} prompts a block were asked for; take at least one.")
        self.blocks = _check_blocks(blocks, num_blocks, "Prompts")
        self.num_blocks = num_blocks
        bound = math.sqrt(6.0 / (3 * patch_size**2 + width))
        self.embeddings = nn.Parameter(torch.empty(len(self.blocks), num_prompts, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def hook(self, num_patches: int, *, severed: Collection[int] = (), keep_rows: bool = False) -> BeforeBlock:
        """Make the function that puts the prompts into an image tower; the ``severed`` blocks drop all of them.

        With ``keep_rows`` they are rows of their own everywhere, as in the authors' code, so that the blocks' full
        outputs can be compared. The class token and the patches come out the same.
        """
        prompts = dict(zip(self.blocks, self.dropout(self.embeddings), strict=True))

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            prompt = None if index in severed else prompts.get(index)
            drop = index in severed or (prompt is not None and index - 1 in prompts)
            if drop and tokens.shape[1] > 1 + num_patches:
                tokens = torch.cat([tokens[:, :1], tokens[:, -num_patches:]], dim=1)
            if prompt is None:
                return tokens, None
            following = index + 1
            dead = following == self.num_blocks or following in prompts or following in severed
            if dead and not keep_rows:
                return tokens, prompt[None]
            rows = prompt.expand(len(tokens), -1, -1)
            return torch.cat([tokens[:, :1], rows, tokens[:, 1:]], dim=1), None

        return before_block
