"""``lexiseg data``: datasets on disk and a look at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lexiseg.cli.console import say, say_json, say_note, say_table, say_written, waiting, with_progress
from lexiseg.cli.options import Json, check_png, show_help, write_png
from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from lexiseg.data.sets.verify import SampleCheck

app = typer.Typer(help="Write the picture world to disk, look at it; prepare and check a data set.")
app.callback(invoke_without_command=True)(show_help)


World = Annotated[
    str, typer.Option("--world", help="picture-world, picture-world-2 or picture-world-2-twemoji (other drawings).")
]


@app.command("world")
def world(
    folder: Annotated[Path, typer.Argument(help="Where to write; created where it is missing.")],
    train: Annotated[int, typer.Option(min=0, help="Number of training scenes.")] = 200,
    val: Annotated[int, typer.Option(min=0, help="Number of validation scenes.")] = 50,
    size: Annotated[int, typer.Option(min=16, help="Side of a scene in pixels.")] = 256,
    name: World = "picture-world",
) -> None:
    """Write a picture world in the layout of PASCAL VOC, as any dataset on disk would be.

    The masks of the training scenes have 255 ("ignored") where a class is unseen.
    """
    from lexiseg.data.picture_world import find_world, write_voc

    with waiting(f"drawing {train + val} scenes"):
        root = write_voc(folder, world=find_world(name), num_train=train, num_val=val, size=size)
    say_written([root])


@app.command("show")
def show(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture to write, a .png.", callback=check_png)
    ] = Path("out/picture-world.png"),
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Which scenes.")] = "val",
    rows: Annotated[int, typer.Option(min=1, max=20, help="Scenes from top to bottom.")] = 3,
    columns: Annotated[int, typer.Option(min=1, max=20, help="Scenes from left to right.")] = 5,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Side of a scene in pixels.")] = 256,
    name: World = "picture-world",
) -> None:
    """Draw the first scenes of a split side by side, to look at."""
    from lexiseg.data.picture_world import contact_sheet, find_world

    with waiting(f"drawing {rows * columns} scenes"):
        sheet = contact_sheet(split, world=find_world(name), rows=rows, columns=columns, size=size)
    write_png(output, sheet.save)


_NAME = (
    "voc2012, coco-stuff-164k, coco-object, pascal-context-59, pascal-context-459, ade20k-150, ade20k-847, cityscapes, "
    "or own"
)

Classes = Annotated[Path | None, typer.Option("--classes", help="A list of the classes, where the data carries none.")]


@app.command("verify")
def verify(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{_NAME}; or the folder of your own data.")],
    root: Annotated[
        Path | None, typer.Argument(metavar="[ROOT]", help="The folder the data set was unpacked in.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", help="A split to look at; may be repeated. Default: training and val."),
    ] = None,
    classes: Classes = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Threads that read. Default: one per processor.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Report every file, not one line per kind of fault.")] = False,
    json: Json = False,
) -> None:
    """Read every file of a data set and report what is wrong: missing, damaged, of another size, unknown ids and more.

    A line a kind of fault, with how often it is and where first; --all names every file.

    Exit code 1 when something would make training or evaluation fail or go wrong; warnings alone are 0.
    """
    from lexiseg.data.sets.verify import verify as run

    chosen, folder = _name_and_root(name, root)
    found = run(chosen, folder, splits=split, classes=classes, workers=workers, progress=_progress)
    if json:
        say_json(found.to_dict())
    else:
        for finding in found.findings if every else found.summary():
            where = ": ".join(part for part in (finding.split, finding.sample) if part)
            say(f"{finding.severity}  {finding.kind}  {where + ': ' if where else ''}{finding.problem}")
        rows = [
            [check.split, f"{check.samples:,}", f"{sum(count > 0 for count in check.class_pixels)}",
             f"{100 * check.ignored / max(1, check.labelled + check.ignored):.1f} %"]
            for check in found.splits
        ]  # fmt: skip
        say_table(f"{chosen}, {len(found.classes)} classes", ["split", "samples", "classes there", "no class"], rows)
        warnings = len(found.findings) - len(found.errors)
        say(f"{len(found.errors)} errors, {warnings} warnings")
    if found.errors:
        raise typer.Exit(1)


@app.command("prepare")
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{_NAME}.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="The folder of the archives.")],
    classes: Classes = None,
    json: Json = False,
) -> None:
    """Unpack the archives in a folder and write the lists that are missing; needs no network.

    A run that was stopped goes on where it was, and one on a folder that is ready does nothing. Archives are kept.
    Exit code 2 when something of the data set is missing afterwards.
    """
    from dataclasses import asdict

    from lexiseg.data.sets.prepare import prepare as run

    steps = run(name, root, classes=classes, say=say_note)
    if json:
        say_json({"data_set": name, "root": str(root), "steps": [asdict(step) for step in steps]})
        return
    for step in steps:
        say(f"{step.what}: {step.path}")
    say(f"{name} in '{root}' is prepared; `lexiseg data verify {name} {root}` looks at every file.")


def _name_and_root(name: str, root: Path | None) -> tuple[str, Path]:
    """A folder alone is one's own data."""
    if root is not None:
        return name, root
    from lexiseg.data.sets.catalog import NAMES

    if name in NAMES:
        raise LexisegError(f"'{name}' needs its folder as well: lexiseg data verify {name} FOLDER.")
    if not Path(name).is_dir():
        raise LexisegError(f"'{name}' is neither a folder nor a data set; there are {', '.join(NAMES)}.")
    return "own", Path(name)


def _progress(checks: Iterable[SampleCheck], total: int, split: str) -> Iterator[SampleCheck]:
    return with_progress(checks, total, f"reading {split}")
