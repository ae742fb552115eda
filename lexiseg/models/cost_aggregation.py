"""The cost aggregation of CAT-Seg: cosines of patches and words in, one map of logits per word out.

Cho, Shin et al., "CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation", CVPR 2024, Sec. 3.3. It knows
neither CLIP nor pictures, hence a file of its own. Modules have the names of the released checkpoints. What is the
same for all classes is computed once, and without gradients the classes are processed in parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.models.options import Count, WindowOptions

_CLASSES_AT_ONCE = 32
_ROWS_AT_ONCE = 4
_LEFT_OUT = -100.0


class AggregationOptions(WindowOptions):
    """Sizes of the aggregation; the defaults are the released models'.

    Attributes:
        templates: how many templates are kept as channels of the cost volume; with 1 any number is averaged.
        hidden_dim: width of the aggregation.
        layers: of the aggregation, each one over space and one over classes.
        heads: attention heads of both.
        attention_window: side of the windows of the spatial aggregation, in patches.
        class_attention: of the aggregation over classes; "full" is softmax attention, the paper's ablation.
        padding: vocabularies with fewer classes are padded to this number with a learned token; 0 for no padding.
        pooling: sides of the average pooling before the aggregation over classes, in training only.
        appearance_dim: width of the image guidance of the aggregation.
        text_dim: width of its text guidance.
        guidance_dims: widths of the two upsampled CLIP features.
        decoder_guidance_dims: widths to which the decoder projects them.
        decoder_dims: widths of the decoder.
        released: the released code's limits: with more classes than ``padding``, those with the largest cosine anywhere
            in the picture are kept and all others get the logit -100; of a name with commas, the first part is
            embedded.
    """

    templates: Count = 1
    hidden_dim: Count = 128
    layers: Count = 2
    heads: Count = 4
    attention_window: Count = 12
    class_attention: Literal["linear", "full"] = "linear"
    padding: Annotated[int, Field(ge=0)] = 256
    pooling: tuple[Count, Count] = (2, 2)
    appearance_dim: Count = 128
    text_dim: Count = 128
    guidance_dims: tuple[Count, Count] = (256, 128)
    decoder_guidance_dims: tuple[Count, Count] = (32, 16)
    decoder_dims: tuple[Count, Count] = (64, 32)
    released: bool = False

    @model_validator(mode="after")
    def _check_sizes(self) -> AggregationOptions:
        if self.hidden_dim % self.heads:
            raise ValueError(f"a hidden_dim of {self.hidden_dim} is not a multiple of its {self.heads} heads")
        for dim, guidance in zip((self.hidden_dim, *self.decoder_dims), self.decoder_guidance_dims, strict=False):
            if guidance >= dim:
                raise ValueError(f"a guidance of {guidance} leaves no room in a decoder of width {dim}")
        wrong = [dim for dim in self.decoder_dims if dim > 16 and dim % (dim // 16)]
        if wrong:
            raise ValueError(f"a decoder of width {wrong[0]} does not divide into groups of about 16")
        return self


def _at_once() -> bool:
    """Whether classes go through together: where gradients are taken, or a graph is made for any number of them."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _guided(linear: nn.Linear, x: Tensor, guidance: Tensor) -> Tensor:
    """A linear layer of ``[x, guidance]``, in which what is the same for all classes, or places, is computed once."""
    weight, bias = linear.weight, linear.bias
    return F.linear(x, weight[:, : x.shape[-1]]) + F.linear(guidance, weight[:, x.shape[-1] :], bias)


class _Projections(nn.Module):
    """Queries and keys of [x, guidance], values of x, and what comes behind the attention."""

    def __init__(self, dim: int, guidance: int, *, out: bool = False) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(dim + guidance, dim), nn.Linear(dim + guidance, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim) if out else nn.Identity()

    def forward(self, x: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., C)."""
        return _guided(self.q, x, guidance), _guided(self.k, x, guidance), self.v(x)


class WindowBlock(nn.Module):
    """Attention in windows of each class's map (Sec. 3.3, spatial aggregation).

    Queries and keys see an image guidance of width G. The windows of a ``shifted`` block are shifted by half a window,
    so that they overlap those of the block before.
    """

    def __init__(self, dim: int, guidance: int, heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Projections(dim, guidance, out=True)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Aggregate x (B, T, H, W, C) with the guidance (B, 1, H, W, G): (B, T, H, W, C)."""
        x = x + self.attn.proj(self._attend(*self.attn(self.norm1(x), guidance)))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, classes, height, width, dim = query.shape
        side = min(self.window, height, width)
        shift = side // 2 if self.shifted and min(height, width) > self.window else 0
        rows, columns = -(-height // side), -(-width // side)
        # A grid of other sides than whole windows is filled up; the padding is a region of its own.
        padding = (0, 0, 0, columns * side - width, 0, rows * side - height)

        def windows(x: Tensor) -> Tensor:
            x = F.pad(x.flatten(0, 1), padding).roll((-shift, -shift), (1, 2))
            x = x.view(-1, rows, side, columns, side, self.heads, dim // self.heads)
            return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(x.shape[0], rows * columns * self.heads, side * side, -1)

        mask = None
        if shift or any(padding):
            mask = self._mask((height, width), side, shift, query)
        mixed = F.scaled_dot_product_attention(windows(query), windows(key), windows(value), attn_mask=mask)
        mixed = mixed.view(-1, rows, columns, self.heads, side, side, dim // self.heads).permute(0, 1, 4, 2, 5, 3, 6)
        mixed = mixed.reshape(-1, rows * side, columns * side, dim).roll((shift, shift), (1, 2))
        return mixed[:, :height, :width].unflatten(0, (batch, classes))

    def _mask(self, grid: tuple[int, int], side: int, shift: int, like: Tensor) -> Tensor:
        """What is added to the attention (1, windows * heads, side^2, side^2): -100 between regions."""

        def regions(length: int) -> Tensor:
            whole = -(-length // side) * side
            place = torch.arange(whole, device=like.device)
            outside = (place >= length).long().roll(-shift) * 3
            # The last window holds what the shift brought around from the other border.
            return outside + (place >= whole - side).long() + (place >= whole - shift).long() if shift else outside

        regions_of = regions(grid[0])[:, None] * 6 + regions(grid[1])[None]
        parts = regions_of.view(regions_of.shape[0] // side, side, -1, side).transpose(1, 2).reshape(-1, side * side)
        mask = (parts[:, None] != parts[:, :, None]).to(like.dtype) * _LEFT_OUT
        return mask.repeat_interleave(self.heads, dim=0)[None]


class SpatialLayer(nn.Module):
    """Windows, then windows shifted by half a window, guided by CLIP's features."""

    def __init__(self, dim: int, guidance: int, heads: int, window: int) -> None:
        super().__init__()
        self.block_1 = WindowBlock(dim, guidance, heads, window, shifted=False)
        self.block_2 = WindowBlock(dim, guidance, heads, window, shifted=True)
        self.guidance_norm = nn.LayerNorm(guidance)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Aggregate x (B, T, H, W, C) with the guidance (B, H, W, G): (B, T, H, W, C)."""
        guidance = self.guidance_norm(guidance)[:, None]
        return self.block_2(self.block_1(x, guidance), guidance)


class ClassLayer(nn.Module):
    """Attention among the classes at each place (Sec. 3.3, class aggregation), without positions.

    Missing classes up to ``padding`` take part as copies of one learned token, so results depend on the padding. Since
    the copies are equal, a single one is computed and weighted by their number.
    """

    def __init__(self, dim: int, guidance: int, heads: int, padding: int, *, linear: bool) -> None:
        super().__init__()
        self.heads, self.padding, self.linear = heads, padding, linear
        if padding:
            self.padding_tokens = nn.Parameter(torch.zeros(1, 1, dim))
            self.padding_guidance = nn.Parameter(torch.zeros(1, 1, guidance))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = _Projections(dim, guidance)
        self.MLP = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Aggregate x (B, T, H, W, C), each place by itself, with the guidance (B, T, G): (B, T, H, W, C)."""
        x = x + self._attend(self.norm1(x), guidance[:, :, None, None])
        return x + self.MLP(self.norm2(x))

    def _attend(self, x: Tensor, guidance: Tensor) -> Tensor:
        query, key, value = self._heads(x, guidance)
        missing: Any
        missing, padding = max(self.padding - x.shape[1], 0), None
        if torch.compiler.is_compiling() and self.padding:  # of any number of classes: computed, not known
            missing = (self.padding - x.new_ones(x.shape[1]).sum()).clamp(min=0.0)[None]
        if self.padding and (isinstance(missing, Tensor) or missing):
            token, its_guidance = (part[:, :, None, None] for part in (self.padding_tokens, self.padding_guidance))
            _, *padding = self._heads(self.norm1(token), its_guidance)
        attend = _linear_attention if self.linear else _full_attention
        return attend(query, key, value, padding, missing).permute(0, 4, 1, 2, 3, 5).flatten(-2)

    def _heads(self, x: Tensor, guidance: Tensor) -> list[Tensor]:
        """Queries, keys and values (B, H, W, heads, T, C / heads)."""
        parts = self.attention(x, guidance)
        return [part.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 4, 1, 5) for part in parts]


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, padding: list[Tensor] | None, missing: Any) -> Tensor:
    """Attention (..., T, C) with the feature map elu(x) + 1 in the softmax's place; ``missing`` copies of a padding."""
    # Sums over the classes do not survive half precision. (Tensors without values, for counting, know no autocast.)
    kind = query.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        query, key, value = F.elu(query.float()) + 1, F.elu(key.float()) + 1, value.float()
        sums, total = key.transpose(-1, -2) @ value, key.sum(-2)
        if padding is not None:
            key = F.elu(padding[0].float()) + 1
            sums = sums + missing * (key.transpose(-1, -2) @ padding[1].float())
            total = total + missing * key.sum(-2)
        return query @ sums / (query @ total[..., None] + 1e-6)


def _full_attention(query: Tensor, key: Tensor, value: Tensor, padding: list[Tensor] | None, missing: Any) -> Tensor:
    """Softmax attention (..., T, C); one padding counts ``missing`` times by the logarithm added to its logit."""
    mask = None
    if padding is not None:
        shape = (*key.shape[:-2], 1, key.shape[-1])
        key, value = (
            torch.cat([own, extra.to(own.dtype).expand(shape)], dim=-2)
            for own, extra in zip((key, value), padding, strict=True)
        )
        mask = query.new_zeros(query.shape[-2], key.shape[-2])
        mask[:, -1] = missing.log() if isinstance(missing, Tensor) else math.log(missing)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class AggregationLayer(nn.Module):
    """One layer of the aggregation: over space, then over classes."""

    def __init__(self, options: AggregationOptions) -> None:
        super().__init__()
        dim, heads = options.hidden_dim, options.heads
        self.swin_block = SpatialLayer(dim, options.appearance_dim, heads, options.attention_window)
        self.attention = ClassLayer(
            dim, options.text_dim, heads, options.padding, linear=options.class_attention == "linear"
        )

    def forward(self, x: Tensor, appearance: Tensor, words: Tensor, pooling: tuple[int, int]) -> Tensor:
        """Aggregate x (B, T, H, W, C), which is overwritten where no gradient is needed.

        ``appearance`` (B, H, W, G) and ``words`` (B, T, G) guide it; ``pooling`` are the sides of the average pooling
        before the aggregation over classes.
        """
        x = _in_parts(lambda part: self.swin_block(part, appearance), x, 1, _CLASSES_AT_ONCE)
        grid = (x.shape[2], x.shape[3])
        pooling = (min(pooling[0], grid[0]), min(pooling[1], grid[1]))
        if pooling == (1, 1):
            return _in_parts(lambda part: part + self.attention(part, words), x, 2, _ROWS_AT_ONCE)
        maps = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), pooling)
        mixed = self.attention(maps.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]), words)
        maps = mixed.flatten(0, 1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=True)
        return x + maps.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor, dim: int, size: int) -> Tensor:
    """A function of x that works on each index of ``dim`` by itself: in parts and in place where there is no graph."""
    if _at_once() or x.shape[dim] <= size:
        return function(x)
    for part in x.split(size, dim):
        part.copy_(function(part))
    return x


class Upsample(nn.Module):
    """Twice the size, guided by CLIP's features (Sec. 3.3, upsampling decoder)."""

    def __init__(self, dim: int, out: int, guidance: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(dim, dim - guidance, 2, 2)
        layers: list[nn.Module] = []
        for inputs in (dim, out):
            convolution = nn.Conv2d(inputs, out, 3, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(max(out // 16, 1), out), nn.ReLU()]
        self.conv = nn.ModuleDict({"double_conv": nn.Sequential(*layers)})

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Upsample x (B * T, C, H, W) with the guidance (B, G, 2 H, 2 W): (B * T, out, 2 H, 2 W)."""
        x = self.up(x)
        first, *rest = self.conv["double_conv"].children()
        weight: Any = first.weight
        # The part of the first convolution that sees the guidance is the same for all classes.
        same = F.conv2d(guidance, weight[:, x.shape[1] :], padding=1)
        x = F.conv2d(x, weight[:, : x.shape[1]], padding=1).unflatten(0, (same.shape[0], -1)) + same[:, None]
        return nn.Sequential(*rest)(x.flatten(0, 1))


class CostAggregator(nn.Module):
    """Aggregates the cosines of patches and words into one map of logits per word, at four times the resolution."""

    def __init__(self, dim: int, options: AggregationOptions) -> None:
        super().__init__()
        hidden, (first, second) = options.hidden_dim, options.decoder_guidance_dims
        self.keep = options.padding if options.released else 0
        self.conv1 = nn.Conv2d(options.templates, hidden, 7, padding=3)
        self.guidance_projection = nn.Sequential(nn.Conv2d(dim, options.appearance_dim, 3, padding=1), nn.ReLU())
        self.text_guidance_projection = nn.Sequential(nn.Linear(dim, options.text_dim), nn.ReLU())
        self.decoder_guidance_projection = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, out, 3, padding=1), nn.ReLU())
            for inputs, out in zip(options.guidance_dims, (first, second), strict=True)
        )
        self.layers = nn.ModuleList(AggregationLayer(options) for _ in range(options.layers))
        self.decoder1 = Upsample(hidden, options.decoder_dims[0], first)
        self.decoder2 = Upsample(options.decoder_dims[0], options.decoder_dims[1], second)
        self.head = nn.Conv2d(options.decoder_dims[1], 1, 3, padding=1)

    def forward(
        self, features: Tensor, text: Tensor, guidance: Sequence[Tensor], pooling: tuple[int, int] = (1, 1)
    ) -> Tensor:
        """Logits (B, T, 4 H, 4 W) of words; -100 for words that the released limit leaves out.

        Args:
            features: (B, D, H, W) patches, of any length.
            text: (B, T, P, D) words in P templates, of any length.
            guidance: (B, D, H, W), (B, G1, 2 H, 2 W) and (B, G2, 4 H, 4 W).
            pooling: see `AggregationLayer`.
        """
        cost = self.cost_volume(features, text)
        classes, kept = text.shape[1], None
        if self.keep and not torch.compiler.is_compiling() and classes > self.keep:
            kept = self.best_words(cost)
            cost = cost.gather(2, kept[:, None, :, None, None].expand(-1, cost.shape[1], -1, *cost.shape[3:]))
            text = text.gather(1, kept[:, :, None, None].expand(-1, -1, *text.shape[2:]))
        appearance = self.guidance_projection(guidance[0]).permute(0, 2, 3, 1)
        words = self.text_guidance_projection(F.normalize(text.mean(2), dim=-1))
        x = self._each_word(self.embed, cost.transpose(1, 2))
        for layer in self.layers:
            x = layer(x, appearance, words, pooling)
        fine = [project(level) for project, level in zip(self.decoder_guidance_projection, guidance[1:], strict=True)]
        logits = self._each_word(lambda part: self.decode(part, fine), x)
        if kept is None:
            return logits
        places = kept[:, :, None, None].expand_as(logits)
        return logits.new_full((len(logits), classes, *logits.shape[2:]), _LEFT_OUT).scatter(1, places, logits)

    @staticmethod
    def cost_volume(features: Tensor, text: Tensor) -> Tensor:
        """Cosines (B, P, T, H, W) of patches (B, D, H, W) and words (B, T, P, D)."""
        return torch.einsum("bdhw,btpd->bpthw", F.normalize(features, dim=1), F.normalize(text, dim=-1))

    def best_words(self, cost: Tensor) -> Tensor:
        """Indices (B, K), ascending, of the words with the largest cosine in any template and place."""
        return cost.amax((1, 3, 4)).topk(self.keep, dim=1).indices.sort(dim=1).values

    def embed(self, cost: Tensor) -> Tensor:
        """The first convolution, each word by itself: (B, T, P, H, W) to (B, T, H, W, C)."""
        return self.conv1(cost.flatten(0, 1)).permute(0, 2, 3, 1).unflatten(0, cost.shape[:2])

    def decode(self, x: Tensor, guidance: Sequence[Tensor]) -> Tensor:
        """Upsample class maps (B, T, H, W, C) to logits (B, T, 4 H, 4 W)."""
        maps = self.decoder1(x.flatten(0, 1).permute(0, 3, 1, 2), guidance[0])
        return self.head(self.decoder2(maps, guidance[1])).view(*x.shape[:2], 4 * x.shape[2], 4 * x.shape[3])

    @staticmethod
    def _each_word(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if _at_once() or x.shape[1] <= _CLASSES_AT_ONCE:
            return function(x)
        return torch.cat([function(part) for part in x.split(_CLASSES_AT_ONCE, 1)], dim=1)
