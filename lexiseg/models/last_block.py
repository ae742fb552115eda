"""The training-free methods' replacements for the last block's token mixing, softmax(q k^T) v.

All of it works on queries, keys and values (B, heads, T, d) of any tower, patches last among the tokens, and builds no
attention matrix unless a method is defined by one. Sources: MaskCLIP (Zhou et al., ECCV 2022), SCLIP (Wang et al.,
ECCV 2024), ClearCLIP (Lan et al., ECCV 2024), NACLIP (Hajimiri et al., WACV 2025), ProxyCLIP (Lan et al., ECCV 2024),
ResCLIP (Yang et al., CVPR 2025), GEM (Bousselham et al., CVPR 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.patch_tower import Block, Grid, QueriesKeys

Mixing = Literal["qk", "value", "qq", "kk", "qq+kk", "kk+neighbours", "neighbours"]

_PAIRS = {"qk": (("q", "k"),), "qq": (("q", "q"),), "kk": (("k", "k"),), "qq+kk": (("q", "q"), ("k", "k"))}


@lru_cache(maxsize=16)
def _neighbourhood(grid: Grid, std: float, num_prefix: int) -> Tensor:
    rows = torch.arange(grid[0])[:, None].expand(grid).flatten()
    columns = torch.arange(grid[1]).expand(grid).flatten()
    squares = (rows[:, None] - rows).square() + (columns[:, None] - columns).square()
    return F.pad((-squares / (2 * std**2)).exp(), (num_prefix, 0, num_prefix, 0))


def neighbourhood(grid: Grid, std: float, num_prefix: int = 1) -> Tensor:
    """NACLIP's Gaussian of the distance between patches: (T, T), 1 at a patch itself, 0 for the prefix tokens.

    Args:
        grid: (h, w) patches.
        std: standard deviation in patches.
        num_prefix: tokens before the patches; T is that and h * w.
    """
    made = _neighbourhood.__wrapped__ if torch.compiler.is_compiling() else _neighbourhood
    return made(grid, float(std), num_prefix)


@dataclass(frozen=True)
class Feedback:
    """What ResCLIP adds to the token mixing.

    Attributes:
        middle: queries and keys of the middle blocks, whose mean attention R is mixed in; empty for none.
        middle_weights: (tau, lambda): the weights become tau * ((1 - lambda) A + lambda R).
        labels: E (B, T, T), 1 at most, how strongly patches belong together by the labels of a first pass; None for
            none.
        label_weights: (tau, lambda): the logits become tau * ((1 - lambda) logits + lambda E).
    """

    middle: Sequence[QueriesKeys] = ()
    middle_weights: tuple[float, float] = (2.0, 0.4)
    labels: Tensor | None = None
    label_weights: tuple[float, float] = (1.8, 0.7)


def mix(
    qkv: tuple[Tensor, Tensor, Tensor],
    mixing: Mixing,
    neighbours: Tensor | None = None,
    feedback: Feedback | None = None,
) -> Tensor:
    """Mix the values of all tokens: (B, heads, T, values' width).

    Args:
        qkv: queries, keys and values (B, heads, T, d); the values may be of another width.
        mixing: ``value``: each token keeps its own value (MaskCLIP). ``qk``: CLIP's own attention. ``qq``, ``kk``: the
            softmax of queries with queries (ClearCLIP), of keys with keys. ``qq+kk``: the sum of both, whose rows sum
            to 2 (SCLIP). ``kk+neighbours``: keys with keys, and the neighbourhood added to the scaled logits (NACLIP).
            ``neighbours``: the neighbourhood alone, at the scale of the mean product of two keys' lengths.
        neighbours: (T, T) from `neighbourhood`, for the mixings that have it in their name.
        feedback: ResCLIP's additions, for the mixings with a softmax.
    """
    query, key, value = qkv
    if mixing == "value":
        return value
    scale = query.shape[-1] ** -0.5
    bias = None if neighbours is None else neighbours.to(query)
    if mixing == "neighbours":
        lengths = query.norm(dim=-1).mean(-1) * key.norm(dim=-1).mean(-1)
        logits = scale * lengths.mean(-1)[:, None, None] * bias
        return logits.softmax(dim=-1)[:, None] @ value
    feedback = feedback or Feedback()
    if feedback.labels is not None:
        tau, part = feedback.label_weights
        scale *= tau * (1 - part)
        added = (tau * part * feedback.labels).to(query)[:, None]
        bias = added if bias is None else added + bias
    parts = {"q": query, "k": key}
    attended = (
        F.scaled_dot_product_attention(parts[first], parts[second], value, attn_mask=bias, scale=scale)
        for first, second in _PAIRS[mixing.partition("+neighbours")[0]]
    )
    mixed = reduce(torch.add, attended)
    if not feedback.middle:
        return mixed
    tau, part = feedback.middle_weights
    middle = torch.stack([F.scaled_dot_product_attention(q, k, value) for q, k in feedback.middle]).mean(0)
    return tau * ((1 - part) * mixed + part * middle)


def proxy_attention(features: Tensor, beta: float, gamma: float) -> Tensor:
    """ProxyCLIP's attention (B, h * w, h * w) between places, from another encoder's features (B, C, h, w).

    With S the cosines, the weights are softmax(gamma * (S - beta * mean(S))) over the places where that is not
    negative. The mean is over each image, as in the paper (the released code's is over the batch), and a place always
    attends to the most similar one, so that a picture of a single colour has weights too.
    """
    with torch.autocast(features.device.type, enabled=False):  # the cut at zero wants the digits
        unit = F.normalize(features.float().flatten(2), dim=1, eps=1e-12)
        similarity = unit.transpose(1, 2) @ unit
    logits = gamma * (similarity - beta * similarity.mean(dim=(1, 2), keepdim=True))
    floor = logits.amax(dim=-1, keepdim=True).clamp(max=0.0)
    return logits.masked_fill_(logits < floor, -torch.inf).softmax(dim=-1)


def mix_by_proxy(value: Tensor, grid: Grid, attention: Tensor, proxy_grid: Grid) -> Tensor:
    """Interpolate the values of patches (B, heads, h * w, d) bilinearly to the proxy's grid, and mix them there.

    Returns:
        (B, heads, h2 * w2, d).
    """
    heads = value.shape[1]
    flat = value.transpose(2, 3).flatten(1, 2).unflatten(2, grid)
    if proxy_grid != grid:
        flat = F.interpolate(flat, size=proxy_grid, mode="bilinear", align_corners=False)
    mixed = attention.to(flat.dtype) @ flat.flatten(2).transpose(1, 2)
    return mixed.unflatten(2, (heads, -1)).transpose(1, 2)


def self_self(block: Block, tokens: Tensor, iterations: int, temperature: float | None) -> Tensor:
    """GEM's self-self attention of a block: keys, values and queries are each clustered, then mix the values.

    Tokens (B, T, W) enter, (B, T, W) come out of the output projection. Clustering is ``iterations`` of z = softmax(t z
    z^T) z on unit vectors; a temperature t of None is the mean length of an image's normalised tokens over the root of
    a head's width.
    """
    query, key, value = block.qkv(tokens)
    scale: Tensor | float
    if temperature is None:
        lengths = block.norm1(tokens).norm(dim=-1).mean(-1)
        scale = (lengths * query.shape[-1] ** -0.5)[:, None, None, None]
    else:
        scale = temperature
    total = torch.zeros_like(value)
    for part in (value, key, query):
        unit = F.normalize(part, dim=-1)
        for _ in range(iterations):
            unit = F.normalize(F.scaled_dot_product_attention(scale * unit, unit, unit, scale=1.0), dim=-1)
        total = total + F.scaled_dot_product_attention(scale * unit, unit, value, scale=1.0)
    return block.output(total / 3)


def label_agreement(labels: Tensor, std: float, same_entity_only: bool = True) -> Tensor:
    """ResCLIP's feedback (..., h * w, h * w), rows that sum to 1: which patches belong together, by labels (..., h, w).

    Two patches with the same label agree by 1; where another label lies on the straight line between them (unless not
    ``same_entity_only``), by exp(-distance / largest distance). The rows are smoothed with ``std`` patches along the
    flattened grid, across the ends of its rows, as released.
    """
    flat = labels.flatten(-2)
    count = flat.shape[-1]
    agree = (flat[..., None] == flat[..., None, :]).float()
    if same_entity_only and count > 1:
        agree = agree * line_weights(labels)
    length = min(count, int(6 * std) + 1)
    length += 1 - length % 2
    offsets = torch.arange(length, device=labels.device, dtype=torch.float32) - length // 2
    kernel = (-offsets.square() / (2 * std**2)).exp()
    kernel = kernel / kernel.sum()
    agree = F.conv1d(agree.reshape(-1, 1, count), kernel[None, None], padding=length // 2).view_as(agree)
    return agree / (agree.sum(dim=-1, keepdim=True) + 1e-8)


def line_weights(labels: Tensor) -> Tensor:
    """The factor of pairs of patches (..., h * w, h * w) for what lies between them, which counts for pairs that agree.

    The row of a point on the line is that of two rows and its column that of two columns, so that tables of those give
    the labels on all lines at once.
    """
    height, width = (int(side) for side in labels.shape[-2:])
    longest = max(height, width) - 1
    rows, columns = (torch.arange(side, device=labels.device) for side in (height, width))
    down, right = rows - rows[:, None], columns - columns[:, None]
    labels = labels.int()
    # All of it lies as (first row, second row, first column, second column), after what is in front.
    distance = torch.maximum(down.abs()[:, :, None, None], right.abs()[None, None]).short()
    own = labels[..., :, None, :, None]
    crossed = torch.zeros((), dtype=torch.bool, device=labels.device)
    for index in range(1, longest + 1):
        # Steps are as long as those of the longest pair, so that near pairs are checked on part of their way only.
        part = index / longest
        row, column = (rows[:, None] + down * part).round().long(), (columns[:, None] + right * part).round().long()
        met = labels[..., column.flatten()][..., row.flatten(), :].unflatten(-1, (width, width))
        met = met.unflatten(-3, (height, height))
        crossed = crossed | ((met != own) & (distance >= index))
    weights = torch.where(crossed, (-distance.float() / longest).exp(), 1.0)
    return weights.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def majority(labels: Tensor, grid: Grid) -> Tensor:
    """The most frequent label (..., h, w) in each cell of labels (..., h * a, w * b); the smallest of several."""
    cells = labels.unflatten(-1, (grid[1], -1)).unflatten(-3, (grid[0], -1)).transpose(-3, -2).flatten(-2)
    counts = (cells[..., None] == cells[..., None, :]).sum(-1)
    return cells.masked_fill(counts < counts.amax(-1, keepdim=True), torch.iinfo(cells.dtype).max).amin(-1)
