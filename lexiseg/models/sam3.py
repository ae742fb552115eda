"""SAM 3: a detector prompted with each word, whose masks become a label map.

Carion et al., "SAM 3: Segment Anything with Concepts", 2025, through transformers. One pass of the image serves all
words, which go through the detector in batches. For each word it gives scored masks of the things that are called so, a
map of all of them together, and how likely any is there at all; what they become here, one map of probabilities a word,
is ours. Its weights are gated and have their own licence, so they are never downloaded unasked.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.foreign import ForeignCLIP
from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.models.options import Count, ModelOptions
from lexiseg.scores import RegionScores
from lexiseg.vocabulary import Vocabulary

_DEVIATION = (0.5,) * 3
_TEXTS_AT_ONCE = 64
# What stands in the place of a word where a box says what is meant (the authors' code).
_BOX_WORD = "visual"


class SAM3Options(ModelOptions):
    """Options of `SAM3`.

    Attributes:
        words_at_once: how many words the detector takes at once; more need more memory.
        most_words: keep the maps of this many words, those with the highest value anywhere; others score 0.
    """

    words_at_once: Count = 4
    most_words: Count = 64


class SAM3Towers(ForeignCLIP):
    """The transformers network, a ``Sam3Model``, with the interface of `CLIP`; a word is a sequence of tokens in it."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        width = int(model.config.detr_encoder_config.hidden_size)
        super().__init__(model, tokenizer, name, mean=_DEVIATION, std=_DEVIATION, embed_dim=width)

    @property
    def patch_size(self) -> int:
        return int(self.model.config.vision_config.backbone_config.patch_size)

    @property
    def image_size(self) -> int:
        return int(self.model.config.image_size)

    @torch.no_grad()
    def word_tokens(self, words: Sequence[str]) -> Tensor:
        """The detector's input for words.

        Returns:
            (W, L, D + 1) float32: a word's tokens, each with a 1 behind it, or 0 for padding.
        """
        parts = []
        for start in range(0, len(words), _TEXTS_AT_ONCE):
            inputs = self.tokenizer(
                list(words[start : start + _TEXTS_AT_ONCE]),
                padding="max_length",
                truncation=True,
                max_length=self.context_length,
                return_tensors="pt",
            ).to(self.device)
            ids, given = inputs["input_ids"], inputs["attention_mask"]
            tokens = self.model.get_text_features(input_ids=ids, attention_mask=given).pooler_output.float()
            parts.append(torch.cat([tokens, given[..., None].to(tokens)], dim=-1))
        return torch.cat(parts)


class SAM3(SegmentationModel):
    """SAM 3 as a segmentation system.

    A word's value at a pixel is a probability: that of the word being in the picture, times the larger of two: the map
    of everything with that name, and the best mask there times its score.
    """

    system = "sam3"
    options_class = SAM3Options
    clip: SAM3Towers
    options: SAM3Options

    def __init__(self, clip: SAM3Towers, options: SAM3Options | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__(clip, options, seen_names)
        self.default_templates = ("{}",)
        self.set_trainable()

    @property
    def network(self) -> Any:
        """The ``Sam3Model``."""
        return self.clip.model

    def embed_text(self, embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
        """The tokens of the words; see `SAM3Towers.word_tokens`.

        Raises:
            LexisegError: there are several templates.
        """
        if len(vocabulary.templates) > 1:
            raise LexisegError(f"SAM 3 takes one template, but {len(vocabulary.templates)} were given; give one.")
        template = vocabulary.templates[0]
        return self.clip.word_tokens([template.replace("{}", word) for word in vocabulary.words])

    @torch.no_grad()
    def embed_exemplar(self, image: Tensor, mask: Tensor) -> Tensor:
        """What the detector is told of a thing in a picture: its box, which is encoded with that picture's features.

        SAM 3 is trained with boxes in the picture that is segmented; a box in another picture is a use its authors do
        not describe.

        Args:
            image: uint8 (3, H, W).
            mask: where the thing is, bool (H, W); its bounding box is used.

        Returns:
            (L, D + 1), as those of a word.
        """
        device, (height, width) = self.device, mask.shape
        rows, columns = (mask.any(dim).nonzero()[:, 0] for dim in (1, 0))
        (top, bottom), (left, right) = ((int(at[0]), int(at[-1]) + 1) for at in (rows, columns))
        middle = [(left + right) / 2 / width, (top + bottom) / 2 / height]
        box = torch.tensor([[[*middle, (right - left) / width, (bottom - top) / height]]], device=device)
        pixels = (image[None].to(device).float() / 255 - 0.5) / 0.5
        levels, positions = self._levels(self.encode_images(pixels), 0, 1)
        inside = torch.ones(1, 1, dtype=torch.bool, device=device)
        found = self.network.geometry_encoder(
            box_embeddings=box,
            box_mask=inside,
            box_labels=inside.long(),
            img_feats=levels[:-1],
            img_pos_embeds=positions[:-1],
        ).last_hidden_state[0]
        word = self.clip.word_tokens([_BOX_WORD])[0]
        tokens = torch.cat([word[word[:, -1] > 0], F.pad(found.float(), (0, 1), value=1.0)])
        return F.pad(tokens, (0, 0, 0, len(word) - len(tokens)))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Run the image tower on images resized to its square input; see `SegmentationModel.encode_images`.

        Returns:
            features with ``level_N`` and ``position_N`` (B, D, h, w), the finest first.
        """
        size, side = (int(images.shape[-2]), int(images.shape[-1])), self.clip.image_size
        if size != (side, side):
            images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        found = self.network.get_vision_features(images)
        levels = {f"level_{index}": level for index, level in enumerate(found.fpn_hidden_states)}
        return ImageFeatures(
            size, levels | {f"position_{index}": level for index, level in enumerate(found.fpn_position_encoding)}
        )

    @staticmethod
    def _levels(features: ImageFeatures, picture: int, count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The levels and positions of one picture, for so many words."""

        def of(kind: str) -> tuple[Tensor, ...]:
            names = sorted(name for name in features.values if name.startswith(kind))
            maps = (features.values[name] for name in names)
            return tuple((one[picture] if len(one) > 1 else one[0]).expand(count, -1, -1, -1) for one in maps)

        return of("level_"), of("position_")

    @torch.no_grad()
    def word_maps(self, features: ImageFeatures, picture: int, text: Tensor) -> Tensor:
        """The probability of words (W, L, D + 1) in a picture: (W, h, w), at the network's own size."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

        levels, positions = self._levels(features, picture, len(text))
        found = self.network(
            vision_embeds=Sam3VisionEncoderOutput(fpn_hidden_states=levels, fpn_position_encoding=positions),
            text_embeds=BaseModelOutputWithPooling(pooler_output=text[..., :-1]),
            attention_mask=text[..., -1].long(),
        )
        scores = found.pred_logits.float().sigmoid()[..., None, None]
        things = found.pred_masks.float().sigmoid_().mul_(scores).amax(1)
        everything = found.semantic_seg[:, 0].float().sigmoid()
        return torch.maximum(things, everything) * found.presence_logits.float().sigmoid()[..., None]

    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> RegionScores:
        """Score words against images; see `SegmentationModel.score`. ``seen`` makes no difference.

        Returns:
            one region for each of the `SAM3Options.most_words` words kept, in which only that word has a score.
        """
        if text.dim() == 2:  # one vector per word is a sequence of one
            text = F.pad(text, (0, 1), value=1.0)[:, None]
        options, count = self.options, len(text)
        regions, owners = [], []
        for picture in range(max(len(value) for value in features.values.values())):
            maps, words = text.new_zeros(0), torch.zeros(0, dtype=torch.long, device=text.device)
            for start in range(0, count, options.words_at_once):
                found = self.word_maps(features, picture, text[start : start + options.words_at_once])
                maps = torch.cat([maps.view(-1, *found.shape[1:]), found])
                words = torch.cat([words, start + torch.arange(len(found), device=text.device)])
                if len(maps) > options.most_words:
                    best = maps.flatten(1).amax(1).topk(options.most_words).indices.sort().values
                    maps, words = maps[best], words[best]
            regions.append(maps)
            owners.append(F.one_hot(words, count).float())
        return RegionScores(torch.stack(owners), torch.stack(regions), word_to_class=word_to_class)
