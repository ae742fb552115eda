"""The benchmarks run; what they find is for a quiet machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import picture_world

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("predict", {"tower", "tower, prompts as rows", "predict"}),
        ("training", {"forward + backward", "training step"}),
    ],
)
def test_benchmark_runs_small(name: str, rows: set[str]) -> None:
    small = ("--repeats", "1", "--threads", "1", "--side", "64", "--classes", "3", "--prompts", "2", "--json")
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *small],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {row["what"] for row in found["rows"]} == rows
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert found["command"] == f"python -m benchmarks.{name} {' '.join(small)}"
    assert found["machine"]["threads"] == 1


@pytest.mark.slow
def test_a_tower_learns_from_half_masks() -> None:
    command = [sys.executable, "-m", "benchmarks.half_masks", "--steps", "2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    rows = [json.loads(line.replace("'", '"')) for line in result.stdout.splitlines()]
    assert [row["steps"] for row in rows] == [0, 2] and all(0 < row["half_over_exact"] < 1.5 for row in rows)


@pytest.mark.slow
def test_other_systems_are_timed_in_the_same_run() -> None:
    small = ("--repeats", "1", "--threads", "1", "--side", "64", "--classes", "3", "--prompts", "2", "--json")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.predict", *small, "--against", "dense-clip", "cascade-clip"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    found = {row["what"] for row in json.loads(result.stdout)["rows"]}
    assert {"tower", "predict", "predict of dense-clip", "predict of cascade-clip"} <= found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "small", "columns"),
    [
        ("data", ("--samples", "2"), {"decode", "read", "augment", "per s"}),
        (
            "evaluation",
            ("--pictures", "1", "--classes", "300", "--size", "64x48", "--tower", "clip-emoji"),
            {"decode", "counting", "peak MiB", "dense MiB"},
        ),
    ],
)
def test_benchmarks_of_the_data_path_and_of_evaluation(name: str, small: tuple[str, ...], columns: set[str]) -> None:
    words = (*small, "--repeats", "1", "--threads", "1", "--json")
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert rows and all(columns <= set(row) for row in rows)


def test_some_systems_alone_do_not_rewrite_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(picture_world, "run_one", lambda *given: ran.append(given))
    monkeypatch.setattr(picture_world, "collect", lambda runs: pytest.fail("the page is of all systems"))
    monkeypatch.setattr(sys, "argv", ["picture_world", "--runs", str(tmp_path), "--only", "zegclip", "--seeds", "0"])
    picture_world.main()
    assert ran == [("zegclip", 0, tmp_path)]
