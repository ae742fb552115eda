"""What the commands print: results on stdout, notes, progress and errors on stderr.

With ``--json`` stdout carries one JSON value and nothing else, so that a script can read it. Whatever is printed here
may hold text from a stranger's file, so all of it goes through `lexiseg.words.printable`.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lexiseg.errors import LexisegWarning
from lexiseg.progress import progress_bar
from lexiseg.words import printable

T = TypeVar("T")


class Notes:
    """How each `LexisegWarning` is shown while a command runs. ``quiet``: not at all."""

    quiet = False

    @contextmanager
    def printed(self) -> Iterator[None]:
        """Print each distinct warning once, as ``note: ...`` on stderr, while the body runs."""
        said: set[str] = set()
        self.quiet = False

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, LexisegWarning):
                others(message, category, *rest, **more)
            elif not self.quiet and str(message) not in said:
                said.add(str(message))
                say_error(f"note: {message}")

        with warnings.catch_warnings():
            others, warnings.showwarning = warnings.showwarning, show
            warnings.simplefilter("always", LexisegWarning)
            yield


notes = Notes()


def say(line: str = "") -> None:
    """Print a line of the result on stdout."""
    _print(printable(line))


def _print(text: str) -> None:
    """Print on stdout; if its reader is gone (``lexiseg predict ... | head -1``), go on silently."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_error(sentence: str) -> None:
    """Print ``sentence`` on stderr as one line, without the line breaks of a library's message."""
    say_note(" ".join(sentence.split()))


def say_note(sentence: str) -> None:
    """Print a line about the work on stderr."""
    typer.echo(printable(sentence), err=True)


def say_written(paths: Iterable[object]) -> None:
    """Print one line per file written, on stdout."""
    for path in paths:
        say(f"wrote {path}")


def say_json(value: Any) -> None:
    """Print ``value`` as JSON on stdout, in ASCII so that a pipe of any encoding carries it unharmed."""
    _print(json.dumps(value, indent=2))


def say_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; every column but the first is right-aligned where it holds numbers."""
    if title:
        # Not as the table's own title, which would be wrapped to the table's width.
        say(title)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    console = Console(soft_wrap=False, highlight=False, markup=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        # Long names are wrapped, since numbers without room would be left out.
        short = index == 0 and all(cell_len(row[0]) <= console.width // 2 for row in rows)
        table.add_column(
            printable(column), justify="right" if numeric else "left", no_wrap=numeric or short, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(printable, row))
    with console.capture() as lines:
        console.print(table)
    _print(lines.get().rstrip("\n"))


def _is_number(cell: str) -> bool:
    text = cell.strip().rstrip("%x").strip()
    return text in {"", "-"} or text.replace(".", "", 1).replace(",", "").lstrip("-").isdigit()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show a spinner with ``what`` on stderr while the body runs, where stderr is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(printable(what))):
        yield


def with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield ``items`` and show a bar on stderr meanwhile, where stderr is a terminal and there are several."""
    if total < 2:
        yield from items
        return
    # What is printed meanwhile goes through the bar's console, which is stderr; a file must still get it as stdout.
    with progress_bar(transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        yield from progress.track(items, total=total, description=what)
