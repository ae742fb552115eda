"""``lexiseg predict``: pictures and words in, labels out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lexiseg
from lexiseg.cli.console import say, say_error, say_json, say_note, say_table, say_written, waiting, with_progress
from lexiseg.cli.options import (
    DEFAULT_MAX_PIXELS,
    DEFAULT_MODEL,
    Background,
    Cleaning,
    Compile,
    Device,
    Dtype,
    Json,
    Precision,
    Refine,
    Stride,
    Template,
    Window,
    templates_of,
    window_of,
)
from lexiseg.errors import LexisegError
from lexiseg.words import word_key

if TYPE_CHECKING:
    from lexiseg.labelling.record import Entry, Picture, Record
    from lexiseg.segmenter import Segmenter
    from lexiseg.vocabulary import Vocabulary
    from lexiseg.windows import WindowPolicy

SOME_FAILED, ALL_FAILED = 1, 2
_ALIASES = {"png": "labels", "rle": "coco"}
_OBJECT_KINDS = {"coco", "geojson", "yolo", "labelme", "cvat"}


class Cluster(str, Enum):
    """What spreads pictures over machines."""

    ray = "ray"


def predict(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... CLASSES",
            help="Pictures, folders or patterns, and at the end the classes: 'giraffe; tree, bush; sky' (a semicolon "
            "separates classes, a comma joins synonyms) or a file of them.",
            show_default=False,
        ),
    ],
    classes_file: Annotated[
        Path | None,
        typer.Option(
            "--classes-file", "-c", help="File of classes; then all arguments are pictures.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name that `lexiseg models` lists, a folder, or auto.")
    ] = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")] = Path("out"),
    save: Annotated[
        str,
        typer.Option(
            "--save",
            help="What to write, with commas: overlay, labels (png), json; coco (one annotations.json a run); geojson, "
            "yolo, labelme, cvat; masks (a PNG a class).",
        ),
    ] = "overlay,labels,json",
    instances: Annotated[
        str | None,
        typer.Option(
            "--instances",
            help="Classes whose connected regions become annotations of their own, 'giraffe; tree' or all, in coco, "
            "geojson, yolo, labelme and cvat. Things that touch are one region.",
            show_default=False,
        ),
    ] = None,
    font: Annotated[
        Path | None,
        typer.Option(
            "--font",
            help="TrueType or OpenType file for the legend. Default: fonts of this machine that have the letters.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out pictures that a run into the same folder has finished.")
    ] = False,
    window: Window = None,
    stride: Stride = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Windows in one forward pass.")] = 4,
    device: Device = "auto",
    dtype: Dtype = Precision.fp32,
    compile: Compile = False,
    template: Template = None,
    background: Background = None,
    refine: Refine = Cleaning.none,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, help="Refuse pictures with more pixels than this.")
    ] = DEFAULT_MAX_PIXELS,
    cluster: Annotated[
        Cluster | None,
        typer.Option("--cluster", help="Spread the pictures over machines: ray. Default: this process does all."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Cluster: models at work at most. Default: one a GPU, or a CPU without any."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Cluster: where it is, HOST:PORT; auto: the one this machine is part of; local starts one here. "
            "Default: $RAY_ADDRESS, or local.",
        ),
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option("--shard-size", min=1, help="Cluster: pictures that a worker is given at a time.")
    ] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Video: label every so many frames.")] = 1,
    smooth: Annotated[
        float, typer.Option("--smooth", help="Video: weight of earlier frames in the scores, 0 to below 1.")
    ] = 0.0,
    bands: Annotated[
        str | None, typer.Option("--bands", help="Map: its bands for red, green and blue: 4,3,2.", show_default=False)
    ] = None,
    polygons: Annotated[str, typer.Option("--polygons", help="Map: geojson, gpkg or none.")] = "geojson",
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Video: stop after so many frames.", show_default=False)
    ] = None,
) -> None:
    """Segment pictures by words.

    Prints a table for one picture, a line each for several, and where the files are. A picture that cannot be read is
    reported and the rest goes on; the exit code is then 1, and 2 when no picture could be segmented.
    """
    if cluster is None and (workers or address or shard_size):
        raise LexisegError("--workers, --address and --shard-size are for a cluster; add --cluster ray.")
    kinds = _kinds(save, instances)
    sources, classes = _split(words, classes_file)
    from lexiseg.cli.streams import predict_map, predict_video, read_bands
    from lexiseg.maps import MapOptions, is_map
    from lexiseg.video import VideoOptions, is_video

    video = VideoOptions(every, smooth, "overlay" in kinds, resume, frames) if is_video(sources[0]) else None
    chart = MapOptions(read_bands(bands), polygons=polygons) if is_map(sources[0]) else None
    if (video or chart) and (len(sources) > 1 or cluster):
        raise LexisegError("A video or a map is segmented by itself; give one, and no --cluster.")
    paths = [] if video or chart else _pictures(sources)
    vocabulary = lexiseg.Vocabulary.parse(classes)
    from lexiseg.files import make_folder

    make_folder(output)
    loading: dict[str, Any] = {
        "dtype": dtype.value,
        "compile": compile,
        "templates": templates_of(template),
        "max_pixels": max_pixels,
        "refine": refine.value,
    }
    with waiting(f"loading {model}"):
        # On a cluster the workers load it where they are; here it is needed to look at the words.
        segmenter = lexiseg.load(model, device=device if cluster is None else "cpu", **loading)
    policy = window_of(segmenter.model.window, window, stride)
    checked = segmenter.vocabulary(vocabulary, background=background)
    if chart:
        predict_map(segmenter, sources[0], checked, output, chart, json, window=policy, batch_size=batch_size)
        return
    if video:
        predict_video(segmenter, sources[0], checked, output, video, json, window=policy, batch_size=batch_size)
        return
    regions = _instances(instances, checked)

    from lexiseg.labelling.record import Record, absolute
    from lexiseg.labelling.shards import Labeller, Wanted, label_all, shards_of

    record = Record(output) if len(paths) > 1 or resume or cluster or "coco" in kinds else None
    settings = {} if record is None else _settings(segmenter, checked, policy, dtype.value, regions)
    done, todo = _plan(paths, kinds, record, settings, resume, manifest=cluster is not None)
    face = None if font is None else str(font)
    wanted = Wanted(vocabulary, tuple(kinds), policy, batch_size, background, regions, face)
    start = time.perf_counter()
    entries: Iterable[Entry]
    if record is None:
        entries = Labeller(segmenter, wanted, output).label(todo)
    elif cluster is None:
        entries = label_all(Labeller(segmenter, wanted, output), record, shards_of(record, todo))
    else:
        from lexiseg.labelling.ray_data import Job, label_on_ray, model_argument

        del segmenter
        todo = [replace(picture, path=picture.image) for picture in todo]
        job = Job(absolute(output), wanted, model_argument(model), device, **loading)
        entries = label_on_ray(job, shards_of(record, todo, shard_size), workers=workers, address=address)
    given = {absolute(path): path for path in paths}
    shown = None if json else partial(_say, given=given, output=output, vocabulary=checked)
    broken = _follow(with_progress(entries, len(todo), "segmenting"), done, len(given), shown, record is not None)
    ordered = [done[image] for image in given if image in done]
    failed = sum(bool(entry.error) for entry in ordered) + len(given) - len(ordered)
    written = _finish(record, ordered, [picture.stem for picture in todo], checked.names, kinds, cluster is not None)
    if json:
        images = [_listed(entry, given[entry.image], output, checked) for entry in ordered]
        say_json({"model": model, "seconds": round(time.perf_counter() - start, 3), "images": images})
    else:
        say_written(written)
        earlier = f", {len(ordered) - len(todo)} of them earlier" if len(todo) < len(ordered) else ""
        if len(given) > 1 or broken:
            say_note(f"{len(given) - failed} of {len(given)} pictures segmented{earlier}")
    if failed:
        raise typer.Exit(ALL_FAILED if failed == len(given) else SOME_FAILED)


def _follow(
    entries: Iterable[Entry],
    done: dict[str, Entry],
    total: int,
    show: Callable[[Entry], None] | None,
    resumable: bool,
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
        advice = "the same command with --resume goes on from there" if resumable else "run the command again"
        stop.args = (f"Stopped; {finished} of {total} pictures are done and complete, and {advice}.",)
        raise
    except LexisegError as error:
        # What is whole stays, and is counted: the disk may be full after a thousand pictures.
        if not any(not entry.error for entry in done.values()):
            raise
        say_error(str(error))
        return True
    if len(done) < total:
        say_error(f"{total - len(done)} pictures came back without a result; use --resume.")
        return True
    return False


def _finish(
    record: Record | None,
    entries: Sequence[Entry],
    stems: Iterable[str],
    classes: Sequence[str],
    kinds: Sequence[str],
    on_cluster: bool,
) -> list[Path]:
    """Write what is written once a run, and return it."""
    if record is None:
        return []
    if on_cluster:
        record.clean(stems)  # what workers left that were killed
    written = [record.write_manifest(entries)] if record.has_manifest else []
    if "coco" in kinds and any(not entry.error for entry in entries):
        written.append(record.write_coco(classes, entries))
    return written


def _plan(
    paths: Sequence[Path],
    kinds: Sequence[str],
    record: Record | None,
    settings: Mapping[str, Any],
    resume: bool,
    *,
    manifest: bool,
) -> tuple[dict[str, Entry], list[Picture]]:
    """What an earlier run has done, by absolute path, and what there is to do; the record is begun."""
    from lexiseg.labelling.record import Picture, absolute

    before = {} if record is None else record.begin(settings, resume=resume, manifest=manifest)
    stems = _stems(paths, {image: entry.stem for image, entry in before.items()})
    done = {image: entry for image, entry in before.items() if set(kinds) <= set(entry.files)}
    todo = [Picture(str(path), stems[path], str(path)) for path in paths if absolute(path) not in done]
    if record is not None:
        record.clean(picture.stem for picture in todo)
    return done, todo


def _settings(
    segmenter: Segmenter, vocabulary: Vocabulary, policy: WindowPolicy | None, precision: str, regions: Sequence[str]
) -> dict[str, Any]:
    """What decides how results look: a run can only be gone on with where all of it is the same."""
    from lexiseg.evaluation.report import weights_hash

    model = segmenter.model
    return {
        "model": {
            "system": model.system,
            "options": model.options.model_dump(mode="json"),
            "sha256": weights_hash(model),
        },
        "classes": vocabulary.hash(),
        "background": vocabulary.background.to_dict(),
        "window": asdict(policy or model.window),
        "dtype": precision,
        **({"instances": list(regions)} if regions else {}),
    }


def _kinds(save: str, instances: str | None) -> list[str]:
    from lexiseg.formats import SAVE_FORMATS

    names = [name.strip().lower() for name in save.split(",")]
    kinds = list(dict.fromkeys(_ALIASES.get(name, name) for name in names))
    for kind in kinds:
        if kind not in SAVE_FORMATS:
            raise LexisegError(f"--save does not know '{kind}'; choose from {', '.join(SAVE_FORMATS)}.")
    if instances is not None and not _OBJECT_KINDS & set(kinds):
        raise LexisegError(f"--instances changes none of what --save writes; add one of {', '.join(_OBJECT_KINDS)}.")
    return kinds


def _instances(text: str | None, vocabulary: Vocabulary) -> tuple[str, ...]:
    """The classes of ``--instances``, as the vocabulary spells them."""
    if text is None:
        return ()
    if text.strip().casefold() == "all":
        return vocabulary.names
    names = {word_key(name): name for name in vocabulary.names}
    wanted = [word for word in text.split(";") if word.strip()]
    unknown = [word for word in wanted if word_key(word) not in names]
    if unknown or not wanted:
        raise LexisegError(f"--instances takes names of classes, or all; '{(unknown or [text])[0]}' is none of them.")
    return tuple(names[word_key(word)] for word in wanted)


def _split(words: Sequence[str], classes_file: Path | None) -> tuple[list[str], str | Path | Vocabulary]:
    """Tell the pictures from the classes."""
    if classes_file is not None:
        return list(words), classes_file
    if len(words) < 2:
        raise LexisegError(
            f"Only '{words[0]}' was given; write the pictures first and then the classes, for example "
            "lexiseg predict photo.jpg 'giraffe; tree, bush'."
        )
    last = words[-1]
    from lexiseg.images import IMAGE_SUFFIXES

    if Path(last).suffix.lower() in IMAGE_SUFFIXES:
        raise LexisegError(f"The last argument, '{last}', is a picture; write the classes after the pictures.")
    return list(words[:-1]), last


def _pictures(sources: Sequence[str]) -> list[Path]:
    """The files that the arguments stand for, each once, in order."""
    from lexiseg.images import list_images
    from lexiseg.labelling.record import absolute

    paths: dict[str, Path] = {}
    for source in sources:
        for path in list_images(source):
            paths.setdefault(absolute(path), path)
    return list(paths.values())


def _stems(paths: Sequence[Path], kept: Mapping[str, str] | None = None) -> dict[Path, str]:
    """A file name for each picture's results: its own without the ending, made longer where two would be the same.

    ``kept``: names that an earlier run has given already, by absolute path.
    """
    from lexiseg.labelling.record import absolute

    kept = kept or {}
    stems: dict[Path, str] = {}
    # Two names that differ only in case or in how an accent is spelled are one file on some systems.
    taken = {word_key(stem) for stem in kept.values()}
    for path in paths:
        stem = kept.get(absolute(path))
        if stem is None:
            choices = chain((path.stem, path.name.replace(".", "_")), (f"{path.stem}_{number}" for number in count(2)))
            stem = next(choice for choice in choices if word_key(choice) not in taken)
            taken.add(word_key(stem))
        stems[path] = stem
    return stems


def _rows(entry: Entry, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The classes by falling fraction, and those without a pixel at the end."""
    found = {row["class"] for row in entry.classes}
    absent = [
        {"class": item.name, "seen": item.seen, "fraction": 0.0, "score": None}
        for item in vocabulary.classes
        if item.name not in found
    ]
    return [*(dict(row) for row in entry.classes), *absent]


def _files(entry: Entry, output: Path) -> dict[str, Path]:
    """Where a picture's results are, by kind; those of coco are part of one file."""
    from lexiseg.labelling.record import COCO

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
