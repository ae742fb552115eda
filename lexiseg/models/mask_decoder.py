"""The text-image matching decoder: class queries attend to patches, and the last attention's logits are the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError

_KEY_BIAS = 4.0
PICTURE_SHARE = 0.25
"""Weight of a word's cosine with the whole picture beside that with a patch, where a decoder starts as matching."""


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

    def mask_logits(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Mean over the heads of the scaled attention logits, (B, C, N), of patches (B, N, D) as they are.

        The sum over heads of products of D / heads numbers each is one product of D numbers: one matrix product, and
        no logits per head. The map to keys goes to whichever side is shorter, the queries or the patches: q (m K)^T
        and (q K^T) m^T are the same.
        """
        scale = (queries.shape[-1] // self.num_heads) ** -0.5 / self.num_heads
        mapped = self.query(queries) * scale
        if mapped.shape[1] >= memory.shape[1]:
            return mapped @ self.key(memory).transpose(1, 2)
        return (mapped @ self.key.weight) @ memory.transpose(1, 2) + (mapped @ self.key.bias)[..., None]

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


@dataclass(frozen=True)
class Memory:
    """Patches as a `MaskDecoder` attends to them.

    Attributes:
        patches: (B, N, D), unmapped.
        keys: (B, N, D) for each layer but the last.
        values: likewise.
    """

    patches: Tensor
    keys: list[Tensor]
    values: list[Tensor]


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
        copy_first_layer(self.layers)

    def _stack(self) -> list[MatchingLayer]:
        return cast("list[MatchingLayer]", list(self.layers))

    @torch.no_grad()
    def start_as_matching(
        self, query_proj: nn.Linear, gain: float, offset: float, basis: Tensor, *, silent: bool = False
    ) -> None:
        """Set the weights so that the mask logits are those of queries and patches compared directly.

        Queries are the text embeddings, the layers' updates start at zero and only their norms remain, and the last
        layer's query and key maps are multiples of the identity. For unit queries and patches a logit is then about
        ``gain * cosine - offset``: the biases of queries and keys are opposite along one direction, and their product
        is the offset. Where there is a relationship descriptor, it adds the words' comparison with the whole picture.

        Args:
            query_proj: makes the queries of [t * cls, t] or t; its weights are set as well.
            gain: factor on the cosine.
            offset: what is subtracted, so that most classes start as absent.
            basis: orthonormal rows (D, D), the directions along which patches differ most first; along the last the
                biases shift all patches alike.
            silent: start with logits of zero instead, from which gradients reach the last layer's keys.
        """
        pass_text(query_proj)
        direction = basis[-1]
        for layer in self._stack():
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
            compare_picture(query_proj, direction, PICTURE_SHARE * gain / (scale * factor * length * _KEY_BIAS))
            layer.query.bias.copy_(-offset / (scale * _KEY_BIAS) * direction)
            if silent:
                for parameter in (layer.key.weight, layer.key.bias, layer.query.bias):
                    nn.init.zeros_(parameter)

    def project_memory(self, memory: Tensor, grid: tuple[int, int] | None = None) -> Memory:
        """Map patches (B, N, D) to each layer's keys and values, once for all classes; ``grid`` makes no difference."""
        inner = self._stack()[:-1]
        return Memory(memory, [layer.key(memory) for layer in inner], [layer.value(memory) for layer in inner])

    def forward(self, queries: Tensor, memory: Memory, trace: list[DecoderTrace] | None = None) -> Tensor:
        """Mask logits (B, C, N) of class queries (B, C, D) over patches.

        Args:
            queries: (B, C, D).
            memory: from `project_memory`.
            trace: a list that receives what each layer computed, for comparisons.
        """
        *inner, last = self._stack()
        for layer, keys, values in zip(inner, memory.keys, memory.values, strict=True):
            updated = layer(queries, keys, values)
            if trace is not None:
                trace.append(DecoderTrace(updated, layer.mask_logits(queries, memory.patches)))
            queries = updated
        logits = last.mask_logits(queries, memory.patches)
        if trace is not None:
            trace.append(DecoderTrace(None, logits))
        return logits


@torch.no_grad()
def compare_picture(query_proj: nn.Linear, direction: Tensor, amount: float) -> None:
    """Shift queries along ``direction`` by ``amount`` times the cosine of word and picture, the sum of t * cls.

    Without a relationship descriptor there is no t * cls, and nothing is done.
    """
    dim = query_proj.out_features
    if query_proj.in_features == 2 * dim:
        query_proj.weight[:, :dim] = amount * direction[:, None]


@torch.no_grad()
def pass_text(query_proj: nn.Linear) -> None:
    """Let queries be the text embeddings t, which come last in what ``query_proj`` maps."""
    nn.init.zeros_(query_proj.weight)
    nn.init.eye_(query_proj.weight[:, -query_proj.out_features :])
    nn.init.zeros_(query_proj.bias)


def copy_first_layer(layers: nn.ModuleList) -> None:
    """Give all layers the first one's weights, as far as they have them: released decoders start as copies."""
    prototype = layers[0].state_dict()
    for layer in layers:
        layer.load_state_dict({key: prototype[key] for key in layer.state_dict()})


def unit(x: Tensor) -> Tensor:
    """Divide by the length along the last axis, without an epsilon, as the authors' code does."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
