"""Text embeddings of a vocabulary: encoded in chunks, averaged over templates, cached in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder
from lexiseg.vocabulary import Vocabulary

_CHUNK = 256
# Texts that are put together at once: a hundred thousand words in fifteen templates are gigabytes of vectors, of which
# only the means are wanted.
_BLOCK = 16_384
_MEMORY_ENTRIES = 32


def default_cache_folder() -> Path:
    """Where text embeddings are kept: ``$LEXISEG_CACHE``, or ``~/.cache/lexiseg``."""
    given = os.environ.get("LEXISEG_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "lexiseg"


def _blocks(groups: Sequence[Sequence[str]], num_templates: int) -> Iterator[list[Sequence[str]]]:
    """The groups in their order, in parts of about `_BLOCK` texts."""
    block: list[Sequence[str]] = []
    count = 0
    for group in groups:
        if block and count + len(group) * num_templates > _BLOCK:
            yield block
            block, count = [], 0
        block.append(group)
        count += len(group) * num_templates
    yield block


class TextEmbedder:
    """Turns the words of a vocabulary into unit vectors and remembers them.

    Each word is put into each template, encoded and normalised; the mean over the templates is normalised again
    (CLIP's prompt ensemble; ZegCLIP's released embeddings are made the same way).

    Args:
        clip: the text tower. Its weights are part of the cache's key, so a changed tower is never served old vectors.
        cache_dir: folder of the disk cache; None keeps the vectors in memory only.
        chunk: number of texts encoded at once.

    Attributes:
        num_forwards: how often the text tower ran; it stays the same when the cache answered.
    """

    def __init__(self, clip: CLIP, cache_dir: str | Path | None = None, *, chunk: int = _CHUNK) -> None:
        self.clip = clip
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.chunk = chunk
        self.num_forwards = 0
        self._memory: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, vocabulary: Vocabulary) -> Tensor:
        """Embed ``vocabulary.words`` with ``vocabulary.templates``: float32 (W, D) of unit length, on clip's device.

        Raises:
            LexisegError: a word is too long for the text tower.
        """
        return self.embed(vocabulary.words, vocabulary.templates)

    def embed(self, words: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed ``words`` with ``templates`` (each with one ``{}``): float32 (W, D) of unit length, on clip's device.

        Raises:
            LexisegError: a filled template is too long for the text tower.
        """
        return self._remembered(
            [1, list(templates), list(words)], len(words), lambda: self._encode_words(words, templates)
        )

    def embed_joined(self, groups: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
        """Embed groups of synonyms, a vector a group: the unit features of all its words in all templates, averaged.

        ZegFormer's rule for a class name such as "grass, lawn".

        Args:
            groups: C groups of at least one word each.
            templates: each with one ``{}``.

        Returns:
            float32 (C, D) of unit length, on clip's device.

        Raises:
            LexisegError: a filled template is too long for the text tower.
        """
        content = ["joined", list(templates), [list(group) for group in groups]]
        return self._remembered(content, len(groups), lambda: self._encode(groups, templates))

    def embed_prompted(
        self, learner: PromptLearner, words: Sequence[str], task: str | None = None, *, disk: bool = True
    ) -> Tensor:
        """Embed ``words`` with learned prompts, which are part of the cache's key: float32 (W, D) of unit length.

        There is no gradient; training calls the `PromptLearner` itself.

        Args:
            learner: the prompts.
            words: the words.
            task: for prompts with a task part, see `PromptLearner`.
            disk: False remembers them in memory only, for prompts that are still being trained.

        Raises:
            LexisegError: a word is too long, or a task is given to prompts without one.
        """

        @torch.no_grad()
        def encode() -> Tensor:
            self.num_forwards += 1
            return learner(self.clip, words, task, chunk=self.chunk).cpu()

        return self._remembered(["prompted", learner.fingerprint(), task, list(words)], len(words), encode, disk=disk)

    def _remembered(
        self, content: Sequence[Any], count: int, encode: Callable[[], Tensor], *, disk: bool = True
    ) -> Tensor:
        """Answer from memory or disk, or encode and remember; the text tower is part of the key."""
        kind, *rest = content
        text = json.dumps([kind, self.clip.text_fingerprint(), *rest], ensure_ascii=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        found = self._memory.get(key)
        if found is None and disk:
            found = self._read(key, count)
        if found is None:
            found = encode()
            if disk:
                self._write(key, found)
        self._memory[key] = found
        self._memory.move_to_end(key)
        while len(self._memory) > _MEMORY_ENTRIES:
            self._memory.popitem(last=False)
        return found.to(self.clip.device)

    def _encode_words(self, words: Sequence[str], templates: Sequence[str]) -> Tensor:
        return self._encode([(word,) for word in words], templates)

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

    @torch.no_grad()
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

    def _path(self, key: str) -> Path | None:
        return None if self.cache_dir is None else self.cache_dir / "text" / f"{key}.safetensors"

    def _read(self, key: str, num_words: int) -> Tensor | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        # A damaged cache file costs a text forward, never an error: it is ignored here and written anew.
        with suppress(SafetensorError, OSError, KeyError, ValueError):
            vectors = load_file(path)["text"]
            if vectors.shape == (num_words, self.clip.embed_dim) and bool(torch.isfinite(vectors).all()):
                return vectors.float()
        return None

    def _write(self, key: str, vectors: Tensor) -> None:
        path = self._path(key)
        if path is None:
            return
        # A full or read-only disk must not stop a prediction.
        with suppress(LexisegError):
            make_folder(path.parent)
            with atomic_write(path) as temporary:
                save_file({"text": vectors.contiguous()}, temporary)
