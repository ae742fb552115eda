"""``lexiseg predict``: pictures and words in, labels out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lexiseg
from lexiseg.cli.console import say_error, say_json, say_note, say_table, say_written, waiting, with_progress
from lexiseg.cli.options import (
    DEFAULT_MAX_PIXELS,
    DEFAULT_MODEL,
    Background,
    Compile,
    Device,
    Dtype,
    Json,
    Precision,
    Stride,
    Template,
    Window,
    templates_of,
    window_of,
)
from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from lexiseg.labelling.record import Entry, Picture, Record
    from lexiseg.segmenter import Segmenter
    from lexiseg.vocabulary import Vocabulary
    from lexiseg.windows import WindowPolicy

SOME_FAILED, ALL_FAILED = 1, 2
_KINDS = {"overlay": "overlay", "labels": "labels", "png": "labels", "json": "json", "coco": "coco", "rle": "coco"}


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
        str, typer.Option("--model", "-m", help="A name that `lexiseg models` lists, or a folder.")
    ] = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")] = Path("out"),
    save: Annotated[
        str, typer.Option("--save", help="What to write: any of overlay, labels (png), json, coco (rle), with commas.")
    ] = "overlay,labels,json",
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
) -> None:
    """Segment pictures by words.

    Prints a table for one picture, a line each for several, and where the files are. A picture that cannot be read is
    reported and the rest goes on; the exit code is then 1, and 2 when no picture could be segmented.
    """
    if cluster is None and (workers or address or shard_size):
        raise LexisegError("--workers, --address and --shard-size are for a cluster; add --cluster ray.")
    kinds = _kinds(save)
    sources, classes = _split(words, classes_file)
    paths = _pictures(sources)
    vocabulary = lexiseg.Vocabulary.parse(classes)
    from lexiseg.files import make_folder

    make_folder(output)
    loading: dict[str, Any] = {
        "dtype": dtype.value,
        "compile": compile,
        "templates": templates_of(template),
        "max_pixels": max_pixels,
    }
    with waiting(f"loading {model}"):
        # On a cluster the workers load it where they are; here it is needed to look at the words.
        segmenter = lexiseg.load(model, device=device if cluster is None else "cpu", **loading)
    policy = window_of(segmenter.model.window, window, stride)
    checked = segmenter.vocabulary(vocabulary, background=background)

    from lexiseg.labelling.record import Record, absolute
    from lexiseg.labelling.shards import Labeller, Wanted, label_all, shards_of

    record = Record(output) if len(paths) > 1 or resume or cluster else None
    settings = {} if record is None else _settings(segmenter, checked, policy, dtype.value)
    done, todo = _plan(paths, kinds, record, settings, resume, manifest=cluster is not None)
    wanted = Wanted(vocabulary, tuple(kinds), policy, batch_size, background)
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
    for entry in with_progress(entries, len(todo), "segmenting"):
        done[entry.image] = entry
        if entry.error:
            say_error(entry.error)
        elif not json:
            _say(entry, given[entry.image], output, checked, alone=len(paths) == 1)
    missing = [str(path) for image, path in given.items() if image not in done]
    if missing:
        raise LexisegError(f"{len(missing)} pictures came back without a result, such as '{missing[0]}'; use --resume.")
    ordered = [done[image] for image in given]
    failed = sum(bool(entry.error) for entry in ordered)
    manifest: list[Path] = []
    if record is not None and cluster is not None:
        record.clean(picture.stem for picture in todo)  # what workers left that were killed
    if record is not None and record.has_manifest:
        manifest.append(record.write_manifest(ordered))
    if json:
        images = [_listed(entry, given[entry.image], output, checked) for entry in ordered]
        say_json({"model": model, "seconds": round(time.perf_counter() - start, 3), "images": images})
    elif record is not None:
        say_written(manifest)
        earlier = f", {len(ordered) - len(todo)} of them earlier" if len(todo) < len(ordered) else ""
        say_note(f"{len(ordered) - failed} of {len(ordered)} pictures segmented{earlier}")
    if failed:
        raise typer.Exit(ALL_FAILED if failed == len(ordered) else SOME_FAILED)


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
    segmenter: Segmenter, vocabulary: Vocabulary, policy: WindowPolicy | None, precision: str
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
    }


def _kinds(save: str) -> list[str]:
    kinds: list[str] = []
    for name in (part.strip().lower() for part in save.split(",")):
        if name not in _KINDS:
            raise LexisegError(f"--save does not know '{name}'; choose from overlay, labels, json and coco.")
        if _KINDS[name] not in kinds:
            kinds.append(_KINDS[name])
    return kinds


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

    Args:
        paths: of the pictures.
        kept: names that an earlier run has given already, by absolute path.
    """
    from lexiseg.labelling.record import absolute

    kept = kept or {}
    stems: dict[Path, str] = {}
    # Case is folded because two names that differ in it only are one file on some systems.
    taken = {stem.casefold() for stem in kept.values()}
    for path in paths:
        stem = kept.get(absolute(path))
        if stem is None:
            choices = chain((path.stem, path.name.replace(".", "_")), (f"{path.stem}_{number}" for number in count(2)))
            stem = next(choice for choice in choices if choice.casefold() not in taken)
            taken.add(stem.casefold())
        stems[path] = stem
    return stems


def _rows(entry: Entry, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The classes by falling share, and those without a pixel at the end."""
    found = {row["class"] for row in entry.classes}
    absent = [
        {"class": item.name, "seen": item.seen, "share": 0.0, "score": None}
        for item in vocabulary.classes
        if item.name not in found
    ]
    return [*(dict(row) for row in entry.classes), *absent]


def _listed(entry: Entry, path: Path, output: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    if entry.error:
        return {"image": str(path), "error": entry.error}
    files = {kind: str(output / name) for kind, name in entry.files.items()}
    return {"image": str(path), "classes": _rows(entry, vocabulary), "files": files}


def _say(entry: Entry, path: Path, output: Path, vocabulary: Vocabulary, *, alone: bool) -> None:
    if not alone:
        found = ", ".join(f"{row['class']} {row['share']:.0%}" for row in entry.classes[:5])
        typer.echo(f"{path}: {found or 'no class'}")
    else:
        seen = {True: "seen", False: "unseen", None: "-"}
        rows = [
            [
                row["class"],
                seen[row["seen"]],
                f"{100 * row['share']:.1f} %",
                "-" if row["score"] is None else f"{row['score']:.3f}",
            ]
            for row in _rows(entry, vocabulary)
        ]
        if entry.ignored:
            rows.append(["(no class)", "-", f"{100 * entry.ignored:.1f} %", "-"])
        height, width = entry.size
        say_table(f"{path}, {width} x {height} pixels", ["class", "in training", "share", "mean score"], rows)
    say_written([output / name for name in entry.files.values()])
