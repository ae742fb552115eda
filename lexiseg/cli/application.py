"""The typer application and its entry point, :func:`main`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
import typer.main

import lexiseg
from lexiseg.cli import benchmark, convert, data, doctor, draw, evaluate, models, predict, serve, train
from lexiseg.cli.console import notes, say_error
from lexiseg.errors import LexisegError

NOTHING_DONE = 2
STOPPED = 130

# Older releases of typer stand on click, newer ones carry a copy of it: take the classes from where typer has them.
_UsageError: Any = typer.BadParameter.__base__
_ClickException: Any = _UsageError.__base__

app = typer.Typer(
    name="lexiseg",
    help="Segment pictures by words: classes in, a label for every pixel out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("predict")(predict.predict)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("convert")(convert.convert)
app.add_typer(draw.app, name="draw")
app.add_typer(benchmark.app, name="benchmark")
app.command("serve")(serve.serve)
app.command("models")(models.models)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"lexiseg {lexiseg.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _command() -> Any:
    """The application as a command of click's, with ``--quiet`` among every verb's options."""
    command: Any = typer.main.get_command(app)
    # Made by typer from a function, since the class of an option and what it takes change with typer's releases.
    maker = typer.Typer(add_completion=False)
    maker.command()(_quiet)
    option = typer.main.get_command(maker).params[0]
    groups = [command]
    while groups:
        group = groups.pop()
        group.params.append(option)
        groups.extend(getattr(group, "commands", {}).values())
    return command


def _silence(value: bool) -> None:
    notes.quiet = notes.quiet or value


def _quiet(
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            help="Leave out the notes about results that are probably not meant.",
            callback=_silence,
            is_eager=True,
            expose_value=False,
        ),
    ] = False,
) -> None: ...


def _usage_sentence(error: Any) -> str:
    """What typer says about a wrong command line, as one sentence that also says where the help is."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "lexiseg"
    return f"{message}; see '{command} --help'."


def _say(error: LexisegError) -> None:
    """Print a mistake; of the processes of a launcher one does, where all know of it."""
    from lexiseg import processes

    # Before the processes have met, what is wrong is the command line, and all have the same.
    own = processes.count() > 1 and not isinstance(error, processes.SharedError | processes.PeerError)
    if own or processes.is_first_of_launch():
        say_error(str(error))
    if isinstance(error, processes.SharedError):
        # A launcher ends all processes as soon as one has ended, so wait until the sentence is out.
        with suppress(LexisegError):
            processes.barrier()


def _memory_sentence() -> str:
    return "The memory of the device ran out; use a smaller --window or --batch-size, or --device cpu."


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: torch must not be imported to report a mistake made before it was needed.
    return isinstance(error, MemoryError) or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: the words after ``lexiseg``; taken from ``sys.argv`` when left out.

    Returns:
        0, 1, 2 or 130, as the documentation of :mod:`lexiseg.cli` says.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A class name that the terminal's encoding lacks must not break the command that prints it.
            stream.reconfigure(errors="backslashreplace")
    try:
        with notes.printed():
            code = _command()(args=None if args is None else list(args), prog_name="lexiseg", standalone_mode=False)
    except LexisegError as error:
        _say(error)
        return NOTHING_DONE
    except _ClickException as error:
        say_error(_usage_sentence(error))
        return NOTHING_DONE
    except (KeyboardInterrupt, typer.Abort):
        say_error("Stopped.")
        return STOPPED
    except BrokenPipeError:
        # The reader of our output went away (``lexiseg models | head -1``); nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        say_error(_memory_sentence())
        return NOTHING_DONE
    return code if isinstance(code, int) else 0
