"""What an evaluation has counted so far, kept in files, so that one that was stopped can go on.

Every process writes one file, its own, over and over: the counts and which pictures they are of, in one atomic write.
Integers add up exactly, so parts of any run with any number of processes make the same report.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lexiseg.errors import LexisegError
from lexiseg.evaluation.metrics import Confusion
from lexiseg.files import make_folder, write_json

Size = tuple[int, int]
_COUNTS = ("intersection", "predicted", "labelled", "as_seen")


@dataclass(eq=False)
class Tally:
    """Counts over some batches of an evaluation."""

    confusion: Confusion  # the counts
    batches: set[int] = field(default_factory=set)  # numbers of the batches they are of
    smallest: Size | None = None  # the smallest (height, width), by height first; None without a picture
    largest: Size | None = None  # the largest
    seconds: float = 0.0  # time the predictions took

    def saw(self, size: Size) -> None:
        """Take a picture's (height, width) into account."""
        self.smallest = size if self.smallest is None else min(self.smallest, size)
        self.largest = size if self.largest is None else max(self.largest, size)

    def merge(self, other: Tally) -> None:
        """Add what another process, or an earlier run, has counted. Raises LexisegError if a batch is in both."""
        twice = self.batches & other.batches
        if twice:
            raise LexisegError(
                f"Batch {min(twice)} has been counted twice, so two evaluations wrote to one folder at a time; start "
                "again without --resume, into a folder of its own."
            )
        self.confusion.merge(other.confusion)
        self.batches |= other.batches
        for size in (other.smallest, other.largest):
            if size is not None:
                self.saw(size)
        self.seconds += other.seconds

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        counts = {name: getattr(self.confusion, name).tolist() for name in _COUNTS}
        sizes = {"smallest": self.smallest, "largest": self.largest}
        return {"batches": sorted(self.batches), **counts, **sizes, "seconds": self.seconds}


class Parts:
    """The folder of an evaluation's parts.

    ``folder``: where they are; it holds nothing else. ``identity``: JSON values that say which evaluation it is; parts
    of another one do not count. ``empty`` makes the counts of nothing.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], empty: Callable[[], Tally], every: float) -> None:
        self.folder = folder
        # Through JSON, because that is what the parts' values have been through.
        self._identity = _flat(json.loads(json.dumps(dict(identity))))
        self._empty, self._every, self._written = empty, every, time.monotonic()
        self._file = folder / f"{uuid.uuid4().hex}.json"

    def begin(self) -> Tally:
        """Remove what an earlier evaluation left behind."""
        clear(self.folder)
        make_folder(self.folder)
        return self._empty()

    def resume(self) -> Tally:
        """What has been counted so far.

        Raises LexisegError if the parts are of another evaluation, or damaged, or a batch is in two of them.
        """
        make_folder(self.folder)
        found = self._empty()
        for path in sorted(self.folder.glob("[!.]*.json")):
            found.merge(self._read(path))
        return found

    def write(self, tally: Tally, *, now: bool = False) -> None:
        """Write this process's counts if the last time is long enough ago, or ``now``."""
        if now or time.monotonic() - self._written >= self._every:
            write_json(self._file, {"identity": self._identity, **tally.to_dict()})
            self._written = time.monotonic()

    def _read(self, path: Path) -> Tally:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            tally = self._empty()
            before = values["identity"]
            if before == self._identity:
                for name in _COUNTS:
                    counts = np.asarray(values[name], np.int64)
                    if counts.shape != (tally.confusion.num_classes,):
                        raise ValueError("another number of classes")
                    setattr(tally.confusion, name, counts)
                tally.batches = set(map(int, values["batches"]))
                tally.seconds = float(values["seconds"])
                for size in (values["smallest"], values["largest"]):
                    if size is not None:
                        tally.saw((int(size[0]), int(size[1])))
                return tally
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise LexisegError(
                f"'{path}' is damaged or was not written by this version; start again without --resume."
            ) from error
        key = next(key for key in sorted({*before, *self._identity}) if before.get(key) != self._identity.get(key))
        raise LexisegError(
            f"'{self.folder}' holds parts of another evaluation: '{key}' was {before.get(key)} and is now "
            f"{self._identity.get(key)}; leave out --resume to start again, or choose another output folder."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def clear(folder: Path) -> None:
    """Remove the parts, once the report is written or to start again; whatever else lies there stays."""
    for path in folder.glob("*.json"):  # a hidden one is what a kill left of a write
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def missing(tally: Tally, batches: Iterable[int]) -> list[int]:
    """The batches that are not counted yet."""
    return [number for number in batches if number not in tally.batches]
