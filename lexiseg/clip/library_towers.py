"""The image towers of open_clip, timm and transformers as a `PatchTower`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.patch_tower import Block, Grid, PatchTower
from lexiseg.clip.positions import Interpolation, resize_positions
from lexiseg.clip.tower import ImageTower, patch_grid, token_values
from lexiseg.errors import LexisegError


class OpenCLIPTower(PatchTower):
    """open_clip's plain vision transformer; a patch meets text as the class token does, by the norm and projection."""

    positions: Interpolation = "bicubic-antialias"
    num_prefix = 1

    def __init__(self, tower: ImageTower) -> None:
        self.tower = tower
        self.patch_size, self.width = tower.patch_size, tower.width
        self.blocks = [_open_clip_block(block) for block in tower.visual.transformer.resblocks]

    def embed(
        self, images: Tensor, *, interpolation: Interpolation | None = None, by_count: bool = False
    ) -> tuple[Tensor, Grid]:
        return self.tower.embed(images, interpolation=interpolation or self.positions, by_count=by_count)

    def project(self, tokens: Tensor) -> Tensor:
        return self.tower.project(tokens)


def _open_clip_block(block: Any) -> Block:
    attention = block.attn
    return Block(
        attention.num_heads,
        block.ln_1,
        lambda x: F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1),
        lambda x: block.ls_1(attention.out_proj(x)),
        lambda x: block.ls_2(block.mlp(block.ln_2(x))),
    )


class TimmTower(PatchTower):
    """timm's ``VisionTransformer``: DINO, DINOv2 and TIPSv2, with or without class token and registers.

    ``positions`` is how its authors resize the position table, None timm's way. Another kind of model is a
    `LexisegError`.
    """

    def __init__(self, trunk: Any, positions: Interpolation | None = None) -> None:
        from timm.models.vision_transformer import Block as TimmBlock
        from timm.models.vision_transformer import VisionTransformer

        plain = isinstance(trunk, VisionTransformer) and all(isinstance(block, TimmBlock) for block in trunk.blocks)
        if not plain or trunk.pos_embed is None:
            raise LexisegError(
                f"A {type(trunk).__name__} of timm has blocks or position embeddings that lexiseg does not support; "
                "choose a plain vision transformer such as 'vit_base_patch8_224.dino'."
            )
        self.trunk = trunk
        self.positions: Interpolation = positions or "bicubic-antialias"
        self.patch_size, self.width = int(trunk.patch_embed.patch_size[0]), int(trunk.embed_dim)
        self.num_prefix = int(trunk.num_prefix_tokens)
        self.blocks = [_timm_block(block) for block in trunk.blocks]

    def embed(
        self, images: Tensor, *, interpolation: Interpolation | None = None, by_count: bool = False
    ) -> tuple[Tensor, Grid]:
        trunk, grid = self.trunk, patch_grid(images, self.patch_size)
        patches = trunk.patch_embed.proj(images.to(trunk.patch_embed.proj.weight.dtype)).flatten(2).transpose(1, 2)
        prefix = [
            part.expand(images.shape[0], -1, -1) for part in (trunk.cls_token, trunk.reg_token) if part is not None
        ]
        rows, source = 0 if trunk.no_embed_class else self.num_prefix, tuple(trunk.patch_embed.grid_size)
        kind = interpolation or self.positions
        table = resize_positions(trunk.pos_embed[0], grid, source, kind, by_count=by_count, num_prefix=rows)
        tokens = torch.cat([*prefix, patches + table[rows:].to(patches.dtype)], dim=1)
        if rows:
            tokens = torch.cat([tokens[:, :rows] + table[:rows], tokens[:, rows:]], dim=1)
        return trunk.norm_pre(tokens), grid

    def project(self, tokens: Tensor) -> Tensor:
        return self.trunk.norm(tokens)


def _timm_block(block: Any) -> Block:
    attention = block.attn
    norm = getattr(attention, "norm", nn.Identity())
    return Block(
        attention.num_heads,
        block.norm1,
        lambda x: attention.qkv(x).chunk(3, dim=-1),
        lambda x: block.ls1(attention.proj(norm(x))),
        lambda x: block.ls2(block.mlp(block.norm2(x))),
        (attention.q_norm, attention.k_norm),
    )


class TransformersTower(PatchTower):
    """The image half of a dual encoder of transformers: CLIP and MetaCLIP 2, SigLIP and SigLIP 2, TIPSv2.

    CLIP's patches meet text by the class token's norm and projection, TIPSv2's after the last norm, and SigLIP's by the
    value path of the pooling head, which is what MaskCLIP's value path is to a class token. Another model is a
    `LexisegError`.
    """

    def __init__(self, model: Any) -> None:
        vision = model.vision_model
        self.vision, self.model = vision, model
        embeddings = vision.embeddings
        known = {"SiglipVision": "bicubic", "Siglip2": "bilinear-antialias", "Tipsv2": "bilinear-antialias"}
        known |= {"MetaClip2": "bicubic", "CLIPVision": "bicubic"}
        kind = next((value for start, value in known.items() if type(vision).__name__.startswith(start)), None)
        if kind is None or (hasattr(vision, "use_head") and not vision.use_head):
            raise LexisegError(
                f"lexiseg does not know how to compare the patches of a {type(vision).__name__} with text; choose "
                "CLIP, MetaCLIP 2, SigLIP, SigLIP 2 or TIPSv2."
            )
        self.positions = kind  # type: ignore[assignment]
        self.is_tips = hasattr(embeddings, "register_tokens")
        config = vision.config
        self.patch_size, self.width = int(config.patch_size), int(config.hidden_size)
        layers = vision.encoder.layer if self.is_tips else vision.encoder.layers
        self.blocks = [_transformers_block(layer, config.num_attention_heads) for layer in layers]
        if self.is_tips:
            self.num_prefix = 1 + int(embeddings.register_tokens.shape[1])
        else:
            self.num_prefix = int(hasattr(embeddings, "class_embedding"))

    def embed(
        self, images: Tensor, *, interpolation: Interpolation | None = None, by_count: bool = False
    ) -> tuple[Tensor, Grid]:
        grid, embeddings = patch_grid(images, self.patch_size), self.vision.embeddings
        kind = interpolation or self.positions
        if self.is_tips:
            patches = embeddings.patch_embeddings(images)
            table, prefix = embeddings.position_embeddings[0], embeddings.cls_token
        else:
            patches = self._patches(images, embeddings.patch_embedding)
            table, prefix = embeddings.position_embedding.weight, getattr(embeddings, "class_embedding", None)
        rows = int(prefix is not None)
        table = resize_positions(table, grid, None, kind, by_count=by_count, num_prefix=rows)
        parts = [patches + table[rows:].to(patches.dtype)]
        if prefix is not None:
            parts.insert(0, (prefix.reshape(1, 1, -1) + table[:1]).expand(images.shape[0], -1, -1).to(patches.dtype))
        if self.is_tips:
            parts.insert(1, embeddings.register_tokens.expand(images.shape[0], -1, -1))
        tokens = torch.cat(parts, dim=1)
        return (self.vision.pre_layrnorm(tokens) if hasattr(self.vision, "pre_layrnorm") else tokens), grid

    def _patches(self, images: Tensor, embedding: nn.Module) -> Tensor:
        if isinstance(embedding, nn.Conv2d):
            return embedding(images.to(embedding.weight.dtype)).flatten(2).transpose(1, 2)
        # SigLIP 2 multiplies patches that were cut out and flattened, colour last, by a matrix.
        patch, (height, width) = self.patch_size, patch_grid(images, self.patch_size)
        cut = images.reshape(images.shape[0], 3, height, patch, width, patch).permute(0, 2, 4, 3, 5, 1)
        return embedding(cut.reshape(images.shape[0], height * width, -1))

    def project(self, tokens: Tensor) -> Tensor:
        vision = self.vision
        tokens = vision.layernorm(tokens) if self.is_tips else vision.post_layernorm(tokens)
        if hasattr(vision, "head"):
            return pool_values(vision.head, tokens)
        return self.model.visual_projection(tokens) if hasattr(self.model, "visual_projection") else tokens


def pool_values(head: Any, tokens: Tensor) -> Tensor:
    """What SigLIP's pooling head would say of each token (B, T, W) if its probe attended to that token alone."""
    pooled = head.attention.out_proj(token_values(head.attention, tokens))
    return pooled + head.mlp(head.layernorm(pooled))


def _transformers_block(layer: Any, heads: int) -> Block:
    tips = hasattr(layer, "attention")  # TIPSv2, which follows DINOv2
    attention = layer.attention if tips else layer.self_attn

    def project_in(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)

    if not tips:
        return Block(
            heads, layer.layer_norm1, project_in, attention.out_proj, lambda x: layer.mlp(layer.layer_norm2(x))
        )
    return Block(
        heads,
        layer.norm1,
        project_in,
        lambda x: layer.layer_scale1(attention.o_proj(x)),
        lambda x: layer.layer_scale2(layer.mlp(layer.norm2(x))),
    )
