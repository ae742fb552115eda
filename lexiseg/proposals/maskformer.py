"""MaskFormer as DeOP, ZSSeg and ZegFormer use it, from the parts in `transformers`.

Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation", NeurIPS 2021. The pixel decoder
and the query decoder are `transformers`' modules; its whole model cannot be used, because it lacks the backbone and
the class heads, and predicts its auxiliary masks from states without the final norm.
"""

import torch
from torch import Tensor

from lexiseg.matmul import convolve, plain
from lexiseg.proposals.base import Proposals
from lexiseg.proposals.heads import QueryGenerator, start_convolutions, start_matrices
from lexiseg.proposals.options import MaskFormerOptions


class MaskFormer(QueryGenerator):
    """MaskFormer, with whose proposals words have nothing to do."""

    def __init__(self, options: MaskFormerOptions) -> None:
        super().__init__(options)
        from transformers import MaskFormerConfig, MaskFormerDetrConfig, ResNetConfig
        from transformers.models.maskformer.modeling_maskformer import (
            MaskformerMLPPredictionHead,
            MaskFormerPixelDecoder,
            MaskFormerTransformerModule,
        )

        channels = self.backbone.channels
        self.pixel_decoder = MaskFormerPixelDecoder(
            in_features=channels[-1],
            lateral_widths=list(channels[:-1]),
            feature_size=options.pixel_dim,
            mask_feature_size=options.mask_dim,
        )
        decoder = MaskFormerDetrConfig(
            num_queries=options.num_queries,
            d_model=options.hidden_dim,
            encoder_attention_heads=options.heads,
            decoder_attention_heads=options.heads,
            decoder_layers=options.decoder_layers,
            decoder_ffn_dim=options.ffn_dim,
            dropout=options.dropout,
            attention_dropout=options.dropout,
            activation_dropout=options.dropout,
        )
        # The backbone named here is never built; without a name the configuration would describe a Swin.
        config = MaskFormerConfig(backbone_config=ResNetConfig(), decoder_config=decoder)
        self.transformer = MaskFormerTransformerModule(in_features=channels[-1], config=config)
        self.mask_embed = MaskformerMLPPredictionHead(options.hidden_dim, options.hidden_dim, options.mask_dim)
        self.finish()
        start_convolutions(self.pixel_decoder)
        start_matrices(self.transformer.decoder)

    def propose(self, features: list[Tensor], text: Tensor | None = None) -> Proposals:
        """Propose regions, whatever the ``text``. See `QueryGenerator.propose`."""
        pixels = self.pixel_decoder.fpn(features)[-1]
        states = self.decode(features[-1])
        if plain(pixels):
            return self.proposals(states[-1:], [self._last_masks(states[-1], pixels)])
        # Earlier layers serve the losses alone; their masks cost as much as those of the last.
        states = states if torch.is_grad_enabled() else states[-1:]
        pixels = self.pixel_decoder.mask_projection(pixels)
        masks = (torch.einsum("bnc,bchw->bnhw", self.mask_embed(state), pixels) for state in states)
        return self.proposals(states, masks)

    def _last_masks(self, state: Tensor, pixels: Tensor) -> Tensor:
        """The masks of the last layer alone, of what the pixel decoder projects to mask features (B, C, h, w).

        The projection and the products with the N queries are linear both, so that one convolution to N masks does.
        """
        projection, queries = self.pixel_decoder.mask_projection, self.mask_embed(state)
        weight = torch.einsum("bnc,cdij->bndij", queries, projection.weight)
        bias = queries @ projection.bias
        masks = [convolve(projection, *one) for one in zip(pixels.split(1), weight, bias, strict=True)]
        return torch.cat(masks).contiguous()

    def decode(self, feature: Tensor) -> list[Tensor]:
        """Run the query decoder on the feature of stride 32.

        Returns:
            (B, N, D) after each layer, first to last, every one through the shared final norm. (`transformers` gives
            only the last one so.)
        """
        module = self.transformer
        if module.input_projection is not None:
            feature = module.input_projection(feature)
        positions = module.position_embedder(feature.shape, feature.device, feature.dtype).flatten(2).transpose(1, 2)
        memory = feature.flatten(2).transpose(1, 2)
        queries = module.queries_embedder.weight.expand(len(feature), -1, -1)
        state = torch.zeros_like(queries)
        states = []
        for layer in module.decoder.layers:
            state = layer(state, None, positions, queries, memory)
            states.append(module.decoder.layernorm(state))
        return states
