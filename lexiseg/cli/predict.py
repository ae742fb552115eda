"""``lexiseg predict``: pictures and words in, labels out."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    from lexiseg.segmentation import Segmentation
    from lexiseg.vocabulary import Vocabulary

SOME_FAILED, ALL_FAILED = 1, 2
_KINDS = {"overlay": "overlay", "labels": "labels", "png": "labels", "json": "json", "coco": "coco", "rle": "coco"}


def predict(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... CLASSES",
            help="Pictures, folders or patterns, and at the end the classes: 'giraffe; tree, bush; sky' (a semicolon "
            "separates classes, a comma joins synonyms) or a .txt, .json or .yaml file of them.",
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
) -> None:
    """Segment pictures by words.

    Prints a table for one picture, a line each for several, and where the files are. A picture that cannot be read is
    reported and the rest goes on; the exit code is then 1, and 2 when no picture could be segmented.
    """
    kinds = _kinds(save)
    sources, classes = _split(words, classes_file)
    paths = _pictures(sources)
    vocabulary = lexiseg.Vocabulary.parse(classes)
    from lexiseg.files import make_folder

    make_folder(output)
    with waiting(f"loading {model}"):
        segmenter = lexiseg.load(
            model,
            device=device,
            dtype=dtype.value,
            compile=compile,
            templates=templates_of(template),
            max_pixels=max_pixels,
        )
    policy = window_of(segmenter.model.window, window, stride)
    stems = _stems(paths)
    done: list[dict[str, Any]] = []
    start = time.perf_counter()
    results = segmenter.predict_folder(paths, vocabulary, window=policy, batch_size=batch_size, background=background)
    for path, result in with_progress(results, len(paths), "segmenting"):
        if isinstance(result, LexisegError):
            say_error(str(result))
            done.append({"image": str(path), "error": str(result)})
            continue
        written = result.save(output, stems[path], kinds)
        done.append({"image": str(path), "classes": _rows(result), "files": {k: str(v) for k, v in written.items()}})
        if not json:
            _say(result, path, list(written.values()), alone=len(paths) == 1)
    failed = sum("error" in entry for entry in done)
    if json:
        say_json({"model": model, "seconds": round(time.perf_counter() - start, 3), "images": done})
    elif len(paths) > 1:
        say_note(f"{len(paths) - failed} of {len(paths)} pictures segmented")
    if failed:
        raise typer.Exit(ALL_FAILED if failed == len(done) else SOME_FAILED)


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
    if last.startswith("@"):
        return list(words[:-1]), Path(last[1:])
    from lexiseg.images import IMAGE_SUFFIXES

    if Path(last).suffix.lower() in IMAGE_SUFFIXES:
        raise LexisegError(f"The last argument, '{last}', is a picture; write the classes after the pictures.")
    return list(words[:-1]), last


def _pictures(sources: Sequence[str]) -> list[Path]:
    """The files that the arguments stand for, each once, in order."""
    from lexiseg.images import list_images

    paths: dict[Path, None] = {}
    for source in sources:
        paths.update(dict.fromkeys(list_images(source)))
    return list(paths)


def _stems(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for each picture's results: its own without the ending, made longer where two would be the same."""
    stems: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        choices = [
            path.stem,
            path.name.replace(".", "_"),
            *(f"{path.stem}_{number}" for number in range(2, len(paths) + 2)),
        ]
        # Case is folded because two names that differ in it only are one file on some systems.
        stem = next(choice for choice in choices if choice.casefold() not in taken)
        taken.add(stem.casefold())
        stems[path] = stem
    return stems


def _rows(result: Segmentation) -> list[dict[str, Any]]:
    return [
        {"class": row.name, "seen": row.seen, "share": row.share, "score": row.score}
        for row in result.table(include_absent=True)
    ]


def _say(result: Segmentation, path: Path, written: Sequence[Path], *, alone: bool) -> None:
    if not alone:
        found = ", ".join(f"{row.name} {row.share:.0%}" for row in result.table()[:5])
        typer.echo(f"{path}: {found or 'no class'}")
    else:
        seen = {True: "seen", False: "unseen", None: "-"}
        rows = [
            [row.name, seen[row.seen], f"{100 * row.share:.1f} %", "-" if row.score is None else f"{row.score:.3f}"]
            for row in result.table(include_absent=True)
        ]
        if result.num_ignored:
            rows.append(["(no class)", "-", f"{100 * result.num_ignored / result.label_map.numel():.1f} %", "-"])
        height, width = result.size
        say_table(f"{path}, {width} x {height} pixels", ["class", "in training", "share", "mean score"], rows)
    say_written(written)
