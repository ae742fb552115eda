"""Running a segmenter over a dataset and counting, in one process or several, at a stretch or in parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from lexiseg import processes
from lexiseg.background import BackgroundSource
from lexiseg.data.base import SegmentationDataset, fingerprint, seen_ids, unseen_ids
from lexiseg.errors import LexisegError
from lexiseg.evaluation.metrics import Confusion
from lexiseg.evaluation.report import Example, Report, versions
from lexiseg.images import ImageSource
from lexiseg.journal import Journal, Writer
from lexiseg.label_ids import ignore_index
from lexiseg.progress import progress_bar
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary
from lexiseg.windows import WindowPolicy
from lexiseg.words import whole_number, word_key

Offsets: TypeAlias = Literal["data", "all", "none"]


def run_evaluation(
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
    seen_split: bool = True,
    num_examples: int = 6,
    seed: int | None = None,
    card: Mapping[str, Any] | None = None,
    progress: bool = True,
    shared: bool = False,
    journal: Journal | None = None,
    resume: bool = False,
) -> Report:
    """Predict every picture of ``dataset`` and compare with its labels; label maps are counted and dropped one by one.

    Classes are seen or unseen as the dataset says, and where it says nothing as the model was trained. ``name``,
    ``split``, ``seed`` (the training's) and ``card`` are for the report. ``background``: None takes the dataset's rule;
    a background class that the dataset does not have counts as no class. ``window``: None takes the model's own.
    ``limit``: take only this many, spread evenly. ``offsets``: which classes the model's score offset is
    subtracted from: "data" those that count as seen, "all" every class alike, "none" no class; None is "data",
    but "all" for a model that had masks of every class, as the authors' code does it for fully supervised models.
    ``seen_split``: False, across datasets, says nothing of seen and unseen classes. ``num_examples``: pictures in the
    report's grid. ``shared``: divide the pictures among the processes of a launcher, all of which call this; each gets
    the whole report, whose numbers are those of one process. ``journal``: what has been counted so far, to ``resume``
    from; the caller removes it.

    Raises LexisegError if a sample cannot be read, its label does not fit the classes, or the journal is of another
    evaluation.
    """
    with processes.together() if shared else nullcontext():
        batch_size = whole_number(batch_size, "The batch size", 1)
        limit = None if limit is None else whole_number(limit, "The limit", 1)
        vocabulary = segmenter.vocabulary(dataset.vocabulary, background=background)
        offsets, asked = offset_classes(segmenter, dataset.vocabulary, offsets)
        num_classes = len(dataset.vocabulary)
        if not (indices := spread(len(dataset), limit)):
            raise LexisegError(f"The split '{split}' of '{name}' is empty; choose another split.")
        # A background class the dataset does not have is dropped again: it counts as no class.
        judged = Vocabulary(vocabulary.classes[:num_classes], vocabulary.templates)
        judged = judged if seen_split else _flagged(judged, None)
        facts = {"dataset": name, "split": split, "num_pictures": len(indices), **_classes(judged, seen_split)}
        facts |= {"vocabulary_sha256": vocabulary.hash(), "window": asdict(window or segmenter.model.window)}
        facts |= {"templates": list(vocabulary.templates), "background": vocabulary.background.to_dict()}
        facts |= {"refine": segmenter.refinement.kind, "offsets": offsets, "ignore_index": ignore_index(num_classes)}
        facts |= {"batch_size": batch_size, "seed": seed, **(card or {}), **_describe(segmenter)}
        if isinstance(size := getattr(dataset, "size", None), int):  # of scenes that are drawn at any
            facts["size"] = size
        facts["versions"] = versions()
        # Whole batches are divided, not pictures, so that each is predicted exactly as in one process.
        batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        identity = {**facts, "device": segmenter.device.type, "pictures": fingerprint(dataset)}
        identity["exemplars"] = {one.word: one.content_hash() for _, one in vocabulary.exemplars}
        empty = Tally(Confusion(num_classes, seen=seen_ids(judged)))
    found = _before(journal, identity, resume, deepcopy(empty), shared)
    wanted = {indices[position] for position in spread(len(indices), num_examples)}
    how: dict[str, Any] = {"background": background, "window": window, "batch_size": batch_size}
    count = partial(_count, segmenter, dataset, asked, how, wanted, empty)
    tally = _count_rest(count, batches, found, journal, progress, shared)
    for part in processes.gather(tally) if shared else [tally]:
        found.merge(part)
    if len(found.batches) != len(batches):
        raise RuntimeError(f"{len(found.batches)} of {len(batches)} batches were counted")
    for chosen in batches:  # pictures to show that were counted before a kill
        if wanted.intersection(chosen) - found.examples.keys():
            found.examples |= count(chosen).examples
    facts["processes"] = processes.count() if shared else 1
    metrics = found.confusion.compute(seen_ids(judged), unseen_ids(judged))
    pictures = tuple(found.examples[index] for index in sorted(wanted))
    return Report(metrics, found.confusion, judged, facts, found.seconds, pictures)


@dataclass(eq=False)
class Tally:
    """Counts over some batches of an evaluation. Integers add up exactly, in whatever order and number of processes."""

    confusion: Confusion
    batches: set[int] = field(default_factory=set)  # numbers of the batches they are of
    seconds: float = 0.0  # time the predictions took
    examples: dict[int, Example] = field(default_factory=dict)  # by their index, the pictures of them that are shown

    def merge(self, other: Tally) -> None:
        """Add what another process, or an earlier run, has counted. Raises LexisegError if a batch is in both."""
        twice = self.batches & other.batches
        if twice:
            raise LexisegError(
                f"Batch {min(twice)} was counted twice, so two evaluations wrote to the same folder at once; start "
                "again without --resume, into another folder."
            )
        self.confusion.merge(other.confusion)
        self.batches |= other.batches
        self.seconds += other.seconds
        self.examples |= other.examples

    def to_line(self) -> dict[str, Any]:
        """The counts as JSON holds them, without the classes that do not occur."""
        counts = self.confusion.counts
        classes = {int(index): counts[:, index].tolist() for index in np.flatnonzero(counts.any(axis=0))}
        return {"batches": sorted(self.batches), "classes": classes, "seconds": self.seconds}

    def merge_line(self, line: Mapping[str, Any]) -> None:
        """Add what `to_line` gave."""
        part = Tally(Confusion(self.confusion.num_classes), set(line["batches"]), seconds=float(line["seconds"]))
        for index, counts in line["classes"].items():
            part.confusion.counts[:, int(index)] = counts
        self.merge(part)


def _count(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    asked: Vocabulary,
    how: Mapping[str, Any],
    wanted: Collection[int],
    empty: Tally,
    chosen: Sequence[int],
) -> Tally:
    """Predict the ``chosen`` samples and count them from ``empty`` on; those of them that are ``wanted`` are kept."""
    tally = deepcopy(empty)
    samples = [dataset[index] for index in chosen]
    since = time.perf_counter()
    images: list[ImageSource] = [sample.image for sample in samples]
    results = segmenter.predict(images, asked, **how)
    tally.seconds = time.perf_counter() - since
    for index, sample, result in zip(chosen, samples, results, strict=True):
        prediction = np.asarray(result.label_map)
        if prediction.dtype != np.uint8:
            prediction = prediction.astype(np.int64)
        try:
            tally.confusion.update(prediction, sample.label.numpy())
        except ValueError as error:
            raise LexisegError(f"The sample '{sample.name}' cannot be evaluated: {error}.") from error
        if index in wanted:
            image = sample.image.permute(1, 2, 0).numpy()
            tally.examples[index] = Example(image, sample.label.numpy(), prediction, sample.name)
    return tally


def _count_rest(
    count: Callable[[Sequence[int]], Tally],
    batches: Sequence[Sequence[int]],
    before: Tally,
    journal: Journal | None,
    progress: bool,
    shared: bool,
) -> Tally:
    """Count this process's part of the batches that are not in ``before``, and write it down batch by batch."""
    tally = Tally(Confusion(before.confusion.num_classes))
    rank, number_of_processes = (processes.rank(), processes.count()) if shared else (0, 1)
    # In turns, not in runs as accelerate's split_between_processes does it: datasets are sorted, and so are sizes.
    mine = [number for number in range(len(batches)) if number not in before.batches][rank::number_of_processes]
    total, done = sum(map(len, batches)), sum(len(batches[number]) for number in before.batches)
    writing = nullcontext() if journal is None else closing(Writer(journal, f"process-{rank}"))
    with writing as writer, progress_bar(show=progress and rank == 0) as bar:
        task = bar.add_task("evaluating", total=total, completed=done)
        for number in mine:
            part = count(batches[number])
            part.batches.add(number)
            tally.merge(part)
            if writer is not None:
                writer.write(part.to_line())
            done += len(batches[number]) * number_of_processes  # the others are about as far as this one
            bar.update(task, completed=min(total, done))
    return tally


def _classes(judged: Vocabulary, seen_split: bool) -> dict[str, Any]:
    seen, unseen = (len(ids(judged)) if seen_split else None for ids in (seen_ids, unseen_ids))
    return {"num_classes": len(judged), "num_seen": seen, "num_unseen": unseen, "num_words": len(judged.words)}


def _before(journal: Journal | None, identity: Mapping[str, Any], resume: bool, found: Tally, shared: bool) -> Tally:
    """What earlier runs have counted, added to ``found``; one process reads it, for all."""
    if journal is None:
        return found
    with processes.together() if shared else nullcontext():
        if (not shared or processes.is_main()) and journal.begin(identity, resume=resume):
            for line in journal.lines():
                if "batches" in line:
                    found.merge_line(line)
    return processes.gather(found)[0] if shared else found


def offset_classes(segmenter: Segmenter, vocabulary: Vocabulary, offsets: Offsets | None) -> tuple[Offsets, Vocabulary]:
    """Which classes lose the model's score offset, see `run_evaluation`, and the classes to predict, flagged so."""
    every = len(with_masks(segmenter, vocabulary.names)) == len(vocabulary)
    offsets = offsets or ("all" if every else "data")
    return offsets, vocabulary if offsets == "data" else _flagged(vocabulary, offsets == "all")


def with_masks(segmenter: Segmenter, names: Sequence[str]) -> list[str]:
    """Those of these classes that the model had masks of in training."""
    keys = {word_key(name) for name in segmenter.model.seen_names}
    return [name for name in names if word_key(name) in keys]


def _flagged(vocabulary: Vocabulary, seen: bool | None) -> Vocabulary:
    """The vocabulary with every class flagged as seen, every class as unseen, or none flagged."""
    return replace(vocabulary, classes=tuple(replace(entry, seen=seen) for entry in vocabulary.classes))


def spread(length: int, limit: int | None) -> list[int]:
    """``limit`` indices of ``length`` at even distances, the first one included; all where ``limit`` is None."""
    if limit is None or limit >= length:
        return list(range(length))
    return [index * length // limit for index in range(limit)]


def _describe(segmenter: Segmenter) -> dict[str, Any]:
    model = segmenter.model
    return {
        "model": {
            "system": model.system,
            "options": model.options.model_dump(mode="json"),
            "clip": model.clip.name,
            "weights_sha256": segmenter.fingerprint(),
            "parameters": model.num_parameters(),
            "trainable": model.num_parameters(trainable=True),
        },
        "device": str(segmenter.device),
        "dtype": str(segmenter.dtype or torch.float32).removeprefix("torch."),
    }
