"""The spectral guided decoder of SPT-SEG: patches are split into high and low frequencies before queries meet them.

It takes the place of the cross-attention in `lexiseg.models.mask_decoder`. What a layer makes of the patches does not
depend on the queries, so it is computed once for all classes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.models.mask_decoder import PICTURE_SHARE, DecoderTrace, compare_picture, copy_first_layer, pass_text

_HEADS = 8  # fixed in the authors' code, whatever the number of attention heads elsewhere
_WINDOW = 3
# The "matching" start: how sharply patches attend to patches like them, and the constant part along one direction.
_SHARPNESS = 100.0
_CONSTANT = 2.0


class SpectralGuide(nn.Module):
    """High and low frequencies of the patches, gated by a learnt prompt: z of patches m.

    One of eight heads attends within windows of 3 x 3 patches (high frequencies); seven attend from every patch to the
    3 x 3 averages of the map (low frequencies). The map is padded with zeros to whole windows, and the zeros take part
    in both, as in the authors' code.

    Args:
        dim: D of the patches.

    Raises:
        LexisegError: eight heads do not divide D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % _HEADS:
            raise LexisegError(
                f"The spectral guided decoder has {_HEADS} heads, which do not divide the width {dim}; "
                "take a CLIP with another embedding."
            )
        self.head_dim = dim // _HEADS
        low = dim - self.head_dim
        self.low_query = nn.Linear(dim, low, bias=False)
        self.low_key_value = nn.Linear(dim, 2 * low, bias=False)
        self.low_out = nn.Linear(low, low)
        self.high = nn.Linear(dim, 3 * self.head_dim, bias=False)
        self.prompt = nn.Parameter(torch.randn(dim))
        self.transform = nn.Parameter(torch.eye(dim))

    def forward(self, memory: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return z (B, N, D) of patches (B, N, D) of a grid (h, w).

        Where z points away from the prompt it is zero: all classes then have the logit 0 there.
        """
        z = torch.cat([self._high(memory, grid), self._low(memory, grid)], dim=-1)
        gate = (F.normalize(z, dim=-1, eps=1e-12) @ F.normalize(self.prompt, dim=0, eps=1e-12)).clamp(0.0, 1.0)
        return (z * gate[..., None]) @ self.transform

    def _windows(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, E) to (B, rows of windows, 3, columns of windows, 3, E), padded with zeros at the right and below."""
        height, width = grid
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, -width % _WINDOW, 0, -height % _WINDOW))
        return x.unflatten(2, (-1, _WINDOW)).unflatten(1, (-1, _WINDOW))

    def _high(self, memory: Tensor, grid: tuple[int, int]) -> Tensor:
        # Without a bias the maps of padding are zero: padding after the map is the same, and less work.
        windows = self._windows(self.high(memory), grid).transpose(2, 3)
        batch, rows, columns = windows.shape[:3]
        query, key, value = windows.reshape(batch * rows * columns, _WINDOW**2, -1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.reshape(batch, rows, columns, _WINDOW, _WINDOW, -1).transpose(2, 3)
        return mixed.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)

    def _low(self, memory: Tensor, grid: tuple[int, int]) -> Tensor:
        pooled = self._windows(memory, grid).mean(dim=(2, 4)).flatten(1, 2)
        key, value = self.low_key_value(pooled).chunk(2, dim=-1)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(split(self.low_query(memory)), split(key), split(value))
        return self.low_out(mixed.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def start_as_identity(self, basis: Tensor) -> None:
        """Set the weights so that z is about the patches, smoothed where they are alike, plus a constant.

        The directions along which patches differ most go to the high frequencies and tell everywhere which patches are
        alike; the constant lies along the last direction, where the prompt looks, so that the gate is open.

        Args:
            basis: see `SpectralDecoder.start_as_matching`.
        """
        size = self.head_dim
        scale = (_SHARPNESS * size**0.5) ** 0.5
        top, low = basis[:size], basis[size:]
        self.high.weight.copy_(torch.cat([scale * top, scale * top, top]))
        self.low_query.weight.copy_(scale * top.repeat(_HEADS - 1, 1))
        self.low_key_value.weight.copy_(torch.cat([scale * top.repeat(_HEADS - 1, 1), low]))
        nn.init.eye_(self.low_out.weight)
        nn.init.zeros_(self.low_out.bias)
        self.low_out.bias[-1] = _CONSTANT
        nn.init.zeros_(self.prompt)
        self.prompt[-1] = 1.0
        self.transform.copy_(basis)


class SpectralLayer(nn.Module):
    """Queries attend to z, with a feed-forward part, post-norm; see `SpectralGuide`.

    Args:
        dim: D of queries and patches.
        ffn_ratio: hidden width of the feed-forward part over D.
        dropout: on the attention, its output, and in the feed-forward part.
        logits_only: build only what the mask logits need, for the last layer.
    """

    def __init__(self, dim: int, ffn_ratio: float, dropout: float, *, logits_only: bool) -> None:
        super().__init__()
        self.logits_only = logits_only
        self.guide = SpectralGuide(dim)
        if not logits_only:
            hidden = int(dim * ffn_ratio)
            self.out = nn.Linear(dim, dim)
            self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.ffn_in, self.ffn_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
            self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, z: Tensor) -> Tensor:
        """Update queries (B, C, D): one head, no scale and no maps of queries and keys."""
        rate = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, z, z, dropout_p=rate, scale=1.0)
        queries = self.norm_attention(queries + self.dropout(self.out(mixed)))
        hidden = self.ffn_out(self.dropout(F.relu(self.ffn_in(queries))))
        return self.norm_ffn(queries + self.dropout(hidden))


class SpectralDecoder(nn.Module):
    """A stack of `SpectralLayer`; the products of its last layer's queries and z are the mask logits.

    Args:
        dim: D.
        num_layers: layers.
        ffn_ratio: see `SpectralLayer`.
        dropout: see `SpectralLayer`.

    Raises:
        LexisegError: D does not divide, or there is no layer.
    """

    def __init__(self, dim: int, num_layers: int = 3, ffn_ratio: float = 4.0, dropout: float = 0.1) -> None:
        super().__init__()
        if num_layers < 1:
            raise LexisegError("A spectral guided decoder of no layers cannot be built; take at least one layer.")
        self.layers = nn.ModuleList(
            SpectralLayer(dim, ffn_ratio, dropout, logits_only=index == num_layers - 1) for index in range(num_layers)
        )
        copy_first_layer(self.layers)

    def _stack(self) -> list[SpectralLayer]:
        return cast("list[SpectralLayer]", list(self.layers))

    @torch.no_grad()
    def start_as_matching(
        self, query_proj: nn.Linear, gain: float, offset: float, basis: Tensor, *, silent: bool = False
    ) -> None:
        """Set the weights so that the mask logits are those of queries and patches compared directly.

        See `MaskDecoder.start_as_matching`; the last but one layer's norm gives the gain, and a bias of the queries
        against the constant part of z the offset.

        Raises:
            LexisegError: the decoder has one layer, and so no norm.
        """
        *inner, last = self._stack()
        if not inner:
            raise LexisegError("start 'matching' needs a spectral guided decoder of two layers at least.")
        for layer in inner:
            layer.guide.start_as_identity(basis)
            for linear in (layer.out, layer.ffn_out):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        last.guide.start_as_identity(basis)
        # Queries are the text without its part along the constant of z, which would differ from class to class, and as
        # long as after a norm: the layers' first updates, alike for all classes, must not drown them.
        pass_text(query_proj)
        query_proj.weight[:, -len(basis) :] -= torch.outer(basis[-1], basis[-1])
        query_proj.weight.mul_(len(basis) ** 0.5)
        compare_picture(query_proj, basis[-1], PICTURE_SHARE / _CONSTANT)
        norm = inner[-1].norm_ffn
        nn.init.constant_(norm.weight, gain / basis.shape[0] ** 0.5)  # a norm leaves vectors of the length sqrt(D)
        norm.bias.copy_(-offset / _CONSTANT * basis[-1])
        if silent:
            nn.init.zeros_(norm.bias)
            nn.init.zeros_(last.guide.transform)

    def project_memory(self, memory: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Each layer's z (B, N, D) of patches (B, N, D) of a grid (h, w), once for all classes."""
        return [layer.guide(memory, grid) for layer in self._stack()]

    def forward(self, queries: Tensor, memory: list[Tensor], trace: list[DecoderTrace] | None = None) -> Tensor:
        """Mask logits (B, C, N) of class queries (B, C, D) over patches; see `MaskDecoder.forward`."""
        logits = queries.new_empty(0)
        for layer, z in zip(self._stack(), memory, strict=True):
            if layer.logits_only or trace is not None:
                logits = queries @ z.transpose(1, 2)
            if not layer.logits_only:
                queries = layer(queries, z)
            if trace is not None:
                trace.append(DecoderTrace(None if layer.logits_only else queries, logits))
        return logits
