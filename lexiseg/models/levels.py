"""Features of several blocks: which blocks form a group, how their outputs are projected, and how a group is joined.

Cascade-CLIP (Li et al., ICML 2024), Sec. 3.3. Its Eq. 4 sums patch tokens as the blocks leave them; its code sums unit
vectors that a norm and a projection of each block made, and this file follows the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.models.mask_decoder import unit

Groups = tuple[tuple[int, ...], ...]
Aggregation = Literal["nga", "nga-fixed", "sum", "trainable-sum", "concat", "self-attention"]
LevelProjection = Literal["released", "clip", "trained"]


def parse_groups(text: str | Iterable[Iterable[int]]) -> Groups:
    """Read groups of blocks, counted from 1 as in the paper.

    Args:
        text: such as ``"{6-8},{9-11},{12}"``, or lists of numbers. A group may also name its blocks: ``"{6,8,11}"``.

    Raises:
        ValueError: it is not of that form, a group is empty, or the blocks of a group do not rise.
    """
    if isinstance(text, str):
        if not re.fullmatch(r"\s*(\{[\d\s,-]*\}\s*)(,\s*\{[\d\s,-]*\}\s*)*", text):
            raise ValueError(f"'{text}' names no groups of blocks; write them like {{6-8}},{{9-11}},{{12}}")
        groups = [_parse_group(part) for part in re.findall(r"\{([^}]*)\}", text)]
    else:
        groups = [tuple(int(block) for block in group) for group in text]
    if not groups:
        raise ValueError("there is no group of blocks; write them like {6-8},{9-11},{12}")
    for group in groups:
        if not group or group[0] < 1 or any(b <= a for a, b in pairwise(group)):
            raise ValueError(f"the group {list(group)} must hold rising block numbers, counted from 1")
    return tuple(groups)


def _parse_group(text: str) -> tuple[int, ...]:
    blocks: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if span is None:
            raise ValueError(f"'{{{text}}}' is no group of blocks; write it like {{6-8}} or {{6,7,8}}")
        first, last = int(span[1]), int(span[2] or span[1])
        if last - first >= 1000:
            raise ValueError(f"'{{{text}}}' has more blocks than any tower")
        blocks += range(first, last + 1) if first <= last else [first, last]  # a falling span is refused later
    return tuple(blocks)


def format_groups(groups: Groups) -> str:
    """Write groups as `parse_groups` reads them, with spans where blocks follow each other."""

    def write(group: tuple[int, ...]) -> str:
        if len(group) > 1 and group[-1] - group[0] == len(group) - 1:
            return f"{{{group[0]}-{group[-1]}}}"
        return "{" + ",".join(str(block) for block in group) + "}"

    return ",".join(write(group) for group in groups)


class LevelProjections(nn.Module):
    """A norm and a projection for each intermediate block: patches of width W become unit vectors of width D.

    Args:
        blocks: indices (0-based, rising) of the blocks.
        norm: CLIP's final norm.
        proj: CLIP's projection (W, D).
        start: "released": norms of weight one and random projections N(0, 1) / sqrt(W), which the released code draws
            once and never trains, so that they must come from the checkpoint. "clip" and "trained": copies of CLIP's
            final norm and projection; whether they train is the system's business.
    """

    def __init__(self, blocks: Sequence[int], norm: nn.LayerNorm, proj: Tensor, start: LevelProjection) -> None:
        super().__init__()
        width, dim = proj.shape
        self.blocks = tuple(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for _ in self.blocks)
        self.projections = nn.Parameter(torch.randn(len(self.blocks), width, dim) * width**-0.5)
        if start != "released":
            for level in self.norms:
                level.load_state_dict(norm.state_dict())
            self.projections.data.copy_(proj.detach().expand_as(self.projections))

    def forward(self, index: int, patches: Tensor) -> Tensor:
        """Unit vectors (B, N, D) of the patches (B, N, W) that the block ``blocks[index]`` left."""
        return unit(self.norms[index](patches) @ self.projections[index])


class WeightedSum(nn.Module):
    """Z = sum of w_l f_l over the blocks of a group, without dividing by anything.

    Neighborhood Gaussian aggregation (Cascade-CLIP, Eq. 4) starts from w_l = exp(-(d - l)^2 / (2 sigma^2)) for the l-th
    of d blocks: 0.135, 0.607, 1 for three. The paper prints d - l + 1 in the exponent, which would make the last weight
    0.607; its code and its Tables 16 and 17 have d - l.

    Args:
        count: d.
        sigma: width of the Gaussian in blocks; None starts from ones.
    """

    def __init__(self, count: int, sigma: float | None) -> None:
        super().__init__()
        distance = torch.arange(count - 1, -1, -1, dtype=torch.float32)
        weights = torch.ones(count) if sigma is None else torch.exp(-0.5 * (distance / sigma) ** 2)
        self.weights = nn.Parameter(weights)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Join levels (B, N, D) into one (B, N, D)."""
        weights = self.weights.to(levels[0].dtype).unbind()
        result = levels[0] * weights[0]
        for level, weight in zip(levels[1:], weights[1:], strict=True):
            result = torch.addcmul(result, level, weight)
        return result


class Concatenation(nn.Module):
    """The blocks' features side by side, mapped back to D by a linear layer (Cascade-CLIP, Table 8, "Concat").

    Args:
        count: blocks of the group.
        dim: D.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(count * dim, dim)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Join levels (B, N, D) into one (B, N, D)."""
        return self.proj(torch.cat(levels, dim=-1))


class LevelAttention(nn.Module):
    """Self-attention among a patch's features from the blocks of a group, summed (Cascade-CLIP, Table 8).

    The paper names this comparison and does not describe it. Here the d features of one patch attend to each other
    with learnt maps, and their outputs are added to them and summed.

    Args:
        dim: D.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.inputs, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Join levels (B, N, D) into one (B, N, D)."""
        x = torch.stack(levels, dim=2)
        batch, count, depth, dim = x.shape
        parts = self.inputs(x).reshape(batch * count, depth, 3, self.num_heads, dim // self.num_heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        return (x + self.out(mixed)).sum(dim=2)


def build_aggregation(kind: Aggregation, count: int, dim: int, *, sigma: float, num_heads: int) -> nn.Module:
    """Make the module that joins ``count`` levels of width ``dim``.

    A group of one block has nothing to join: its module returns the level as it is.
    """
    if count == 1:
        return nn.Identity()
    if kind == "concat":
        return Concatenation(count, dim)
    if kind == "self-attention":
        return LevelAttention(dim, num_heads)
    return WeightedSum(count, sigma if kind in ("nga", "nga-fixed") else None)


def aggregate(module: nn.Module, levels: list[Tensor]) -> Tensor:
    """Join levels (B, N, D) with a module from `build_aggregation`."""
    return levels[0] if len(levels) == 1 else cast(Tensor, module(levels))


def check_groups(groups: Groups, num_blocks: int) -> None:
    """See that a tower has the blocks.

    Raises:
        LexisegError: a block is beyond the tower's last.
    """
    beyond = max(block for group in groups for block in group)
    if beyond > num_blocks:
        raise LexisegError(
            f"The groups {format_groups(groups)} name block {beyond}, but the image tower has {num_blocks} blocks; "
            "set groups to blocks it has."
        )
