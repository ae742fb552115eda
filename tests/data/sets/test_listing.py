"""Names of pictures: those no list can hold or that are spelled otherwise, and long lists of what is held back."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from lexiseg.cli import main
from lexiseg.data.sets import layouts
from lexiseg.data.sets.layouts import Layout, names_of
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.sets.prepare import prepare
from tests.data.sets.test_layouts import LABEL, SIZE
from tests.miniatures import save_index, save_picture


def test_names_that_are_not_utf8_or_spelled_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [os.fsdecode(b"caf\xe9"), unicodedata.normalize("NFD", "éa"), "b\x1b[31m", "c\nd", "e", "f"]
    for index, name in enumerate(names):
        save_picture(tmp_path / "images" / f"{name}.png", index, SIZE)
        other = unicodedata.normalize("NFC", name)
        save_index(tmp_path / "masks" / f"{other}_labels.png", LABEL % 254)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert main(["data", "verify", str(tmp_path), "--all"]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert len(open_data_set("own", tmp_path, "train")) == 5
    (tmp_path / "masks" / f"{names[0]}_labels.png").write_bytes(b"")
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert r"caf\xe9" in capsys.readouterr().out
    (tmp_path / "images/c\nd.png").unlink()  # no list can name it
    (tmp_path / "masks/c\nd_labels.png").unlink()
    assert len(prepare("own", tmp_path)) == 2
    assert prepare("own", tmp_path) == []
    data = open_data_set("own", tmp_path, "train")
    assert [path.image.name for path in data.items] and len(data) == 4
    assert main(["data", "verify", str(tmp_path), "--json"]) == 1
    json.loads(capsys.readouterr().out)


def test_a_long_list_of_what_is_held_back_is_gone_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    listed_as = layouts.listed_as

    def counted(name: str, pictures: set[str]) -> str:
        assert isinstance(pictures, set)  # in a list each name would be looked for again
        asked.append(name)
        return listed_as(name, pictures)

    monkeypatch.setattr(layouts, "listed_as", counted)
    names = [f"picture-{number:04d}" for number in range(2000)]
    (tmp_path / "val.txt").write_text("".join(f"{name}.jpg\n" for name in names[:500]), encoding="utf-8")
    assert names_of(tmp_path, "train", Layout(tmp_path, tmp_path, False), names) == (names[500:], [])
    assert len(asked) == 500
