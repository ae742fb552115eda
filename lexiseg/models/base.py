"""The interface of every segmentation system: images and text embeddings in, factorised scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.checking import check
from lexiseg.clip.load import count_parameters, shapes_of
from lexiseg.clip.model import CLIP
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.models.options import ModelOptions, Triple
from lexiseg.scores import Scores
from lexiseg.scores.words import Postprocessing
from lexiseg.templates import SINGLE_TEMPLATE
from lexiseg.vocabulary import Vocabulary
from lexiseg.windows import WindowPolicy


@dataclass(frozen=True)
class ImageFeatures:
    """What a model computes from a batch of images, so that many vocabularies can be scored against it.

    Attributes:
        size: (H, W) of the images the features are of.
        values: tensors by name; each system says which.
    """

    size: tuple[int, int]
    values: dict[str, Tensor]


class SegmentationModel(nn.Module, ABC):
    """A segmentation system: one file that turns images and text embeddings into `Scores`.

    Code that knows no particular system turns those into pixels, windows, files and training steps.

    Args:
        clip: the towers; the model owns them from here on.
        options: the system's options; None for its defaults.
        seen_names: names of the classes that had masks in training; empty for a training-free model.

    Attributes:
        system: name of the system, as in ``config.json``.
        options_class: the pydantic class of its options.
        family: systems of the same family can be initialised from each other's models, see `init_from`; "" for none.
        no_graph: why a system without `score_grid` has none, said of it where it is to be exported.
        metadata: free-form notes saved with the model (data, steps, measured results).
        weighs_classes: whether its mask losses use ``class_weights``.
        class_weights: (C,) factors on the losses of the classes trained on; None is 1 for all.
        postprocessing: makes labels by probabilities of words, where a protocol of the training-free papers asks for
            it; None compares scores.
    """

    system: ClassVar[str]
    options_class: ClassVar[type[ModelOptions]]
    family: ClassVar[str] = ""
    no_graph: ClassVar[str] = "has no grid of patches that vectors of words score"
    weighs_classes: ClassVar[bool] = False
    class_weights: Tensor | None = None

    def __init__(self, clip: CLIP, options: ModelOptions | None = None, seen_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.clip = clip
        self.options = options or self.parse_options({})
        self.seen_names = tuple(seen_names)
        self.default_templates: tuple[str, ...] = SINGLE_TEMPLATE
        self.metadata: dict[str, Any] = {}
        self.postprocessing: Postprocessing | None = None

    @classmethod
    def build(cls, clip: CLIP, options: dict[str, Any] | None = None, **fields: Any) -> SegmentationModel:
        """Build the system with options given as a plain dict; a wrong one is a `LexisegError` that names it."""
        return cls.variant(options or {})(clip, cls.parse_options(options or {}), **fields)

    @classmethod
    def variant(cls, options: dict[str, Any]) -> type[SegmentationModel]:
        """The class that these options ask for: this one, unless the system has several variants."""
        return cls

    @classmethod
    def parse_options(cls, options: dict[str, Any]) -> ModelOptions:
        """Check options given as a plain dict; a wrong one is a `LexisegError` that names it."""
        return check(cls.variant(options).options_class, options, f"The system '{cls.system}'", noun="option")

    @property
    def mean(self) -> Triple:
        """Mean the images are normalised with, RGB in 0..1: the option, or CLIP's."""
        return getattr(self.options, "mean", None) or self.clip.mean

    @property
    def std(self) -> Triple:
        """Standard deviation the images are normalised with, RGB in 0..1: the option, or CLIP's."""
        return getattr(self.options, "std", None) or self.clip.std

    @property
    def window(self) -> WindowPolicy:
        """How it is run over a picture by default."""
        return self.options.window()

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.clip.patch_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.clip.device

    @property
    def learned_prompts(self) -> PromptLearner | None:
        """The part of the model that is its learned text prompts, or None."""
        return next((part for part in self.children() if isinstance(part, PromptLearner)), None)

    def init_from(self, other: SegmentationModel, what: str) -> tuple[str, ...]:
        """Start from a trained model: take its weights, CLIP's included, of this system or its `family`.

        Only weights are taken, so options that change no tensor's shape may differ.

        Args:
            other: the trained model. Without values (on the device "meta") it tells whether it would fit.
            what: names it in messages, such as "The initial model 'runs/a'".

        Returns:
            names of the parts taken, where only some fit; () if all do.

        Raises:
            LexisegError: it is of another system or of other shapes.
        """
        there, here = shapes_of(other), shapes_of(self)
        related = bool(self.family) and self.family == other.family and there == here
        if other.system != self.system and not related:
            raise LexisegError(
                f"{what} is of the system '{other.system}', but the recipe trains '{self.system}'; start from a model "
                "of that system."
            )
        if there != here:
            key = next(key for key in (*here, *there) if here.get(key) != there.get(key))
            raise LexisegError(
                f"{what} does not fit: {key} is {there.get(key, 'missing')} in it and {here.get(key, 'missing')} in "
                "the recipe's; give both the same options."
            )
        self.load_state_dict(other.state_dict())
        return ()

    def check_start(self, *, proposals: bool, steps: int) -> None:
        """Check before training that the parts it does not train have trained weights.

        Args:
            proposals: whether the proposals' weights come from a trained model.
            steps: how many the training has.

        Raises:
            LexisegError: some have none.
        """

    def fit_to_patches(self, images: Tensor) -> Tensor:
        """Resize images (B, 3, H, W) bilinearly so that both sides are multiples of the patch size, at least one."""
        patch = self.patch_size
        height, width = images.shape[-2:]
        target = tuple(max(round(side / patch), 1) * patch for side in (height, width))
        if target == (height, width):
            return images
        return F.interpolate(images, size=target, mode="bilinear", align_corners=False)

    def embed_text(self, embedder: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
        """Embed the words of a vocabulary in this system's way; `score` and `losses` take the result as text.

        By default they are put into the learned prompts, or else into the vocabulary's templates, encoded and averaged.
        A system with its own templates or sources of text overrides it and calls the embedder, which caches vectors.

        Returns:
            (W, D) unit vectors, one per word; or (W, S, D) for a system with S sources of text.

        Raises:
            LexisegError: a word is too long for the text tower.
        """
        prompts = self.learned_prompts
        if prompts is None:
            return embedder(vocabulary)
        return embedder.embed_prompted(prompts, vocabulary.words, disk=not self.training)

    def embed_exemplar(self, image: Tensor, mask: Tensor) -> Tensor:
        """The text row of a thing in a picture, for a system with several vectors per word that takes pictures too.

        Args:
            image: uint8 (3, H, W).
            mask: where the thing is, bool (H, W).

        Returns:
            one row of what `embed_text` gives.

        Raises:
            LexisegError: the system does not take pictures.
        """
        raise LexisegError(
            f"{self.system} has several vectors per word, so it cannot use a picture as a class; use words."
        )

    def training_text(self, vocabulary: Vocabulary, text: Tensor) -> Tensor:
        """The text for a training step, from `embed_text`'s result; with gradients where the text tower is trained."""
        prompts = self.learned_prompts
        if prompts is None or not any(parameter.requires_grad for parameter in prompts.parameters()):
            return text
        return prompts(self.clip, vocabulary.words)

    @abstractmethod
    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Compute everything that does not depend on the words.

        Args:
            images: (B, 3, H, W) float, normalised with `mean` and `std`; any H and W.
        """

    @abstractmethod
    def score(
        self, features: ImageFeatures, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> Scores:
        """Score words against images.

        Args:
            features: from `encode_images`.
            text: (W, D) unit vectors, one per word.
            word_to_class: (W,) class of each word, non-decreasing; its best word counts. None = each word is a class.
            seen: (W,) bool, True for words that had masks in training; None = unknown, treated as not seen.
        """

    def seen_offsets(self, seen: Tensor | None, text: Tensor) -> Tensor | None:
        """What is subtracted from the score of each word, (W,), or None; the option ``seen_offset``."""
        offset = getattr(self.options, "seen_offset", 0.0)
        return None if seen is None or not offset else seen.to(text.device).float() * offset

    def score_grid(self, features: ImageFeatures, text: Tensor) -> Tensor:
        """The values (B, W, h, w) behind `score`, for systems that score patches; an exported graph returns them."""
        raise NotImplementedError

    def check_exportable(self) -> None:
        """Raise LexisegError if the model cannot be exported as a graph."""
        if type(self).score_grid is SegmentationModel.score_grid:
            raise LexisegError(
                f"{self.system} {self.no_graph}, so it cannot be exported as a fixed graph; export a one-stage or a "
                "training-free model."
            )

    @property
    def exports_any_size(self) -> bool:
        """Whether one exported graph takes images of any size."""
        return True

    def forward(
        self, images: Tensor, text: Tensor, *, word_to_class: Tensor | None = None, seen: Tensor | None = None
    ) -> Scores:
        """Call `encode_images`, then `score`; the arguments are theirs."""
        return self.score(self.encode_images(images), text, word_to_class=word_to_class, seen=seen)

    def losses(self, images: Tensor, labels: Tensor, text: Tensor, *, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Training losses.

        Args:
            images: (B, 3, H, W) float, normalised.
            labels: (B, h, w) long in 0..C-1 in the order of ``text``, 255 = no class.
            text: (C, D) unit vectors of the classes trained on.
            seen: (C,) bool; given for self-training only, see the system.

        Returns:
            named scalars; ``"loss"`` is the sum to minimise and alone carries the gradient.

        Raises:
            LexisegError: the system is training-free.
        """
        raise LexisegError(f"{self.system} is training-free, so there is nothing to train; choose another system.")

    def trainable_names(self) -> tuple[str, ...]:
        """Names of the parameters that training changes, as in ``named_parameters``; none for a training-free model."""
        return ()

    def set_trainable(self) -> SegmentationModel:
        """Make exactly the `trainable_names` require gradients, and return the model."""
        names = set(self.trainable_names())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)
        return self

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of all parameters that training changes."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def num_parameters(self, *, trainable: bool = False) -> int:
        """Count parameters, all or only those that training changes."""
        return count_parameters(self, trainable=trainable)
