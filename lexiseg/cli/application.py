"""The typer application and its entry point, :func:`main`."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

import lexiseg
from lexiseg.cli import benchmark, convert, data, doctor, draw, evaluate, export, models, predict, push, serve, train
from lexiseg.cli.console import notes, say_error
from lexiseg.errors import LexisegError
from lexiseg.files import is_full
from lexiseg.renames import renamed_arguments
from lexiseg.startup import start_quickly

NOTHING_DONE = 2
STOPPED, TERMINATED = 130, 143

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
app.command("export")(export.export)
app.add_typer(draw.app, name="draw")
app.add_typer(benchmark.app, name="benchmark")
app.command("serve")(serve.serve)
app.command("push")(push.push)
app.command("models")(models.models)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Suppress notes about suspicious results; works with every command.")
    ] = False,
) -> None:
    notes.quiet = quiet
    if version:
        typer.echo(f"lexiseg {lexiseg.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _usage_sentence(error: Any) -> str:
    """Typer's message about a wrong command line, as one sentence that points to the help."""
    message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "lexiseg"
    return f"{message}; see '{command} --help'."


def _say(error: LexisegError) -> None:
    """Print a user error; if all processes of a launcher have it, only one prints it."""
    from lexiseg import processes

    # Before the processes have met, what is wrong is the command line, and all have the same.
    own = processes.count() > 1 and not isinstance(error, processes.SharedError | processes.PeerError)
    if own or processes.is_first_of_launch():
        say_error(str(error))
    if isinstance(error, processes.SharedError):
        # A launcher ends all processes as soon as one has ended, so wait until the sentence is out.
        with suppress(LexisegError):
            processes.barrier()


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: torch must not be imported to report a mistake made before it was needed.
    if any(base.__name__ in ("MemoryError", "OutOfMemoryError") for base in type(error).__mro__):
        return True
    # What torch says on a CPU, and of a size beyond any memory.
    return any(said in str(error) for said in ("DefaultCPUAllocator", "Storage size calculation overflowed"))


def _check_folder() -> None:
    """Raise LexisegError if the folder that the shell is in was deleted, in which torch would end the process."""
    try:
        Path.cwd()
    except OSError as error:
        raise LexisegError("The current folder has been deleted; change to one that exists.") from error


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    ``args``: the words after ``lexiseg``; taken from ``sys.argv`` when left out. Returns 0, 1, 2, 130 or 143, as the
    documentation of :mod:`lexiseg.cli` says.
    """
    start_quickly()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # Closed before we came (``>&-``): the next file that is opened would get the number, and what is printed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            # A class name that the terminal's encoding lacks must not break the command that prints it.
            stream.reconfigure(errors="backslashreplace")
    with _terminable() as terminated:
        try:
            # Every command takes --quiet, which is moved in front of its name.
            words = sorted(sys.argv[1:] if args is None else args, key=lambda word: word != "--quiet")
            if "" in words:  # as a path it would be the folder the shell is in
                raise LexisegError("An argument is empty, perhaps from an unset shell variable; give it a value.")
            _check_folder()
            command: Any = typer.main.get_command(app)
            # Not by calling it: click would answer Ctrl-C with a line of its own.
            with notes.printed(), command.make_context("lexiseg", renamed_arguments(words)) as context:
                context.command.invoke(context)
            sys.stdout.flush()
        except typer.Exit as error:
            return error.exit_code
        except LexisegError as error:
            _say(error)
        except _ClickException as error:
            say_error(_usage_sentence(error))
        except (KeyboardInterrupt, typer.Abort) as error:
            say_error(str(error) or "Stopped.")
            return TERMINATED if terminated() else STOPPED
        except BrokenPipeError:
            # The reader of our output went away (``lexiseg --help | head -1``); nothing more can be said to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            if not is_full(error):
                raise
            say_error(f"Cannot write ({error.strerror}); free disk space or write elsewhere.")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            say_error("The device ran out of memory; use a smaller model, window or batch, or another --device.")
        else:
            return 0
        return NOTHING_DONE


class _Terminated(KeyboardInterrupt):
    """SIGTERM came. Of a bare KeyboardInterrupt inside `exec` Python makes an end by SIGINT, whatever the exit code."""


@contextmanager
def _terminable() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM stop the command as Ctrl-C does; what is yielded says whether it came."""
    came: list[int] = []
    own = os.getpid()

    def stop(number: int, _frame: Any) -> None:
        if os.getpid() != own:  # a child that was forked: it goes as it would without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        came.append(number)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
