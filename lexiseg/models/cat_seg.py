"""CAT-Seg: the similarity of every patch with every word as a cost volume, which a small network aggregates.

Cho, Shin et al., "CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation", CVPR 2024. CLIP's patches are
made dense by the value path of its last block; their cosines with the words are aggregated over space, guided by
CLIP's features, and over classes, guided by the text, and upsampled four times (`lexiseg.models.cost_aggregation`).
Where the paper and the released code differ, the code is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.clip.text import TextEmbedder
from lexiseg.clip.tower import token_values
from lexiseg.errors import LexisegError, warn
from lexiseg.losses.masks import check_labels
from lexiseg.losses.reduction import reduction_weight
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.models.cost_aggregation import AggregationOptions, CostAggregator
from lexiseg.models.options import Count, Pixels
from lexiseg.scores import GridScores
from lexiseg.templates import IN_THE_SCENE
from lexiseg.vocabulary import Vocabulary

_MAPS_AT_ONCE = 512  # pairs of a picture and a word that are aggregated at once at prediction, which bounds the memory


class CATSegOptions(AggregationOptions):
    """Options of `CATSeg`, with those of `AggregationOptions`.

    Attributes:
        finetune: which part of CLIP is trained: "attention" the query and value projections of both towers (the
            released setting), "full" all of their blocks, "prompt" deep visual prompts, "none" nothing.
        prompt_length: visual prompts per block; 0 for none.
        prompt_depth: blocks with prompts, from the first on; None is all.
        resolution: side that images are resized to for CLIP, whatever their aspect ratio (released: 384 with patches of
            16, 336 with patches of 14); None keeps their size, rounded to whole patches.
        guidance_blocks: blocks (0-based) whose outputs guide the decoder; None is a third and two thirds of the way (3
            and 7 of 12, 7 and 15 of 24).
        window_size: side of the sliding window at prediction; None runs whole pictures (released: 384).
        window_stride: its stride (released: 256).
        short_side: length that pictures' shorter side is first resized to; None keeps it (released: 640).
        long_side: limit of the longer side in that resize (released: 2560).
        canvas: sides (height, width) to which the picture is stretched then, on which the windows lie (released: 640).
        whole: average the windows with the whole picture, stretched to one window (released: True).
    """

    finetune: Literal["attention", "full", "prompt", "none"] = "attention"
    prompt_length: Annotated[int, Field(ge=0)] = 0
    prompt_depth: Count | None = None
    resolution: Pixels | None = None
    guidance_blocks: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    long_side: Pixels | None = None
    canvas: tuple[Pixels, Pixels] | None = None
    whole: bool = False

    @model_validator(mode="after")
    def _check_whole(self) -> CATSegOptions:
        if self.whole and self.window_size is None:
            raise ValueError("the option whole averages windows with the whole picture, so it needs a window_size")
        return self


class SplitAttention(nn.Module):
    """Attention weights with separate query, key and value projections, so that two of them can be trained.

    It takes the place of a block's ``nn.MultiheadAttention``; `lexiseg.clip.tower.block_attention` runs it.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        query, key, value = (nn.Parameter(part.clone()) for part in attention.in_proj_weight.detach().chunk(3))
        self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = query, key, value
        self.in_proj_bias, self.out_proj = attention.in_proj_bias, attention.out_proj

    @property
    def in_proj_weight(self) -> Tensor:
        """The three projections as one, (3 W, W)."""
        return torch.cat([self.q_proj_weight, self.k_proj_weight, self.v_proj_weight])


def _split(blocks: Any) -> None:
    for block in blocks:
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = SplitAttention(block.attn)


class CATSeg(SegmentationModel):
    """CAT-Seg; a `LexisegError` says that the options do not fit the towers.

    The text tower must be CLIP's causal one, since it may be trained as well.
    """

    system = "cat-seg"
    options_class = CATSegOptions
    options: CATSegOptions

    def __init__(self, clip: CLIP, options: CATSegOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        options, tower = self.options, clip.image_tower
        depth = tower.num_blocks
        self.guidance_blocks = options.guidance_blocks or (max(depth // 3, 1) - 1, max(2 * depth // 3, 1) - 1)
        if max(self.guidance_blocks) >= depth or (options.prompt_depth or 0) > depth:
            raise LexisegError(
                f"The guidance_blocks {list(self.guidance_blocks)} or a prompt_depth of {options.prompt_depth} do not "
                f"fit an image tower of {depth} blocks; choose smaller numbers."
            )
        if not clip.plain_text:
            raise LexisegError(
                f"The text tower of '{clip.name}' is not CLIP's causal one, which CAT-Seg needs; "
                "choose a CLIP such as 'ViT-B-16/openai'."
            )
        if options.finetune == "prompt" and not options.prompt_length:
            raise LexisegError("There are no prompts to tune; set prompt_length, or choose another finetune.")
        _split(clip.visual.transformer.resblocks)
        _split(clip.text_tower.transformer.resblocks)
        self.prompt_tokens: nn.Parameter | None = None
        if options.prompt_length:
            prompts = torch.empty(options.prompt_depth or depth, options.prompt_length, tower.width)
            self.prompt_tokens = nn.Parameter(nn.init.trunc_normal_(prompts, std=0.02))
        self.upsample1 = nn.ConvTranspose2d(tower.width, options.guidance_dims[0], 2, 2)
        self.upsample2 = nn.ConvTranspose2d(tower.width, options.guidance_dims[1], 4, 4)
        self.aggregator = CostAggregator(clip.embed_dim, options)
        self.default_templates = IN_THE_SCENE  # as released
        self.set_trainable()

    def trainable_names(self) -> tuple[str, ...]:
        """Everything outside CLIP, and the part of CLIP that ``finetune`` names."""
        parts = {"attention": (".attn.q_proj", ".attn.v_proj"), "full": (".resblocks.",)}.get(self.options.finetune, ())

        def trained(name: str) -> bool:
            if name.startswith("clip."):
                return any(part in name for part in parts)
            return name != "prompt_tokens" or self.options.finetune in ("prompt", "full")

        return tuple(name for name, _ in self.named_parameters() if trained(name))

    def run_tower(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor], tuple[int, int]]:
        """Run the image tower; of the last block only the value path is run.

        Returns:
            tokens (B, 1 + h * w, W) of the last block, the outputs of the `guidance_blocks` in the same layout, and the
                grid (h, w).
        """
        tower = self.clip.image_tower
        tokens, grid = tower.embed(images, interpolation="bicubic", by_count=True)
        last, prompts = tower.num_blocks - 1, self.prompt_tokens

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            # What becomes of a prompt is thrown away after each block, so it is only attended to.
            return tokens, prompts[index][None] if prompts is not None and index < len(prompts) else None

        levels = self.guidance_blocks
        before = tower.run(tokens, grid, before_block=before_block, levels=levels, stop=last)

        def value_path(attention: nn.MultiheadAttention, x: Tensor, context: Tensor | None) -> Tensor:
            # The shortcut around the attention is the class token's, for every token (released code).
            return before.tokens[:, :1] + attention.out_proj(token_values(attention, x))

        after = tower.run(
            before.tokens, grid, attention={last: value_path}, residual={last: 0.0}, levels=levels, first=last
        )
        return after.tokens, {**before.levels, **after.levels}, grid

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Features with ``dense`` (B, D, h, w), ``middle`` (B, G1, 2 h, 2 w) and ``fine`` (B, G2, 4 h, 4 w).

        The patches that are compared with words, and two guidances of the decoder from the `guidance_blocks`.
        """
        size, side = (images.shape[-2], images.shape[-1]), self.options.resolution
        if side is None:
            images = self.fit_to_patches(images)
        elif size != (side, side):
            images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        tokens, levels, grid = self.run_tower(images)

        def as_map(x: Tensor) -> Tensor:
            return x[:, 1:].transpose(1, 2).unflatten(2, grid)

        middle, fine = (as_map(levels[index]) for index in self.guidance_blocks)
        dense = as_map(self.clip.image_tower.project(tokens))
        return ImageFeatures(size, {"dense": dense, "middle": self.upsample1(middle), "fine": self.upsample2(fine)})

    def embed_text(self, embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
        """Embed the words: (W, D) unit vectors, or with the option ``templates`` over 1, (W, P, D), one per template.

        Another number of templates than the option's is a `LexisegError`.
        """
        wanted, given, words = self.options.templates, vocabulary.templates, self._words(vocabulary)
        if wanted == 1:
            return embedder.embed(words, given)
        if len(given) != wanted:
            raise LexisegError(f"This CAT-Seg has {wanted} templates, but {len(given)} were given; give {wanted}.")
        return torch.stack([embedder.embed(words, (template,)) for template in given], dim=1)

    def training_text(self, vocabulary: Vocabulary, text: Tensor) -> Tensor:
        """The text, encoded again with gradients if the text tower is trained."""
        if self.options.finetune not in ("attention", "full"):
            return text
        parts = []
        for template in vocabulary.templates:
            tokens = self.clip.tokenize([template.replace("{}", word) for word in self._words(vocabulary)])
            parts.append(F.normalize(self.clip.encode_text(tokens.to(self.device)), dim=-1))
        stacked = torch.stack(parts, dim=1)
        return F.normalize(stacked.mean(1), dim=-1) if self.options.templates == 1 else stacked

    def _words(self, vocabulary: Vocabulary) -> list[str]:
        """The words that are embedded: as released, of a name such as "building, edifice" what is before the comma."""
        return [word.split(", ")[0] if self.options.released else word for word in vocabulary.words]

    @property
    def exports_any_size(self) -> bool:
        """False: attention windows, and the padding to whole ones, depend on the size."""
        return False

    def score_grid(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """Logits (B, W, 4 h, 4 w) of words (W, D) or (W, P, D), before any resize."""
        text = (text[:, None] if text.ndim == 2 else text)[None]
        values = (features.values["dense"], features.values["middle"], features.values["fine"])
        pooling = self.options.pooling if self.training else (1, 1)

        def run(dense: Tensor, *finer: Tensor) -> Tensor:  # the patches are their own guidance in the aggregation
            return self.aggregator(dense, text.expand(dense.shape[0], -1, -1, -1), (dense, *finer), pooling)

        if torch.compiler.is_compiling():
            return run(*values).float()
        count = len(values[0]) if torch.is_grad_enabled() else max(_MAPS_AT_ONCE // text.shape[1], 1)
        parts = zip(*(value.split(count) for value in values), strict=True)
        return torch.cat([run(*part) for part in parts]).float()

    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> GridScores:
        """Score words against images; see `SegmentationModel.score`. Whether a word was seen makes no difference."""
        limit = self.options.padding
        if self.options.released and 0 < limit < len(text):
            warn(
                f"CAT-Seg as released scores {limit} classes per window and drops the others of {len(text)}; the "
                "option released: false scores all."
            )
        logits = self.score_grid(features, text)
        return GridScores(logits, word_to_class=word_to_class, resize_to=features.size, sigmoid=True)

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, *, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Binary cross entropy of every class at every pixel (released code); text is (C, D) or (C, P, D).

        Pixels without a class count in the mean as negatives of all classes. There is no self-training: ``seen`` is a
        `LexisegError`.
        """
        if seen is not None:
            raise LexisegError("CAT-Seg has no self-training; choose the setting 'inductive' or 'supervised'.")
        check_labels(labels, len(text))
        logits = self.score_grid(self.encode_images(images), text)
        logits = F.interpolate(logits, size=tuple(labels.shape[-2:]), mode="bilinear", align_corners=False)
        # The sum over the classes of softplus(x) - x * target, without targets of C x h x w.
        named = (labels >= 0) & (labels < len(text))
        own = logits.gather(1, torch.where(named, labels, 0)[:, None])[:, 0]
        loss = (F.softplus(logits).sum() - (own * named).sum()) / logits.numel()
        loss = loss * reduction_weight(len(labels), labels.device)
        return {"loss": loss, "loss_mask": loss.detach()}
