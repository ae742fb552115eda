"""The text-image matching decoder: class queries attend to patches, and the last attention's logits are the masks."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError


class DecoderLayer(nn.Module):
    """Cross-attention from queries to patches (ZegCLIP, Sec. 3.3), residual and norm, and an FFN likewise.

    What it makes of the patches does not depend on the queries, so it is computed once for all classes (`see`). With
    ``logits_only`` only what the mask logits need is built: the last layer's output queries are used by nobody. (The
    authors' checkpoints carry those weights, untrained.) A subclass may give another attention.
    """

    def __init__(self, dim: int, num_heads: int, ffn_ratio: float, dropout: float, *, logits_only: bool) -> None:
        super().__init__()
        self.num_heads, self.logits_only = num_heads, logits_only
        if not logits_only:
            hidden = int(dim * ffn_ratio)
            self.out = nn.Linear(dim, dim)
            self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.ffn_in, self.ffn_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
            self.dropout = nn.Dropout(dropout)
        self.build_attention(dim)

    def build_attention(self, dim: int) -> None:
        """Make the maps of the attention."""
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if not self.logits_only:
            self.value = nn.Linear(dim, dim)

    def see(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """The patches (B, N, D) of a grid (h, w) and, where queries are updated, their keys and values."""
        return (patches,) if self.logits_only else (patches, self.key(patches), self.value(patches))

    def mask_logits(self, queries: Tensor, seen: tuple[Tensor, ...]) -> Tensor:
        """Mean over the heads of the scaled attention logits, (B, C, N), of queries (B, C, D).

        The sum over heads is one product of D numbers: one matrix product, and no logits per head. The map to keys goes
        to whichever side is shorter, queries or patches: q (m K)^T and (q K^T) m^T are the same.
        """
        patches = seen[0]
        scale = (queries.shape[-1] // self.num_heads) ** -0.5 / self.num_heads
        mapped = self.query(queries) * scale
        # (A graph that is made for any number of queries takes the way that suits fewer queries than patches.)
        if not torch.compiler.is_compiling() and mapped.shape[1] >= patches.shape[1]:
            return mapped @ self.key(patches).transpose(1, 2)
        return (mapped @ self.key.weight) @ patches.transpose(1, 2) + (mapped @ self.key.bias)[..., None]

    def attend(self, queries: Tensor, seen: tuple[Tensor, ...], dropout: float) -> Tensor:
        """What queries (B, C, D) get from the patches, before the output map."""
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (self.query(queries), *seen[1:])
        )
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)

    def forward(self, queries: Tensor, seen: tuple[Tensor, ...]) -> Tensor:
        """Update queries (B, C, D) with what `see` made of the patches."""
        mixed = self.attend(queries, seen, self.dropout.p if self.training else 0.0)
        queries = self.norm_attention(queries + self.dropout(self.out(mixed)))
        hidden = self.ffn_out(self.dropout(F.relu(self.ffn_in(queries))))
        return self.norm_ffn(queries + self.dropout(hidden))


class MaskDecoder(nn.Module):
    """A stack of layers; the mask logits of the last one are the result (ZegCLIP, Sec. 3.3, Eq. 3 to 5).

    Queries do not see each other, so classes can be decoded in any order and in parts. A `LexisegError` says that there
    is no layer, or that the heads do not divide the width ``dim``.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

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
            self.layer_class(dim, num_heads, ffn_ratio, dropout, logits_only=index == num_layers - 1)
            for index in range(num_layers)
        )
        # Released decoders start as copies of their first layer.
        prototype = self.layers[0].state_dict()
        for layer in self.layers:
            layer.load_state_dict({key: prototype[key] for key in layer.state_dict()})

    def project_memory(self, patches: Tensor, grid: tuple[int, int]) -> list[tuple[Tensor, ...]]:
        """What each layer sees of patches (B, N, D) on a grid (h, w), once for all classes."""
        return [cast(DecoderLayer, layer).see(patches, grid) for layer in self.layers]

    def forward(self, queries: Tensor, memory: list[tuple[Tensor, ...]]) -> Tensor:
        """Mask logits (B, C, N) of class queries (B, C, D) over the patches of a memory from `project_memory`."""
        *inner, last = (cast(DecoderLayer, layer) for layer in self.layers)
        for layer, seen in zip(inner, memory[:-1], strict=True):
            queries = layer(queries, seen)
        return last.mask_logits(queries, memory[-1])


def unit(x: Tensor) -> Tensor:
    """Divide by the length along the last axis, without an epsilon, as the authors' code does."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
