"""Running a segmenter over a dataset and counting."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lexiseg.background import BackgroundSource
from lexiseg.data.base import Sample, SegmentationDataset, seen_ids, unseen_ids
from lexiseg.errors import LexisegError
from lexiseg.evaluation.grid import Example
from lexiseg.evaluation.metrics import Confusion
from lexiseg.evaluation.report import Report, versions, weights_hash
from lexiseg.images import ImageSource
from lexiseg.models.base import WindowPolicy
from lexiseg.segmentation import Segmentation, ignore_index
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary
from lexiseg.words import word_key

Offsets: TypeAlias = Literal["data", "all", "none"]


def evaluate(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    *,
    name: str,
    split: str,
    background: BackgroundSource = None,
    window: WindowPolicy | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    offsets: Offsets | None = None,
    num_examples: int = 6,
    seed: int | None = None,
    card: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Predict every picture of ``dataset`` and compare with its labels.

    Label maps are counted and dropped one by one. Classes are seen or unseen as the dataset says, and where it says
    nothing as the model was trained.

    Args:
        segmenter: the model, ready to predict, with the templates and precision to be judged.
        dataset: pictures with labels.
        name: of the dataset, for the report.
        split: of the dataset, for the report.
        background: what happens to pixels that no class fits; None takes the dataset's rule. A background class that
            the dataset does not have counts as no class.
        window: how the model is run over a picture; None takes the model's own.
        batch_size: pictures predicted together.
        limit: take only this many, spread evenly; None takes all.
        offsets: which classes lose the score that a model takes off those it had masks of: "data" those that count as
            seen, "all" every class alike, "none" no class; the tables of seen and unseen classes stay the dataset's.
            None is "data", but "all" for a model that had masks of every class, as the authors' code does it for fully
            supervised models.
        num_examples: pictures shown in the report's grid, spread evenly.
        seed: the training's seed, for the report.
        card: more to say in the report's protocol, such as its name.
        progress: whether to show a bar.

    Returns:
        The report.

    Raises:
        LexisegError: a sample cannot be read, or its label does not fit the classes; the sentence names it.
    """
    vocabulary = segmenter.vocabulary(dataset.vocabulary, background=background)
    offsets = offsets or ("all" if _had_every_mask(segmenter, dataset.vocabulary) else "data")
    asked = dataset.vocabulary if offsets == "data" else _flagged(dataset.vocabulary, offsets == "all")
    num_classes = len(dataset.vocabulary)
    ignored = ignore_index(num_classes)
    confusion = Confusion(num_classes, ignore_index=ignored)
    indices = spread(len(dataset), limit)
    if not indices:
        raise LexisegError(f"The split '{split}' of '{name}' is empty, so there is nothing to evaluate.")
    shown = {indices[position] for position in spread(len(indices), num_examples)}
    examples: list[Example] = []
    sizes: list[tuple[int, int]] = []
    seconds = 0.0
    with _bar(len(indices), progress) as bar:
        task = bar.add_task("evaluating", total=len(indices))
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            samples = [dataset[index] for index in chosen]
            since = time.perf_counter()
            images: list[ImageSource] = [sample.image for sample in samples]
            results = segmenter.predict(images, asked, background=background, window=window, batch_size=batch_size)
            seconds += time.perf_counter() - since
            for index, sample, result in zip(chosen, samples, results, strict=True):
                prediction = _count(confusion, sample, result)
                sizes.append((int(sample.label.shape[0]), int(sample.label.shape[1])))
                if index in shown:
                    image = sample.image.permute(1, 2, 0).numpy()
                    examples.append(Example(image, sample.label.numpy(), prediction, sample.name))
            bar.advance(task, len(chosen))
    # A background class the dataset does not have is dropped again: it is judged as no class.
    judged = Vocabulary(vocabulary.classes[:num_classes], vocabulary.templates)
    seen, unseen = seen_ids(judged), unseen_ids(judged)
    protocol = {
        "dataset": name,
        "split": split,
        "num_pictures": len(indices),
        "num_classes": num_classes,
        "num_seen": len(seen),
        "num_unseen": len(unseen),
        "vocabulary_sha256": vocabulary.hash(),
        "picture_sizes": {"smallest": list(min(sizes)), "largest": list(max(sizes))},
        "window": asdict(window or segmenter.model.window),
        "templates": list(vocabulary.templates),
        "background": vocabulary.background.to_dict(),
        "offsets": offsets,
        "ignore_index": ignored,
        "batch_size": batch_size,
        "seed": seed,
        **(card or {}),
        **_describe(segmenter),
        "versions": versions(),
    }
    return Report(confusion.compute(seen, unseen), confusion, judged, protocol, seconds, tuple(examples))


def _had_every_mask(segmenter: Segmenter, vocabulary: Vocabulary) -> bool:
    keys = {word_key(name) for name in segmenter.model.seen_names}
    return all(word_key(name) in keys for name in vocabulary.names)


def _flagged(vocabulary: Vocabulary, seen: bool) -> Vocabulary:
    """The vocabulary with every class flagged as seen, or every class as unseen."""
    return replace(vocabulary, classes=tuple(replace(entry, seen=seen) for entry in vocabulary.classes))


def spread(length: int, limit: int | None) -> list[int]:
    """``limit`` indices of ``length`` at even distances, the first one included; all where ``limit`` is None."""
    if limit is None or limit >= length:
        return list(range(length))
    return [index * length // limit for index in range(limit)]


def _count(confusion: Confusion, sample: Sample, result: Segmentation) -> np.ndarray:
    prediction = result.label_map.numpy()
    if prediction.dtype != np.uint8:
        prediction = prediction.astype(np.int64)
    try:
        confusion.update(prediction, sample.label.numpy())
    except ValueError as error:
        raise LexisegError(f"The sample '{sample.name}' cannot be judged: {error}.") from error
    return prediction


def _describe(segmenter: Segmenter) -> dict[str, Any]:
    model = segmenter.model
    return {
        "model": {
            "system": model.system,
            "options": model.options.model_dump(mode="json"),
            "clip": model.clip.name,
            "weights_sha256": weights_hash(model),
            "parameters": model.num_parameters(),
            "trainable": model.num_parameters(trainable=True),
        },
        "device": str(segmenter.device),
        "dtype": str(segmenter.dtype or torch.float32).removeprefix("torch."),
    }


def _bar(total: int, show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not show or not console.is_terminal,
    )
