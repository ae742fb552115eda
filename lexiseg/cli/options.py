"""Options that several commands share, so that they mean and say the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lexiseg.cli.console import say_written
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder

if TYPE_CHECKING:
    from lexiseg.windows import WindowPolicy

DEFAULT_MODEL = "auto"
DEFAULT_MAX_PIXELS = 200_000_000


class Precision(str, Enum):
    """Precisions a model can be run in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    auto = "auto"


class Cleaning(str, Enum):
    """How masks are cleaned up, see `lexiseg.refine`."""

    none = "none"
    edges = "edges"
    pamr = "pamr"
    regions = "regions"


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


def templates_of(given: list[str] | None) -> str | list[str] | None:
    """The ``--template`` values as `lexiseg.Segmenter` takes them: one may be a name such as ``paper``."""
    if not given:
        return None
    return given[0] if len(given) == 1 else given


def window_of(default: WindowPolicy, window: int | None, stride: int | None) -> WindowPolicy | None:
    """What ``--window`` and ``--stride`` make of a model's own way of running over a picture.

    ``window``: side in pixels, 0 for whole pictures, None to keep the model's. ``stride``: in pixels, None to keep the
    model's, or the window's side where that is smaller. Returns the policy, or None where neither was given. Raises
    LexisegError if a stride without a window, or numbers that cannot cover a picture.
    """
    from lexiseg.pictures import window_policy

    if window is None and stride is None:
        return None
    side = default.size or 0 if window is None else window
    return window_policy(default, side if stride is None else (side, stride))


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
