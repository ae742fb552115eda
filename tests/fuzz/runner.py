"""Feeding mutated inputs to lexiseg: whatever a stranger's file holds, the answer is a result or one sentence, soon."""

from __future__ import annotations

import random
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lexiseg.errors import LexisegError

Maker = Callable[[random.Random, Path], Callable[[], object]]
"""Writes a mutated input into a folder and returns what reads it. `CANARY` in that folder must not come into being."""

CANARY = "canary"
# Of processor time, since other programs may keep the processor busy; somebody who waits, for a network, waits longer.
SECONDS, WAITED = 5.0, 60.0
_GIBIBYTES = 2
_LONGEST_SENTENCE = 4000


class Hang(BaseException):
    """Not an Exception, so that no handler on the way swallows it."""


@dataclass
class Report:
    """What came of a run: how many inputs were read, how many refused in a sentence, and what went wrong."""

    read: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(_: int, __: FrameType | None) -> None:
        raise Hang

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITED))
    before = [(number, signal.signal(number, ring)) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in before:
            signal.signal(number, handler)


def run(make: Maker, count: int, seed: int, folder: Path, *, stop_after: int = 20) -> Report:
    """Try ``count`` inputs, the first of them made with ``seed``; one that fails is repeated by its seed alone."""
    report = Report()
    for number in range(seed, seed + count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = make(random.Random(number), folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said: Any = None
        try:
            with _alarm(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case()
            report.read += 1
        except LexisegError as error:
            report.refused += 1
            said = None if len(str(error)) < _LONGEST_SENTENCE else f"a sentence of {len(str(error))} characters"
        except Hang:
            said = f"more than {SECONDS:g} s\n{traceback.format_exc(limit=-6)}"
        except Exception:  # which is what this looks for
            said = traceback.format_exc(limit=-6)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if used - peak > _GIBIBYTES << 20:
            said = f"{(used - peak) / (1 << 20):.1f} GiB of memory"
        if (folder / CANARY).exists():
            (folder / CANARY).unlink()
            said = "something in the input was executed"
        if said:
            report.failures.append(f"seed {number}: {said}")
            if len(report.failures) >= stop_after:
                break
    return report
