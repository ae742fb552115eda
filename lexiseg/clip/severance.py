"""Patch severance: less or no exchange between the tokens of a block, so that patches keep to what they show (DeOP)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.tower import Attention, block_attention, token_values
from lexiseg.errors import LexisegError

SeveranceKind = Literal["gps", "mps", "mps-sum", "released"]


@dataclass(frozen=True)
class Severance:
    """What replaces the token mixing softmax(q k^T / sqrt(d)) v of a block; everything else in the block stays.

    With v the values of the tokens and G (N, T) the weight of each token in each of N region masks, 1 for the class
    token, the token mixing becomes

    - ``"gps"``: alpha v + (1 - alpha) softmax(q k^T / sqrt(d)) v. Needs no masks (DeOP, Eq. 2). alpha 0 is ordinary
      attention, alpha 1 the value path, where each token keeps to itself.
    - ``"mps"``: softmax(G^T G) v, the mask-guided form as the authors' code has it, the same for all heads.
    - ``"mps-sum"``: (G^T G) v, the mask-guided form as the paper prints it (DeOP, Eq. 1), a plain sum.
    - ``"released"``: the sum over the masks of G at a token, times its value. This is what the authors' published
      checkpoint was trained with; it is neither of the paper's forms.

    Attributes:
        kind: one of the four.
        alpha: in 0..1, of ``"gps"`` only.
    """

    kind: SeveranceKind = "gps"
    alpha: float = 1.0

    @property
    def needs_masks(self) -> bool:
        """Whether the kind reads region masks."""
        return self.kind != "gps"

    def mix(self, value: Tensor, weights: Tensor | None) -> Tensor:
        """Mix values (B, T, W) of all heads by the masks' weights G (B, N, T), see `token_weights`."""
        if weights is None:
            raise LexisegError(f"Severance '{self.kind}' needs region masks; give the tower region_masks.")
        weights = weights.to(value.dtype)
        if self.kind == "released":
            return weights.sum(dim=1).unsqueeze(-1) * value
        affinity = weights.transpose(1, 2) @ weights
        return (affinity.softmax(dim=-1) if self.kind == "mps" else affinity) @ value

    def attention(self, region_masks: Tensor | None = None) -> Attention:
        """Make what mixes the tokens of a severed block, see `lexiseg.clip.tower.run_block`."""

        def mix(attention: nn.MultiheadAttention, x: Tensor, context: Tensor | None) -> Tensor:
            value = token_values(attention, x)
            if self.needs_masks:
                value = self.mix(value, None if region_masks is None else token_weights(region_masks, x.shape[1]))
            own: Tensor = attention.out_proj(value)
            if self.needs_masks or self.alpha == 1.0:
                return own
            return self.alpha * own + (1.0 - self.alpha) * block_attention(attention, x, context)

        return mix


def severed_attention(severance: Mapping[int, Severance], region_masks: Tensor | None = None) -> dict[int, Attention]:
    """What `ImageTower.run` takes as ``attention``, given severance by block index."""
    return {index: kind.attention(region_masks) for index, kind in severance.items() if kind.needs_masks or kind.alpha}


def token_weights(region_masks: Tensor, num_tokens: int) -> Tensor:
    """Masks (B, N, gh, gw) as weights (B, N, T) of T tokens; those before the patches have weight 1."""
    patches = region_masks.flatten(2)
    return F.pad(patches, (num_tokens - patches.shape[-1], 0), value=1.0)


def severance_masks(mask_logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring mask logits (B, N, h, w) to the patch grid as severance reads them, in 0..1: resized first, sigmoid after.

    (The masks that DeOP pools with are made in the other order.)
    """
    if mask_logits.shape[1] == 0:
        return mask_logits.new_zeros(len(mask_logits), 0, *grid)
    return torch.sigmoid(F.interpolate(mask_logits, size=grid, mode="bilinear", align_corners=False))


def released_residual(severed: Iterable[int]) -> dict[int, float]:
    """Factors on the shortcut around the attention that the authors' encoder without added tables uses, by block.

    There a severed block has the factor 0.2 if its index is 11, whatever the depth of the tower, and 1 otherwise; the
    paper does not mention it.
    """
    return {11: 0.2} if 11 in set(severed) else {}
