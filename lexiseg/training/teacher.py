"""Self-training with a teacher: a model that is trained already says what pixels without a label show.

ZSSeg and MAFT (App. C.2) label the training set once, with a trained model, and train anew with these labels. Here the
teacher labels each crop when it is trained on, which needs no labels on disk; the model that learns is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.models.base import SegmentationModel
from lexiseg.scores import GridScores, RegionScores
from lexiseg.training.initial import refuse_leaks
from lexiseg.training.labels import UNLABELLED
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model

# More than scores ever differ by, and little enough that nothing of a score is lost beside it.
_NEVER = 1e4


class Teacher:
    """A trained model that gives pixels without a label their unseen class.

    Args:
        model: of any system.
        vocabulary: all classes, those with masks flagged as seen.
        cache_dir: of the text embeddings on disk; None keeps them in memory.

    Raises:
        LexisegError: it had masks of a class that is unseen now.
    """

    def __init__(self, model: SegmentationModel, vocabulary: Vocabulary, *, cache_dir: Path | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        words = Vocabulary.parse(vocabulary, templates=model.default_templates)
        self._text = model.embed_text(TextEmbedder(model.clip, cache_dir), words)
        self._seen = torch.tensor([entry.seen is True for entry in vocabulary.classes])

    @torch.no_grad()
    def label(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Fill in the pixels labelled -1.

        Args:
            images: (B, 3, H, W), normalised for the model that learns.
            labels: (B, h, w) ids, the label of no class, and -1.
            mean: that the images were normalised with, in 0..1.
            std: the same.

        Returns:
            (B, h, w), -1 replaced by the unseen class with the largest score.

        Raises:
            LexisegError: the model's scores cannot be told to leave classes out.
        """
        missing = labels == UNLABELLED
        if not bool(missing.any()):
            return labels
        self.model.to(images.device)
        own = (self.model.mean, self.model.std)
        if own != (tuple(mean), tuple(std)):
            before, after = (
                [images.new_tensor(values)[:, None, None] for values in pair] for pair in ((mean, std), own)
            )
            images = (images * before[1] + before[0] - after[0]) / after[1]
        seen = self._seen.to(images.device)
        scores = self.model.score(self.model.encode_images(images), self._text.to(images.device), seen_words=seen)
        if not isinstance(scores, GridScores | RegionScores):
            raise LexisegError(f"A model of the system '{self.model.system}' cannot be a teacher; choose another one.")
        scores.offsets = seen.float() * _NEVER
        return torch.where(missing, scores.label_map((labels.shape[-2], labels.shape[-1])), labels)


def load_teacher(name: str, vocabulary: Vocabulary, *, cache_dir: Path | None = None) -> Teacher:
    """Read the teacher of a self-training.

    Args:
        name: folder of a run or of a model.
        vocabulary: all classes, those with masks flagged as seen.
        cache_dir: see `Teacher`.

    Raises:
        LexisegError: there is no such model, or it had masks of a class that is unseen now.
    """
    model = load_model(name)
    seen = [entry.name for entry in vocabulary.classes if entry.seen]
    if len(seen) == len(vocabulary):
        raise LexisegError("Every class has masks, so a teacher has nothing to say; leave out 'teacher'.")
    refuse_leaks(f"The teacher '{name}'", model.seen_names, seen, vocabulary)
    return Teacher(model, vocabulary, cache_dir=cache_dir)
