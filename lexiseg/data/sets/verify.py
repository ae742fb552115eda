"""Finding what is wrong with a dataset before anything trains on it."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lexiseg.data.sets.archive import Member, Place
from lexiseg.data.sets.catalog import NAMES, data_set
from lexiseg.data.sets.dataset import Finding, Item, SplitFiles, misfit, nothing_labelled, unknown_value, value_name
from lexiseg.data.sets.labels import UNKNOWN, LabelKind, png_fault
from lexiseg.data.sets.listing import unreadable
from lexiseg.data.sets.open import OWN, list_split, splits_of
from lexiseg.errors import DataSetError, LexisegError
from lexiseg.files import is_folder
from lexiseg.windows import check_proportions
from lexiseg.words import counted

_SHOWN = 12
SampleCheck: TypeAlias = "tuple[list[Finding], NDArray[np.int64]]"
"""What is wrong with a sample, and its pixels: of unknown values, of each class, and without one."""
Progress: TypeAlias = Callable[[Iterable[SampleCheck], int, str], Iterable[SampleCheck]]
"""Shows that the samples of a split pass by: the checks, their number, and what is done."""


@dataclass(frozen=True)
class SplitCheck:
    """What was counted in one split."""

    split: str  # its name
    samples: int  # pictures that have a label
    labelled: int  # pixels with a class
    ignored: int  # pixels without one
    unknown: int  # pixels of values that stand for nothing
    class_pixels: tuple[int, ...]  # pixels of each class, in the order of the ids


@dataclass(frozen=True)
class Verification:
    """The result of `verify`."""

    name: str  # of the dataset
    root: str  # its folder
    classes: tuple[str, ...] = ()  # names of the classes; empty where they could not be read
    splits: tuple[SplitCheck, ...] = ()  # what was counted
    findings: tuple[Finding, ...] = ()  # what is wrong; empty for a dataset that can be used

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make training or evaluation fail or go wrong."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def summary(self) -> tuple[Finding, ...]:
        """The findings, one per kind and split (for unknown values, one per value), with how many samples have it."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.kind, finding.severity, finding.split), []).append(finding)
        pixels = {check.split: check.labelled + check.ignored + check.unknown for check in self.splits}
        samples = {check.split: check.samples for check in self.splits}
        told: list[Finding] = []
        for (_, _, split), group in groups.items():
            first = group[0]
            if len(group) == 1:
                told.append(first)
            elif any(finding.values for finding in group):
                told += _values_told(group, samples[split], pixels[split])
            else:
                problem = f"{len(group)} times; the first: {first.problem}"
                told.append(replace(first, problem=problem, sample=""))
        return tuple(told)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "data_set": self.name,
            "root": self.root,
            "classes": list(self.classes),
            "splits": [asdict(split) for split in self.splits],
            "kinds": dict(Counter(finding.kind for finding in self.findings)),
            "findings": [asdict(finding) for finding in self.findings],
        }


def _values_told(group: Sequence[Finding], samples: int, pixels: int) -> list[Finding]:
    """What is said of the values that stand for nothing in a split: a line a value, the most frequent first."""
    labels: Counter[int] = Counter(value for finding in group for value, _ in finding.values)
    sizes: Counter[int] = Counter()
    for finding in group:
        sizes.update(dict(finding.values))
    kind = LabelKind.color if group[0].kind == "unknown-color" else LabelKind.index
    remedy = group[0].problem.rpartition(": ")[2]
    told = []
    for value, number in labels.most_common(_SHOWN):
        first = next(finding for finding in group if value in dict(finding.values))
        fraction = 100 * sizes[value] / max(1, pixels)
        problem = (
            f"{value_name(kind, value)} in {number} of {counted(samples, 'label')} ({fraction:.3g} % of the pixels), "
            f"first in '{first.path}'; no class has it: {remedy}"
        )
        told.append(replace(first, problem=problem, sample="", values=((value, sizes[value]),)))
    if len(labels) > _SHOWN:
        problem = (
            f"{counted(len(labels) - _SHOWN, 'further value')} without a class as well; so many usually mean masks "
            "that were smoothed, saved as JPEG, or hold something other than classes."
        )
        told.append(replace(group[0], problem=problem, sample="", values=()))
    return told


def verify(
    name: str,
    root: str | Path,
    *,
    splits: Sequence[str] | None = None,
    classes: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Read every file of a dataset and say what is wrong with it.

    ``name``: as in `lexiseg.data.sets.open.open_data_set`. ``splits``: which to look at; None takes the one the
    papers train on and "val". ``classes``: the class list, where the distribution does not carry one. ``workers``:
    threads that read; None takes one per processor. Returns the findings: those of lists and folders first, then sample
    by sample in their order, then those of a whole split. A fault of one file never hides those of another. Raises
    LexisegError if there is no dataset of that name. Everything that is wrong on disk is a finding.
    """
    root = Path(root)
    given = splits is not None
    wanted = ("train", "val") if name == OWN and not given else ()
    try:
        chosen, findings = (splits, []) if splits is not None else usable_splits(name, root)
    except DataSetError as error:
        return Verification(name, str(root), findings=(Finding(error.kind, str(error), str(root)),))
    checks: list[SplitCheck] = []
    classes_of: dict[str, tuple[str, ...]] = {}
    members: dict[str, dict[str, Place]] = {}
    for split in dict.fromkeys((*chosen, *wanted)):
        files: SplitFiles | None = None
        try:
            files = list_split(name, root, split, classes=classes)
            faults = [replace(one, split=split) for one in files.faults()]
        except LexisegError as error:
            # Lists of classes and folders are shared by the splits, so that what is wrong with them is not of one.
            kind = error.kind if isinstance(error, DataSetError) else "class-list"
            faults = [Finding(kind, str(error), str(root), split=split if given else "")]
        if split not in chosen:  # what training or evaluation would say of it
            problem = faults[0].problem if faults else f"There is no split '{split}'."
            files, faults = None, [Finding("missing-list", problem, str(root), split=split, severity="warning")]
        said = {finding.problem for finding in findings}
        findings += [fault for fault in faults if fault.problem not in said]
        if files is None:
            continue
        classes_of[split] = files.vocabulary.names
        check, wrong = _check_split(files, workers or os.cpu_count() or 1, progress)
        findings += wrong
        checks.append(check)
        members[split] = {item.name: item.image for item in files.items}
    findings += _overlaps(members)
    findings += _other_classes(classes_of, root)
    return Verification(name, str(root), next(iter(classes_of.values()), ()), tuple(checks), tuple(findings))


def usable_splits(name: str, root: Path) -> tuple[Sequence[str], list[Finding]]:
    """The splits to look at where nobody names any, and a warning where that is not all the papers train on.

    Raises LexisegError if there is no dataset of that name, or its folder may not be read.
    """
    chosen = splits_of(name, root)
    if name not in NAMES or "aug" not in data_set(name).splits or not is_folder(root):
        return chosen, []
    found = any(next(root.glob(f"{place}{mark}"), None) is not None
                for place in ("", "*/", "*/*/")
                for mark in ("SegmentationClassAug", "benchmark_RELEASE"))  # fmt: skip
    if found:
        return chosen, []
    problem = (
        f"'{root}' has no augmented training labels (SegmentationClassAug or SBD's benchmark_RELEASE), on which the "
        "papers train; only VOC's own train split can be used."
    )
    return ("train", "val"), [Finding("no-augmented-labels", problem, str(root), severity="warning")]


def _check_split(files: SplitFiles, workers: int, progress: Progress | None) -> tuple[SplitCheck, list[Finding]]:
    num_classes = len(files.vocabulary)
    pixels = np.zeros(num_classes + 2, np.int64)
    findings: list[Finding] = []
    checks: Iterable[SampleCheck] = _map(lambda item: _check_sample(item, num_classes), files.items, workers)
    if progress is not None:
        checks = progress(checks, len(files.items), f"reading {files.split}")
    for wrong, found in checks:
        findings += [replace(finding, split=files.split) for finding in wrong]
        pixels += found
    unknown, *counts, ignored = pixels.tolist()
    where = str(files.items[0].label.parent) if files.items else ""
    # Masks of unseen classes are left out of training on purpose.
    of_all = zip(files.vocabulary.classes, counts, strict=True)
    wanted = {entry.name: count for entry, count in of_all if files.split == "val" or entry.seen is not False}
    if any(wanted.values()):
        if empty := [name for name, count in wanted.items() if not count]:
            shown = ", ".join(f"'{name}'" for name in empty[:_SHOWN])
            more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
            problem = (
                f"No label of the split '{files.split}' has a pixel of {counted(len(empty), 'class')}: {shown}{more}."
            )
            findings.append(Finding("empty-class", problem, where, split=files.split, severity="warning"))
    elif files.items and not any(finding.severity == "error" for finding in findings):
        findings = [Finding("no-labels", nothing_labelled(files.split), where, split=files.split)]
    return SplitCheck(files.split, len(files.items), sum(counts), ignored, unknown, tuple(counts)), findings


def _check_sample(item: Item, num_classes: int) -> SampleCheck:
    findings: list[Finding] = []
    image = _read(item, "picture", findings)
    size = None if image is None else image.shape[:2]
    del image  # the label may be as large
    if size is not None:
        try:
            check_proportions(*size)
        except LexisegError as error:
            findings.append(_finding(item, "odd-proportions", f"'{item.image}': {error}", item.image))
    values = _read(item, "label", findings)
    if values is None:
        return findings, np.zeros(num_classes + 2, np.int64)
    label = item.table.look_up(values)
    fault = None if size is None else misfit(item, size, values.shape)
    if fault is not None:
        findings.append(_finding(item, *fault, item.label))
    unknown = values[label == UNKNOWN]
    if unknown.size:
        kind = "unknown-color" if item.kind is LabelKind.color else "unknown-id"
        found = tuple(zip(*(part.tolist() for part in np.unique(unknown, return_counts=True)), strict=True))
        findings.append(replace(_finding(item, kind, unknown_value(item, unknown), item.label), values=found[:256]))
    # UNKNOWN is -1, and the label of pixels without a class is above all of them.
    pixels = np.bincount(np.minimum(label, num_classes).ravel() + 1, minlength=num_classes + 2)
    if not pixels[1:-1].any() and not findings:
        problem = f"The label '{item.label}' has no pixel of any class, so '{item.name}' cannot be used; remove it."
        findings.append(replace(_finding(item, "empty-label", problem, item.label), severity="warning"))
    return findings, pixels


def _read(item: Item, part: Literal["picture", "label"], findings: list[Finding]) -> NDArray[Any] | None:
    """The picture or its label; None where it cannot be read, or the label is damaged."""
    place, drawn = (item.image, False) if part == "picture" else (item.label, item.draw is not None)
    with suppress(OSError):  # reading it says what is wrong
        if not drawn and (place.size if isinstance(place, Member) else place.stat().st_size) == 0:
            problem = f"The {part} '{place}' is an empty file; copy it again."
            findings.append(_finding(item, "empty-file", problem, place))
            return None
    try:
        values: NDArray[Any] = item.pixels() if part == "picture" else item.values()
    except (OSError, LexisegError) as error:
        said = unreadable(Path(str(place)), error) if isinstance(error, OSError) else error
        kind = error.kind if isinstance(error, DataSetError) else f"damaged-{part}"
        findings.append(_finding(item, kind, str(said), place))
        return None
    fault = None if drawn else png_fault(place)
    if fault is not None:
        problem = f"The {part} '{place}' is damaged: {fault}; copy it again."
        findings.append(_finding(item, f"damaged-{part}", problem, place))
    return None if fault is not None and part == "label" else values


def _finding(item: Item, kind: str, problem: str, path: Place) -> Finding:
    return Finding(kind, problem, str(path), item.name)


def _overlaps(members: dict[str, dict[str, Place]]) -> list[Finding]:
    """Pictures in both the training and the evaluation split."""
    return [
        Finding(
            "split-overlap",
            f"'{name}' is in both '{split}' and 'val', so it would be evaluated after being trained on.",
            str(path),
            name,
            split,
        )
        for split, names in members.items()
        if split not in ("val", "trainval")
        for name, path in names.items()
        if members.get("val", {}).get(name) == path
    ]


def _other_classes(classes_of: Mapping[str, tuple[str, ...]], root: Path) -> list[Finding]:
    """Splits that each bring their classes (COCO-style JSON) must bring the same: an id means one thing only."""
    findings: list[Finding] = []
    first, ours = next(iter(classes_of.items()), ("", ()))
    for split, names in classes_of.items():
        if names != ours:
            index, ones = next((i, both) for i, both in enumerate(zip_longest(ours, names)) if both[0] != both[1])
            told = ["none" if one is None else f"'{one}'" for one in ones]
            problem = (
                f"The classes of '{first}' and '{split}' differ: class {index} is {told[0]} in one and {told[1]} in "
                "the other; list the same categories in both."
            )
            findings.append(Finding("class-list", problem, str(root), split=split))
    return findings


def _map(check: Callable[[Item], SampleCheck], items: Sequence[Item], workers: int) -> Iterator[SampleCheck]:
    """``check`` of each item, in their order; a few wait to be taken at most."""
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), 16 * workers):
            yield from pool.map(check, items[start : start + 16 * workers])
