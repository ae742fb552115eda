"""Lettering: every script for which there is a font, and what happens where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw, features

from lexiseg import fonts
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.segmentation import Segmentation
from lexiseg.vocabulary import Vocabulary

ROOM = "部屋"


def write_font(path: Path, letters: str) -> Path:
    """A font whose letters are filled squares and whose sign for what it lacks is a small one."""

    def square(side: int) -> object:
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, side), (side, side), (side, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = [f"letter{ord(letter)}" for letter in letters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names, strict=True)})
    builder.setupGlyf({".notdef": square(200), **dict.fromkeys(names, square(700))})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupOS2()
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine whose only fonts are those of a folder."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "nowhere"))
    fonts.font_files.cache_clear()
    yield folder
    fonts.font_files.cache_clear()


def result(*names: str) -> Segmentation:
    labels = torch.arange(len(names)).repeat_interleave(120)[:, None].repeat(1, 200).to(torch.uint8)
    return Segmentation(labels, Vocabulary.parse(list(names)))


def legend(segmentation: Segmentation, **options: object) -> np.ndarray:
    return np.asarray(segmentation.overlay(**options))[:, 200:]  # type: ignore[arg-type]


def test_a_name_no_font_has_is_its_id_and_said(machine: Path) -> None:
    with pytest.warns(LexisegWarning, match=rf"'{ROOM}'.*'class 1'.*--font") as caught:
        shown = legend(result("cat", ROOM))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(shown, legend(result("cat", "class 1")))


def test_a_font_of_the_machine_is_found(machine: Path) -> None:
    (machine / "broken.ttf").write_bytes(b"not a font")
    write_font(machine / "a-bold.ttf", ROOM)
    write_font(machine / "other.ttf", "長")
    write_font(machine / "room.ttf", ROOM)
    assert [path.name for path in fonts.font_files()] == ["broken.ttf", "other.ttf", "room.ttf", "a-bold.ttf"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = legend(result("cat", f"cat {ROOM}"))
    assert shown.min() < 60  # the squares are drawn


def test_a_font_can_be_named(machine: Path, tmp_path: Path) -> None:
    path = write_font(tmp_path / "mine.ttf", ROOM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        legend(result("cat", ROOM), font=path)
    for wrong in (tmp_path / "missing.ttf", tmp_path):
        with pytest.raises(LexisegError, match="Cannot read the font"):
            legend(result("cat"), font=wrong)


def test_pieces_of_several_fonts_stand_side_by_side(machine: Path) -> None:
    write_font(machine / "room.ttf", ROOM)
    letters = fonts.Lettering(["ab", ROOM], 40)
    assert letters.length(f"a{ROOM}b") == pytest.approx(letters.length("ab") + 2 * 32, abs=1)
    image = Image.new("L", (200, 80), 255)
    letters.draw(ImageDraw.Draw(image), 10, 40, ROOM, (0,))
    rows, columns = np.nonzero(np.asarray(image) < 128)
    assert abs((rows.min() + rows.max()) / 2 - 40) < 3 and abs(columns.min() - 10) < 2
    assert columns.max() < 10 + 64


def test_marks_are_drawn_by_a_font_that_has_their_letter_too(machine: Path) -> None:
    write_font(machine / "accent.ttf", "\u0303")
    write_font(machine / "both.ttf", "q\u0303")
    letters = fonts.Lettering(["q\u0303", "x\u20dd"], 40)
    assert letters.missing == {"\u20dd"}
    assert letters.length("q\u0303") >= 32 > letters.length("q")


def test_joiners_that_no_font_has_are_left_out(machine: Path) -> None:
    letters = fonts.Lettering(["a\u200db\ufe0f"], 40)
    assert not letters.missing and letters.length("a\u200db\ufe0f") == letters.length("ab")


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow draws scripts that run to the left without it")
def test_spaces_stay_behind_words_that_run_to_the_left(machine: Path) -> None:
    write_font(machine / "alef.ttf", "\u05d0 ")
    letters = fonts.Lettering(["\u05d0 b"], 40)
    image = Image.new("L", (200, 80), 255)
    letters.draw(ImageDraw.Draw(image), 10, 40, "\u05d0 b", (0,))
    assert abs(np.nonzero(np.asarray(image) < 128)[1].min() - 10) < 2
