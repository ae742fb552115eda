"""MaskFormer as DeOP, ZSSeg and ZegFormer use it, from the parts in `transformers`.

Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation", NeurIPS 2021. The pixel decoder
and the query decoder are `transformers`' modules; its whole model cannot be used, because it lacks the backbone and
the class heads, and predicts its auxiliary masks from states without the final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lexiseg.matmul import convolve, plain
from lexiseg.proposals.backbone import build_backbone
from lexiseg.proposals.base import ProposalGenerator, Proposals, check_images
from lexiseg.proposals.heads import (
    build_class_head,
    check_query_options,
    start_convolutions,
    start_matrices,
    use_own_layers,
)
from lexiseg.proposals.options import MaskFormerOptions


class MaskFormer(ProposalGenerator):
    """Queries that become masks: N masks at a quarter of the image's size, and an embedding for each.

    Widths that do not fit together are a `LexisegError`.
    """

    def __init__(self, options: MaskFormerOptions) -> None:
        super().__init__(frozen_dropout=options.frozen_dropout)
        check_query_options(options)
        from transformers import MaskFormerConfig, MaskFormerDetrConfig, ResNetConfig
        from transformers.models.maskformer.modeling_maskformer import (
            MaskformerMLPPredictionHead,
            MaskFormerPixelDecoder,
            MaskFormerTransformerModule,
        )

        self.options = options
        self.backbone = build_backbone(options)
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
        self.class_embed = build_class_head(options)
        self.embed_dim = None if self.class_embed is None else options.embed_dim
        use_own_layers(self)
        start_convolutions(self.pixel_decoder)
        start_matrices(self.transformer.decoder)

    def forward(self, images: Tensor, text: Tensor | None = None) -> Proposals:
        """Propose regions; ``text`` is ignored. See `ProposalGenerator.forward`."""
        check_images(images, self.stride)
        return self.propose(self.backbone(images))

    def propose(self, features: list[Tensor]) -> Proposals:
        """Propose regions from the backbone's features, at strides 4, 8, 16, 32."""
        pixels = self.pixel_decoder.fpn(features)[-1]
        states = self.decode(features[-1])
        if plain(pixels):
            return self._last_level(states[-1], pixels)
        pixels = self.pixel_decoder.mask_projection(pixels)
        # Earlier layers serve the losses alone; their masks cost as much as those of the last.
        levels = [
            Proposals(
                torch.einsum("bnc,bchw->bnhw", self.mask_embed(state), pixels),
                None if self.class_embed is None else self.class_embed(state),
            )
            for state in (states if torch.is_grad_enabled() else states[-1:])
        ]
        return Proposals(levels[-1].mask_logits, levels[-1].embeddings, aux=tuple(levels[:-1]))

    def _last_level(self, state: Tensor, pixels: Tensor) -> Proposals:
        """The result alone, of what the pixel decoder projects to mask features (B, C, h, w).

        The projection and the products with the N queries are linear both, so that one convolution to N masks does.
        """
        projection, queries = self.pixel_decoder.mask_projection, self.mask_embed(state)
        weight = torch.einsum("bnc,cdij->bndij", queries, projection.weight)
        bias = queries @ projection.bias
        masks = [convolve(projection, *one) for one in zip(pixels.split(1), weight, bias, strict=True)]
        return Proposals(torch.cat(masks).contiguous(), None if self.class_embed is None else self.class_embed(state))

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
