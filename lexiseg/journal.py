"""A journal of finished work, from which a stopped run resumes: no interruption loses a piece or repeats it.

A journal is a folder of files that only grow::

    FOLDER/run.json           the settings that the work is done with
    FOLDER/NAME.HEX.jsonl     what one writer has finished, one line per piece, written when the piece is complete

Every writer has a file of its own, so that two of them (a worker that is only thought to be dead) never write into one.
A line that cannot be read, such as one cut short by a kill, is work to be done again.
"""

import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from lexiseg.errors import LexisegError
from lexiseg.files import make_folder, read_json, read_lines, write_json, writing
from lexiseg.words import shorten

RUN, LINES = "run.json", ".jsonl"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys, in which a difference can be named; all values as JSON gives them."""
    found: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(dict(values))).items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference of two runs' settings, as ``'key' was A and is now B``; "" where there is none."""
    old, new = flat(before), flat(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            was, value = (shorten(str(settings.get(key, "not set"))) for settings in (old, new))
            return f"'{key}' was {was} and is now {value}"
    return ""


class Journal:
    """The journal in a folder, which holds nothing else that ends in ``.jsonl``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings of the work that is recorded; None where none is, or this machine does not see it."""
        with suppress(LexisegError):
            return read_json(self.folder / RUN)
        return None

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> bool:
        """Start, or continue what is recorded; returns whether anything is.

        ``settings``: JSON values, everything that decides what the results are. Raises LexisegError if what is recorded
        was done with other settings, or the folder cannot be written.
        """
        make_folder(self.folder)
        before = self.settings if resume else None
        if before is None:
            self._empty()
            write_json(self.folder / RUN, dict(settings))
        elif difference := changed(before, settings):
            raise LexisegError(
                f"'{self.folder.parent}' holds results made with other settings: {difference}; choose another "
                "--output, or leave out --resume to start again."
            )
        return before is not None

    def files(self, name: str = "*") -> list[Path]:
        """The files of the writers called ``name``."""
        return sorted(self.folder.glob(f"{name}.*{LINES}"))

    def lines(self) -> Iterator[dict[str, Any]]:
        """What all writers have written."""
        for path in self.files():
            yield from read_lines(path)

    def remove(self) -> None:
        """Remove the journal, once the work is done; whatever else lies in its folder stays."""
        self._empty()
        with suppress(OSError):
            self.folder.rmdir()

    def _empty(self) -> None:
        for path in [self.folder / RUN, *self.folder.glob(f"*{LINES}"), *self.folder.glob(".*.tmp.json")]:
            with suppress(OSError):
                path.unlink(missing_ok=True)


class Writer:
    """A new file of a journal; its first line says which process writes it.

    Raises LexisegError if the folder cannot be written.
    """

    def __init__(self, journal: Journal, name: str) -> None:
        self._folder = journal.folder
        with self._writing():
            self._file = (self._folder / f"{name}.{uuid.uuid4().hex[:12]}{LINES}").open("a", encoding="utf-8")
        self.write({"process": os.getpid(), "machine": platform.node()})

    def write(self, content: Mapping[str, Any]) -> None:
        """Add a line. Raises LexisegError if the disk does not take it."""
        with self._writing():
            self._file.write(json.dumps(dict(content), separators=(",", ":")) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Write no more."""
        with suppress(OSError):  # a full disk was said when the line was written
            self._file.close()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"write into '{self._folder}'", "choose an output folder you may write to")
