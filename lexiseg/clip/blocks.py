"""One transformer block of an open_clip tower, run by our own forward.

The weights stay in open_clip's modules; only the order of operations is ours. So one function serves prompts that are
attended to but not updated, attention masks, and other attentions, without a copy of the tower for each system.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What mixes the tokens of a block: the block's ``nn.MultiheadAttention``, its normalised tokens (B, L, W) and, or None,
# normalised tokens (B or 1, P, W) that are keys and values only; gives (B, L, W), after the output projection.
Attention = Callable[[nn.MultiheadAttention, Tensor, Tensor | None], Tensor]


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
    query, key, value = F.linear(x, weight, bias).chunk(3, dim=-1)
    if context is not None:
        rows = F.linear(context, weight[width:], None if bias is None else bias[width:])
        more_keys, more_values = rows.expand(x.shape[0], -1, -1).chunk(2, dim=-1)
        key, value = torch.cat([key, more_keys], dim=1), torch.cat([value, more_values], dim=1)
    query, key, value = (
        rows.unflatten(2, (num_heads, width // num_heads)).transpose(1, 2) for rows in (query, key, value)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


def token_values(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Each token's own value (B, L, W), all heads side by side: what attention mixes."""
    width, bias = attention.embed_dim, attention.in_proj_bias
    return F.linear(x, attention.in_proj_weight[2 * width :], None if bias is None else bias[2 * width :])


def run_block(
    block: Any,
    x: Tensor,
    context: Tensor | None = None,
    *,
    attention: Attention = block_attention,
    residual: float = 1.0,
) -> Tensor:
    """Run one pre-norm residual block of an open_clip tower: tokens (B, L, W) to (B, L, W).

    ``context`` (B or 1, P, W) is attended to and has no output: prompts whose outputs would be thrown away cost no
    queries and no MLP so. ``attention`` mixes the tokens, ``residual`` is a factor on the shortcut around it.
    """
    if "forward" in vars(block):
        tokens: Tensor = block(x, context, attention, residual)
        return tokens
    return _run(block, x, context, attention, residual)


def run_as_module(block: nn.Module) -> None:
    """Let `run_block` go through the block's ``__call__``, so that its forward hooks are called, as sharding needs."""
    block.forward = MethodType(_run, block)


def _run(block: Any, x: Tensor, context: Tensor | None, attention: Attention, residual: float) -> Tensor:
    mixed = attention(block.attn, block.ln_1(x), None if context is None else block.ln_1(context))
    x = (x if residual == 1.0 else residual * x) + block.ls_1(mixed)
    return x + block.ls_2(block.mlp(block.ln_2(x)))
