"""One transformer block of an open_clip tower, run by our own forward.

The weights stay in open_clip's modules; only the order of operations is ours. That is what lets one function serve
prompts that are attended to but not updated, attention masks per block, and the value path of the last block, without
a copy of the tower for each system.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.severance import Severance, as_severance


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, length, width = x.shape
    return x.reshape(batch, length, num_heads, width // num_heads).transpose(1, 2)


def block_attention(
    attention: nn.MultiheadAttention,
    x: Tensor,
    context: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    severance: float | Severance = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention with open_clip's packed weights.

    Args:
        attention: the block's ``nn.MultiheadAttention`` (packed projection, batch first or not: only weights are read).
        x: normalised tokens (B, L, W): the queries, and the first L keys and values.
        context: further normalised tokens (B, P, W), or (1, P, W) for all images alike, that serve as keys and
            values only.
        mask: added to the attention logits, or boolean with True = may attend; broadcast to (B, heads, L, L + P).
        causal: token i attends to tokens 0..i only; not together with ``mask`` or ``context``.
        severance: what replaces the token mixing, see `Severance`; a number is the share alpha of the identity,
            o = alpha v + (1 - alpha) softmax(qk/sqrt(d)) v, so that 0 is ordinary attention and 1 the value path. The
            kinds that read masks, and alpha 1, do not see the ``context``.
        weights: (B, N, L), weight of each token in each region, for the kinds of severance that read masks.

    Returns:
        (B, L, W), after the output projection.

    Raises:
        LexisegError: the severance needs weights and there are none.
    """
    width, num_heads = attention.embed_dim, attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    severance = as_severance(severance)
    alpha = severance.alpha
    if severance.needs_masks or alpha == 1.0:
        value = F.linear(x, weight[2 * width :], None if bias is None else bias[2 * width :])
        return attention.out_proj(severance.mix(value, weights) if severance.needs_masks else value)
    query, key, value = F.linear(x, weight, bias).chunk(3, dim=-1)
    own_value = value
    if context is not None:
        rows = F.linear(context, weight[width:], None if bias is None else bias[width:])
        more_keys, more_values = rows.expand(len(x), -1, -1).chunk(2, dim=-1)
        key, value = torch.cat([key, more_keys], dim=1), torch.cat([value, more_values], dim=1)
    mixed = F.scaled_dot_product_attention(
        _split_heads(query, num_heads),
        _split_heads(key, num_heads),
        _split_heads(value, num_heads),
        attn_mask=mask,
        is_causal=causal,
    )
    mixed = mixed.transpose(1, 2).reshape(x.shape)
    if alpha:
        mixed = alpha * own_value + (1.0 - alpha) * mixed
    return attention.out_proj(mixed)


def run_block(
    block: Any,
    x: Tensor,
    context: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    severance: float | Severance = 0.0,
    weights: Tensor | None = None,
    residual: float = 1.0,
) -> Tensor:
    """Run one pre-norm residual block of an open_clip tower.

    Args:
        block: an open_clip ``ResidualAttentionBlock``.
        x: tokens (B, L, W).
        context: tokens (B, P, W) or (1, P, W) that are attended to but have no output of their own. Prompts whose
            outputs are thrown away are given here: their queries and their MLP would be dead computation.
        mask: see `block_attention`.
        causal: see `block_attention`.
        severance: see `block_attention`.
        weights: see `block_attention`.
        residual: factor on the shortcut around the attention; 1 everywhere but in DeOP's plain encoder, whose severed
            last block uses 0.2.

    Returns:
        tokens (B, L, W).
    """
    run = block if "forward" in vars(block) else partial(_run, block)
    tokens: Tensor = run(x, context, mask=mask, causal=causal, severance=severance, weights=weights, residual=residual)
    return tokens


def run_as_module(block: nn.Module) -> None:
    """Let `run_block` go through the block's ``__call__``, so that its forward hooks are called, as sharding needs."""
    block.forward = MethodType(_run, block)


def _run(
    block: Any,
    x: Tensor,
    context: Tensor | None,
    *,
    mask: Tensor | None,
    causal: bool,
    severance: float | Severance,
    weights: Tensor | None,
    residual: float,
) -> Tensor:
    normalised = block.ln_1(x)
    if context is not None:
        context = block.ln_1(context)
    mixed = block_attention(
        block.attn, normalised, context, mask=mask, causal=causal, severance=severance, weights=weights
    )
    x = (x if residual == 1.0 else residual * x) + block.ls_1(mixed)
    return x + block.ls_2(block.mlp(block.ln_2(x)))
