"""Text embeddings of a vocabulary: encoded in chunks, averaged over templates, cached in memory and on disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.clip.text_cache import TextCache
from lexiseg.errors import LexisegError
from lexiseg.vocabulary import Vocabulary

# Texts that are put together at once: a hundred thousand words in fifteen templates are gigabytes of vectors, of which
# only the means are wanted.
BLOCK = 16_384


def _blocks(groups: Sequence[Sequence[str]], num_templates: int) -> Iterator[list[Sequence[str]]]:
    """The groups in their order, in parts of about `BLOCK` texts."""
    block: list[Sequence[str]] = []
    count = 0
    for group in groups:
        if block and count + len(group) * num_templates > BLOCK:
            yield block
            block, count = [], 0
        block.append(group)
        count += len(group) * num_templates
    yield block


@dataclass(eq=False, repr=False)
class TextEmbedder:
    """Turns the words of a vocabulary into unit vectors and remembers each; threads may share it.

    Each word is put into each template, encoded and normalised; the mean over the templates is normalised again
    (CLIP's prompt ensemble; ZegCLIP's released embeddings are made the same way).
    """

    clip: CLIP  # the text tower. Its weights are part of the cache's key, so a changed tower never gets old vectors.
    # folder of the disk cache, see `lexiseg.clip.text_cache`; None keeps the vectors in memory only
    cache_dir: str | Path | None = None
    _: KW_ONLY
    chunk: int = 256  # number of texts encoded at once
    num_forwards: int = field(init=False, default=0)  # how often the tower ran, for words that the cache did not know

    def __post_init__(self) -> None:
        folder = None if self.cache_dir is None else Path(self.cache_dir) / "text"
        self._cache = TextCache(folder, self.clip.embed_dim)

    def __call__(self, vocabulary: Vocabulary) -> Tensor:
        """Embed ``vocabulary.words`` with ``vocabulary.templates``, see `embed`."""
        return self.embed(vocabulary.words, vocabulary.templates)

    def embed(self, words: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed ``words`` with ``templates`` (each with one ``{}``): float32 (W, D) of unit length, on clip's device.

        A filled template that is too long for the text tower is a `LexisegError`.
        """
        return self.remember(
            ["words", list(templates)], words, lambda found: self._encode([(words[i],) for i in found], templates)
        )

    def embed_joined(self, groups: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
        """Embed C groups of synonyms: (C, D), the mean of a group's words in all templates; see `embed`.

        ZegFormer's rule for a class name such as "grass, lawn".
        """
        keys = [json.dumps(list(group), ensure_ascii=False) for group in groups]
        return self.remember(
            ["joined", list(templates)], keys, lambda found: self._encode([groups[i] for i in found], templates)
        )

    def embed_prompted(
        self, learner: PromptLearner, words: Sequence[str], task: str | None = None, *, disk: bool = True
    ) -> Tensor:
        """Embed ``words`` with learned prompts, which are part of the cache's key: float32 (W, D) of unit length.

        There is no gradient; training calls the `PromptLearner` itself. ``task`` and errors are the learner's. ``disk``
        False remembers in memory only, for prompts that are still being trained.
        """

        def encode(found: list[int]) -> Tensor:
            self.num_forwards += 1
            return learner(self.clip, [words[i] for i in found], task, chunk=self.chunk)

        return self.remember(["prompted", learner.fingerprint(), task], words, encode, disk=disk)

    def remember(
        self, manner: Sequence[Any], keys: Sequence[str], encode: Callable[[list[int]], Tensor], *, disk: bool = True
    ) -> Tensor:
        """Vectors (len(keys), D) from memory or disk, or made now, of words or other things; on clip's device.

        Args:
            manner: what the vectors depend on beside the keys and the text tower; JSON can hold it.
            keys: a text for each vector.
            encode: makes the vectors (n, D) of the keys with the given indices.
            disk: look and keep on disk too.
        """
        text = json.dumps([*manner, self.clip.text_fingerprint()], ensure_ascii=False)
        shelf = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        device = self.clip.device
        # What is remembered serves training as well, and other programs: no mode of the caller's may change it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self._cache.get(shelf, keys, encode, disk=disk).to(device)

    def _encode(self, groups: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
        parts = []
        # All texts are looked at before the first is encoded; of their tokens what is not padding is kept.
        for block in _blocks(groups, len(templates)):
            texts = [template.replace("{}", word) for group in block for word in group for template in templates]
            tokens = self.clip.tokenize(texts)
            self._check(texts, tokens)
            width = int((tokens != 0).any(dim=0).nonzero().max()) + 1
            sizes = torch.tensor([len(group) * len(templates) for group in block])
            parts.append((tokens[:, :width].int(), sizes))
        return torch.cat([self._means(tokens, sizes) for tokens, sizes in parts])

    def _means(self, tokens: Tensor, sizes: Tensor) -> Tensor:
        """Unit vectors (G, D) of groups of ``sizes`` (G,) texts each, whose token ids (n, L) may lack padding."""
        tokens = F.pad(tokens.long(), (0, self.clip.context_length - tokens.shape[1]))
        # Sorted by length, each chunk is cut to its own longest text, which saves most of the tower's time.
        order = (tokens != 0).sum(dim=1).argsort(stable=True)
        rows = []
        for part in order.split(self.chunk):
            vectors = self.clip.encode_text(tokens[part].to(self.clip.device)).float()
            rows.append((vectors / vectors.norm(dim=-1, keepdim=True)).cpu())
            self.num_forwards += 1
        vectors = torch.empty(len(tokens), rows[0].shape[1])
        vectors[order] = torch.cat(rows)
        group_of = torch.arange(len(sizes)).repeat_interleave(sizes)
        total = torch.zeros(len(sizes), vectors.shape[1]).index_add_(0, group_of, vectors)
        mean = total / sizes[:, None]
        return mean / mean.norm(dim=-1, keepdim=True)

    def _check(self, texts: Sequence[str], tokens: Tensor) -> None:
        full = (tokens[:, -1] != 0).nonzero().flatten().tolist()
        for index in full:
            needed = self.clip.count_tokens(texts[index])
            if needed > self.clip.context_length:
                raise LexisegError(
                    f"'{texts[index][:80]}' needs {needed} tokens and the text tower takes "
                    f"{self.clip.context_length}; shorten the class name or the template."
                )
