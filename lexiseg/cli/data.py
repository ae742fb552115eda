"""``lexiseg data``: write, show, verify and prepare datasets."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from lexiseg.cli.console import say, say_json, say_note, say_table, say_written, waiting, with_progress
from lexiseg.cli.options import Classes, Json, Png, show_help, write_png
from lexiseg.errors import LexisegError
from lexiseg.words import counted

app = typer.Typer(help="Write or show the picture world; prepare or verify a dataset.")
app.callback(invoke_without_command=True)(show_help)


World = Annotated[
    str, Option("--world", help="picture-world, picture-world-2 or picture-world-2-twemoji (another drawing style).")
]


@app.command("world")
def world(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Folder to write.")],
    train: Annotated[int, Option(min=0, help="Number of training scenes.")] = 200,
    val: Annotated[int, Option(min=0, help="Number of validation scenes.")] = 50,
    size: Annotated[int, Option(min=16, help="Side of a scene in pixels.")] = 256,
    name: World = "picture-world",
) -> None:
    """Write a picture world to disk in the layout of PASCAL VOC.

    The masks of training scenes have 255 ("ignored") where a class is unseen.
    """
    from lexiseg.data.picture_world import find_world, write_voc

    with waiting(f"drawing {counted(train + val, 'scene')}"):
        root = write_voc(folder, world=find_world(name), num_train=train, num_val=val, size=size)
    say_written([root])


@app.command("show")
def show(
    output: Png = Path("out/picture-world.png"),
    split: Annotated[Literal["train", "val", "test"], Option(help="Split of the scenes.")] = "val",
    rows: Annotated[int, Option(min=1, max=20, help="Number of rows.")] = 3,
    columns: Annotated[int, Option(min=1, max=20, help="Number of columns.")] = 5,
    size: Annotated[int, Option(min=16, max=1024, help="Side of a scene in pixels.")] = 256,
    name: World = "picture-world",
) -> None:
    """Draw the first scenes of a split side by side."""
    from lexiseg.data.picture_world import contact_sheet, find_world

    with waiting(f"drawing {counted(rows * columns, 'scene')}"):
        sheet = contact_sheet(split, world=find_world(name), rows=rows, columns=columns, size=size)
    write_png(output, sheet.save)


_NAME = (
    "voc2012, coco-stuff-164k, coco-object, pascal-context-59, pascal-context-459, ade20k-150, ade20k-847, cityscapes, "
    "or own"
)


@app.command("verify")
def verify(
    name: Annotated[str, Argument(metavar="NAME", help=f"{_NAME}; or the folder of your own data.")],
    root: Annotated[Path | None, Argument(metavar="ROOT", help="The folder the dataset was unpacked in.")] = None,
    split: Annotated[
        list[str] | None, Option("--split", help="A split; may be repeated. Default: training and val.")
    ] = None,
    classes: Classes = None,
    workers: Annotated[
        int | None, Option("--workers", min=1, help="Reader threads. Default: one per processor.")
    ] = None,
    every: Annotated[bool, Option("--all", help="Report every file, not one line per kind of problem.")] = False,
    json: Json = False,
) -> None:
    """Read every file of a dataset and report problems: missing or damaged files, wrong sizes, unknown ids and more.

    One line per kind of problem, with its count and first place; --all reports every file.

    Exit code 1 if there are errors; warnings alone give 0.
    """
    from lexiseg.data.sets.verify import verify as run

    chosen, folder = _name_and_root(name, root)
    found = run(chosen, folder, splits=split, classes=classes, workers=workers, progress=with_progress)
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
        say_table(
            f"{chosen}, {counted(len(found.classes), 'class')}", ["split", "samples", "classes found", "no class"], rows
        )
        warnings = len(found.findings) - len(found.errors)
        say(f"{counted(len(found.errors), 'error')}, {counted(warnings, 'warning')}")
    if found.errors:
        raise typer.Exit(1)


@app.command("prepare")
def prepare(
    name: Annotated[str, Argument(metavar="NAME", help=f"{_NAME}.")],
    root: Annotated[Path, Argument(metavar="ROOT", help="The folder of the archives.")],
    classes: Classes = None,
    json: Json = False,
) -> None:
    """Unpack the archives in a folder and write missing lists; needs no network.

    A stopped run continues when repeated; a folder that is ready is left alone. Archives are kept.

    Exit code 2 if part of the dataset is missing afterwards.
    """
    from dataclasses import asdict

    from lexiseg.data.sets.prepare import prepare as run

    steps = run(name, root, classes=classes, say=say_note)
    if json:
        say_json({"data_set": name, "root": str(root), "steps": [asdict(step) for step in steps]})
        return
    for step in steps:
        say(f"{step.what}: {step.path}")
    say(f"{name} in '{root}' is ready; `lexiseg data verify {name} {root}` reads every file.")


def _name_and_root(name: str, root: Path | None) -> tuple[str, Path]:
    """A folder alone means the user's own data."""
    if root is not None:
        return name, root
    from lexiseg.data.sets.catalog import NAMES
    from lexiseg.files import is_folder

    if name in NAMES:
        raise LexisegError(f"'{name}' needs its folder too: lexiseg data verify {name} FOLDER.")
    if not is_folder(name):
        raise LexisegError(f"'{name}' is neither a folder nor a dataset; the datasets are {', '.join(NAMES)}.")
    return "own", Path(name)
