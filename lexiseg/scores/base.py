"""What all factorised scores can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.scores import decode
from lexiseg.scores.fields import Field

Size = tuple[int, int]
"""(height, width) in pixels."""


class NotFiniteError(LexisegError):
    """Scores hold NaN or infinite values."""


class Scores(ABC):
    """Scores of C classes at every pixel of B pictures, in a form much smaller than (B, C, H, W).

    A class may be described by several words (synonyms); its score at a pixel is that of its best word there.

    The scores of a pixel are defined by ``dense``; they are computed in float32, whatever the type of the inputs, by
    operations that give the same bits wherever the pixel is computed. So ``label_map(size)`` equals
    ``dense(size).argmax(1)`` exactly, and so do ``top_k(size, 1)`` and ``label_and_score(size)``: a tie goes to the
    class with the lowest index. No gradient flows through the decode; losses take the logits.

    All methods raise `LexisegError` if the scores hold NaN or infinite values: such a picture has no meaningful labels.

    Attributes:
        num_words: W, how many words are scored.
        num_classes: C, how many classes they belong to.
        word_to_class: (W,) int64, non-decreasing, or None where each word is a class.
        batch_size: B.
        device: where the scores lie and where results are made.
    """

    def __init__(self, batch_size: int, num_words: int, device: torch.device, word_to_class: Tensor | None) -> None:
        self.batch_size = batch_size
        self.num_words = self.num_classes = num_words
        self.device = device
        self.word_to_class: Tensor | None = None
        if word_to_class is None:
            return
        index = word_to_class.detach().to("cpu", torch.long)
        if index.shape != (num_words,):
            raise ValueError(f"word_to_class must be ({num_words},), one class per word, not {tuple(index.shape)}")
        steps = index.diff(prepend=index.new_zeros(1))
        if bool(((steps < 0) | (steps > 1)).any()) or int(index[0]) != 0:
            raise ValueError("word_to_class must go 0, 1, 2 ... without gaps, each class's words side by side")
        self.num_classes = int(index[-1]) + 1
        if self.num_classes < num_words:
            self.word_to_class = index.to(device)

    def label_map(self, size: Size) -> Tensor:
        """The best class of each pixel: (B, H, W) int64 in 0..C-1, for ``size`` (height, width)."""
        return self._best(size, False)[0]

    def label_and_score(self, size: Size) -> tuple[Tensor, Tensor]:
        """The best class (B, H, W) int64 of each pixel and its score (B, H, W) float32, in one pass."""
        return self._best(size, True)

    def top_k(self, size: Size, k: int) -> tuple[Tensor, Tensor]:
        """The k best classes of each pixel, best first; of equal scores the lower class index comes first.

        Returns:
            (B, k, H, W) float32 scores and (B, k, H, W) int64 classes.

        Raises:
            ValueError: k is not between 1 and num_classes.
        """
        size = check_size(size)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must lie between 1 and the number of classes, {self.num_classes}, not {k}")
        if k == 1:
            labels, scores = self.label_and_score(size)
            return scores[:, None], labels[:, None]
        values = torch.empty(self.batch_size, k, *size, dtype=torch.float32, device=self.device)
        indices = torch.empty(values.shape, dtype=torch.long, device=self.device)
        for picture, field in self._fields(size):
            decode.top_k(field, self.word_to_class, values[picture], indices[picture])
        return values, indices

    def dense(self, size: Size, classes: Tensor | None = None) -> Tensor:
        """The score of every class, or of some, at every pixel. Its memory grows with the classes.

        Args:
            size: height and width of the result.
            classes: (K,) indices, ascending, of the classes wanted; None for all.

        Returns:
            (B, C or K, H, W) float32.
        """
        size = check_size(size)
        count = self.num_classes if classes is None else len(classes)
        out = torch.empty(self.batch_size, count, *size, dtype=torch.float32, device=self.device)
        for picture, field in self._fields(size):
            decode.dense(field, self.word_to_class, out[picture], None if count == self.num_classes else classes)
        return out

    def __getitem__(self, picture: int) -> Scores:
        return self.map(lambda values: values[picture][None])

    def to(self, device: torch.device | str) -> Scores:
        """The same scores on another device."""
        return self.map(lambda values: values.to(device))

    def detach(self) -> Scores:
        """The same scores, cut off from the graph that made them."""
        return self.map(Tensor.detach)

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """The same kind of scores, of changed tensors."""

    @abstractmethod
    def field(self, picture: int, size: Size) -> Field:
        """The virtual (num_words, height, width) array of one picture."""

    @cached_property
    @abstractmethod
    def largest(self) -> float:
        """At least as large as the magnitude of every number the scores are made of; not finite if one is not."""

    def __len__(self) -> int:
        return self.batch_size

    def __iter__(self) -> Iterator[Scores]:
        return (self[picture] for picture in range(self.batch_size))

    def _best(self, size: Size, with_scores: bool) -> tuple[Tensor, Tensor]:
        """Labels and, if wanted, their scores; an empty tensor otherwise."""
        size = check_size(size)
        labels = torch.empty(self.batch_size, *size, dtype=torch.long, device=self.device)
        scores = torch.empty(labels.shape if with_scores else 0, dtype=torch.float32, device=self.device)
        for picture, field in self._fields(size):
            decode.best(field, self.word_to_class, labels[picture], scores[picture] if with_scores else None)
        return labels, scores

    def _fields(self, size: Size) -> Iterator[tuple[int, Field]]:
        """Each picture's number and field, inside which neither a graph nor autocast is."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for picture in range(self.batch_size):
                field = self.field(picture, size) if math.isfinite(self.largest) else None
                if field is None or not field.limits()[0] < torch.finfo(torch.float32).max:
                    raise NotFiniteError(
                        "The model's scores for this picture hold NaN or infinite values; run it in float32 (dtype) or "
                        "check its weights."
                    )
                yield picture, field


def check_size(size: Size, name: str = "size") -> Size:
    """``size`` as two ints of at least 1; a ValueError if it is something else."""
    height, width = (int(n) for n in size)
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be (height, width) of at least 1 x 1, not {tuple(size)}")
    return height, width
