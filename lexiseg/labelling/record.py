"""What a run over many pictures has done, kept so that no stop of any kind loses a picture or has one done twice.

The record is a hidden folder among the results::

    OUTPUT/.lexiseg-predict/run.json             what the results were made with
    OUTPUT/.lexiseg-predict/manifest             there where the results have a manifest, which a cluster writes
    OUTPUT/.lexiseg-predict/000012.jsonl         a finished shard: a line a picture
    OUTPUT/.lexiseg-predict/000012.HEX.part      a shard somebody is at, or was when he was killed
    OUTPUT/.lexiseg-predict/coco/                each picture's part of OUTPUT/annotations.json

A finished shard appears at once and whole. The parts grow line by line, each line written when the picture's files are
complete; every attempt at a shard has a part of its own, so that two of them (a worker that is only thought to be dead)
never write into one file.
"""

from __future__ import annotations

import json
import os
import platform
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lexiseg.errors import LexisegError
from lexiseg.files import make_folder, write_json, write_text
from lexiseg.formats import merge_coco

FOLDER = ".lexiseg-predict"
RUN, FINISHED, PART = "run.json", ".jsonl", ".part"
MANIFEST = "manifest.jsonl"
COCO = "annotations.json"
WITH_MANIFEST = "manifest"
_FORMAT = 1
_SHARD = re.compile(r"\d+(\.[0-9a-f]+\.part|\.jsonl)")
_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.[0-9a-f]{8}\.tmp\.(png|json)")


@dataclass(frozen=True)
class Picture:
    """A picture to be done."""

    path: str  # where to read it; on a cluster absolute, so that it means the same everywhere
    stem: str  # what the names of its results begin with
    name: str  # what to call it, usually its path as the user gave it

    @property
    def image(self) -> str:
        """What the record calls it: its absolute path."""
        return absolute(self.path)


def absolute(path: str | Path) -> str:
    """``path`` from the root of the file system; links are left as they are."""
    return str(Path(path).absolute())


@dataclass(frozen=True)
class Entry:
    """What became of a picture."""

    image: str  # the picture's path, absolute
    stem: str  # what the names of its results begin with
    error: str = ""  # the sentence that says why it could not be done; empty where it was
    # the files written, by kind, relative to the folder of the results
    files: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)  # height and width in pixels
    ignored: float = 0.0  # fraction of its pixels without a class, 0..1
    # its classes by falling fraction: name, whether masks of it were trained on, fraction, mean score
    classes: Sequence[Mapping[str, Any]] = ()
    state: tuple[int, int] = (0, 0)  # size in bytes and time of the last change of the picture's file when it was read

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n"

    def to_manifest(self) -> dict[str, Any]:
        """The line of the manifest, for people and other programs."""
        if self.error:
            return {"image": self.image, "error": self.error}
        height, width = self.size
        files = {kind: COCO if kind == "coco" else name for kind, name in self.files.items()}
        facts = {"image": self.image, "files": files, "height": height, "width": width}
        return {**facts, "ignored_fraction": self.ignored, "classes": [dict(row) for row in self.classes]}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Entry:
        """Read what :meth:`to_line` wrote."""
        entry = Entry(**content)
        return replace(entry, size=_pair(entry.size), state=_pair(entry.state))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def file_state(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds; zeros where there is no such file."""
    try:
        facts = Path(path).stat()
    except (OSError, ValueError):
        return 0, 0
    return facts.st_size, facts.st_mtime_ns


class Record:
    """The record of one run. ``folder``: where the record is."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.folder = self.output / FOLDER

    def begin(self, settings: Mapping[str, Any], *, resume: bool, manifest: bool = False) -> dict[str, Entry]:
        """Start a run, or go on with the one that is recorded.

        ``settings``: everything that decides what the results look like. ``manifest``: the run will write a manifest;
        every run that goes on with it then has to as well, because the old one would not say what it did. Returns the
        pictures that are done, by path: those without an error, whose files are all there, and which have not changed
        since. Raises LexisegError if the results that are there were made with other settings, or the folder cannot be
        written.
        """
        make_folder(self.folder)
        run = {"format": _FORMAT, "settings": dict(settings)}
        before = self._read_run()
        if not resume or before is None:
            for path in self._shards():
                path.unlink(missing_ok=True)
            for path in (self.output / MANIFEST, self.folder / WITH_MANIFEST):
                path.unlink(missing_ok=True)
            write_json(self.folder / RUN, run)
            self._mark(manifest)
            return {}
        if before != run:
            raise LexisegError(
                f"'{self.output}' holds results made with other settings ({_difference(before, run)}), so this run "
                "cannot resume them; choose another --output, or leave out --resume to start again."
            )
        self._mark(manifest)
        return self._done()

    @property
    def has_manifest(self) -> bool:
        """Whether the results have a manifest, or will have one when the run that was stopped is at its end."""
        return (self.folder / WITH_MANIFEST).is_file() or (self.output / MANIFEST).is_file()

    def _mark(self, manifest: bool) -> None:
        if manifest:
            # Before the first picture: the run may be stopped long before there is a manifest.
            write_text(self.folder / WITH_MANIFEST, "")

    @property
    def is_there(self) -> bool:
        """Whether this machine sees the record."""
        return self._read_run() is not None

    def next_shard(self) -> int:
        """The lowest number that no shard has."""
        return 1 + max((int(path.name.split(".")[0]) for path in self._shards()), default=-1)

    def open_shard(self, number: int) -> Attempt:
        """An attempt at a shard, with what earlier ones have done."""
        return Attempt(self, number)

    def clean(self, stems: Iterable[str]) -> None:
        """Remove files that a killed process was writing; nobody may be writing results of ``stems`` meanwhile."""
        beginnings = set(stems)
        with os.scandir(self.output) as found:
            names = [entry.name for entry in found if entry.name.startswith(".")]
        for name in names:
            match = _TEMPORARY.fullmatch(name)
            if match and any(match["stem"] == f"{start}{end}" for start, end in _splits(match["stem"], beginnings)):
                (self.output / name).unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp.json*"):
            path.unlink(missing_ok=True)

    def write_coco(self, classes: Iterable[str], entries: Iterable[Entry]) -> Path:
        """Write the pictures' annotations as one COCO data set; a picture that could not be done is none of it.

        Names of files are relative to the folder that holds all the pictures.
        """
        done = [entry for entry in entries if not entry.error]
        home = os.path.commonpath([Path(entry.image).parent for entry in done]) if done else ""
        pieces = ((Path(entry.image).relative_to(home).as_posix(), self.output / entry.files["coco"]) for entry in done)
        return merge_coco(self.output / COCO, classes, pieces)

    def write_manifest(self, entries: Iterable[Entry]) -> Path:
        """Write a line a picture, in the order of ``entries``, with the paths of files relative to the folder."""
        lines = (json.dumps(entry.to_manifest(), ensure_ascii=False) + "\n" for entry in entries)
        return write_text(self.output / MANIFEST, "".join(lines))

    def _shards(self) -> list[Path]:
        return [path for path in sorted(self.folder.iterdir()) if _SHARD.fullmatch(path.name)]

    def _read_run(self) -> Any:
        try:
            return json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _done(self) -> dict[str, Entry]:
        """Everything recorded that still holds; parts are made whole, so that nobody adds to them any more."""
        found: dict[str, Entry] = {}
        shards = self._shards()
        for path in shards:
            entries, _ = _read(path)
            found.update((entry.image, entry) for entry in entries if not entry.error)
        parts = [path for path in shards if path.suffix == PART]
        if parts:
            number = self.next_shard()
            kept = [entry for path in parts for entry in _read(path)[0]]
            write_text(self.folder / f"{number:06d}{FINISHED}", "".join(entry.to_line() for entry in kept))
            for path in parts:
                path.unlink(missing_ok=True)
        # A listing a folder: asking for each file would take minutes on a network.
        folders = {str(Path(name).parent) for entry in found.values() for name in entry.files.values()}
        names = {str(Path(folder, name)) for folder in folders for name in _listing(self.output / folder)}
        return {
            image: entry
            for image, entry in found.items()
            if names.issuperset(entry.files.values()) and entry.state == file_state(image)
        }


class Attempt:
    """One worker's attempt at one shard.

    ``number``: how many attempts there have been, with this one. ``begun``: how often earlier attempts began a picture
    that they did not finish and said so. ``done``: what earlier attempts have finished, by path.
    """

    def __init__(self, record: Record, shard: int) -> None:
        self._folder = record.folder
        self._shard = f"{shard:06d}"
        self.done: dict[str, Entry] = {}
        self.begun: dict[str, int] = {}
        before = sorted(self._folder.glob(f"{self._shard}.*{PART}"))
        finished = self._folder / f"{self._shard}{FINISHED}"
        for path in [*before, *([finished] if finished.is_file() else [])]:
            entries, begun = _read(path)
            self.done.update((entry.image, entry) for entry in entries)
            for image in begun:
                self.begun[image] = self.begun.get(image, 0) + 1
        self.number = len(before) + 1
        try:
            self._file = (self._folder / f"{self._shard}.{uuid.uuid4().hex[:12]}{PART}").open(
                "a", encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        # Which process this is helps to find out what happened to it.
        self._write(json.dumps({"process": os.getpid(), "machine": platform.node()}))

    def begin(self, image: str) -> None:
        """Say that a picture is next, so that the next attempt knows what this one was at."""
        self._write(json.dumps({"begin": image}))

    def finish(self, entry: Entry) -> None:
        """Say that a picture's files are complete, or why there are none."""
        self.done[entry.image] = entry
        self._write(entry.to_line().rstrip("\n"))

    def close(self, images: Sequence[str]) -> None:
        """Make the shard whole: ``images`` are its pictures, all of them done."""
        text = "".join(self.done[image].to_line() for image in images)
        write_text(self._folder / f"{self._shard}{FINISHED}", text)
        self._file.close()
        for path in self._folder.glob(f"{self._shard}.*{PART}"):
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Leave the shard unfinished; what is done is recorded."""
        with suppress(OSError):  # a full disk was said when the line was written
            self._file.close()

    def _write(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._folder, error) from error


def _read(path: Path) -> tuple[list[Entry], list[str]]:
    """The entries of a shard or part, and the pictures begun but not finished; a line that was cut off is no line."""
    entries: dict[str, Entry] = {}
    begun: dict[str, None] = {}
    text = ""
    with suppress(OSError, UnicodeDecodeError):
        text = path.read_bytes().decode("utf-8", errors="replace")
    for line in text.split("\n")[:-1]:
        with suppress(ValueError, TypeError):
            content = json.loads(line)
            if "begin" in content:
                begun[content["begin"]] = None
            elif "image" in content:
                entry = Entry.from_dict(content)
                entries[entry.image] = entry
    return list(entries.values()), [image for image in begun if image not in entries]


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (names alone, which is several times as fast)
    except OSError:
        return []


def _splits(stem: str, beginnings: set[str]) -> Iterable[tuple[str, str]]:
    for ending in ("_labels", "_overlay", "_coco", ""):
        if stem.endswith(ending) and stem[: len(stem) - len(ending)] in beginnings:
            yield stem[: len(stem) - len(ending)], ending


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    old = before.get("settings") if isinstance(before, dict) else None
    if not isinstance(old, dict):
        return "of another version"
    new = now["settings"]
    return ", ".join(sorted(key for key in {*old, *new} if old.get(key) != new.get(key))) or "of another version"


def _unwritable(folder: Path, error: OSError) -> LexisegError:
    reason = error.strerror or type(error).__name__
    return LexisegError(f"Cannot write into '{folder}' ({reason}); choose an output folder you may write to.")
