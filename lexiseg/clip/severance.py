"""Patch severance: less or no exchange between the tokens of a block, so that patches keep to what they show (DeOP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.tower import Attention, block_attention, token_values

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

    def mix(self, value: Tensor, masks: Tensor) -> Tensor:
        """Mix values (B, T, W) of all heads by masks (B, N, gh, gw); tokens before the patches are in every region."""
        patches = masks.flatten(2).to(value.dtype)
        weights = F.pad(patches, (value.shape[1] - patches.shape[2], 0), value=1.0)
        if self.kind == "released":
            return weights.sum(dim=1).unsqueeze(-1) * value
        affinity = weights.transpose(1, 2) @ weights
        return (affinity.softmax(dim=-1) if self.kind == "mps" else affinity) @ value

    def attention(self, masks: Tensor) -> Attention:
        """What mixes the tokens of a severed block, see `lexiseg.clip.tower.run_block`; masks are those of `mix`."""
        alpha = self.alpha if self.kind == "gps" else 1.0

        def mix(attention: nn.MultiheadAttention, x: Tensor, context: Tensor | None) -> Tensor:
            value = token_values(attention, x)
            own: Tensor = attention.out_proj(value if self.kind == "gps" else self.mix(value, masks))
            return own if alpha == 1.0 else alpha * own + (1.0 - alpha) * block_attention(attention, x, context)

        return mix if alpha else block_attention
