"""What reaches the terminal: notes once, nothing with power over it."""

from __future__ import annotations

import warnings

import pytest

from lexiseg.cli import application, main
from lexiseg.cli.console import say, say_error, say_note, say_table, say_written
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.words import counted, printable

EVIL = "a\x1b[31mb\x07\u202ec\n\rd\u2028e\udce9f\x9bg"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photo.jpg", "photo.jpg"),
        ("长颈鹿 ژیراف 👨\u200d👩\u200d👧", "长颈鹿 ژیراف 👨\u200d👩\u200d👧"),
        ("caf\udce9.png", r"caf\xe9.png"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("photo\u202egnp.exe", r"photo\u202egnp.exe"),
        ("a\tb\nc\x85d\u2029e", r"a\tb\nc\x85d\u2029e"),
        ("\ud800", r"\ud800"),
    ],
)
def test_a_text_is_shown_without_power_over_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_one_is_no_plural() -> None:
    assert [counted(number, "class") for number in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [counted(number, "error") for number in (0, 1, 2)] == ["0 errors", "1 error", "2 errors"]


def test_everything_the_commands_print_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    say_error(EVIL)
    say_note(EVIL)
    say_written([EVIL])
    say_table(EVIL, [EVIL, "b"], [[EVIL, "1"]])
    out, err = capsys.readouterr()
    assert not set("\x1b\x07\u202e\r\u2028\udce9\x9b") & set(out + err)
    assert out.count("\n") == 6 and err.count("\n") == 2
    assert r"\x1b[31m" in out and r"\xe9" in out


@pytest.mark.parametrize("name", ["cat", "a class with a name that goes on and on and on and on", "x" * 200])
def test_a_table_keeps_its_numbers_however_long_the_names(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns = ["class", "in training", "pixels", "mean score"]
    say_table("", columns, [[name, "unseen", "12.3 %", "0.456"], ["grass", "seen", "87.7 %", "0.789"]])
    out = capsys.readouterr().out
    head, _, *rows = out.splitlines()
    assert head.split() == ["class", "in", "training", "pixels", "mean", "score"]
    assert all(row in out for row in ("unseen", "12.3 %", "0.456")) and len(max(rows, key=len)) <= 80
    first = "".join(row[: head.index("in training")].strip() for row in rows[:-1])
    assert first.replace(" ", "") == name.replace(" ", "")


def _noted() -> None:
    for _ in range(3):
        warnings.warn("one class everywhere", LexisegWarning, stacklevel=2)
    warnings.warn("a second thing", LexisegWarning, stacklevel=2)


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
@pytest.mark.parametrize("verb_first", [True, False])
def test_a_note_is_said_once_on_stderr_unless_quiet(
    quiet: list[str], verb_first: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(application.models.lexiseg, "list_models", lambda: _noted() or [])
    assert main(["models", *quiet] if verb_first else [*quiet, "models"]) == 0
    out, err = capsys.readouterr()
    assert err == ("" if quiet else "note: one class everywhere\nnote: a second thing\n")
    assert "FOLDER" in out


def test_a_note_is_an_ordinary_warning_in_python() -> None:
    with pytest.warns(LexisegWarning, match="one class"):
        _noted()
    assert not issubclass(LexisegWarning, LexisegError)
