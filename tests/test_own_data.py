"""The tutorial on one's own data: its commands, as they stand in it, on a folder that ``data world`` writes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lexiseg.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"


def _lines() -> list[str]:
    block = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[0]
    return [line for line in block.splitlines() if line.startswith("lexiseg ")]


def test_the_tutorials_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = _lines()
    assert [line.split()[1] for line in lines] == ["data", "data", "train", "evaluate"]
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    out = capsys.readouterr().out
    assert "0 errors" in out and "hIoU" in out and "wrote report" in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["protocol"]["dataset"] == "my" and report["protocol"]["num_pictures"] == 2
    assert report["protocol"]["num_seen"] and report["protocol"]["num_unseen"]
    assert "source: own" in (tmp_path / "runs" / "my" / "recipe.yaml").read_text()


def test_every_kind_of_finding_is_in_the_tutorial() -> None:
    package = Path(__file__).parents[1] / "lexiseg" / "data" / "sets"
    text = PAGE.read_text(encoding="utf-8")
    kinds = set()
    for path in package.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        kinds |= set(re.findall(r'(?:Finding|_finding)\(\s*(?:item, )?"([a-z-]+)"', source))
    assert len(kinds) > 15
    assert not {kind for kind in kinds if f"`{kind}`" not in text} - {"no-augmented-labels"}
