"""What DeOP is compared with: severance guided by masks (Table 4), other heatmaps (5) and visual prompts (7).

And what only its released code has. The decoders take and give what `lexiseg.regions.anchors` says.
"""

import math
from collections.abc import Collection, Iterable
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.tower import BeforeBlock, ImageTower, token_values
from lexiseg.models.decoupled import DecoupledOptions
from lexiseg.models.options import Dropout
from lexiseg.regions.anchors import OutputLayer, QueryAnchors

# The released encoder without tables has this factor on the shortcut around the attention of a severed block of this
# index, whatever the depth of the tower; the paper does not mention it.
RELEASED_RESIDUAL = {11: 0.2}
_CHUNK = 16


class AblationOptions(DecoupledOptions):
    """Options of `lexiseg.models.deop.DeOP` that the paper's system does not need; the defaults leave it as it is.

    Attributes:
        released_residual: without visual prompts, the released encoder's factor 0.2 on the shortcut of block 11.
        table_start: "random" is the released initialisation. "zero" starts the added tables from CLIP as it is, which a
            short training needs.
        num_prompts: prepended prompts a block.
        prompt_dropout: on prepended prompts.
        class_scores: "softmax" over the classes and "no object"; "cosine" is temperature * cosine, as the released code
            of the baseline has it.
        masks: what the class scores are multiplied with: "sigmoid" of the upsampled logits, or what released variants
            have: "logits" (never squashed) and "patches" (masks on the patch grid, upsampled) in the baseline's code,
            "patches-twice" (those, squashed once more) behind a switch that is off.
        clip_images: "shared" shows CLIP the pictures as the generator sees them, as released; "own" with CLIP's mean
            and standard deviation.
    """

    released_residual: bool = False
    table_start: Literal["random", "zero"] = "random"
    num_prompts: Annotated[int, Field(ge=1)] = 5
    prompt_dropout: Dropout = 0.1
    class_scores: Literal["softmax", "cosine"] = "softmax"
    masks: Literal["sigmoid", "logits", "patches", "patches-twice"] = "sigmoid"
    clip_images: Literal["shared", "own"] = "shared"


def mix_by_masks(value: Tensor, masks: Tensor, kind: str) -> Tensor:
    """Mix values (B, T, W) of all heads by region masks (B, N, gh, gw); tokens before the patches are in every region.

    With v the values and G (N, T) the weight of each token in each of the N masks, 1 for the class token, ``kind`` is

    - ``"mps"``: softmax(G^T G) v, the mask-guided form as the authors' code has it, the same for all heads.
    - ``"mps-sum"``: (G^T G) v, the mask-guided form as the paper prints it (DeOP, Eq. 1), a plain sum.
    - ``"released"``: the sum over the masks of G at a token, times its value. This is what the authors' published
      checkpoint was trained with; it is neither of the paper's forms.
    """
    patches = masks.flatten(2).to(value.dtype)
    weights = F.pad(patches, (value.shape[1] - patches.shape[2], 0), value=1.0)
    if kind == "released":
        return weights.sum(dim=1).unsqueeze(-1) * value
    affinity = weights.transpose(1, 2) @ weights
    return (affinity.softmax(dim=-1) if kind == "mps" else affinity) @ value


def mask_severance(
    attention: nn.MultiheadAttention, x: Tensor, context: Tensor | None = None, *, masks: Tensor, kind: str
) -> Tensor:
    """In the place of a block's token mixing, see `lexiseg.clip.tower.Attention`: `mix_by_masks`."""
    return cast(Tensor, attention.out_proj(mix_by_masks(token_values(attention, x), masks, kind)))


class PrependedPrompts(nn.Module):
    """Learnt tokens behind the class token, fresh ones at each listed block (deep visual prompt tuning).

    DeOP's prompts of the kind "prepending" (released option LEARN_TOKEN). Before a listed block its prompts take the
    place of the previous block's if that was listed as well, and are inserted otherwise; behind the last listed block
    they go on as tokens. A ``severed`` block drops them. They have no positions.
    """

    def __init__(
        self, tower: ImageTower, blocks: Collection[int], severed: Collection[int], num: int, dropout: float
    ) -> None:
        super().__init__()
        self.blocks, self.severed = tuple(blocks), tuple(severed)
        bound = math.sqrt(6.0 / (3 * tower.patch_size**2 + tower.width))
        self.embeddings = nn.Parameter(torch.empty(len(self.blocks), num, tower.width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, grid: tuple[int, int]) -> tuple[None, BeforeBlock]:
        """As `lexiseg.models.deop.AddedTables.forward`: nothing at the input, and what puts prompts before blocks."""
        prompts = dict(zip(self.blocks, self.dropout(self.embeddings), strict=True))
        num_patches = grid[0] * grid[1]

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            prompt = None if index in self.severed else prompts.get(index)
            if index in self.severed or (prompt is not None and index - 1 in prompts):
                tokens = torch.cat([tokens[:, :1], tokens[:, -num_patches:]], dim=1)
            if prompt is not None:
                tokens = torch.cat([tokens[:, :1], prompt.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)
            return tokens, None

        return None, before_block


class ReleasedOutputLayer(OutputLayer):
    """With projections of queries and keys, and a third of rows that nothing reads but parameter counts include."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))


class ReleasedQueryAnchors(QueryAnchors):
    """The query-based heatmap decoder as released.

    Eq. 3 has all heads with learned projections, the learned queries and sine positions are added before it, and each
    head pools its own channels of the patches, which it takes as they are.
    """

    output_layer = ReleasedOutputLayer
    heatmap: ReleasedOutputLayer

    def attention(self, features: Tensor) -> Tensor:
        """Attention maps (B, heads, Q, gh, gw) before the masks, distributions over the patches but for dropout."""
        layer, dim, heads = self.heatmap, features.shape[-1], self.num_heads
        projection = layer.in_proj_weight, layer.in_proj_bias
        given = self.decoded(features) + self.queries, features.flatten(1, 2) + self.positions(features)
        query, key = (
            F.linear(rows, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for rows, weight, bias in zip(given, *(x[: 2 * dim].split(dim) for x in projection), strict=True)
        )
        maps = (query @ key.transpose(-1, -2) * (dim // heads) ** -0.5).softmax(dim=-1)
        return layer.dropout(maps).unflatten(-1, features.shape[1:3])


class ReleasedConvAnchors(nn.Module):
    """The convolutional heatmap decoder as released: one 3 x 3 convolution of each region's masked patches.

    Neither batch norm nor ReLU, and however many layers the configuration asks for, each is the same convolution of the
    same input. What is pooled so is not divided by its length. "sigmoid" is the released default; "softmax" over all
    patches is what any other setting gives. The paper's Eq. 4 is `ConvAnchors`.
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
        taps = F.linear(features, self.weight[0].flatten(1).t().to(features.dtype)).permute(0, 3, 1, 2)
        taps, near = (F.pad(x.to(taps.dtype), (1, 1, 1, 1), mode="replicate") for x in (taps, masks))
        height, width = features.shape[1:3]
        scores = masks.new_zeros(masks.shape, dtype=taps.dtype)
        for tap in range(9):
            rows, columns = slice(tap // 3, tap // 3 + height), slice(tap % 3, tap % 3 + width)
            scores = scores + near[:, :, rows, columns] * taps[:, tap, None, rows, columns]
        return scores

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Heatmaps (B, 1, N, gh, gw) of regions, see `lexiseg.regions.anchors`."""
        if not masks.shape[1]:
            return masks[:, None]
        scores = self.scores(features, masks)
        return (scores.sigmoid() if self.activation == "sigmoid" else _softmax(scores))[:, None]


class ConvAnchors(nn.Module):
    """The convolutional heatmap decoder of the paper (DeOP, Eq. 4): K x (conv, batch norm, ReLU), conv, softmax.

    It was never released; the borders' padding and the division of what is pooled by its length follow the other
    decoders. Each region is convolved on its own: 2.4 M products a patch, layer and region at E = 512. The paper has K
    = 3 layers of 512 channels; a ``width`` of None is E.
    """

    def __init__(self, dim: int, num_layers: int = 3, width: int | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_layers):
            convolution = nn.Conv2d(dim, width or dim, 3, padding=1, padding_mode="replicate", bias=False)
            dim = convolution.out_channels
            layers += [convolution, nn.BatchNorm2d(dim), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(dim, 1, 3, padding=1, padding_mode="replicate"))

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Heatmaps (B, 1, N, gh, gw) of regions, see `lexiseg.regions.anchors`."""
        if not masks.shape[1]:
            return masks[:, None]
        weighted = (
            (image * part[:, None].to(image.dtype))
            for image, own in zip(features.permute(0, 3, 1, 2), masks, strict=True)
            for part in own.split(_CHUNK)
        )
        # In training batch norm looks at all regions of the batch together.
        parts: Iterable[Tensor] = [torch.cat(list(weighted))] if self.training else weighted
        scores = torch.cat([self.layers(part)[:, 0] for part in parts])
        return _softmax(scores.unflatten(0, masks.shape[:2]))[:, None]


def _softmax(scores: Tensor) -> Tensor:
    """The softmax of scores (B, N, gh, gw) over all patches."""
    return scores.flatten(2).softmax(dim=-1).view_as(scores)
