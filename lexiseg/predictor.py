"""From pictures and words to results, whatever runs the model; nothing here needs torch."""

from __future__ import annotations

import copy
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, overload

from lexiseg import notes
from lexiseg.background import BackgroundSource
from lexiseg.class_list import class_source
from lexiseg.errors import LexisegError
from lexiseg.files import as_path
from lexiseg.images import DEFAULT_MAX_PIXELS, ImageSource, list_images
from lexiseg.label_ids import ignore_index
from lexiseg.pictures import Failure, HeldPicture, Picture, WindowSource, read_picture, run_in_batches, window_policy
from lexiseg.renames import renamed_method
from lexiseg.segmentation import Segmentation
from lexiseg.templates import SINGLE_TEMPLATE
from lexiseg.vocabulary import TemplateSource, Vocabulary, VocabularySource
from lexiseg.windows import Box, WindowPolicy
from lexiseg.words import describe, quoted, shorten, whole_number

if TYPE_CHECKING:
    from typing_extensions import Self

    from lexiseg.refine import Refinement
    from lexiseg.scores import Scores

BATCH_SIZE = 4
"""Windows in one forward pass."""


@dataclass
class Words:
    """A vocabulary as the model takes it: tensors, or numpy arrays."""

    vocabulary: Vocabulary
    text: Any
    word_to_class: Any
    seen_words: Any


class _Held(threading.local):
    """One picture a thread."""

    picture: HeldPicture | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Held, ()  # a copy holds none


class Predictor(ABC):
    """What `lexiseg.load` returns: a model that segments pictures by words. Threads may share it; it can be pickled.

    A subclass turns words into text embeddings (`_words`), runs windows (`_run`; for `set_image`, `_encode`) and makes
    scores (`_joined`) or labels (`labels_of`) of what they give. ``model`` has ``system``, ``options``, ``clip``,
    ``window``, ``default_templates`` and ``seen_names``; ``templates`` replace those a vocabulary states. Raises
    LexisegError if a template, the refinement or the limit of pixels is wrong.
    """

    _arrays = False  # whether pictures are read into arrays instead of tensors
    # asked before each forward pass; where it says yes the work ends with a LexisegError, since nobody waits for it
    interrupted: Callable[[], bool] | None = None

    def __init__(
        self,
        model: Any,
        *,
        templates: TemplateSource = None,
        max_pixels: float = DEFAULT_MAX_PIXELS,
        refine: str | Refinement | None = None,
    ) -> None:
        if isinstance(max_pixels, bool) or not isinstance(max_pixels, int | float) or not max_pixels > 0:
            raise LexisegError(f"The limit of pixels must be a number above 0, not {quoted(max_pixels)}.")
        self.model = model
        self.dtype: Any = None
        self.max_pixels = max_pixels
        self.refinement = _refinement(refine)
        self.templates = None if templates is None else Vocabulary.parse("any", templates=templates).templates
        self._held = _Held()
        self._note_photographs = (model.clip.trained_on or "").startswith("picture-world")
        self._last: tuple[Any, Any, Vocabulary] | None = None

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the model's weights: results of equal models can be put together."""

    def set_image(
        self, image: ImageSource, *, window: WindowSource = None, batch_size: int = BATCH_SIZE
    ) -> HeldPicture:
        """Encode a picture once, so that predicting it again only has to score words; see `predict`.

        Returns the held picture, whose `HeldPicture.predict` takes words. `predict` without a picture takes the one
        that was set last in the same thread. Raises LexisegError if the picture is wrong.
        """
        batch_size, policy = whole_number(batch_size, "The batch size", 1), window_policy(self.model.window, window)
        scored = self._encode(self._read_one(image, policy), batch_size)

        def predict(classes: VocabularySource, *, background: BackgroundSource = None) -> Segmentation:
            words = self._words(classes, background)
            return self._decode(scored(words), words, policy)

        self._held.picture = HeldPicture(policy, predict)
        return self._held.picture

    @abstractmethod
    def _words(self, classes: VocabularySource, background: BackgroundSource) -> Words:
        """The classes as the model takes them."""

    @abstractmethod
    def _run(self, batch: list[tuple[Picture, Box]], words: Words) -> None:
        """Run windows of one shape and add the scores of each to its picture's parts."""

    def _run_all(self, picture: Picture, words: Words, batch_size: int) -> Picture:
        """The picture with the scores of all its windows."""
        picture = replace(picture, parts=[])
        for start in range(0, len(picture.boxes), batch_size):
            self._run_unless_interrupted([(picture, box) for box in picture.boxes[start : start + batch_size]], words)
        return picture

    def _run_unless_interrupted(self, batch: list[tuple[Picture, Box]], words: Words) -> None:
        if self.interrupted is not None and self.interrupted():
            raise LexisegError("Cancelled, because no client is waiting for the result.")
        self._run(batch, words)

    def _encode(self, picture: Picture, batch_size: int) -> Callable[[Words], Picture]:
        """What turns words into the picture with its scores; whatever the words do not change is done here."""
        return lambda words: self._run_all(picture, words, batch_size)

    @abstractmethod
    def _joined(self, picture: Picture, words: Words, policy: WindowPolicy) -> Scores:
        """The scores of a picture whose windows were all run."""

    @abstractmethod
    def labels_of(self, picture: Picture, words: Words, policy: WindowPolicy) -> tuple[Any, Any]:
        """The labels (H, W) of a picture whose windows were all run, refined, and their scores."""

    @abstractmethod
    def _about(self) -> dict[str, str]:
        """What a result says of how the model was run."""

    def identity(self, vocabulary: Vocabulary, window: WindowSource = None) -> dict[str, Any]:
        """What the labels of any picture depend on, as JSON holds it: work is resumed only if all of it is the same."""
        options = self.model.options.model_dump(mode="json")
        return {
            "model": {"system": self.model.system, "options": options, "sha256": self.fingerprint()},
            **vocabulary.to_dict(),
            "classes": {str(place): entry.to_dict() for place, entry in enumerate(vocabulary.classes, 1)},
            "exemplars": {one.word: one.content_hash() for _, one in vocabulary.exemplars},
            "window": asdict(window_policy(self.model.window, window)),
            "dtype": str(self.dtype),
            "refine": self.refinement.kind,
        }

    def with_refinement(self, refine: str | Refinement | None) -> Self:
        """A copy with another refinement of masks; model and caches are shared, a picture that was set is not.

        Raises LexisegError if there is no such refinement.
        """
        other = copy.copy(self)
        vars(other).update(refinement=_refinement(refine), _held=_Held())
        return other

    refined = renamed_method("refined", "with_refinement")

    def scores(
        self,
        image: ImageSource,
        classes: VocabularySource,
        *,
        window: WindowSource = None,
        batch_size: int = BATCH_SIZE,
        background: BackgroundSource = None,
    ) -> Scores:
        """One picture's scores in factorised form, from which `predict` makes its labels; arguments as in `predict`.

        Raises LexisegError if the picture or the classes are wrong.
        """
        batch_size, policy = whole_number(batch_size, "The batch size", 1), window_policy(self.model.window, window)
        words = self._words(classes, background)
        return self._joined(self._run_all(self._read_one(image, policy), words, batch_size), words, policy)

    def _decode(self, picture: Picture, words: Words, policy: WindowPolicy) -> Segmentation:
        """The result of a picture whose windows were all run."""
        vocabulary = words.vocabulary
        try:
            labels, best = self.labels_of(picture, words, policy)
        except LexisegError as error:
            raise type(error)(f"{shorten(picture.name, 200)}: {error}") from error
        if (threshold := vocabulary.background.threshold) is not None:
            labels[best < threshold] = ignore_index(len(vocabulary))
            if best.max() < threshold:
                notes.no_class(threshold)
        metadata = {"system": self.model.system, "clip": self.model.clip.name, "window": asdict(policy)}
        metadata |= {**self._about(), "refine": self.refinement.kind}
        return Segmentation(labels, vocabulary, best, picture.image, picture.name, metadata)

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
        vocabulary.with_placeholders().check_lengths(self.model.clip.count_tokens, self.model.clip.context_length)
        # Only what cannot change behind our back is remembered; a list could, and so could a file.
        words = isinstance(classes, str) and class_source(classes) is classes
        if (words or isinstance(classes, Vocabulary)) and not isinstance(background, dict):
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
        batch_size: int = BATCH_SIZE,
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
            held = self._held.picture
            if held is None:
                raise LexisegError("No picture is given; pass one to predict, or call set_image first, in this thread.")
            if window is not None and window_policy(self.model.window, window) != held.window:
                raise LexisegError("The window was chosen when the picture was set; give it to set_image instead.")
            return held.predict(classes, background=background)
        batch_size, policy = whole_number(batch_size, "The batch size", 1), window_policy(self.model.window, window)
        if "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor):
            image = list(image) if not image.is_nested and image.ndim == 4 else image
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
        batch_size: int = BATCH_SIZE,
        background: BackgroundSource = None,
    ) -> Iterator[tuple[Path, Segmentation | LexisegError]]:
        """Segment the pictures of a folder one after the other; pictures of one size share a forward pass.

        ``target``: a folder, a pattern, a file (see `lexiseg.images.list_images`), or a list of paths; the rest as in
        `predict`. Returns an iterator of the path and its result, in the paths' order; for a broken picture, the
        error that names it takes the result's place. At most ``batch_size`` pictures are held at a time. Raises
        LexisegError if there are no pictures, or the classes are wrong: at the call, not later.
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

    def _read(self, key: Any, source: ImageSource, policy: WindowPolicy) -> Picture | Failure:
        """Read a picture; an error is a value here, so that a folder can go on."""
        try:
            return self._read_one(source, policy, key)
        except LexisegError as error:
            return key, error

    def _read_one(self, source: ImageSource, policy: WindowPolicy, key: Any = 0) -> Picture:
        if self._note_photographs and notes.picture_world_model(source):
            self._note_photographs = False  # once is enough
        return read_picture(key, source, policy, self.max_pixels, arrays=self._arrays)

    def _stream(
        self, pictures: Iterable[Picture | Failure], words: Words, batch_size: int, policy: WindowPolicy
    ) -> Iterator[tuple[Any, Segmentation | LexisegError]]:
        """Run the pictures in batches and yield their results in their order."""
        for picture in run_in_batches(pictures, batch_size, lambda batch: self._run_unless_interrupted(batch, words)):
            if not isinstance(picture, Picture):
                yield picture
                continue
            if self.refinement.kind == "regions" and self.refinement.regions is None:
                from lexiseg.refine import sam

                sam()  # here, so that a SAM that cannot be had is said once and not of every picture
            try:
                result: Segmentation | LexisegError = self._decode(picture, words, policy)
            except LexisegError as error:
                result = error
            yield picture.key, result


def _refinement(refine: str | Refinement | None) -> Any:
    """What is asked for; torch is not imported as long as that is nothing."""
    if refine in (None, "none"):
        return SimpleNamespace(kind="none")
    from lexiseg.refine import Refinement

    return Refinement.parse(refine)
