"""DeOP's two kinds of visual prompts: tables added to the tokens, and tokens put behind the class token."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lexiseg.clip.positions import resize_positions
from lexiseg.clip.tower import BeforeBlock


class AddedTables(nn.Module):
    """Learnt tables added to the tokens, class token included: one at the input and one at each of several ``blocks``.

    DeOP's prompts of the kind "adding" (released option LEARN_POSITION). The table at the input joins CLIP's position
    table before the first norm; that of a block is added where the tokens enter the block, so it stays in the residual
    stream. Tables of ``side`` patches a side (DeOP: 24, for 384 pixels) are resized to the patch grid bicubically
    (align_corners False, row 0 copied), unless their number of rows is right already: the released code looks at the
    number only, not at the shape of the grid.
    """

    def __init__(self, width: int, blocks: Collection[int], side: int = 24) -> None:
        super().__init__()

        def table() -> nn.Parameter:
            # The released initial values: a normal distribution with deviation W^-0.5, not zero.
            return nn.Parameter(torch.randn(1 + side**2, width) * width**-0.5)

        self.table = table()
        self.block_tables = nn.ParameterDict({str(index): table() for index in blocks})

    def at_input(self, grid: tuple[int, int]) -> Tensor:
        """The input's table for a patch grid (h, w): (1 + h * w, W), what `ImageTower.embed` takes as ``added``."""
        return resize_positions(self.table, grid, interpolation="bicubic", by_count=True)

    def hook(self, grid: tuple[int, int]) -> BeforeBlock:
        """Make the function that adds the blocks' tables in an image tower run on the patch grid (h, w)."""

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            if str(index) in self.block_tables:
                table = self.block_tables[str(index)]
                tokens = tokens + resize_positions(table, grid, interpolation="bicubic", by_count=True).to(tokens.dtype)
            return tokens, None

        return before_block


class PrependedPrompts(nn.Module):
    """Learnt tokens behind the class token, fresh ones at each listed block (deep visual prompt tuning).

    DeOP's prompts of the kind "prepending" (released option LEARN_TOKEN). Before a listed block its prompts take the
    place of the previous block's if that was listed as well, and are inserted otherwise; behind the last listed block
    they go on as tokens. A severed block drops them. They have no positions.
    """

    def __init__(self, num: int, width: int, patch_size: int, blocks: Collection[int], dropout: float = 0.1) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        bound = math.sqrt(6.0 / (3 * patch_size**2 + width))
        self.embeddings = nn.Parameter(torch.empty(len(self.blocks), num, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def hook(self, num_patches: int, severed: Collection[int] = ()) -> BeforeBlock:
        """Make the function that puts the prompts into an image tower; the ``severed`` blocks drop all of them."""
        prompts = dict(zip(self.blocks, self.dropout(self.embeddings), strict=True))

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            prompt = None if index in severed else prompts.get(index)
            if index in severed or (prompt is not None and index - 1 in prompts):
                tokens = torch.cat([tokens[:, :1], tokens[:, -num_patches:]], dim=1)
            if prompt is not None:
                tokens = torch.cat([tokens[:, :1], prompt.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)
            return tokens, None

        return before_block
