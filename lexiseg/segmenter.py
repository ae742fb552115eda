"""A model made usable: a picture of any kind and a list of words in, a `Segmentation` out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch
from torch import Tensor

from lexiseg import notes
from lexiseg.background import BackgroundSource
from lexiseg.clip.text import TextEmbedder
from lexiseg.devices import EvaluationMode, compiled, float32_default, pick_device, pick_dtype
from lexiseg.errors import LexisegError
from lexiseg.exemplar_vectors import with_exemplars
from lexiseg.files import as_path, default_cache_folder, write_text
from lexiseg.images import DEFAULT_MAX_PIXELS, ImageSource, list_images
from lexiseg.label_ids import ignore_index
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.pictures import (
    Failure,
    HeldPicture,
    Picture,
    WindowSource,
    cut_windows,
    read_picture,
    run_in_batches,
    window_policy,
)
from lexiseg.refine import Refinement, refine, refined_dense
from lexiseg.scores import Scores
from lexiseg.scores.words import words_to_classes
from lexiseg.segmentation import Segmentation
from lexiseg.vocabulary import SINGLE_TEMPLATE, TemplateSource, Vocabulary, VocabularySource
from lexiseg.windows import Box, WindowPolicy
from lexiseg.words import describe, shorten, whole_number

_BATCH_SIZE = 4


@dataclass
class _Words:
    """A vocabulary as the model takes it."""

    vocabulary: Vocabulary
    text: Tensor
    word_to_class: Tensor | None
    seen_words: Tensor | None


class Segmenter:
    """Segments pictures by words with one model; threads may share it.

    Args:
        model: any segmentation model. It is moved to ``device`` and run in evaluation mode; its mode is restored
            afterwards, so a model in training can be looked at.
        device: such as "cpu", "cuda" or "cuda:1"; "auto" takes an accelerator where there is one; None leaves the model
            where it is.
        dtype: "bf16" or "fp16" (or torch's names for them) run the model in mixed precision; scores are decoded in
            float32 in any case. "auto" is bf16 on a processor that has instructions for it. None is float32.
        compile: compile the model with torch.compile; worth its minutes only for many pictures of few sizes.
        templates: the sentences for every vocabulary (a list, one template, "single" or "paper"). None takes the
            templates a vocabulary states, else the model's own; a ``Vocabulary`` with CLIP's single template counts as
            stating none.
        cache_dir: folder for text embeddings; None is ``$LEXISEG_CACHE`` or ``~/.cache/lexiseg``.
        disk_cache: False keeps text embeddings in memory only.
        max_pixels: larger pictures are refused before they are decoded.
        refine: how masks are cleaned up by what the picture shows: "none", "edges", "pamr", "regions", or a
            `lexiseg.refine.Refinement`; it composes with every system.

    Raises:
        LexisegError: the device or dtype is unknown or not there, or a template is wrong.
    """

    def __init__(
        self,
        model: SegmentationModel,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        templates: TemplateSource = None,
        cache_dir: str | Path | None = None,
        disk_cache: bool = True,
        max_pixels: float = DEFAULT_MAX_PIXELS,
        refine: str | Refinement | None = None,
    ) -> None:
        if not isinstance(model, SegmentationModel):
            raise LexisegError(f"A segmenter is made of a model, not {describe(model)}; lexiseg.load(name) makes one.")
        self.model = model if device is None else model.to(pick_device(device))
        self.dtype = pick_dtype(dtype, self.model.device)
        if isinstance(max_pixels, bool) or not isinstance(max_pixels, int | float) or not max_pixels > 0:
            raise LexisegError(f"The limit of pixels must be a number above 0, not {describe(max_pixels)}.")
        self.max_pixels = max_pixels
        self.refinement = Refinement.parse(refine)
        self.templates = None if templates is None else Vocabulary.parse("any", templates=templates).templates
        cache = default_cache_folder() if cache_dir is None else as_path(cache_dir, "cache_dir")
        self.embedder = TextEmbedder(model.clip, cache if disk_cache else None)
        self._forward: Any = compiled(model) if compile else model
        self._held = threading.local()  # one picture a thread
        self._evaluating = EvaluationMode(model, self.dtype)
        self._note_photographs = "emoji" in model.clip.name
        self._last: tuple[Any, Any, Vocabulary] | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings: Any) -> Segmenter:
        """`lexiseg.load` under the name that Hugging Face's libraries have for it; the arguments are its own."""
        import lexiseg

        return lexiseg.load(name, **settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model as a folder with a card, which `lexiseg.load` reads.

        Raises LexisegError if the folder cannot be written.
        """
        from lexiseg.weights.folder import save_model
        from lexiseg.weights.publish import CARD, model_card

        path = save_model(self.model, folder)
        write_text(path / CARD, model_card(path))
        return path

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Put the model on the Hugging Face hub as ``owner/name`` and return its address.

        The token comes from ``HF_TOKEN`` or ``hf auth login``. Raises LexisegError if there is none, or the hub
        refuses.
        """
        from lexiseg.weights.folder import save_model
        from lexiseg.weights.publish import push_folder

        with TemporaryDirectory() as folder:
            return push_folder(save_model(self.model, folder), repository, private=private)

    def refined(self, refine: str | Refinement | None) -> Segmenter:
        """This segmenter with another refinement of its masks; model and caches are shared.

        Raises LexisegError if there is no such refinement.
        """
        other = copy.copy(self)
        other.refinement = Refinement.parse(refine)
        return other

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    def vocabulary(self, classes: VocabularySource, *, background: BackgroundSource = None) -> Vocabulary:
        """The vocabulary that `predict` makes of ``classes``: templates chosen, seen classes marked, lengths checked.

        Raises LexisegError if something is wrong with the classes, or a name is too long for the text tower.
        """
        last = self._last
        if last is not None and classes is last[0] and background is last[1]:
            return last[2]
        default = self.templates or self.model.default_templates
        vocabulary = Vocabulary.parse(classes, background=background, default_templates=default)
        if self.templates is not None or vocabulary.templates == SINGLE_TEMPLATE:
            vocabulary = replace(vocabulary, templates=default)
        if self.model.seen_names:
            vocabulary = vocabulary.with_seen(self.model.seen_names)
        vocabulary.spoken().check_lengths(self.model.clip.count_tokens, self.model.clip.context_length)
        # Only what cannot change behind our back is remembered; a list could.
        if isinstance(classes, Vocabulary | str) and not isinstance(background, dict):
            self._last = classes, background, vocabulary
        return vocabulary

    @overload
    def predict(
        self,
        image: list[ImageSource] | tuple[ImageSource, ...],
        classes: VocabularySource,
        *,
        window: WindowSource = ...,
        batch_size: int = ...,
        background: BackgroundSource = ...,
    ) -> list[Segmentation]: ...

    @overload
    def predict(
        self,
        image: ImageSource | None = ...,
        classes: VocabularySource | None = ...,
        *,
        window: WindowSource = ...,
        batch_size: int = ...,
        background: BackgroundSource = ...,
    ) -> Segmentation: ...

    def predict(
        self,
        image: ImageSource | Sequence[ImageSource] | None = None,
        classes: VocabularySource | None = None,
        *,
        window: WindowSource = None,
        batch_size: int = _BATCH_SIZE,
        background: BackgroundSource = None,
    ) -> Segmentation | list[Segmentation]:
        """Segment a picture, or several, by words.

        Args:
            image: anything `lexiseg.images.read_image` takes, or a list of such; None takes the picture of `set_image`.
            classes: anything ``Vocabulary.parse`` takes, such as ``["giraffe", "tree, bush", "sky"]``.
            window: how the model is run over the picture: the side of a sliding window in pixels, its side and stride,
                0 for whole pictures, or a `WindowPolicy`; None takes the model's own way.
            batch_size: windows in one forward pass; those of several pictures share it. The result does not depend on
                it beyond rounding.
            background: replaces the vocabulary's background: "none"; a class name; or a score below which pixels are
                ignored (255).

        Returns:
            The result at the picture's own size, or a list of results in the pictures' order.

        Raises:
            LexisegError: a picture or the classes are wrong; one sentence says which and what to do.
        """
        if classes is None:
            raise LexisegError("No classes are given; name at least one, for example ['cat', 'tree, bush'].")
        if image is None:
            held: HeldPicture | None = getattr(self._held, "picture", None)
            if held is None:
                raise LexisegError("No picture is given; pass one to predict, or call set_image first, in this thread.")
            if window is not None and window_policy(self.model.window, window) != held.window:
                raise LexisegError("The window was chosen when the picture was set; give it to set_image instead.")
            return held.predict(classes, background=background)
        batch_size, policy = whole_number(batch_size, "The batch size", 1), window_policy(self.model.window, window)
        if isinstance(image, torch.Tensor) and not image.is_nested and image.ndim == 4:
            image = list(image)
        words = self._words(classes, background)
        many = isinstance(image, list | tuple)
        sources: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        pictures = (self._read(index, source, policy) for index, source in enumerate(sources))
        results = []
        for _, result in self._stream(pictures, words, batch_size, policy):
            if isinstance(result, LexisegError):
                raise result
            results.append(result)
        return results if many else results[0]

    def __call__(
        self, image: ImageSource | Sequence[ImageSource], candidate_labels: VocabularySource, **options: Any
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Segment as a pipeline of Hugging Face's transformers does; the arguments are those of `predict`.

        Returns `lexiseg.segmentation.Segmentation.segments`, ``[{"label", "score", "mask"}, ...]`` with masks as PIL
        images of mode L (255 inside); of several pictures a list of such. Raises LexisegError as `predict`.
        """
        result: Any = self.predict(image, candidate_labels, **options)  # type: ignore[arg-type]
        return [one.segments for one in result] if isinstance(result, list) else result.segments

    def predict_folder(
        self,
        target: str | Path | Iterable[str | Path],
        classes: VocabularySource,
        *,
        window: WindowSource = None,
        batch_size: int = _BATCH_SIZE,
        background: BackgroundSource = None,
    ) -> Iterator[tuple[Path, Segmentation | LexisegError]]:
        """Segment the pictures of a folder one after the other; pictures of one size share a forward pass.

        Args:
            target: a folder, a pattern, a file (see `lexiseg.images.list_images`), or a list of paths.
            classes: as in `predict`, and so are the others.
            window: see there.
            batch_size: see there.
            background: see there.

        Returns:
            An iterator of the path and its result, in the paths' order; where a picture is broken, the error that names
            it
            stands in the result's place. At most ``batch_size`` pictures are held at a time.

        Raises:
            LexisegError: there are no pictures, or the classes are wrong. This is raised at the call, not later.
        """
        if isinstance(target, str | Path):
            paths = list_images(target)
        elif isinstance(target, Iterable):
            paths = [as_path(path, "Each picture of a folder") for path in target]
        else:
            raise LexisegError(f"Pictures are a folder, a pattern or a list of paths, not {describe(target)}.")
        batch_size, policy = whole_number(batch_size, "The batch size", 1), window_policy(self.model.window, window)
        words = self._words(classes, background)
        return self._stream((self._read(path, path, policy) for path in paths), words, batch_size, policy)

    def set_image(
        self, image: ImageSource, *, window: WindowSource = None, batch_size: int = _BATCH_SIZE
    ) -> HeldPicture:
        """Look at a picture once, so that predicting it again only has to score words; arguments as in `predict`.

        Returns the held picture, whose `HeldPicture.predict` takes words. `predict` without a picture takes the one
        that was set last in the same thread. Raises LexisegError if the picture is wrong.
        """
        batch_size, policy = whole_number(batch_size, "The batch size", 1), window_policy(self.model.window, window)
        picture = self._read_one(image, policy)
        features = []
        with self._evaluating():
            for start in range(0, len(picture.boxes), batch_size):
                boxes = picture.boxes[start : start + batch_size]
                batch = self._crops([(picture, box) for box in boxes])
                features.append((self.model.encode_images(batch), len(boxes)))
        self._held.picture = HeldPicture(policy, partial(self._predict_held, picture, tuple(features), policy))
        return self._held.picture

    def scores(
        self,
        image: ImageSource,
        classes: VocabularySource,
        *,
        window: WindowSource = None,
        batch_size: int = _BATCH_SIZE,
        background: BackgroundSource = None,
    ) -> Scores:
        """The scores of one picture that `predict` makes its labels of, in factorised form; arguments as in `predict`.

        Raises LexisegError if the picture or the classes are wrong.
        """
        batch_size, policy = whole_number(batch_size, "The batch size", 1), window_policy(self.model.window, window)
        words = self._words(classes, background)
        picture = self._read_one(image, policy)
        for start in range(0, len(picture.boxes), batch_size):
            self._run([(picture, box) for box in picture.boxes[start : start + batch_size]], words)
        return picture.joined(policy)

    def pixels(self, image: ImageSource) -> Tensor:
        """A whole picture as the model sees it when it is run without windows: float32 (1, 3, h, w), normalised.

        Raises LexisegError if the picture is wrong.
        """
        picture = self._read_one(image, window_policy(self.model.window, 0))
        return self._crops([(picture, picture.boxes[0])])

    def _predict_held(
        self,
        picture: Picture,
        held: Sequence[tuple[ImageFeatures, int]],
        policy: WindowPolicy,
        classes: VocabularySource,
        background: BackgroundSource,
    ) -> Segmentation:
        words = self._words(classes, background)
        picture = replace(picture, parts=[])
        with self._evaluating():
            for features, count in held:
                scores = self.model.score(
                    features, words.text, word_to_class=words.word_to_class, seen_words=words.seen_words
                )
                picture.parts.extend(scores[index] for index in range(count))
        return self._decode(picture, words, policy)

    def _words(self, classes: VocabularySource, background: BackgroundSource) -> _Words:
        vocabulary = self.vocabulary(classes, background=background)
        notes.one_class(vocabulary)
        device = self.device
        with float32_default():
            text = self.model.embed_text(self.embedder, vocabulary.spoken()).to(device)
            if vocabulary.exemplars:
                with self._evaluating():
                    text = with_exemplars(self.model, self.embedder, text, vocabulary, self.max_pixels)
        joined = len(vocabulary.words) > len(vocabulary)
        return _Words(
            vocabulary,
            text,
            vocabulary.word_to_class.to(device) if joined and self.model.words_rule is None else None,
            vocabulary.seen_words.to(device) if bool(vocabulary.seen_words.any()) else None,
        )

    def _read(self, key: Any, source: ImageSource, policy: WindowPolicy) -> Picture | Failure:
        """Read a picture; an error is a value here, so that a folder can go on."""
        try:
            return self._read_one(source, policy, key)
        except LexisegError as error:
            return key, error

    def _read_one(self, source: ImageSource, policy: WindowPolicy, key: Any = 0) -> Picture:
        if self._note_photographs and notes.picture_world_model(source):
            self._note_photographs = False  # once is enough
        return read_picture(key, source, policy, self.max_pixels)

    def _stream(
        self, pictures: Iterable[Picture | Failure], words: _Words, batch_size: int, policy: WindowPolicy
    ) -> Iterator[tuple[Any, Segmentation | LexisegError]]:
        """Run the pictures in batches and yield their results in their order."""
        for picture in run_in_batches(pictures, batch_size, lambda batch: self._run(batch, words)):
            if not isinstance(picture, Picture):
                yield picture
                continue
            try:
                result: Segmentation | LexisegError = self._decode(picture, words, policy)
            except LexisegError as error:
                result = error
            yield picture.key, result

    def _run(self, batch: list[tuple[Picture, Box]], words: _Words) -> None:
        try:
            with self._evaluating():
                scores = self._forward(
                    self._crops(batch), words.text, word_to_class=words.word_to_class, seen_words=words.seen_words
                )
        except torch.OutOfMemoryError as error:
            raise LexisegError(
                f"The device has too little memory for {len(batch)} windows and {len(words.vocabulary):,} classes at "
                "once; lower the batch size or use dtype bf16."
            ) from error
        for index, (picture, _) in enumerate(batch):
            picture.parts.append(scores[index])

    def _crops(self, batch: list[tuple[Picture, Box]]) -> Tensor:
        """Windows of one shape as the model takes them: float32 (B, 3, H, W) on its device."""
        return cut_windows(batch, self.model.mean, self.model.std, self.device)

    def _decode(self, picture: Picture, words: _Words, policy: WindowPolicy) -> Segmentation:
        vocabulary = words.vocabulary
        scores = picture.joined(policy)
        try:
            with float32_default():
                found, values = self._labels(scores, picture.image, vocabulary)
        except LexisegError as error:
            raise LexisegError(f"{shorten(picture.name, 200)}: {error}") from error
        labels, best = found.cpu(), values.cpu()
        labels = labels.to(torch.uint8 if len(vocabulary) <= 255 else torch.int32)
        if vocabulary.background.threshold is not None:
            labels[best < vocabulary.background.threshold] = ignore_index(len(vocabulary))
        metadata = {"system": self.model.system, "clip": self.model.clip.name, "window": asdict(policy)}
        dtype = str(self.dtype or torch.float32).removeprefix("torch.")
        metadata |= {"dtype": dtype, "refine": self.refinement.kind}
        return Segmentation(labels, vocabulary, best, picture.image, picture.name, metadata)

    def _labels(self, scores: Scores, image: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """Labels (H, W) and winning scores: refined, or by the rule of a training-free protocol."""
        rule = self.model.words_rule
        if rule is None:
            return refine(scores, image, self.refinement)
        # Protocols only: every word at every pixel, as their authors have it.
        cosines = refined_dense(scores, image, self.refinement)
        owners, background = vocabulary.word_to_class.to(cosines.device), vocabulary.names.index("background")
        labels, probabilities = words_to_classes(cosines, owners, rule, background)
        return labels, probabilities.amax(dim=0)
