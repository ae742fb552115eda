"""Mask2Former with context interaction as FreeSeg and MAFT use it, from the parts in `transformers`.

Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022, with the module that
FreeSeg (Qin et al., CVPR 2023) puts between its two halves, in which the image features attend to the words.
`transformers` has the halves; its whole model has no place for that module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.proposals.base import Proposals
from lexiseg.proposals.heads import QueryGenerator, start_convolutions, start_matrices
from lexiseg.proposals.options import Mask2FormerOptions

# Levels that the deformable encoder works on: strides 32, 16 and 8, in this order.
_LEVELS = 3
_GAMMA = 0.1


class ContextInteraction(nn.Module):
    """Image features attend to words of width ``text_dim``, level after level (FreeSeg's released code).

    The residual starts from the normalised feature, and the words are normalised once more at every level: both are as
    the released checkpoints were trained.
    """

    def __init__(self, width: int, text_dim: int, inner: int, heads: int, dropout: float) -> None:
        super().__init__()
        if inner % heads:
            raise LexisegError(f"interaction_dim {inner} cannot be split into {heads} heads; change interaction_heads.")
        self.heads = heads
        self.dropout = dropout
        self.norm_features = nn.LayerNorm(width)
        self.norm_text = nn.LayerNorm(text_dim)
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(text_dim, inner)
        self.value = nn.Linear(text_dim, inner)
        self.out = nn.Linear(inner, width)
        self.gamma = nn.Parameter(torch.full((width,), _GAMMA))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], text: Tensor) -> list[Tensor]:
        """Let features (B, C, h, w) attend to the words (B, K, T), in the order given."""
        result = []
        for feature in features:
            text = self.norm_text(text)
            pixels = self.norm_features(feature.flatten(2).transpose(1, 2))
            attended = F.scaled_dot_product_attention(
                self._split(self.query(pixels)),
                self._split(self.key(text)),
                self._split(self.value(text)),
                dropout_p=self.dropout if self.training else 0.0,
            )
            pixels = pixels + self.gamma * self.out(attended.transpose(1, 2).flatten(2))
            result.append(pixels.transpose(1, 2).reshape(feature.shape))
        return result

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Mask2Former(QueryGenerator):
    """Mask2Former: queries become masks through masked attention."""

    options: Mask2FormerOptions

    def __init__(self, options: Mask2FormerOptions) -> None:
        super().__init__(options)
        if options.interaction and options.pixel_dim != options.mask_dim:
            raise LexisegError(
                f"The context interaction needs features of one width: mask_dim {options.mask_dim} must equal "
                f"pixel_dim {options.pixel_dim}."
            )
        encoder_heads = options.encoder_heads or options.heads
        if options.pixel_dim % encoder_heads:
            raise LexisegError(
                f"pixel_dim {options.pixel_dim} cannot be split into {encoder_heads} heads; change encoder_heads."
            )
        from transformers import Mask2FormerConfig
        from transformers.models.mask2former.modeling_mask2former import (
            Mask2FormerPixelDecoder,
            Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
            Mask2FormerTransformerModule,
        )

        shared = {
            "feature_size": options.pixel_dim,
            "mask_feature_size": options.mask_dim,
            "hidden_dim": options.hidden_dim,
            "encoder_feedforward_dim": options.encoder_ffn_dim,
            "encoder_layers": options.encoder_layers,
            "dim_feedforward": options.ffn_dim,
            "num_queries": options.num_queries,
            # transformers counts the prediction before the first layer as a layer.
            "decoder_layers": options.decoder_layers + 1,
            # Its one dropout would also skip whole decoder layers; the encoder's own is set below.
            "dropout": 0.0,
        }
        self.pixel_decoder = Mask2FormerPixelDecoder(
            Mask2FormerConfig(**shared, num_attention_heads=encoder_heads), list(self.backbone.channels)
        )
        start_convolutions(self.pixel_decoder)
        nn.init.normal_(self.pixel_decoder.level_embed)
        for layer in self.pixel_decoder.encoder.layers:
            layer.self_attn = Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(
                options.pixel_dim, encoder_heads, _LEVELS, options.encoder_points
            )
            layer.dropout = layer.activation_dropout = options.dropout
            start_matrices(layer)
            _start_deformable(layer.self_attn)
        self.transformer = Mask2FormerTransformerModule(
            options.pixel_dim, Mask2FormerConfig(**shared, num_attention_heads=options.heads)
        )
        # In some releases (5.20, the last for Python 3.10) it is a plain list, whose weights belong to no module.
        self.transformer.input_projections = nn.ModuleList(self.transformer.input_projections)
        start_convolutions(self.transformer.input_projections)
        start_matrices(self.transformer.decoder.layers)
        self.interaction: ContextInteraction | None = None
        if options.interaction:
            self.interaction = ContextInteraction(
                options.pixel_dim,
                options.text_dim or options.embed_dim,
                options.interaction_dim,
                options.interaction_heads or options.heads,
                options.dropout,
            )
        self.needs_text = options.interaction
        self.finish()

    def propose(self, features: list[Tensor], text: Tensor | None = None) -> Proposals:
        levels, pixels = self.pixel_features(features)
        return self.decode(*self.interact(levels, pixels, text))

    def pixel_features(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Run the deformable encoder.

        Returns:
            features (B, C, h, w) of strides 32, 16 and 8, and the mask features of stride 4.
        """
        found = self.pixel_decoder(features)
        return list(found.multi_scale_features), found.mask_features

    def interact(self, levels: list[Tensor], pixels: Tensor, text: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Let what `pixel_features` gave attend to the words; a `LexisegError` if they are missing or do not fit."""
        if self.interaction is None:
            return levels, pixels
        if text is None:
            raise LexisegError(
                "This proposal generator reads the words (interaction), but got none; pass the text embeddings."
            )
        width = self.options.text_dim or self.options.embed_dim
        if text.shape[-1] != width:
            raise LexisegError(
                f"This proposal generator reads text embeddings of width {width}, but got {text.shape[-1]}; use the "
                "CLIP model it was trained with, or set text_dim."
            )
        if text.dim() == 2:
            text = text.expand(len(pixels), -1, -1)
        *levels, pixels = self.interaction([*levels, pixels], text)
        return levels, pixels

    def decode(self, levels: list[Tensor], pixels: Tensor) -> Proposals:
        """Run the masked decoder on what `interact` gave."""
        found = self.transformer(levels, pixels)
        states = (state.transpose(0, 1) for state in found.intermediate_hidden_states)
        return self.proposals(states, found.masks_queries_logits)


def _start_deformable(attention: Any) -> None:
    """Start deformable attention as Deformable DETR does: head i looks in direction i, point j at distance j + 1."""
    heads, levels, points = attention.n_heads, attention.n_levels, attention.n_points
    angles = torch.arange(heads, dtype=torch.float32) * (2 * torch.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().max(dim=-1, keepdim=True).values
    distances = torch.arange(1, points + 1, dtype=torch.float32)
    offsets = directions[:, None, None, :] * distances[None, None, :, None]
    with torch.no_grad():
        attention.sampling_offsets.weight.zero_()
        attention.sampling_offsets.bias.copy_(offsets.expand(heads, levels, points, 2).flatten())
        attention.attention_weights.weight.zero_()
        attention.attention_weights.bias.zero_()
        attention.value_proj.bias.zero_()
        attention.output_proj.bias.zero_()
