"""``lexiseg data``: datasets on disk and a look at them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lexiseg.cli.console import say_json, say_written, waiting
from lexiseg.errors import LexisegError

app = typer.Typer(
    help="Write the picture world to disk, look at it, and check a dataset folder.", no_args_is_help=False
)


class Split(str, Enum):
    """The splits of the picture world."""

    train = "train"
    val = "val"


@app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("world")
def world(
    folder: Annotated[Path, typer.Argument(help="Where to write; created where it is missing.")],
    train: Annotated[int, typer.Option(min=0, help="Number of training scenes.")] = 200,
    val: Annotated[int, typer.Option(min=0, help="Number of validation scenes.")] = 50,
    size: Annotated[int, typer.Option(min=16, help="Side of a scene in pixels.")] = 256,
) -> None:
    """Write the picture world in the layout of PASCAL VOC, as any dataset on disk would be.

    The masks of the training scenes have 255 ("ignored") where a class is unseen.
    """
    from lexiseg.data.picture_world import write_voc

    with waiting(f"drawing {train + val} scenes"):
        root = write_voc(folder, num_train=train, num_val=val, size=size)
    say_written([root])


@app.command("show")
def show(
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write, a .png.")] = Path(
        "out/picture-world.png"
    ),
    split: Annotated[Split, typer.Option(help="Which scenes.")] = Split.val,
    rows: Annotated[int, typer.Option(min=1, max=20, help="Scenes from top to bottom.")] = 3,
    columns: Annotated[int, typer.Option(min=1, max=20, help="Scenes from left to right.")] = 5,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Side of a scene in pixels.")] = 256,
) -> None:
    """Draw the first scenes of a split side by side, to look at."""
    from lexiseg.data.picture_world import contact_sheet
    from lexiseg.files import atomic_write, make_folder

    if output.suffix.lower() != ".png":
        raise LexisegError(f"'{output}' must end in .png.")
    make_folder(output.parent)
    with waiting(f"drawing {rows * columns} scenes"):
        sheet = contact_sheet(split.value, rows=rows, columns=columns, size=size)
    with atomic_write(output) as temporary:
        sheet.save(temporary)
    say_written([output])


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="A dataset in the layout of PASCAL VOC.")],
    split: Annotated[str, typer.Option(help="Name of the list in ImageSets/Segmentation.")] = "val",
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Read every sample of a dataset folder and report those that cannot be used.

    Exit code 1 when there are any.
    """
    from lexiseg.data.folders import VocFolder

    dataset = VocFolder(folder, split)
    with waiting(f"reading {len(dataset)} samples"):
        problems = [{"sample": name, "problem": problem} for name, problem in dataset.verify()]
    if json:
        say_json({"folder": str(folder), "split": split, "samples": len(dataset), "problems": problems})
    else:
        for entry in problems:
            typer.echo(f"{entry['sample']}: {entry['problem']}")
        typer.echo(f"{len(dataset)} samples of {len(dataset.vocabulary)} classes, {len(problems)} unusable")
    if problems:
        raise typer.Exit(1)
