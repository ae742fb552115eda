"""The authors' form of a prompted tower: prompts are rows with outputs of their own, which are thrown away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lexiseg.models.zegclip import ZegCLIP


@contextmanager
def prompts_as_rows(model: ZegCLIP) -> Iterator[None]:
    """Inside the ``with`` block the tower of ``model`` carries its prompts along; the rest comes out the same."""
    prompts: Any = model.prompts

    def forward() -> Callable[[int, Tensor], tuple[Tensor, None]]:
        plain = type(prompts).forward(prompts)

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, None]:
            carried = index > 0 and plain(index - 1, tokens)[1] is not None
            tokens, fresh = plain(index, tokens)
            if carried:
                tokens = torch.cat([tokens[:, :1], tokens[:, 1 + prompts.num_prompts :]], dim=1)
            if fresh is not None:
                tokens = torch.cat([tokens[:, :1], fresh.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)
            return tokens, None

        return before_block

    if prompts is not None:
        prompts.forward = forward
    try:
        yield
    finally:
        if prompts is not None:
            del prompts.forward
