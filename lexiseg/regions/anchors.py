"""Classification anchor learning: which patches of a region tell its class (DeOP, Sec. 4.2).

A decoder makes a heatmap for each proposed region; the region's embedding is the sum of the patches under it. There
are two decoders, by queries and by convolution, and each exists in two forms where the released code departs from the
paper. What they share: patches (B, gh, gw, E) of unit length and masks (B, N, gh, gw) in, `Anchored` out, for any N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.regions.pooling import unit_or_zero

_CONV_CHUNK = 16


@dataclass(frozen=True)
class Anchored:
    """Regions pooled under their heatmaps.

    Attributes:
        embeddings: (B, N, E), what is compared with the text.
        pooled: (B, N, E), the sums of the patches, before any division by the length.
        heatmaps: (B, heads, N, gh, gw), the weights of the sums; one head for the convolutional decoders.
    """

    embeddings: Tensor
    pooled: Tensor
    heatmaps: Tensor

    @property
    def mean_heatmaps(self) -> Tensor:
        """(B, N, gh, gw), the heatmaps averaged over the heads: what DeOP's pictures show (Fig. 5)."""
        return self.heatmaps.mean(dim=1)


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


class QueryAnchors(nn.Module):
    """The query-based heatmap decoder (DeOP, Sec. 4.2.1), its output layer to the letter of Eq. 3.

    H = softmax(q F / sqrt(d)) * M: the queries, once more through self-attention, are multiplied with the patches as
    they are, and the heatmap of a proposal pools whole patches. The patches have unit length, as in the released code;
    the paper does not say. Query i makes the heatmap of proposal i. Queries never see the masks before the product, so
    the attention maps are made once for the Q queries; with more than Q proposals, proposal n takes query n mod Q.

    Args:
        dim: E, a multiple of 4 and of the heads, else a `LexisegError`.
        num_queries: Q, the number of proposals it is trained with.
        num_layers: K, 0 included; each costs 3.15 M parameters at E = 512.
        num_heads: heads of the attentions (released: 8).
        hidden: width of the feed-forward parts (released: 1024); None is 2 E.
        dropout: of attentions, their outputs and the feed-forward parts (released: 0.1).
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 100,
        num_layers: int = 1,
        num_heads: int = 8,
        hidden: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 4 or num_queries < 1 or num_layers < 0:
            raise LexisegError(
                f"An anchor decoder of {num_queries} queries, {num_layers} layers, {num_heads} heads and width {dim} "
                "cannot be built; its width must be a multiple of 4 and of its heads."
            )
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.layers = nn.ModuleList(
            AnchorLayer(dim, num_heads, 2 * dim if hidden is None else hidden, dropout) for _ in range(num_layers)
        )
        self.heatmap = self.output_layer(dim, num_heads, dropout)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "queries":
                nn.init.xavier_uniform_(parameter)

    def output_layer(self, dim: int, num_heads: int, dropout: float) -> OutputLayer:
        """The layer that makes the heatmaps."""
        return OutputLayer(dim, num_heads, dropout)

    def states(self, features: Tensor) -> list[Tensor]:
        """What the queries become, K + 1 tensors (B, Q, E): after each layer, and after Eq. 3's self-attention."""
        memory = features.flatten(1, 2)
        keys = memory + self.positions(features)
        queries = self.queries.expand(len(memory), -1, -1)
        state = torch.zeros_like(queries)
        found = []
        for layer in self.layers:
            state = cast(AnchorLayer, layer)(state, queries, memory, keys)
            found.append(state)
        return [*found, self.heatmap.update(state, queries)]

    def attention(self, features: Tensor) -> Tensor:
        """Attention maps (B, heads, Q, gh, gw) before the masks, distributions over the patches; one head here."""
        memory, state = features.flatten(1, 2), self.states(features)[-1]
        maps = (state @ memory.transpose(1, 2) * memory.shape[-1] ** -0.5).softmax(dim=-1)
        return maps[:, None].unflatten(-1, features.shape[1:3])

    def forward(self, features: Tensor, masks: Tensor) -> Anchored:
        """Pool N regions of features (B, gh, gw, E) of unit length under masks (B, N, gh, gw) in [0, 1]."""
        maps = self.attention(features)
        count, num_queries = masks.shape[1], maps.shape[2]
        if count != num_queries:
            maps = maps[:, :, torch.arange(count, device=maps.device) % num_queries]
        heatmaps = maps * masks[:, None].to(maps.dtype)
        values = features.flatten(1, 2).unflatten(-1, (maps.shape[1], -1)).transpose(1, 2)
        pooled = (heatmaps.flatten(3) @ values.to(maps.dtype)).transpose(1, 2).flatten(2)
        return Anchored(unit_or_zero(pooled), pooled, heatmaps)

    def positions(self, features: Tensor) -> Tensor:
        """MaskFormer's sine encoding (1, gh * gw, E) of the grid, the first half of it of the rows."""
        from transformers.models.maskformer.modeling_maskformer import MaskFormerSinePositionEmbedding

        channels = features.permute(0, 3, 1, 2)[:1]
        encode = MaskFormerSinePositionEmbedding(channels.shape[1] // 2, normalize=True)
        return encode(channels.shape, channels.device, torch.float32).flatten(2).transpose(1, 2).to(features.dtype)


class OutputLayer(nn.Module):
    """The self-attention among the queries that Eq. 3 begins with."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def update(self, state: Tensor, queries: Tensor) -> Tensor:
        """The state of the queries (B, Q, E), to which the learned ``queries`` are added where logits are made."""
        asking = state + queries
        mixed = self.self_attn(asking, asking, state, need_weights=False)[0]
        return self.norm(state + self.dropout(mixed))


class ReleasedOutputLayer(OutputLayer):
    """The output layer as released: queries ask the patches head by head, with learned projections."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout)
        # As released, with a third of rows for values that nothing reads: the papers' parameter counts include them.
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))

    def forward(self, asking: Tensor, keys: Tensor) -> Tensor:
        """Attention maps (B, heads, Q, P), each a distribution over the patches, of queries and keys (B, P, E)."""
        dim = asking.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = split(F.linear(asking, weight[:dim], bias[:dim])) * (dim // self.num_heads) ** -0.5
        key = split(F.linear(keys, weight[dim : 2 * dim], bias[dim : 2 * dim]))
        return self.dropout((query @ key.transpose(-1, -2)).softmax(dim=-1))


class ReleasedQueryAnchors(QueryAnchors):
    """The query-based heatmap decoder as released.

    Eq. 3 has eight heads with learned projections, the learned queries and sine positions are added before it, and each
    head pools its own E / 8 channels of the patches, which it takes as they are.
    """

    heatmap: ReleasedOutputLayer

    def output_layer(self, dim: int, num_heads: int, dropout: float) -> OutputLayer:
        """The layer that makes the heatmaps."""
        return ReleasedOutputLayer(dim, num_heads, dropout)

    def attention(self, features: Tensor) -> Tensor:
        """Attention maps (B, heads, Q, gh, gw) before the masks, each a distribution over the patches."""
        keys = features.flatten(1, 2) + self.positions(features)
        maps = self.heatmap(self.states(features)[-1] + self.queries, keys)
        return maps.unflatten(-1, features.shape[1:3])


class ConvAnchors(nn.Module):
    """The convolutional heatmap decoder as released: one 3 x 3 convolution of each region's masked patches.

    Neither batch norm nor ReLU, and however many layers the configuration asks for, each is the same convolution of the
    same input. The embeddings are not divided by their length. "sigmoid" is the released default; "softmax" over all
    patches is what any other setting gives. The paper's Eq. 4 is `StackedConvAnchors`.
    """

    def __init__(self, dim: int, activation: Literal["sigmoid", "softmax"] = "sigmoid") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(1, dim, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv2d starts

    def scores(self, features: Tensor, masks: Tensor) -> Tensor:
        """Convolve mask * patches, its border repeated outwards: (B, N, gh, gw).

        A mask is a scalar a patch, so each of the kernel's nine taps is applied to the patches once for all regions.
        """
        height, width = features.shape[1:3]
        taps = F.linear(features, self.weight[0].flatten(1).t().to(features.dtype)).permute(0, 3, 1, 2)
        taps = F.pad(taps, (1, 1, 1, 1), mode="replicate")
        if not masks.shape[1]:
            return masks.to(taps.dtype)
        masks = F.pad(masks.to(taps.dtype), (1, 1, 1, 1), mode="replicate")
        scores = masks.new_zeros((*masks.shape[:2], height, width))
        for tap in range(9):
            rows, columns = slice(tap // 3, tap // 3 + height), slice(tap % 3, tap % 3 + width)
            scores = scores + masks[:, :, rows, columns] * taps[:, tap, None, rows, columns]
        return scores

    def forward(self, features: Tensor, masks: Tensor) -> Anchored:
        """Pool N regions; the arguments are those of `ReleasedQueryAnchors.forward`."""
        scores = self.scores(features, masks)
        heat = scores.sigmoid() if self.activation == "sigmoid" else scores.flatten(2).softmax(-1).view_as(scores)
        pooled = heat.flatten(2) @ features.flatten(1, 2).to(heat.dtype)
        return Anchored(pooled, pooled, heat[:, None])


class StackedConvAnchors(nn.Module):
    """The convolutional heatmap decoder of the paper (DeOP, Eq. 4): K x (conv, batch norm, ReLU), conv, softmax.

    It was never released; the borders' padding and the division of the embeddings by their length follow the other
    decoders. Each region is convolved on its own: 2.4 M products a patch, layer and region at E = 512. The paper has K
    = 3 layers of 512 channels; a ``width`` of None is E.
    """

    def __init__(self, dim: int, num_layers: int = 3, width: int | None = None) -> None:
        super().__init__()
        width = width or dim
        layers: list[nn.Module] = []
        for index in range(num_layers):
            given = width if index else dim
            layers += [
                nn.Conv2d(given, width, 3, padding=1, padding_mode="replicate", bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        given = width if num_layers else dim
        self.layers = nn.Sequential(*layers, nn.Conv2d(given, 1, 3, padding=1, padding_mode="replicate"))

    def forward(self, features: Tensor, masks: Tensor) -> Anchored:
        """Pool N regions; the arguments are those of `ReleasedQueryAnchors.forward`."""
        channels = features.permute(0, 3, 1, 2)
        if not masks.shape[1]:
            scores = masks.to(features.dtype)
        elif self.training:  # batch norm looks at all regions of the batch together
            weighted = channels[:, None] * masks[:, :, None].to(channels.dtype)
            scores = self.layers(weighted.flatten(0, 1)).unflatten(0, masks.shape[:2]).squeeze(2)
        else:
            parts = [
                self.layers(image * part[:, None].to(image.dtype))[:, 0]
                for image, image_masks in zip(channels, masks, strict=True)
                for part in image_masks.split(_CONV_CHUNK)
            ]
            scores = torch.cat(parts).unflatten(0, masks.shape[:2])
        heat = scores.flatten(2).softmax(dim=-1)
        pooled = heat @ features.flatten(1, 2).to(heat.dtype)
        return Anchored(unit_or_zero(pooled), pooled, heat.view_as(scores)[:, None])
