"""Options that several commands share, so that they mean the same everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from lexiseg.cli.console import say_written
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder

DEFAULT_MODEL = "auto"
DEFAULT_MAX_PIXELS = 200_000_000

Device = Annotated[str, Option("--device", help="cpu, cuda, cuda:1, mps; auto uses an accelerator if there is one.")]
Dtype = Annotated[
    Literal["fp32", "bf16", "fp16", "auto"],
    Option("--dtype", help="Precision of the model; auto is bf16 on processors with bf16 instructions."),
]
Compile = Annotated[
    bool, Option("--compile", help="Compile the model first; takes minutes, pays off for many pictures.")
]
Window = Annotated[
    int | None,
    Option(
        "--window", min=0, help="Side of the sliding window in pixels; 0 runs whole pictures. Default: the model's."
    ),
]
Stride = Annotated[int | None, Option("--stride", min=1, help="Stride of the windows in pixels. Default: the model's.")]
Template = Annotated[
    list[str] | None,
    Option("--template", help="single, paper, or a sentence with one {}; may be repeated. Default: the model's."),
]
Background = Annotated[
    str | None,
    Option("--background", help="none; the name of an additional class; or a score below which pixels get no class."),
]
Refine = Annotated[
    Literal["none", "edges", "pamr", "regions"],
    Option(
        "--refine",
        help="Refine masks by the picture: edges (fast), pamr (slow), or regions (majority vote in SAM's regions).",
    ),
]
Classes = Annotated[Path | None, Option("--classes", help="A list of the classes, if the data has none.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]


def output_option(help: str, **more: Any) -> Any:
    """The option ``--output``, whose name cannot be empty: an unset variable of a script would mean this folder."""
    return Option("--output", "-o", help=help, parser=_output, metavar="PATH", **more)


def set_option(example: str) -> Any:
    """The option ``--set`` of the commands that take a recipe."""
    return Option("--set", help=f"Override a recipe's value: KEY=VALUE, such as {example}; may be repeated.")


def _output(name: str | Path) -> Path:
    if not str(name).strip():
        raise LexisegError("The name of the output (-o) is empty; name a place to write to, or leave -o out.")
    return Path(name)


def check_png(output: Path) -> Path:
    """The path of a figure, checked by typer. Raises LexisegError if it does not end in .png."""
    if output.suffix.lower() != ".png":
        raise LexisegError(f"'{output}' must end in .png.")
    return output


Png = Annotated[Path, output_option("The figure to write, a .png.", callback=check_png)]


def write_png(output: Path, save: Callable[[Path], object]) -> None:
    """Write a figure, create its folder, and print its path."""
    make_folder(output.parent)
    with atomic_write(output) as temporary:
        save(temporary)
    say_written([output])


def show_help(context: typer.Context) -> None:
    """What a group of commands does if no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
