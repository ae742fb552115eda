"""Classification anchor learning: which patches of a region tell its class (DeOP, Sec. 4.2).

A decoder makes a heatmap for each proposed region; the region's embedding is the sum of the patches under it (`pool`).
It takes patches (B, gh, gw, E) of unit length and masks (B, N, gh, gw) in [0, 1], for any N, and gives heatmaps (B,
heads, N, gh, gw). This one does so by queries, the paper's choice; its released form, and those by convolution, are in
`lexiseg.models.deop_ablations`.
"""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError


def pool(features: Tensor, heatmaps: Tensor) -> Tensor:
    """Sum the patches (B, gh, gw, E) under heatmaps (B, heads, N, gh, gw), each head its own E / heads channels.

    The result (B, N, E) is not normalised. With the masks as heatmaps of one head this is the classification stream of
    DeOP's baseline (Sec. 3.1, after OpenSeg).
    """
    values = features.flatten(1, 2).unflatten(-1, (heatmaps.shape[1], -1)).transpose(1, 2)
    return (heatmaps.flatten(3) @ values.to(heatmaps.dtype)).transpose(1, 2).flatten(2)


class AnchorLayer(nn.Module):
    """A transformer decoder layer, post-norm: self-attention among queries, attention to patches, feed-forward part."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.ffn_in, self.ffn_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm_self, self.norm_cross, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor, queries: Tensor, memory: Tensor, keys: Tensor) -> Tensor:
        """Update (B, Q, E); queries are added where logits are made, and ``keys`` are ``memory`` with positions."""
        asking = state + queries
        mixed = self.self_attn(asking, asking, state, need_weights=False)[0]
        state = self.norm_self(state + self.dropout(mixed))
        mixed = self.cross_attn(state + queries, keys, memory, need_weights=False)[0]
        state = self.norm_cross(state + self.dropout(mixed))
        hidden = self.ffn_out(self.dropout(F.relu(self.ffn_in(state))))
        return self.norm_ffn(state + self.dropout(hidden))


class OutputLayer(nn.Module):
    """The self-attention among the queries that Eq. 3 begins with."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor, queries: Tensor) -> Tensor:
        """The state of the queries (B, Q, E), to which the learned ``queries`` are added where logits are made."""
        asking = state + queries
        mixed = self.self_attn(asking, asking, state, need_weights=False)[0]
        return cast(Tensor, self.norm(state + self.dropout(mixed)))


class QueryAnchors(nn.Module):
    """The query-based heatmap decoder (DeOP, Sec. 4.2.1) to the letter of Eq. 3.

    H = softmax(q F / sqrt(d)) * M: the queries, once more through self-attention, are multiplied with the patches as
    they are, and the heatmap of a proposal pools whole patches. The patches have unit length, as in the released code;
    the paper does not say. Query i makes the heatmap of proposal i. Queries never see the masks before the product, so
    the attention maps are made once for the Q queries; with more than Q proposals, proposal n takes query n mod Q.

    ``dim`` is E, a multiple of 4 and of the heads, else a `LexisegError`. A layer costs 3.15 M parameters at E = 512.
    The other arguments are options of `lexiseg.models.deop.DeOPOptions`.
    """

    output_layer: ClassVar[type[OutputLayer]] = OutputLayer

    def __init__(
        self, dim: int, num_queries: int, num_layers: int, num_heads: int, hidden: int | None, dropout: float
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 4:
            raise LexisegError(
                f"An anchor decoder of {num_heads} heads and width {dim} cannot be built; its width must be a multiple "
                "of 4 and of its heads."
            )
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.layers = nn.ModuleList(AnchorLayer(dim, num_heads, hidden or 2 * dim, dropout) for _ in range(num_layers))
        self.heatmap = self.output_layer(dim, num_heads, dropout)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "queries":
                nn.init.xavier_uniform_(parameter)

    def decoded(self, features: Tensor) -> Tensor:
        """What the queries become, (B, Q, E): of the patches by each layer, and by Eq. 3's self-attention."""
        memory = features.flatten(1, 2)
        keys = memory + self.positions(features)
        queries = self.queries.expand(len(memory), -1, -1)
        state = torch.zeros_like(queries)
        for layer in self.layers:
            state = layer(state, queries, memory, keys)
        return cast(Tensor, self.heatmap(state, queries))

    def attention(self, features: Tensor) -> Tensor:
        """Attention maps (B, 1, Q, gh, gw) before the masks, distributions over the patches."""
        query, key = self.decoded(features)[:, None], features.flatten(1, 2)[:, None]
        maps = (query @ key.transpose(-1, -2) * features.shape[-1] ** -0.5).softmax(dim=-1)
        return maps.unflatten(-1, features.shape[1:3])

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Heatmaps (B, heads, N, gh, gw) of regions, see the module."""
        maps, count = self.attention(features), masks.shape[1]
        if count != len(self.queries):
            maps = maps[:, :, torch.arange(count, device=maps.device) % len(self.queries)]
        return maps * masks[:, None].to(maps.dtype)

    def positions(self, features: Tensor) -> Tensor:
        """MaskFormer's sine encoding (1, gh * gw, E) of the grid, the first half of it of the rows."""
        from transformers.models.maskformer.modeling_maskformer import MaskFormerSinePositionEmbedding

        channels = features.permute(0, 3, 1, 2)[:1]
        encode = MaskFormerSinePositionEmbedding(channels.shape[1] // 2, normalize=True)
        return encode(channels.shape, channels.device, torch.float32).flatten(2).transpose(1, 2).to(features.dtype)
