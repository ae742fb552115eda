"""The text-image matching decoder: class queries attend to patches, and the last attention's logits are the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError

_KEY_BIAS = 4.0


@dataclass(frozen=True)
class DecoderTrace:
    """What one decoder layer computed: its output queries (B, C, D), or None, and its mask logits (B, C, N)."""

    queries: Tensor | None
    logits: Tensor


class MatchingLayer(nn.Module):
    """Cross-attention from queries to patches with a feed-forward part, post-norm (ZegCLIP, Sec. 3.3).

    Args:
        dim: D of queries and memory.
        num_heads: attention heads.
        ffn_ratio: hidden width of the feed-forward part over D.
        dropout: on the attention, its output, and in the feed-forward part.
        logits_only: build only what the mask logits need. The last layer's output queries are used by nobody, so it
            has no value path; the authors' checkpoints carry those weights at their initial values.
    """

    def __init__(self, dim: int, num_heads: int, ffn_ratio: float, dropout: float, *, logits_only: bool) -> None:
        super().__init__()
        self.num_heads, self.logits_only = num_heads, logits_only
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if not logits_only:
            hidden = int(dim * ffn_ratio)
            self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.ffn_in, self.ffn_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
            self.dropout = nn.Dropout(dropout)

    def mask_logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Mean over the heads of the scaled attention logits, (B, C, N).

        The sum over heads of products of D / heads numbers each is one product of D numbers: one matrix product, and
        no logits per head.
        """
        scale = (queries.shape[-1] // self.num_heads) ** -0.5 / self.num_heads
        return (self.query(queries) * scale) @ keys.transpose(1, 2)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Update queries (B, C, D) with mapped keys and values (B, N, D) of the patches."""
        batch, count, dim = queries.shape

        def split(x: Tensor) -> Tensor:
            return x.reshape(batch, -1, self.num_heads, dim // self.num_heads).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            split(self.query(queries)),
            split(keys),
            split(values),
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, count, dim))
        queries = self.norm_attention(queries + self.dropout(mixed))
        hidden = self.ffn_out(self.dropout(F.relu(self.ffn_in(queries))))
        return self.norm_ffn(queries + self.dropout(hidden))


class MaskDecoder(nn.Module):
    """A stack of `MatchingLayer`; the mask logits of its last layer are the result (ZegCLIP, Sec. 3.3, Eq. 3 to 5).

    Queries do not see each other, so classes can be decoded in any order and in parts.

    Args:
        dim: D.
        num_layers: layers.
        num_heads: attention heads; must divide D.
        ffn_ratio: see `MatchingLayer`.
        dropout: see `MatchingLayer`.

    Raises:
        LexisegError: the heads do not divide D or there is no layer.
    """

    def __init__(
        self, dim: int, num_layers: int = 3, num_heads: int = 8, ffn_ratio: float = 4.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if num_layers < 1 or dim % num_heads:
            raise LexisegError(
                f"A decoder of {num_layers} layers, width {dim} and {num_heads} heads cannot be built; take at least "
                "one layer and a number of heads that divides the width."
            )
        self.layers = nn.ModuleList(
            MatchingLayer(dim, num_heads, ffn_ratio, dropout, logits_only=index == num_layers - 1)
            for index in range(num_layers)
        )
        # As released: the layers start as copies of one prototype.
        prototype = self.layers[0].state_dict()
        for layer in self.layers:
            layer.load_state_dict({key: prototype[key] for key in layer.state_dict()})

    def _stack(self) -> list[MatchingLayer]:
        return cast("list[MatchingLayer]", list(self.layers))

    @torch.no_grad()
    def start_as_matching(self, gain: float, offset: float, direction: Tensor) -> None:
        """Set the weights so that the mask logits are those of queries and patches compared directly.

        The layers' updates start at zero and only their norms remain, and the last layer's query and key maps are
        multiples of the identity. For unit queries and patches a logit is then about ``gain * cosine - offset``: the
        biases of queries and keys are opposite along one direction, and their product is the offset.

        Args:
            gain: factor on the cosine.
            offset: what is subtracted, so that most classes start as absent.
            direction: unit vector (D,) along which patches differ least, so that the biases shift all alike.
        """
        for layer in self.layers:
            if not isinstance(layer, MatchingLayer):
                continue
            if not layer.logits_only:
                for linear in (layer.out, layer.ffn_out):
                    nn.init.zeros_(linear.weight)
                    nn.init.zeros_(linear.bias)
                continue
            dim = layer.query.in_features
            scale = (dim // layer.num_heads) ** -0.5 / layer.num_heads
            length = dim**0.5 if len(self.layers) > 1 else 1.0  # a norm leaves vectors of this length
            factor = (gain / (scale * length)) ** 0.5
            for linear in (layer.query, layer.key):
                nn.init.eye_(linear.weight)
                linear.weight.mul_(factor)
            # A short bias on the keys, because its product with the queries differs from class to class.
            layer.key.bias.copy_(_KEY_BIAS * direction)
            layer.query.bias.copy_(-offset / (scale * _KEY_BIAS) * direction)

    def project_memory(self, memory: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Map patches (B, N, D) to each layer's keys and values, once for all classes."""
        return [(layer.key(memory), None if layer.logits_only else layer.value(memory)) for layer in self._stack()]

    def forward(
        self,
        queries: Tensor,
        projected: list[tuple[Tensor, Tensor | None]],
        trace: list[DecoderTrace] | None = None,
    ) -> Tensor:
        """Mask logits (B, C, N) of class queries (B, C, D) over patches.

        Args:
            queries: (B, C, D).
            projected: from `project_memory`.
            trace: a list that receives what each layer computed, for comparisons.
        """
        logits = queries.new_empty(0)
        for layer, (keys, values) in zip(self._stack(), projected, strict=True):
            last = values is None
            if last or trace is not None:
                logits = layer.mask_logits(queries, keys)
            if not last:
                queries = layer(queries, keys, values)
            if trace is not None:
                trace.append(DecoderTrace(None if last else queries, logits))
        return logits


def unit(x: Tensor) -> Tensor:
    """Divide by the length along the last axis, without an epsilon, as the authors' code does."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
