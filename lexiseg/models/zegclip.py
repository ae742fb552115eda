"""ZegCLIP: CLIP with deep prompts, a relationship descriptor and a matching decoder, one stage from patch to mask.

Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023. A frozen CLIP runs once
with learned prompts in every block (`PromptTokens`, the paper's DPT); each word becomes a query that knows the image
(`ZegCLIP.descriptor`, RD); a decoder matches queries with patches (`MaskDecoder`); and every class is judged by itself
(NEL: focal and dice loss, `OneStageModel.losses`).

Read `ZegCLIP.encode_images` and `ZegCLIP.grid_logits`, which are the forward pass; `OneStageModel` turns its logits
into scores and losses. Text is frozen CLIP's (`SegmentationModel.embed_text`). Its templates (one sentence on VOC, 15
elsewhere), the sliding window of 512 pixels and the optimiser are the recipes', see ``lexiseg/recipes/voc2012``.
Cascade-CLIP and SPT-SEG subclass `ZegCLIP` and override small methods.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import Interpolation
from lexiseg.clip.tower import BeforeBlock, ImageTokens, ImageTower
from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures
from lexiseg.models.one_stage import DecoderLayer, MaskDecoder, OneStageModel, OneStageOptions
from lexiseg.models.options import Count, Dropout
from lexiseg.models.similarity_init import init_matching_decoder, patch_directions

CLASS_CHUNK = 4096  # classes decoded at once at prediction, which bounds the memory of a large vocabulary


class ZegCLIPOptions(OneStageOptions):
    """Options of `ZegCLIP`, with those of `OneStageOptions`.

    Attributes:
        backbone: "prompt" keeps CLIP frozen and learns prompts; the baselines are "fixed", frozen without prompts, and
            "finetune".
        num_prompts: prompts per block (10 on VOC, 35 on Context, 100 on COCO-Stuff; Fig. 6).
        prompt_depth: which blocks get prompts, see `PromptTokens`; None is all. Table 8: "1" is 0, "1-3" 2, "4-12" -9.
        prompt_dropout: dropout on the prompts.
        descriptor: make queries from [t * cls, t] (Sec. 3.3); False, the paper's ablation, from the text t alone.
        decoder_layers: layers of a decoder.
        decoder_heads: its attention heads.
        ffn_ratio: hidden width of its feed-forward part over its width.
        dropout: dropout in the decoder.
        init: "random", as released, or "clip-similarity", for short trainings: see `lexiseg.models.similarity_init`.
        class_embedding_twice: add the class embedding twice, as the released code does and its checkpoints need; a
            model trained here does better without.
        position_interpolation: how position embeddings follow the resolution.
    """

    backbone: Literal["prompt", "fixed", "finetune"] = "prompt"
    num_prompts: Count = 10
    prompt_depth: int | None = None
    prompt_dropout: Dropout = 0.1
    descriptor: bool = True
    decoder_layers: Count = 3
    decoder_heads: Count = 8
    ffn_ratio: Annotated[float, Field(gt=0)] = 4.0
    dropout: Dropout = 0.1
    init: Literal["random", "clip-similarity"] = "random"
    class_embedding_twice: bool = False
    position_interpolation: Interpolation = "bilinear"

    weights_depend_on = OneStageOptions.weights_depend_on | {
        *("backbone", "num_prompts", "prompt_depth", "descriptor", "decoder_layers", "decoder_heads", "ffn_ratio"),
        *("class_embedding_twice", "position_interpolation"),
    }


class PromptTokens(nn.Module):
    """P prompts for each of several blocks, with one linear map shared by all (Sec. 3.2: deep prompt tuning).

    With a ``depth`` n > 0, "deep", fresh prompts enter blocks 0 to n, their outputs are thrown away each time, and
    later blocks have none. n = 0, "shallow": prompts enter block 0 and pass through all. n < 0, "reverse": fresh
    prompts enter the last |n| blocks only (Appendix B). Prompts have no positions and skip CLIP's first norm. A depth
    that does not fit the tower is a `LexisegError`.
    """

    def __init__(self, num_prompts: int, tower: ImageTower, depth: int, dropout: float) -> None:
        super().__init__()
        width, num_blocks = tower.width, tower.num_blocks
        if not -num_blocks <= depth < num_blocks:
            raise LexisegError(
                f"Prompts at depth {depth} do not fit a tower of {num_blocks} blocks; take a depth from {-num_blocks} "
                f"to {num_blocks - 1}."
            )
        self.num_prompts, self.num_blocks, self.depth = num_prompts, num_blocks, depth
        self.embeddings = nn.Parameter(torch.empty(1, num_prompts, width)) if depth >= 0 else None
        self.deep_embeddings = nn.Parameter(torch.empty(abs(depth), num_prompts, width)) if depth else None
        self.proj = nn.Linear(width, width)
        # Of all tokens, in front of CLIP's own last norm. The released code makes it in shallow mode too, for nothing.
        self.norm = nn.LayerNorm(width, eps=1e-6) if depth else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        # As in visual prompt tuning (Jia et al., ECCV 2022): Xavier's bound for a linear map from a patch's pixels.
        bound = math.sqrt(6.0 / (3 * tower.patch_size**2 + width))
        for embeddings in (self.embeddings, self.deep_embeddings):
            if embeddings is not None:
                nn.init.uniform_(embeddings, -bound, bound)
        nn.init.kaiming_normal_(self.proj.weight, a=0, mode="fan_out")

    def forward(self) -> BeforeBlock:
        """Make the function that puts the prompts into an image tower: one dropout mask for the whole batch."""
        rows = self.dropout(self.proj(torch.cat([t for t in (self.embeddings, self.deep_embeddings) if t is not None])))
        first = self.num_blocks + self.depth if self.depth < 0 else 0
        prompts = {first + index: row[None] for index, row in enumerate(rows)}  # (1, P, W) of each block

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            prompt = prompts.get(index)
            if self.depth or prompt is None:  # deep: keys and values alone, since their outputs would be dropped
                return tokens, prompt
            rows = prompt.expand(tokens.shape[0], -1, -1)  # not `len`, which would fix the batch of an exported graph
            return torch.cat([tokens[:, :1], rows, tokens[:, 1:]], dim=1), None

        return before_block


class Head(NamedTuple):
    """A decoder, what makes its queries and which patches it matches them with."""

    decoder: MaskDecoder
    query_proj: nn.Linear  # from descriptors, or text
    feature: str  # key of the patches in `ImageFeatures.values`


class ZegCLIP(OneStageModel):
    """ZegCLIP and its one-stage baselines; a `LexisegError` says that the options do not fit the tower.

    Features hold ``cls`` (B, D), the embedding of the whole image, and ``patches`` (B, h, w, D), both of unit length.
    """

    system = "zegclip"
    options_class = ZegCLIPOptions
    options: ZegCLIPOptions
    init_decoder = staticmethod(init_matching_decoder)  # for ``init`` "clip-similarity"; another decoder has another

    def __init__(self, clip: CLIP, options: ZegCLIPOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        self.frozen_prefixes: tuple[str, ...] = ("clip.",)  # parameters whose names begin so are not trained
        self.build_prompts()
        self.build_heads()
        if self.options.init == "clip-similarity":
            self.init_from_clip_similarity()
        self.set_trainable()

    def build_prompts(self) -> None:
        """Make the prompts, or none."""
        options, tower = self.options, self.clip.image_tower
        self.prompts: PromptTokens | None = None
        if options.backbone == "prompt":
            depth = tower.num_blocks - 1 if options.prompt_depth is None else options.prompt_depth
            self.prompts = PromptTokens(options.num_prompts, tower, depth, options.prompt_dropout)

    def build_heads(self) -> None:
        """Make the decoders and their query projections: here one of each."""
        self.query_proj, self.decoder = self.build_query_proj(), self.build_decoder()

    def build_query_proj(self) -> nn.Linear:
        """Make the linear map from descriptors, or text, to the queries of a head."""
        return nn.Linear((2 if self.options.descriptor else 1) * self.clip.embed_dim, self.clip.embed_dim)

    def build_decoder(self) -> MaskDecoder:
        """Make the decoder of a head."""
        options, dim, layers = self.options, self.clip.embed_dim, self.options.decoder_layers
        return MaskDecoder(DecoderLayer, layers, dim, options.decoder_heads, options.ffn_ratio, options.dropout)

    def init_from_clip_similarity(self) -> None:
        """Let the decoder start from CLIP's own comparison of patches and words."""
        self.init_decoder(self.decoder, self.query_proj, patch_directions(self.clip.visual.proj))

    def trainable_names(self) -> tuple[str, ...]:
        """Prompts, query projection and decoder, all but the `frozen_prefixes`; "finetune" adds the image tower."""
        tower = ("clip.model.visual.",) if self.options.backbone == "finetune" else ()
        names = (name for name, _ in self.named_parameters())
        return tuple(name for name in names if name.startswith(tower) or not name.startswith(self.frozen_prefixes))

    def make_before_block(self, grid: tuple[int, int]) -> BeforeBlock | None:
        """Make what changes the tokens of a patch grid (h, w) in front of each block, or None."""
        return None if self.prompts is None else self.prompts()

    def run_tower(self, images: Tensor, *, levels: Sequence[int] = ()) -> ImageTokens:
        """Run the image tower with the prompts on whole patches (B, 3, H, W); keep what blocks ``levels`` give."""
        tower, options = self.clip.image_tower, self.options
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.backbone != "fixed"):
            twice = tower.visual.class_embedding[None] if options.class_embedding_twice else None
            tokens, grid = tower.embed(images, interpolation=options.position_interpolation, added=twice)
            return tower.run(tokens, grid, before_block=self.make_before_block(grid), levels=levels)

    def project_tokens(self, result: ImageTokens) -> tuple[Tensor, Tensor]:
        """Turn the tower's last tokens into unit vectors: class token (B, D) and patches (B, N, D), without prompts."""
        tokens = result.tokens if self.prompts is None else self.prompts.norm(result.tokens)
        tokens = F.normalize(self.clip.image_tower.project(tokens), dim=-1)
        return tokens[:, 0], tokens[:, -result.num_patches :]

    def encode_images(self, images: Tensor) -> ImageFeatures:
        result = self.run_tower(self.fit_to_patches(images))
        cls, patches = self.project_tokens(result)
        values = {"cls": cls, "patches": patches.unflatten(1, result.grid)}
        return ImageFeatures((images.shape[-2], images.shape[-1]), values)

    def heads(self) -> list[Head]:
        """The decoders whose mask logits are summed."""
        return [Head(self.decoder, self.query_proj, "patches")]

    def descriptor(self, cls: Tensor, text: Tensor) -> Tensor:
        """Relationship descriptor [t * cls, t] of images ``cls`` (B, D) and text (C, D): (B, C, 2 D) (Sec. 3.3)."""
        text = text.to(cls.dtype)[None]
        return torch.cat([text * cls[:, None], text.expand(cls.shape[0], -1, -1)], dim=-1)

    def queries(self, cls: Tensor, text: Tensor) -> list[Tensor]:
        """Class queries (B, C, D) of each of the `heads`, of images ``cls`` (B, D) and text (C, D)."""
        inputs = self.descriptor(cls, text) if self.options.descriptor else text.to(cls.dtype)[None]
        return [head.query_proj(inputs).expand(cls.shape[0], -1, -1) for head in self.heads()]

    def grid_logits(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Mask logits (B, C, h, w), summed over the heads; see `OneStageModel.grid_logits`."""
        cls, heads = features.values["cls"], self.heads()
        grid = tuple(features.values[heads[0].feature].shape[1:3])
        memories = [head.decoder.project_memory(features.values[head.feature]) for head in heads]

        def decode(part: Tensor) -> Tensor:
            triples = zip(heads, self.queries(cls, part), memories, strict=True)
            # Several heads are Cascade-CLIP's: a sum, not a mean, and no loss of its own for any head.
            return reduce(torch.add, (head.decoder(queries, memory) for head, queries, memory in triples)).float()

        if self.training or text.shape[0] <= CLASS_CHUNK:
            return decode(text).unflatten(2, grid)
        # Queries are independent of each other: many classes are decoded in parts, into one tensor.
        logits = cls.new_empty((len(cls), len(text), grid[0] * grid[1]), dtype=torch.float32)
        for part, place in zip(text.split(CLASS_CHUNK), logits.split(CLASS_CHUNK, 1), strict=True):
            place.copy_(decode(part))
        return logits.unflatten(2, grid)
