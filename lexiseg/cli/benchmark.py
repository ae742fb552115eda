"""``lexiseg benchmark``: run ``benchmarks/`` of the repository."""

import importlib
import sys
from pathlib import Path

import typer

import lexiseg
from lexiseg.cli.options import show_help
from lexiseg.errors import LexisegError

app = typer.Typer(help="Measure what the systems cost.")
app.callback(invoke_without_command=True)(show_help)


@app.command("cost", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def cost(context: typer.Context) -> None:
    """Count parameters and multiply-adds of every system, next to its paper's figures, and time it.

    Raises LexisegError if lexiseg was not installed from its repository, where the benchmarks are.
    """
    root = Path(lexiseg.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "cost").is_dir():
        raise LexisegError(
            "The cost table needs the folder 'benchmarks' of lexiseg's repository, which an installed package lacks; "
            "clone the repository and run 'pip install -e .' there."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    importlib.import_module("benchmarks.cost.__main__").app(
        args=context.args, prog_name="lexiseg benchmark cost", standalone_mode=False
    )
