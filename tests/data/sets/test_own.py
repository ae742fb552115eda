"""The tutorial on one's own data: its commands, as they stand in it, on a folder that ``data world`` writes."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from lexiseg.cli import main
from lexiseg.data.sets.open import list_split, open_data_set
from lexiseg.errors import LexisegWarning

PAGE = Path(__file__).parents[3] / "docs" / "own-data.md"


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


def _said_kinds(path: Path) -> set[str]:
    """Kinds of findings and of errors that become findings, as a module's calls, returns and choices of them say."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts: list[ast.expr | None] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Finding", "_finding", "DataSetError"):
            parts = [*node.args, *(word.value for word in node.keywords if word.arg == "kind")]
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "kind":
            parts = [node.value]
        elif isinstance(node, ast.FunctionDef) and node.name == "_label_fault":
            parts = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
        for part in parts:
            choices = [part.body, part.orelse] if isinstance(part, ast.IfExp) else [part]
            texts = [choice.value for choice in choices if isinstance(choice, ast.Constant)]
            found |= {text for text in texts if isinstance(text, str) and re.fullmatch("[a-z]+(-[a-z]+)+", text)}
    return found


def test_every_kind_of_finding_is_in_the_tutorial() -> None:
    package = Path(__file__).parents[3] / "lexiseg" / "data" / "sets"
    text = PAGE.read_text(encoding="utf-8")
    kinds = set().union(*(_said_kinds(path) for path in package.glob("*.py")))
    assert kinds >= {"damaged-archive", "no-augmented-labels", "unknown-color", "index-label", "missing-folder"}
    assert {kind for kind in kinds if f"`{kind}`" not in text} == set()


def test_a_class_file_beside_coco_json_that_says_something_else_is_named(tmp_path: Path) -> None:
    boxes = [{"image_id": 1, "category_id": one, "segmentation": [[0, 0, 8, 0, 8, 8]]} for one in (1, 2)]
    content = {
        "images": [{"id": 1, "file_name": "p.png", "width": 16, "height": 16}],
        "annotations": boxes,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    Image.new("RGB", (16, 16)).save(tmp_path / "p.png")
    (tmp_path / "instances_val.json").write_text(json.dumps(content))
    listed = tmp_path / "classes.txt"
    for text in ("Cat\ndog\n", "1: cat\n2: dog\n"):
        listed.write_text(text)
        assert not list_split("own", tmp_path, "val").findings
    for text in ("dog\ncat\n", "cat\n", "cat, kitty\ndog\n"):
        listed.write_text(text)
        with pytest.warns(LexisegWarning, match=r"categories of '.*instances_val\.json'; '.*classes\.txt' says some"):
            assert open_data_set("own", tmp_path, "val").vocabulary.names == ("cat", "dog")
    given = listed.rename(tmp_path / "given.txt")
    with pytest.warns(LexisegWarning, match=r"given\.txt' says something else"):
        open_data_set("own", tmp_path, "val", classes=given)
