"""From a data set's name and folder to its samples."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lexiseg.data.sets.ade20k import list_ade150, list_ade847
from lexiseg.data.sets.catalog import NAMES, data_set
from lexiseg.data.sets.coco_stuff import list_coco
from lexiseg.data.sets.context import list_context59, list_context459
from lexiseg.data.sets.dataset import FileDataset, SplitFiles
from lexiseg.data.sets.own import list_own, own_splits
from lexiseg.data.sets.voc import list_voc
from lexiseg.errors import LexisegError

OWN = "own"
"""Name of a folder of one's own among the data sets."""

_LAYOUTS: Mapping[str, Callable[[Path, str, str | None, Path | None], SplitFiles]] = {
    "voc2012": lambda root, split, unseen, _: list_voc(root, split, unseen),
    "coco-stuff-164k": lambda root, split, unseen, _: list_coco(root, split, unseen),
    "pascal-context-59": lambda root, split, unseen, _: list_context59(root, split, unseen),
    "pascal-context-459": list_context459,
    "ade20k-150": lambda root, split, unseen, _: list_ade150(root, split, unseen),
    "ade20k-847": list_ade847,
    OWN: list_own,
}
_TAKES_CLASSES = ("pascal-context-459", "ade20k-847", OWN)


def open_data_set(
    name: str,
    root: str | Path,
    split: str,
    *,
    unseen: str | None = None,
    classes: str | Path | None = None,
    names_of: str | None = None,
) -> FileDataset:
    """Open a split of a data set.

    Args:
        name: one of :data:`lexiseg.data.sets.catalog.NAMES`, or "own" for a folder of one's own; see
            :mod:`lexiseg.data.sets.own`.
        root: the folder it was unpacked in; a relative path starts at the working directory.
        split: "train" or "val"; of VOC also "aug", "trainaug" and "trainval".
        unseen: which list of unseen classes; None takes the data set's first, "none" none.
        classes: the class list, where the distribution does not carry one.
        names_of: the paper whose names to use for the classes it calls otherwise; see
            :attr:`lexiseg.data.sets.catalog.DataSetInfo.renamed`.

    Raises:
        LexisegError: there is no such data set, split, list or paper, or files are missing; the sentence names the
            first.
    """
    files = list_split(name, root, split, unseen=unseen, classes=classes)
    if names_of is not None:
        files = replace(files, vocabulary=data_set(name).vocabulary(unseen=unseen, names_of=names_of))
    return FileDataset(files)


def list_split(
    name: str, root: str | Path, split: str, *, unseen: str | None = None, classes: str | Path | None = None
) -> SplitFiles:
    """Find the files of a split without opening a picture; the arguments are those of :func:`open_data_set`.

    Raises:
        LexisegError: the folder is not there, or the classes cannot be known. Files that are missing are findings.
    """
    if name not in _LAYOUTS:
        near = difflib.get_close_matches(name, _LAYOUTS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(_LAYOUTS)}."
        raise LexisegError(f"There is no data set '{name}'; {hint}")
    if classes is not None and name not in _TAKES_CLASSES:
        raise LexisegError(f"The classes of {name} are known, so a list of them cannot be given; leave it out.")
    if name in NAMES and split not in data_set(name).splits:
        raise LexisegError(f"{name} has no split '{split}'; there are {', '.join(data_set(name).splits)}.")
    return _LAYOUTS[name](Path(root), split, unseen, None if classes is None else Path(classes))


def train_split(name: str) -> str:
    """The split that is trained on: that of the papers ("trainaug" of VOC), of one's own data "train"."""
    return "train" if name == OWN else data_set(name).train_split


def splits_of(name: str, root: str | Path) -> tuple[str, ...]:
    """The splits that are trained and judged on: the papers' training split and "val"."""
    return own_splits(Path(root)) if name == OWN else (train_split(name), "val")
