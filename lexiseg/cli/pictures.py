"""``lexiseg predict`` for pictures: one, several with a journal, or distributed over a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lexiseg.class_forms import ListedClass
from lexiseg.class_list import read_class_list, write_class_list
from lexiseg.cli.console import say, say_error, say_json, say_note, say_table, say_written, with_progress
from lexiseg.data.sets.layouts import CLASS_FILES
from lexiseg.data.sets.listing import files_in
from lexiseg.errors import LexisegError, warn
from lexiseg.journal import flat
from lexiseg.labelling.pictures import COCO, Entry, Labeller, Picture, Record, Wanted, absolute
from lexiseg.words import counted, word_key

if TYPE_CHECKING:
    from lexiseg.predictor import Predictor
    from lexiseg.vocabulary import Vocabulary

SOME_FAILED, ALL_FAILED = 1, 2
_LONGEST_STEM = 200  # in bytes
_PNG = b"Software\0lexiseg"
# Of what `--save` writes a file a picture: how its name ends, and what only ours hold.
_OURS = {"json": (".json", b'"ignore_index"'), "labels": ("_labels.png", _PNG), "overlay": ("_overlay.png", _PNG)}
_HEAD = 1 << 12  # bytes of a PNG before its pixels, which need not be read


@dataclass(frozen=True)
class Spread:
    """How the pictures are distributed over a cluster."""

    device: str
    loading: Mapping[str, Any]  # what `lexiseg.load` is given beside the model
    workers: int | None = None
    address: str | None = None
    shard_size: int | None = None


def predict_pictures(
    segmenter: Predictor,
    model: str,
    paths: Sequence[Path],
    vocabulary: Vocabulary,
    wanted: Wanted,
    output: Path,
    *,
    json: bool,
    resume: bool,
    spread: Spread | None,
) -> None:
    """Segment pictures and print classes and files; ``vocabulary`` is the checked form of ``wanted``."""
    kinds = wanted.kinds
    _refuse_foreign(paths, output, kinds)
    record = Record(output) if len(paths) > 1 or resume or spread or "coco" in kinds else None
    before: dict[str, Entry] = {}
    replaced: list[str] = []  # the classes of the last run into the folder
    if record is not None:
        old = flat(record.settings or {}).items()
        replaced = [name for key, name in old if key.startswith("classes.") and key.endswith(".name")]
        settings = {**segmenter.identity(vocabulary, wanted.window), "instances": list(wanted.instances)}
        before = record.begin_run(settings, resume=resume, images=list(map(absolute, paths)))
    stems = _stems(paths, {image: entry.stem for image, entry in before.items()})
    done = {image: entry for image, entry in before.items() if set(kinds) <= set(entry.files)}
    todo = [Picture(str(path), stems[path], str(path)) for path in paths if absolute(path) not in done]
    if record is not None:
        record.clean(picture.stem for picture in todo)
    start = time.perf_counter()
    entries: Iterable[Entry]
    if record is None:
        Record(output).forget(todo)  # of an earlier run over several pictures
        entries = Labeller(segmenter, wanted, output).label(todo)
    elif spread is None:
        labeller, parts = Labeller(segmenter, wanted, output), record.shards_of(todo).items()
        entries = (entry for number, part in parts for entry in labeller.label_shard(record, number, part))
    else:
        from lexiseg.labelling.ray_data import Job, label_on_ray, model_argument

        del segmenter
        todo = [replace(picture, path=picture.image) for picture in todo]
        job = Job(absolute(output), wanted, model_argument(model), spread.device, spread.loading)
        shards = record.shards_of(todo, spread.shard_size)
        entries = label_on_ray(job, shards, workers=spread.workers, address=spread.address)
    given = {absolute(path): path for path in paths}
    shown = None if json else partial(_say, given=given, output=output, vocabulary=vocabulary)
    broken = _follow(with_progress(entries, len(todo), "segmenting"), done, len(given), shown, record is not None)
    ordered = [done[image] for image in given if image in done]
    failed = sum(bool(entry.error) for entry in ordered) + len(given) - len(ordered)
    written = []
    if record is not None:
        if spread is not None:
            record.clean(picture.stem for picture in todo)  # what workers left that were killed
        if "coco" in kinds and failed < len(given):
            written.append(record.write_coco(vocabulary.names, ordered))
        if "labels" in kinds and failed < len(given):
            written += _list_classes(output, vocabulary.names, replaced)
    if "yolo" in kinds and failed < len(given):
        written.append(write_class_list(output / "yolo", vocabulary.names))
    if json:
        images = [_listed(entry, given[entry.image], output, vocabulary) for entry in ordered]
        say_json({"model": model, "seconds": round(time.perf_counter() - start, 3), "images": images})
    else:
        say_written(written)
        earlier = f", {len(ordered) - len(todo)} of them earlier" if len(todo) < len(ordered) else ""
        if len(given) > 1 or broken:
            say_note(f"{len(given) - failed} of {counted(len(given), 'picture')} segmented{earlier}")
    if failed:
        raise typer.Exit(ALL_FAILED if failed == len(given) else SOME_FAILED)


def _list_classes(output: Path, names: Sequence[str], replaced: Sequence[str]) -> list[Path]:
    """List the classes of label maps beside them, so that they can be read as masks; a list of the user's own stays.

    ``replaced``: the classes of the last run into the folder. Returns the file, or nothing.
    """
    for path in files_in(output, CLASS_FILES)[:1]:
        listed: tuple[ListedClass, ...] = ()
        with suppress(LexisegError):
            listed = read_class_list(path).classes
        if listed != tuple(map(ListedClass, replaced)):
            if tuple(one.name for one in listed) != names:
                warn(f"'{path}' lists other classes than these label maps have; correct it if you use them as masks.")
            return []
    return [write_class_list(output, names)]


def _follow(
    entries: Iterable[Entry], done: dict[str, Entry], total: int, show: Callable[[Entry], None] | None, resumable: bool
) -> bool:
    """Take the pictures' entries as they come, into ``done``; whether something ended the run before its end.

    Raises LexisegError if something is wrong that is no picture's fault, and nothing was done before it. Raises
    KeyboardInterrupt if the user stopped it; its text says what is done and how to go on.
    """
    try:
        for entry in entries:
            done[entry.image] = entry
            if entry.error:
                say_error(entry.error)
            elif show is not None:
                show(entry)
    except KeyboardInterrupt as stop:
        finished = sum(not entry.error for entry in done.values())
        advice = "the same command with --resume continues" if resumable else "run the command again"
        stop.args = (f"Stopped with {finished} of {counted(total, 'picture')} complete; {advice}.",)
        raise
    except LexisegError as error:
        # What is whole stays, and is counted: the disk may be full after a thousand pictures.
        if not any(not entry.error for entry in done.values()):
            raise
        say_error(str(error))
        return True
    if len(done) < total:
        say_error(f"No result for {counted(total - len(done), 'picture')}; run again with --resume.")
        return True
    return False


def _refuse_foreign(paths: Sequence[Path], output: Path, kinds: Collection[str]) -> None:
    """Refuse to replace a user's own files among the pictures: annotation tools name theirs as we do."""
    if not any(absolute(path.parent) == absolute(output) for path in paths):
        return
    written = [(kind, *_OURS[kind]) for kind in _OURS if kind in kinds]
    marks = {f"{stem}{end}": (kind, mark) for stem in _stems(paths).values() for kind, end, mark in written}
    if "coco" in kinds:
        marks[COCO] = "coco", b"made by lexiseg"
    for name, (kind, mark) in marks.items():
        with suppress(OSError), (output / name).open("rb") as file:
            if (content := file.read(_HEAD if mark == _PNG else -1)) and mark not in content:
                raise LexisegError(
                    f"'{output / name}' was not written by lexiseg and would be replaced; choose another --output, or "
                    f"leave {kind} out of --save."
                )


def _stems(paths: Sequence[Path], kept: Mapping[str, str] | None = None) -> dict[Path, str]:
    """A file name for each picture's results: its own without the ending, made longer where two would be the same.

    ``kept``: names that an earlier run has given already, by absolute path.
    """
    kept = kept or {}
    stems: dict[Path, str] = {}
    # Two names that differ only in case or in how an accent is spelled are one file on some systems; annotations.json
    # and the lists of classes are of the whole run.
    taken = {"annotations", "classes", *(word_key(stem) for stem in kept.values())}
    for path in paths:
        stem = kept.get(absolute(path))
        if stem is None:
            short = _cut(path.stem)
            choices = chain((short, _cut(path.name.replace(".", "_"))), (f"{short}_{number}" for number in count(2)))
            stem = next(choice for choice in choices if word_key(choice) not in taken)
            taken.add(word_key(stem))
        stems[path] = stem
    return stems


def _cut(name: str) -> str:
    """A name short enough for what is put behind it: no disk takes more than 255 bytes."""
    data = os.fsencode(name)
    return name if len(data) <= _LONGEST_STEM else data[:_LONGEST_STEM].decode("utf-8", "ignore")


def _rows(entry: Entry, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The classes by decreasing fraction; those without a pixel come last."""
    found = {row["class"] for row in entry.classes}
    absent = [
        {"class": item.name, "seen": item.seen, "fraction": 0.0, "score": None}
        for item in vocabulary.classes
        if item.name not in found
    ]
    return [*(dict(row) for row in entry.classes), *absent]


def _files(entry: Entry, output: Path) -> dict[str, Path]:
    """The files of a picture's results, by kind; those of coco are part of one file."""
    return {kind: output / (COCO if kind == "coco" else name) for kind, name in entry.files.items()}


def _listed(entry: Entry, path: Path, output: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    if entry.error:
        return {"image": str(path), "error": entry.error}
    files = {kind: str(file) for kind, file in _files(entry, output).items()}
    return {"image": str(path), "classes": _rows(entry, vocabulary), "files": files}


def _say(entry: Entry, given: Mapping[str, Path], output: Path, vocabulary: Vocabulary) -> None:
    path = given[entry.image]
    if len(given) > 1:
        found = ", ".join(f"{row['class']} {row['fraction']:.0%}" for row in entry.classes[:5])
        say(f"{path}: {found or 'no class'}")
    else:
        seen = {True: "seen", False: "unseen", None: "-"}
        rows = [
            [
                row["class"],
                seen[row["seen"]],
                f"{100 * row['fraction']:.1f} %",
                "-" if row["score"] is None else f"{row['score']:.3f}",
            ]
            for row in _rows(entry, vocabulary)
        ]
        if entry.ignored:
            rows.append(["(no class)", "-", f"{100 * entry.ignored:.1f} %", "-"])
        height, width = entry.size
        say_table(f"{path}, {width} x {height} pixels", ["class", "in training", "pixels", "mean score"], rows)
    say_written(file for kind, file in _files(entry, output).items() if kind != "coco")
