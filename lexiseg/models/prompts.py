"""Visual prompts: learnt tokens put between the class token and the patches (ZegCLIP, Sec. 3.2: deep prompt tuning)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lexiseg.clip.image import BeforeBlock
from lexiseg.errors import LexisegError


class VisualPrompts(nn.Module):
    """P prompts for each of several blocks, with one linear map shared by all.

    Args:
        num_prompts: P, prompts a block.
        width: W of the tower.
        num_blocks: blocks of the tower.
        patch_size: side of a patch; it sets the range of the initial values.
        depth: n > 0, "deep": fresh prompts enter blocks 0 to n, their outputs are thrown away each time, and later
            blocks have none. n = 0, "shallow": prompts enter block 0 and pass through all blocks. n < 0, "reverse":
            fresh prompts enter the last |n| blocks only. (ZegCLIP, appendix B, compares the three.)
        dropout: on the mapped prompts.

    Raises:
        LexisegError: ``depth`` does not fit the number of blocks, or there are no prompts.
    """

    def __init__(
        self, num_prompts: int, width: int, num_blocks: int, patch_size: int, depth: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if num_prompts < 1 or not -num_blocks <= depth < num_blocks:
            raise LexisegError(
                f"{num_prompts} prompts at depth {depth} do not fit a tower of {num_blocks} blocks; "
                f"take at least one prompt and a depth from {-num_blocks} to {num_blocks - 1}."
            )
        self.num_prompts, self.num_blocks, self.depth = num_prompts, num_blocks, depth
        self.embeddings = nn.Parameter(torch.empty(1, num_prompts, width)) if depth >= 0 else None
        self.deep_embeddings = nn.Parameter(torch.empty(abs(depth), num_prompts, width)) if depth else None
        self.proj = nn.Linear(width, width)
        # The released code makes this norm in shallow mode too but does not apply it there.
        self.norm = nn.LayerNorm(width, eps=1e-6) if depth else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        bound = math.sqrt(6.0 / (3 * patch_size**2 + width))
        for embeddings in (self.embeddings, self.deep_embeddings):
            if embeddings is not None:
                nn.init.uniform_(embeddings, -bound, bound)
        nn.init.kaiming_normal_(self.proj.weight, a=0, mode="fan_out")

    def forward(self) -> dict[int, Tensor]:
        """Return the prompts (1, P, W) that enter each block, by block index, mapped and after dropout.

        One mask of dropout serves the whole batch, so that prompts are the same for all images and their keys and
        values are computed once.
        """
        tables: list[Tensor] = [table for table in (self.embeddings, self.deep_embeddings) if table is not None]
        rows = self.dropout(self.proj(torch.cat(tables)))
        first = self.num_blocks + self.depth if self.depth < 0 else 0
        return {first + index: row[None] for index, row in enumerate(rows)}

    def hook(self, num_patches: int, *, keep_rows: bool = False) -> BeforeBlock:
        """Make the function that puts the prompts into an image tower.

        Args:
            num_patches: patches of an image.
            keep_rows: in deep and reverse mode let the prompts be rows of their own, as in the authors' code, instead
                of keys and values only. The class token and the patches come out the same; it costs time and exists
                so that the blocks' full outputs can be compared.
        """
        prompts = self()

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            if not self.depth and index:
                return tokens, None
            if tokens.shape[1] > 1 + num_patches:
                tokens = torch.cat([tokens[:, :1], tokens[:, -num_patches:]], dim=1)
            prompt = prompts.get(index)
            if prompt is None:
                return tokens, None
            if self.depth and not keep_rows:
                return tokens, prompt
            rows = prompt.expand(len(tokens), -1, -1)
            return torch.cat([tokens[:, :1], rows, tokens[:, 1:]], dim=1), None

        return before_block
