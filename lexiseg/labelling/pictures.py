"""Labelling many pictures in shards, and the record of what is done, from which a stopped run goes on.

The record is a journal in a hidden folder among the results, and has more than that beside it::

    OUTPUT/.lexiseg-predict/000012.HEX.jsonl     an attempt at a shard, one line per picture
    OUTPUT/.lexiseg-predict/coco/                each picture's part of OUTPUT/annotations.json
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from lexiseg.errors import LexisegError
from lexiseg.files import read_lines
from lexiseg.formats import merge_coco
from lexiseg.journal import Journal, Writer

if TYPE_CHECKING:
    from lexiseg.background import BackgroundSource
    from lexiseg.predictor import Predictor
    from lexiseg.vocabulary import Vocabulary
    from lexiseg.windows import WindowPolicy

FOLDER = ".lexiseg-predict"
COCO = "annotations.json"
SHARD_SIZE = 64
TRIES = 2
"""How often a picture may take its worker down before it is left out."""
_NEWEST = 1000  # pictures, of which it is checked whether their results are empty
_TEMPORARY = re.compile(r"\.(?P<stem>.+?)(_labels|_overlay|_coco|_cvat)?\.[0-9a-f]{8}\.tmp\.\w+")


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

    # Deferred, since most runs never call `read_entry`. Python 3.10 and pydantic together need the whole annotation.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(defer_build=True)

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


read_entry = TypeAdapter(Entry).validate_python
"""Takes up what `dataclasses.asdict` gave, from JSON. Raises ValueError if it is something else."""


def file_state(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds; zeros where there is no such file."""
    try:
        facts = Path(path).stat()
    except (OSError, ValueError):
        return 0, 0
    return facts.st_size, facts.st_mtime_ns


class Record(Journal):
    """The record of one run, whose results are in the folder ``output``."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        super().__init__(self.output / FOLDER)

    def begin_run(self, settings: Mapping[str, Any], *, resume: bool, images: Sequence[str] = ()) -> dict[str, Entry]:
        """Start a run, or continue the recorded one; see `Journal.begin`.

        ``images``: what is to be done, by path; one that is recorded under another path, since its folder was moved or
        is named another way, is known by its name, size and time of change. Returns the pictures that are done, by
        path: those without an error, whose files are all there, and which have not changed since.
        """
        return self._done(images) if self.begin(settings, resume=resume) else {}

    def shards_of(self, pictures: Sequence[Picture], size: int | None = None) -> dict[int, Sequence[Picture]]:
        """Pictures in shards of ``size`` (None: 64), by a number that no recorded shard has."""
        size = size or SHARD_SIZE
        first = 1 + max((int(path.name.partition(".")[0]) for path in self.files()), default=-1)
        starts = range(0, len(pictures), size)
        return {first + index: pictures[start : start + size] for index, start in enumerate(starts)}

    def attempts_at(self, shard: int) -> tuple[int, dict[str, Entry], Counter[str]]:
        """How many attempts at a shard there have been, and what they say of its pictures, by path.

        What became of those that were finished, and in how many attempts one was announced.
        """
        attempts = self.files(f"{shard:06d}")
        done: dict[str, Entry] = {}
        begun: Counter[str] = Counter()
        for path in attempts:
            lines = list(read_lines(path))
            done |= {entry.image: entry for entry in _entries(lines)}
            begun.update(str(line["begin"]) for line in lines if "begin" in line)
        return len(attempts), done, begun

    def forget(self, pictures: Sequence[Picture]) -> None:
        """Record that the results of ``pictures`` are replaced by those of a run that keeps no record."""
        stems = {picture.stem for picture in pictures}
        if lost := [entry for entry in _entries(self.lines()) if entry.stem in stems]:
            with closing(Writer(self, f"{min(self.shards_of(pictures)):06d}")) as writer:
                for entry in lost:
                    writer.write(asdict(replace(entry, state=(-1, -1))))  # of no file, so it is done again

    def clean(self, stems: Iterable[str]) -> None:
        """Remove files that a killed process was writing; nobody may be writing results of ``stems`` meanwhile."""
        beginnings = set(stems)
        for folder in (self.output, self.output / "yolo", self.output / "labelme"):
            for name in _listing(folder):
                match = _TEMPORARY.fullmatch(name) if name.startswith(".") else None
                if match and beginnings & {match["stem"], f"{match['stem']}{match[2] or ''}"}:
                    (folder / name).unlink(missing_ok=True)

    def write_coco(self, classes: Iterable[str], entries: Iterable[Entry]) -> Path:
        """Write the pictures' annotations as one COCO dataset; a picture that could not be done is none of it.

        Names of files are relative to the folder that holds all the pictures.
        """
        done = [entry for entry in entries if not entry.error]
        home = os.path.commonpath([Path(entry.image).parent for entry in done]) if done else ""
        pieces = ((Path(entry.image).relative_to(home).as_posix(), self.output / entry.files["coco"]) for entry in done)
        return merge_coco(self.output / COCO, classes, pieces)

    def _done(self, images: Sequence[str]) -> dict[str, Entry]:
        """Everything recorded that still holds."""
        found = {entry.image: entry for entry in _entries(self.lines()) if not entry.error}
        # A listing a folder: asking for each file would take minutes on a network.
        folders = {str(Path(name).parent) for entry in found.values() for name in entry.files.values()}
        names = {str(Path(folder, name)) for folder in folders for name in _listing(self.output / folder)}
        # A power cut may leave the newest empty, which but for YOLO's, of a picture without objects, are no results.
        for name in (name for entry in list(found.values())[-_NEWEST:] for name in entry.files.values()):
            place = self.output / name
            if place.parent.name != "yolo" and place.is_file() and not place.stat().st_size:
                names.discard(name)
        found = {image: entry for image, entry in found.items() if names.issuperset(entry.files.values())}
        given = set(images)
        moved = {(Path(image).name, entry.state): entry for image, entry in found.items() if image not in given}
        for image in images:
            if image not in found and (entry := moved.pop((Path(image).name, file_state(image)), None)):
                found[image] = replace(entry, image=image)
        return {image: entry for image, entry in found.items() if entry.state == file_state(image)}


def _entries(lines: Iterable[Mapping[str, Any]]) -> list[Entry]:
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(read_entry(line))
    return found


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (names alone, which is several times as fast)
    except OSError:
        return []


@dataclass(frozen=True)
class Wanted:
    """What is to be made of every picture."""

    vocabulary: Vocabulary  # the classes
    kinds: tuple[str, ...]  # the files to write, as `lexiseg.segmentation.Segmentation.save` takes them
    window: WindowPolicy | None = None  # as in `lexiseg.segmenter.Segmenter.predict`
    batch_size: int = 4  # likewise
    background: BackgroundSource = None  # likewise
    instances: tuple[str, ...] = ()  # as in `lexiseg.segmentation.Segmentation.save`
    font: str | None = None  # likewise


class Labeller:
    """Segments pictures and writes their results.

    ``segmenter``: the model, with its cache of text embeddings. ``output``: the folder for the results; it must be
    there.
    """

    def __init__(self, segmenter: Predictor, wanted: Wanted, output: str | Path) -> None:
        self.segmenter = segmenter
        self.wanted = wanted
        self.output = Path(output)

    def label(self, pictures: Sequence[Picture]) -> Iterator[Entry]:
        """Make the results of ``pictures``, in their order; a picture that cannot be read is an entry with an error.

        Raises LexisegError if something is wrong that is not one picture's fault: the classes, the disk, the memory.
        """
        wanted = self.wanted
        if not pictures:
            return
        # Read before the pixels are: a file that changes meanwhile is then taken for changed.
        states = {picture.image: file_state(picture.path) for picture in pictures}
        stems = {Path(picture.path): picture for picture in pictures}
        results = self.segmenter.predict_folder(
            list(stems),
            wanted.vocabulary,
            window=wanted.window,
            batch_size=wanted.batch_size,
            background=wanted.background,
        )
        for path, result in results:
            picture, state = stems[path], states[stems[path].image]
            if isinstance(result, LexisegError):
                yield Entry(picture.image, picture.stem, error=str(result), state=state)
                continue
            if result.name != picture.name:
                result = replace(result, name=picture.name)
            files: dict[str, Path] = {}
            for kind in wanted.kinds:
                folder = self.output / FOLDER / "coco" if kind == "coco" else self.output
                files |= result.save(folder, picture.stem, (kind,), instances=wanted.instances, font=wanted.font)
            names = {kind: file.relative_to(self.output).as_posix() for kind, file in files.items()}
            ignored = result.num_ignored / (result.size[0] * result.size[1])
            rows = [
                {"class": row.name, "seen": row.seen, "fraction": row.fraction, "score": row.score}
                for row in result.table()
            ]
            image, stem, size = picture.image, picture.stem, result.size
            yield Entry(image, stem, files=names, size=size, ignored=ignored, classes=rows, state=state)

    def label_shard(self, record: Record, number: int, pictures: Sequence[Picture]) -> Iterator[Entry]:
        """Make the results of a shard and record them; where an earlier attempt was stopped, only the rest.

        A worker that was killed may have been killed by a picture (one that needs more memory than there is). From the
        second attempt on, pictures are therefore run one by one and each is announced first, and one that has taken two
        announcing attempts with it is reported and left out; the others are not lost with it. Raises LexisegError as
        :meth:`label`.
        """
        earlier, done, begun = record.attempts_at(number)
        with closing(Writer(record, f"{number:06d}")) as writer:
            yield from (done[picture.image] for picture in pictures if picture.image in done)
            rest = [picture for picture in pictures if picture.image not in done]
            one_by_one = (self._announced(writer, begun[picture.image], picture) for picture in rest)
            for entry in one_by_one if earlier else self.label(rest):
                writer.write(asdict(entry))
                yield entry

    def _announced(self, writer: Writer, begun: int, picture: Picture) -> Entry:
        if begun >= TRIES:
            problem = (
                f"The worker was killed each time it reached '{picture.path}', probably for lack of memory; lower "
                "--max-pixels or give workers more memory."
            )
            return Entry(picture.image, picture.stem, error=problem, state=file_state(picture.path))
        writer.write({"begin": picture.image})
        return next(iter(self.label([picture])))
