"""What the benchmarks share: alternating timings, what the machine is, and how a result is printed."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

VIT_B_16 = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
"""The size of the papers' tower. The benchmarks fill it with random weights: speed does not depend on their values."""


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


@dataclass(frozen=True)
class Timing:
    """One measurement: seconds on the wall, and seconds of all the process's threads together."""

    wall: float
    cpu: float


def alternate(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, device: str, warmup: int = 1
) -> dict[str, list[Timing]]:
    """Time the candidates in turn, so that a busy minute of the machine falls on all of them alike.

    Returns:
        The measurements of each candidate.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, run in candidates.items():
            gc.collect()
            _synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            _synchronize(device)
            if turn >= warmup:
                timings[name].append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return timings


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


def machine(device: str) -> dict[str, Any]:
    """Name the machine, without its host name."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        facts["device"] = torch.cuda.get_device_name(device)
    return facts


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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
