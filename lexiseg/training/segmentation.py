"""Training a segmentation system on a dataset: the task, and what a label id means to its loss.

ZegCLIP (Sec. 4.1) and Cascade-CLIP (Sec. 4.3) train inductively, transductively (self-training) and fully supervised:

============= =========================== ====================================================================
setting       text of                     labels
============= =========================== ====================================================================
inductive     the seen classes            indices among the seen ones; everything else is 255
transductive  all classes                 ids of seen classes; 255; -1 = no label, filled in by the model itself
supervised    all classes                 ids of all classes; 255
============= =========================== ====================================================================

In every setting the losses treat 255 as a negative of every class, as the authors' code does. Where there are more than
255 classes, 65535 stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lexiseg.clip.text import TextEmbedder
from lexiseg.data.base import SegmentationDataset, read_label, remap_to_seen, seen_ids
from lexiseg.data.sets.dataset import nothing_labelled
from lexiseg.data.transforms import Pipeline
from lexiseg.errors import LexisegError, warn
from lexiseg.evaluation.metrics import SCALARS
from lexiseg.evaluation.run import run_evaluation, spread
from lexiseg.label_ids import IGNORE_INDEX, WIDE_IGNORE_INDEX, ignore_index
from lexiseg.losses.reduction import reduction_weight
from lexiseg.models.base import SegmentationModel
from lexiseg.normalisation import normalise, pixels_of
from lexiseg.recipes.schema import Setting, Unlabelled
from lexiseg.scores import GridScores, RegionScores
from lexiseg.segmenter import Segmenter
from lexiseg.training.engine import Task, part_of, shuffled
from lexiseg.vocabulary import TemplateSource, Vocabulary, VocabularyClass
from lexiseg.weights import load_model
from lexiseg.weights.folder import save_model
from lexiseg.words import word_key

UNLABELLED = -1
"""Label of a pixel whose class self-training chooses itself."""

PADDING = -2
"""Label of padding pixels, where they must be told from void ones."""

# More than scores ever differ by, and little enough that nothing of a score is lost beside it.
_NEVER = 1e4


class SegmentationBatch(NamedTuple):
    """Pictures and labels of one forward pass."""

    images: Tensor  # ``(B, 3, H, W)`` float32, normalised
    # ``(B, h, w)`` int64, of the pictures' size or smaller: indices into the classes whose text is trained on, 255 (or
    # 65535) = none of them, and in self-training -1 = to be chosen by the model
    labels: Tensor
    names: tuple[str, ...]  # of the samples


@dataclass(eq=False, repr=False)
class SegmentationTask(Task):
    """A segmentation system, a dataset, and the text of the classes that take part in the setting.

    In self-training pixels without a label get the model's own best unseen class, chosen anew in every step from the
    masks that step computes (dropout on, no teacher, no threshold; ZegCLIP's self-training as its code does it).
    ``"unlabelled"`` in the log is the percentage of such pixels: at 0 the data marks none, and there is nothing to
    learn about unseen classes. In inductive training the names of unseen classes are never embedded.

    Raises LexisegError if the dataset is empty, or its classes do not suit the setting. Raises ValueError if the
    model's seen names are not the dataset's.
    """

    # the system; its seen names must be the classes with masks in training, in the dataset's order
    model: SegmentationModel
    dataset: SegmentationDataset  # what to train on
    pipeline: Pipeline  # from a sample's picture and label to the model's input
    _: KW_ONLY
    batch_size: int  # samples per batch
    seed: int = 0  # of the order of the samples and of their augmentation
    templates: TemplateSource = None  # for the text; None takes the model's
    validation: SegmentationDataset | None = None  # pictures for the snapshots while training; None for none
    num_samples: int = 40  # validation samples scored per snapshot
    num_pictures: int = 4  # overlays of them per snapshot
    # distance of the label pixels the loss sees; 2 uses a quarter of them, which makes a step cheaper
    label_stride: int = 1
    setting: Setting = "inductive"
    # where self-training finds pixels without a label; see :func:`self_training_labels`. With "ignored" the pipeline
    # must pad pictures with :data:`PADDING`, or padding is unlabelled as well.
    unlabelled: Unlabelled = "marked"
    cache_dir: Path | None = None  # of the text embeddings on disk; None keeps them in memory
    # in self-training, what labels the pixels without a label; None is the model itself
    teacher: Teacher | None = None

    loadable = True

    def __post_init__(self) -> None:
        model, dataset, cache_dir = self.model, self.dataset, self.cache_dir
        if len(dataset) == 0:
            raise LexisegError("The training data is empty; check its list of pictures.")
        self.vocabulary = training_vocabulary(
            dataset.vocabulary, setting=self.setting, templates=self.templates or model.default_templates
        )
        if masked_names(self.vocabulary) != model.seen_names:
            raise ValueError("the model was built for other seen classes than the dataset's")
        self.void = ignore_index(len(dataset.vocabulary))
        everything = list(range(len(dataset.vocabulary)))
        self.seen = everything if self.setting == "supervised" else seen_ids(dataset.vocabulary) or everything
        if not any(
            bool(torch.isin(read_label(dataset, index), torch.tensor(self.seen)).any()) for index in range(len(dataset))
        ):
            raise LexisegError(nothing_labelled("train"))
        if len(self.vocabulary) == 1 and not any(
            bool((read_label(dataset, index) != self.seen[0]).any()) for index in range(len(dataset))
        ):
            (only,) = self.vocabulary.names
            text = f"Every pixel of the training data is '{only}', so the model will find it everywhere; label what is "
            warn(f"{text}something else as another class.")
        self.seen_classes = torch.tensor([entry.seen is True for entry in self.vocabulary.classes])
        self.text = model.embed_text(TextEmbedder(model.clip, cache_dir), self.vocabulary)
        self._segmenter = Segmenter(
            model, templates=self.vocabulary.templates, cache_dir=cache_dir, disk_cache=cache_dir is not None
        )

    def batch(self, index: int, rank: int = 0, processes: int = 1) -> SegmentationBatch:
        """Batch ``index``: each epoch shows every sample once, in an order of its own; batches run across epochs."""
        first = index * self.batch_size
        samples = [self._sample(first + place) for place in part_of(self.batch_size, rank, processes)]
        images, labels, names = zip(*samples, strict=True)
        return SegmentationBatch(torch.stack(images), torch.stack(labels), names)

    def losses(self, batch: SegmentationBatch) -> Mapping[str, Tensor]:
        """The model's own losses, and in self-training the percentage of pixels without a label."""
        device = batch.images.device
        text = self.model.training_text(self.vocabulary, self.text.to(device))
        if self.setting != "transductive":
            return self.model.losses(batch.images, batch.labels, text)
        if self.teacher is None:
            losses = self.model.losses(batch.images, batch.labels, text, seen=self.seen_classes.to(device))
        else:
            labels = self.teacher.label(batch.images, batch.labels, self.model.mean, self.model.std)
            losses = self.model.losses(batch.images, labels, text)
        weight = reduction_weight(len(batch.labels), device)
        return {**losses, "unlabelled": 100.0 * (batch.labels == UNLABELLED).float().mean() * weight}

    def sample_names(self, batch: SegmentationBatch) -> Sequence[str]:
        """Names of the samples of ``batch``."""
        return batch.names

    def measures(self) -> Sequence[str]:
        """The metrics in the log, as `evaluate` calls them; a class that is not in the sample leaves some out."""
        if self.validation is None or not self.num_samples:
            return []
        unseen = any(entry.seen is False for entry in self.validation.vocabulary.classes)
        return [f"val/{name}" for name in SCALARS if unseen or name not in ("miou_unseen", "hiou", "unseen_to_seen")]

    def evaluate(self, step: int) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """The metrics on a part of the validation samples, in percent, and a grid of some of these.

        It shows picture, truth and prediction with all classes, unseen ones included.
        """
        limit = self.num_samples or self.num_pictures
        if self.validation is None or not limit:
            return {}, {}
        report = run_evaluation(
            self._segmenter,
            self.validation,
            name="validation",
            split="val",
            limit=limit,
            num_examples=self.num_pictures,
            progress=False,
        )
        values = report.summary() if self.num_samples else {}
        grid = report.grid()
        pictures = {} if grid is None else {"validation": grid}
        return {f"val/{name}": value for name, value in values.items() if value is not None}, pictures

    def reached(self, step: int) -> None:
        """Note in the model how long it was trained."""
        self.model.metadata["steps"] = step

    def export(self, folder: Path) -> None:
        """Write the model, with the templates it was trained with as its default ones."""
        self.model.default_templates = self.vocabulary.templates
        save_model(self.model, folder)

    def _sample(self, position: int) -> tuple[Tensor, Tensor, str]:
        epoch, place = divmod(position, len(self.dataset))
        sample = self.dataset[int(shuffled(len(self.dataset), self.seed, 0, epoch)[place])]
        rng = np.random.default_rng([self.seed, 1, position])
        image, label = self.pipeline(sample.image, sample.label, rng)
        middle, stride = self.label_stride // 2, self.label_stride
        label = label[middle::stride, middle::stride]
        if self.setting == "transductive":
            label = self_training_labels(label, self.seen, unlabelled=self.unlabelled, void=self.void)
            return image, label, sample.name
        return image, remap_to_seen(label, self.seen, void=self.void), sample.name


class Teacher:
    """A trained model of any system that gives pixels without a label their unseen class.

    ``vocabulary`` has all classes, those with masks flagged as seen; ``cache_dir`` keeps text embeddings on disk.
    """

    def __init__(self, model: SegmentationModel, vocabulary: Vocabulary, *, cache_dir: Path | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        words = Vocabulary.parse(vocabulary, templates=model.default_templates)
        self._text = model.embed_text(TextEmbedder(model.clip, cache_dir), words)
        self._seen = torch.tensor([entry.seen is True for entry in vocabulary.classes])

    @torch.no_grad()
    def label(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Fill in the pixels of labels (B, h, w) that are -1, with the unseen class of the largest score.

        Images (B, 3, H, W) were normalised with ``mean`` and ``std`` for the model that learns. Scores that cannot be
        told to leave classes out are a `LexisegError`.
        """
        missing = labels == UNLABELLED
        if not bool(missing.any()):
            return labels
        self.model.to(images.device)
        own = (self.model.mean, self.model.std)
        if own != (tuple(mean), tuple(std)):
            images = normalise(pixels_of(images, mean, std), *own)
        seen = self._seen.to(images.device)
        scores = self.model.score(self.model.encode_images(images), self._text.to(images.device), seen=seen)
        if not isinstance(scores, GridScores | RegionScores):
            raise LexisegError(
                f"A model of the system '{self.model.system}' cannot be a teacher; choose another model."
            )
        scores.offsets = seen.float() * _NEVER
        return torch.where(missing, scores.label_map((labels.shape[-2], labels.shape[-1])), labels)


def load_teacher(name: str, vocabulary: Vocabulary, *, cache_dir: Path | None = None) -> Teacher:
    """Read the teacher of a self-training, a folder of a run or of a model; see `Teacher`.

    A `LexisegError` says that there is no such model, or that it had masks of a class that is unseen now.
    """
    return Teacher(teacher_model(name, vocabulary), vocabulary, cache_dir=cache_dir)


def teacher_model(name: str, vocabulary: Vocabulary) -> SegmentationModel:
    """The model of `load_teacher`, which raises the same."""
    model = load_model(name)
    seen = [entry.name for entry in vocabulary.classes if entry.seen]
    if len(seen) == len(vocabulary):
        raise LexisegError("Every class has masks, so there is nothing for a teacher to label; remove 'teacher'.")
    refuse_leaks(f"The teacher '{name}'", model.seen_names, seen, vocabulary)
    return model


# ---- labels


def training_vocabulary(
    vocabulary: Vocabulary, *, setting: Setting = "inductive", templates: TemplateSource = None
) -> Vocabulary:
    """The classes whose text takes part in training, by their names, without synonyms.

    Inductive training takes those flagged as seen, and all of a vocabulary without any flag. The other settings take
    all, in the vocabulary's order; each class is flagged as seen if its masks are trained on. ``templates`` replace the
    vocabulary's.

    Raises LexisegError if every class is flagged as unseen, self-training has none to find, or there are more classes
    than 16-bit labels can hold.
    """
    if len(vocabulary) > WIDE_IGNORE_INDEX:
        raise LexisegError(
            f"The dataset has {len(vocabulary)} classes and label files have room for {WIDE_IGNORE_INDEX}; "
            "shorten its list."
        )
    unflagged = all(entry.seen is None for entry in vocabulary.classes)
    seen = [entry.seen is True or unflagged for entry in vocabulary.classes]
    if setting != "supervised" and not any(seen):
        raise LexisegError("The dataset has no seen class, so there is nothing to train on; fix its unseen list.")
    if setting == "transductive" and all(seen):
        raise LexisegError(
            "The dataset has no unseen class, so self-training has nothing to label; list some as unseen, or use the "
            "setting 'supervised'."
        )
    classes = tuple(
        VocabularyClass(entry.name, seen=masks or setting == "supervised", color=entry.color)
        for entry, masks in zip(vocabulary.classes, seen, strict=True)
        if masks or setting != "inductive"
    )
    return Vocabulary.parse(Vocabulary(classes, vocabulary.templates), templates=templates)


def masked_names(vocabulary: Vocabulary) -> tuple[str, ...]:
    """The classes of a :func:`training_vocabulary` with masks in training, which a model keeps as its seen names."""
    return tuple(entry.name for entry in vocabulary.classes if entry.seen)


def self_training_labels(
    label: Tensor, seen: Sequence[int], *, unlabelled: Unlabelled = "marked", void: int = IGNORE_INDEX
) -> Tensor:
    """Labels of self-training: ids of seen classes stay, -1 is where the model has to choose an unseen class.

    Only the place of an unlabelled pixel goes into the result, never its class: whatever is neither a seen id nor void
    becomes the same -1.

    Args:
        label: integer tensor of any shape with dataset ids, ``void``, and :data:`PADDING` where it was filled up.
        seen: the seen ids.
        unlabelled: "marked" is what the authors' code does (ZegCLIP, and Cascade-CLIP after it): a pixel is unlabelled
            where the dataset's own label names an unseen class, so that the ground truth tells where unseen classes
            are, though not which; void stays void. The papers do not mention it. "ignored" takes no such help: every
            pixel without a seen label that is not padding is unlabelled, void and background included.
        void: the dataset's label of pixels without a class.
    """
    label = label.long()
    result = torch.where(torch.isin(label, torch.tensor(list(seen), dtype=torch.long)), label, UNLABELLED)
    nothing = label == PADDING
    if unlabelled == "marked":
        nothing |= label == void
    return result.masked_fill(nothing, void)


def class_weights(
    said: Literal["frequency"] | Mapping[str, float], dataset: SegmentationDataset, trained: Vocabulary
) -> Tensor:
    """Factors (C,) float32 on the losses of the classes whose text takes part in training.

    ``said`` has factors by name, where a class that is not named has 1 and a name that is no class is a `LexisegError`;
    or it is "frequency": 1 over the square root of a class's fraction of the labelled pixels of up to 2,000 pictures,
    spread evenly, scaled to a mean of 1 over the classes found and cut at 10. A class that is not found has 1, and so
    has one without masks in training, of whose labels nothing is counted.
    """
    weights = torch.ones(len(trained))
    if said != "frequency":
        for name, factor in dict(said).items():
            if name not in trained.names:
                raise LexisegError(
                    f"'train.class_weights' names '{name}', which is no class with text in this training; there are "
                    f"{', '.join(trained.names[:8])}{' and more' if len(trained) > 8 else ''}."
                )
            weights[trained.names.index(name)] = factor
        return weights
    ids = [dataset.vocabulary.names.index(name) for name in trained.names]
    pixels = torch.zeros(WIDE_IGNORE_INDEX + 1, dtype=torch.float64)
    for index in spread(len(dataset), 2000):
        pixels += torch.bincount(read_label(dataset, index).flatten(), minlength=len(pixels))
    counts = pixels[ids] * torch.tensor([bool(entry.seen) for entry in trained.classes])
    found = counts > 0
    rarity = (counts[found] / counts.sum()).rsqrt()
    weights[found] = (rarity / rarity.mean()).clamp(max=10).float()
    return weights


def refuse_leaks(what: str, before: Sequence[str], now: Sequence[str], vocabulary: Vocabulary) -> None:
    """Refuse what had masks of a class, ``before``, that is unseen in a training whose classes with masks are ``now``.

    Raises LexisegError if a class had masks before and has none now; ``what`` begins the sentence.
    """
    known = {word_key(name) for name in before} - {word_key(name) for name in now}
    leaked = [name for name in vocabulary.names if word_key(name) in known]
    if leaked:
        raise LexisegError(
            f"{what} was trained on masks of '{leaked[0]}', which is unseen in this training; take one that never had "
            "them."
        )
