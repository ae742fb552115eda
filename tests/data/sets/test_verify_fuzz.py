"""Whatever stands in a class list or a JSON of annotations, ``verify`` says a sentence and raises nothing."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexiseg.data.sets.verify import verify
from lexiseg.errors import LexisegError
from lexiseg.vocabulary import Vocabulary
from tests import miniatures

WORDS = st.sampled_from(
    ["cat", "dog", "tree, bush", "0: ", "1: cat", "2\tdog", "9" * 30, "#", "name,r,g,b", "cat,1,2,3", "Idx\tName", ",",
     "-", "- ", "{", "}", "[", "]", ": ", "name", "id: ", "synonyms: ", "color: ", "classes:", "!!int ", "!!timestamp ",
     "'", "&a", "*a", "\x00", "\ud800", "é", "\n", "\n", "\n", "  "]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10) | st.sampled_from([10**30, 1e300, float("nan"), float("inf"), 0.5])
    | st.sampled_from(["", "3", "cat", "../a", "\ud800", "a\x00b", "x" * 300, "images", "name", "counts", "51X3"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["id", "name", "size", "counts", "image_id", "file_name"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        miniatures.own_json(Path(folder))
        yield Path(folder)


@given(st.lists(WORDS, max_size=12).map("".join), st.sampled_from(["txt", "csv", "yaml", "json"]))
@settings(max_examples=150, deadline=None)
def test_class_lists(root: Path, text: str, ending: str) -> None:
    path = root / f"fuzzed.{ending}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    _read(path)


ENTRIES = VALUES | st.dictionaries(st.sampled_from(["name", "id", "synonyms", "color"]), VALUES)


@given(ENTRIES | st.lists(ENTRIES, max_size=3) | st.lists(ENTRIES, max_size=3).map(lambda value: {"classes": value}))
@settings(max_examples=50, deadline=None)
def test_structured_class_lists(root: Path, value: Any) -> None:
    path = root / "fuzzed.json"
    path.write_text(json.dumps(value))
    _read(path)


def _read(path: Path) -> None:
    try:
        Vocabulary.load(path)
    except LexisegError as error:
        assert "\n" not in str(error)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_annotations(root: Path, data: st.DataObject) -> None:
    path = root / "annotations" / "instances_val.json"
    whole = json.loads((root / "annotations" / "instances_train.json").read_text())
    content = copy.deepcopy(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        content = _replaced(content, data)
    path.write_text(json.dumps(content))
    found = verify("own", root, splits=["val"], workers=1)
    for finding in found.findings:
        assert finding.kind and "\n" not in finding.problem
        finding.problem.encode()


def _replaced(value: Any, data: st.DataObject) -> Any:
    """``value`` with something in it, however deep, replaced or left out."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 5)):
        key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        if data.draw(st.integers(0, 9)):
            value[key] = _replaced(value[key], data)
        else:
            del value[key]
        return value
    return data.draw(VALUES)
