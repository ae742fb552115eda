"""What the benchmarks share: alternating timings, what the machine is, and how a result is printed."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cost.case import VIT_B_16
from benchmarks.timing import Timing, alternate, machine

__all__ = ["VIT_B_16", "Timing", "alternate", "machine", "parser", "report", "set_up", "summary"]


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--repeats", type=int, default=7, help="measurements of each candidate")
    result.add_argument("--threads", type=int, default=2, help="torch threads")
    result.add_argument("--device", default="cpu", help="cpu, cuda ...")
    result.add_argument("--seed", type=int, default=0, help="of the random weights and pictures")
    result.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return result


def set_up(options: argparse.Namespace) -> None:
    """Set threads and seed."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def summary(timings: Mapping[str, Sequence[Timing]], base: str) -> list[dict[str, Any]]:
    """Return a row a candidate: medians of both times, and the ratios to ``base``.

    A ratio is the median of the ratios of measurements made in the same turn. On a machine that others use as well the
    ratio of the processor times is the steadier one.
    """
    return [
        {
            "what": name,
            "seconds": statistics.median(value.wall for value in values),
            "fastest": min(value.wall for value in values),
            "cpu seconds": statistics.median(value.cpu for value in values),
            "ratio": statistics.median(a.wall / b.wall for a, b in zip(values, timings[base], strict=True)),
            "cpu ratio": statistics.median(a.cpu / b.cpu for a, b in zip(values, timings[base], strict=True)),
        }
        for name, values in timings.items()
    ]


def report(title: str, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace, **facts: Any) -> None:
    """Print the rows as a table, or everything as JSON."""
    command = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    about = {"title": title, "command": command, "seed": options.seed, "machine": machine(options.device), **facts}
    if options.json:
        print(json.dumps({**about, "rows": list(rows)}, indent=2))
        return
    console = Console(highlight=False)
    table = Table(title=title, title_justify="left", show_edge=False)
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    for name, value in about.items():
        if name != "title":
            text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
            console.print(f"{name}: {text}", soft_wrap=True, markup=False)
