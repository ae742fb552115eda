"""2,000 mutated inputs, and a runner that notices what it looks for."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lexiseg.errors import LexisegError
from tests.fuzz import runner
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs(name: str, tmp_path: Path) -> None:
    make, count = TARGETS[name]
    report = runner.run(make, count, 0, tmp_path)
    assert not report.failures, "\n".join(report.failures)
    assert report.read and report.refused  # mutations that change nothing, or everything, try nothing
    assert sum(count for _, count in TARGETS.values()) >= 2000


def test_the_runner_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SECONDS", 0.2)
    monkeypatch.setattr(runner, "WAITED", 0.3)

    def make(rng: random.Random, folder: Path) -> Callable[[], object]:
        def refuse() -> None:
            raise LexisegError("no")

        cases = (
            *(lambda: 1, refuse, lambda: [][0], lambda: time.sleep(5), lambda: all(True for _ in itertools.count())),
            (folder / runner.CANARY).touch,
        )
        return cases[next(numbers)]

    numbers = iter(range(6))
    report = runner.run(make, 6, 0, tmp_path)
    assert (report.read, report.refused, len(report.failures)) == (2, 1, 4)
    assert [
        word in text for word, text in zip(("IndexError", "0.2 s", "0.2 s", "executed"), report.failures, strict=True)
    ] == [True] * 4
