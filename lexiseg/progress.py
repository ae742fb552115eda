"""The progress bar of everything that takes long."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def progress_bar(*columns: ProgressColumn, show: bool = True, console: Console | None = None, **more: Any) -> Progress:
    """A bar on stderr, where that is a terminal; ``columns`` stand between the numbers and the time that is left."""
    console = console or Console(stderr=True)
    standard = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = not show or not console.is_terminal
    return Progress(*standard, *columns, TimeRemainingColumn(), console=console, disable=hidden, **more)
