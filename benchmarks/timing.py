"""Timing several candidates fairly, and naming the machine it was done on."""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """One measurement: seconds on the wall, and seconds of all the process's threads together."""

    wall: float
    cpu: float


def alternate(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, device: str, warmup: int = 1
) -> dict[str, list[Timing]]:
    """Time the candidates in turn, so that a busy minute of the machine falls on all of them alike.

    Args:
        candidates: what to run, by name.
        repeats: measurements of each.
        device: where they run, such as "cpu" or "cuda"; an accelerator is waited for.
        warmup: runs of each that are not measured.

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


def machine(device: str) -> dict[str, Any]:
    """Name the machine, without its host name."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()] if sys.platform != "win32" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        facts["device"] = torch.cuda.get_device_name(device)
    return facts


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
