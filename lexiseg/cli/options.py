"""Options that several commands share, so that they mean and say the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from lexiseg.cli.console import say_written
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder

DEFAULT_MODEL = "auto"
DEFAULT_MAX_PIXELS = 200_000_000


Precision = Literal["fp32", "bf16", "fp16", "auto"]
Cleaning = Literal["none", "edges", "pamr", "regions"]

Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one.")
]
Dtype = Annotated[
    Precision, typer.Option("--dtype", help="Precision the model is run in; auto is bf16 on a processor made for it.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the model first: minutes once, worth it for many pictures.")
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window", min=0, help="Side of the sliding window in pixels; 0 runs whole pictures. Default: the model's."
    ),
]
Stride = Annotated[
    int | None, typer.Option("--stride", min=1, help="Distance of the windows in pixels. Default: the model's.")
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template", help="single, paper, or a sentence with one {}; repeat it for several. Default: the model's."
    ),
]
Background = Annotated[
    str | None,
    typer.Option(
        "--background", help="none; a name for one more class; or a score below which pixels are left without a class."
    ),
]
Refine = Annotated[
    Cleaning,
    typer.Option(
        "--refine",
        help="Clean masks up by the picture: edges (fast), pamr (slow), or regions (a vote inside SAM's regions).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def check_png(output: Path) -> Path:
    """A picture's name, for typer to check. Raises LexisegError if it does not end in .png."""
    if output.suffix.lower() != ".png":
        raise LexisegError(f"'{output}' must end in .png.")
    return output


def write_png(output: Path, save: Callable[[Path], object]) -> None:
    """Write a picture whole, with its folder, and say where it is."""
    make_folder(output.parent)
    with atomic_write(output) as temporary:
        save(temporary)
    say_written([output])


def show_help(context: typer.Context) -> None:
    """What a group of commands does where no command is named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
