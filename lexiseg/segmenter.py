"""A model made usable: a picture of any kind and a list of words in, a `Segmentation` out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lexiseg import notes
from lexiseg.background import BackgroundSource
from lexiseg.clip.text import TextEmbedder
from lexiseg.devices import Compiled, EvaluationMode, pick_device, pick_dtype, torch_defaults
from lexiseg.errors import LexisegError
from lexiseg.exemplar_vectors import with_exemplars
from lexiseg.files import as_path, default_cache_folder, write_text
from lexiseg.images import DEFAULT_MAX_PIXELS, ImageSource
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.pictures import Picture, cut_windows, window_policy
from lexiseg.predictor import Predictor, Words
from lexiseg.refine import Refinement, refine, refined_dense
from lexiseg.scores import Scores
from lexiseg.scores.words import words_to_classes
from lexiseg.vocabulary import TemplateSource, VocabularySource
from lexiseg.weights.hashes import weights_hash
from lexiseg.windows import Box, WindowPolicy
from lexiseg.words import describe


class Segmenter(Predictor):
    """Segments pictures by words with one model; threads may share it.

    Args:
        model: any segmentation model. It is moved to ``device`` and run in evaluation mode; its mode is restored
            afterwards, so a model can be tried while it trains.
        device: such as "cpu", "cuda" or "cuda:1"; "auto" uses an accelerator if there is one; None leaves the model
            where it is.
        dtype: "bf16" or "fp16" (or torch's names for them) run the model in mixed precision; scores are decoded in
            float32 in any case. "auto" is bf16 on a processor that has instructions for it. None is float32.
        compile: compile the model with torch.compile; takes minutes, pays off for many pictures of few sizes.
        templates: the sentences for every vocabulary (a list, one template, "single" or "paper"). None takes the
            templates a vocabulary states, else the model's own; a ``Vocabulary`` with CLIP's single template counts as
            stating none.
        cache_dir: folder for text embeddings; None is ``$LEXISEG_CACHE`` or ``~/.cache/lexiseg``.
        disk_cache: False keeps text embeddings in memory only.
        max_pixels: larger pictures are refused before they are decoded.
        refine: how masks are refined by the picture: "none", "edges", "pamr", "regions", or a
            `lexiseg.refine.Refinement`; it composes with every system.

    Raises:
        LexisegError: the device or dtype is unknown or unavailable, or a template is wrong.
    """

    model: SegmentationModel

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
        super().__init__(model, templates=templates, max_pixels=max_pixels, refine=refine)
        self.model = model if device is None else model.to(pick_device(device))
        self.dtype = pick_dtype(dtype, self.model.device)
        cache = default_cache_folder() if cache_dir is None else as_path(cache_dir, "cache_dir")
        self.embedder = TextEmbedder(model.clip, cache if disk_cache else None)
        self._forward: Any = Compiled(model) if compile else model
        self._evaluating = EvaluationMode(model, self.dtype)

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings: Any) -> Segmenter:
        """`lexiseg.load` under the name that Hugging Face's libraries use, with the same arguments."""
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

    def fingerprint(self) -> str:
        """See `Predictor.fingerprint`."""
        return weights_hash(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    def pixels(self, image: ImageSource, policy: WindowPolicy | None = None) -> Tensor:
        """A whole picture as the model sees it when it is run without windows: float32 (1, 3, h, w), normalised.

        ``policy``: how it is resized; None is the model's own. Raises LexisegError if the picture is wrong.
        """
        picture = self._read_one(image, window_policy(policy or self.model.window, 0))
        return self._crops([(picture, picture.boxes[0])])

    def _encode(self, picture: Picture, batch_size: int) -> Callable[[Words], Picture]:
        held: list[tuple[ImageFeatures, int]] = []
        with self._evaluating():
            for start in range(0, len(picture.boxes), batch_size):
                batch = [(picture, box) for box in picture.boxes[start : start + batch_size]]
                held.append((self.model.encode_images(self._crops(batch)), len(batch)))

        def scored(words: Words) -> Picture:
            found = replace(picture, parts=[])
            with self._evaluating():
                for features, count in held:
                    scores = self.model.score(
                        features, words.text, word_to_class=words.word_to_class, seen=words.seen_words
                    )
                    found.parts.extend(scores[index] for index in range(count))
            return found

        return scored

    def _words(self, classes: VocabularySource, background: BackgroundSource) -> Words:
        vocabulary = self.vocabulary(classes, background=background)
        notes.one_class(vocabulary)
        device = self.device
        with torch_defaults():
            text = self.model.embed_text(self.embedder, vocabulary.with_placeholders()).to(device)
            if vocabulary.exemplars:
                with self._evaluating():
                    text = with_exemplars(self.model, self.embedder, text, vocabulary, self.max_pixels)
        joined = len(vocabulary.words) > len(vocabulary)
        return Words(
            vocabulary,
            text,
            vocabulary.word_to_class.to(device) if joined and self.model.postprocessing is None else None,
            vocabulary.seen_words.to(device) if bool(vocabulary.seen_words.any()) else None,
        )

    def _run(self, batch: list[tuple[Picture, Box]], words: Words) -> None:
        try:
            with self._evaluating():
                scores = self._forward(
                    self._crops(batch), words.text, word_to_class=words.word_to_class, seen=words.seen_words
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

    def _joined(self, picture: Picture, words: Words, policy: WindowPolicy) -> Scores:
        return picture.joined(policy)

    def _about(self) -> dict[str, str]:
        return {"dtype": str(self.dtype or torch.float32).removeprefix("torch.")}

    def labels_of(self, picture: Picture, words: Words, policy: WindowPolicy) -> tuple[Tensor, Tensor]:
        """The labels (H, W) of a picture whose windows were all run, refined, and their scores."""
        scores, image, rule = picture.joined(policy), picture.image, self.model.postprocessing
        with torch_defaults():
            if rule is None:
                labels, best = refine(scores, image, self.refinement)
                return labels.cpu(), best.cpu()
            # Protocols only: every word at every pixel, as their authors have it.
            cosines = refined_dense(scores, image, self.refinement)
            vocabulary = words.vocabulary
            owners, background = vocabulary.word_to_class.to(cosines.device), vocabulary.names.index("background")
            labels, probabilities = words_to_classes(cosines, owners, rule, background)
            return labels.cpu(), probabilities.amax(dim=0).cpu()
