"""Class lists as distributions carry them and as people write them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lexiseg.colors import parse_color
from lexiseg.errors import LexisegError
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.words import word_key

_NUMBERED = re.compile(r"^\s*(\d+)\s*[:\t]\s*(.+?)\s*$")


@dataclass(frozen=True)
class ListedClass:
    """One entry of a list.

    Attributes:
        name: of the class.
        value: the number that label files give it; None where the list does not say.
        synonyms: further words.
        color: red, green, blue, where the list says.
    """

    name: str
    value: int | None = None
    synonyms: tuple[str, ...] = ()
    color: tuple[int, int, int] | None = None

    @property
    def text(self) -> str:
        """Name and synonyms in one, such as "building, edifice": what lists with repeated first words tell apart."""
        return ", ".join((self.name, *self.synonyms))


def read_class_list(path: str | Path) -> list[ListedClass]:
    """Read a list of classes, in the order of their ids.

    Text: a class a line, bare ("cat"), or with the number its label files use ("12: cat", as PASCAL Context's
    labels.txt, or number, tab, name); a comma joins synonyms. A table with a heading line: objectInfo150.txt of ADE20K
    (its columns Idx and Name), or name,r,g,b separated by commas. JSON or YAML: a list, or one under "classes", of
    names or of mappings with name, id, synonyms and color; "trainId" gives the order where it is there.

    Raises:
        LexisegError: the file is missing, empty or none of these, or names a class or a number twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise LexisegError(f"The class list '{path}' does not exist; check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LexisegError(f"The class list '{path}' cannot be read as text; it must list the classes.") from error
    if path.suffix.lower() in (".json", ".yaml", ".yml"):
        entries = _structured(text, path)
    else:
        entries = _lines([line for line in text.splitlines() if line.strip()], path)
    if not entries:
        raise LexisegError(f"The class list '{path}' is empty; it must list the classes, one a line.")
    _refuse_repeats(entries, path)
    return entries


def vocabulary_of(entries: Sequence[ListedClass], unseen: Sequence[str] = ()) -> Vocabulary:
    """The vocabulary of a list; classes are flagged seen and unseen where ``unseen`` names any.

    A synonym that several classes share is left out, because it could not say which of them it means.
    """
    count: dict[str, int] = {}
    for entry in entries:
        for word in {word_key(word) for word in (entry.name, *entry.synonyms)}:
            count[word] = count.get(word, 0) + 1
    hidden = {word_key(name) for name in unseen}
    return Vocabulary(
        tuple(
            VocabularyClass(
                entry.name,
                tuple(word for word in dict.fromkeys(entry.synonyms) if count[word_key(word)] == 1),
                word_key(entry.name) not in hidden if hidden else None,
                entry.color,
            )
            for entry in entries
        )
    )


def _structured(text: str, path: Path) -> list[ListedClass]:
    try:
        content: Any = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise LexisegError(f"The class list '{path}' is not right {path.suffix[1:].upper()}; mend it.") from error
    if isinstance(content, dict):
        content = content.get("classes")
    if not isinstance(content, list):
        raise LexisegError(f"The class list '{path}' must hold a list of classes.")
    if all(isinstance(entry, dict) and isinstance(entry.get("trainId"), int) for entry in content):
        content = sorted(content, key=lambda entry: entry["trainId"])
    return [_entry(entry, path) for entry in content]


def _entry(entry: Any, path: Path) -> ListedClass:
    if isinstance(entry, str):
        return _words(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise LexisegError(f"The class list '{path}' must hold names, or mappings with a 'name'.")
    words = _words(entry["name"])
    color, value = entry.get("color"), entry.get("id")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise LexisegError(f"The class list '{path}' gives '{words.name}' the id {value!r}; ids are whole numbers.")
    return ListedClass(
        words.name,
        value,
        (*words.synonyms, *(str(word) for word in entry.get("synonyms", ()))),
        None if color is None else parse_color(color, f"the class '{words.name}' of '{path}'"),
    )


def _lines(lines: list[str], path: Path) -> list[ListedClass]:
    if not lines:
        return []
    heading = [part.strip().lower() for part in re.split(r"[\t,]", lines[0])]
    if "idx" in heading and "name" in heading:
        rows = [re.split(r"\t", line) for line in lines[1:]]
        try:
            return [_words(row[heading.index("name")].strip(), int(row[heading.index("idx")].strip())) for row in rows]
        except (IndexError, ValueError) as error:
            raise LexisegError(f"The class list '{path}' has a line without its columns Idx and Name.") from error
    if heading[:4] == ["name", "r", "g", "b"]:
        return [_colored(line, path) for line in lines[1:]]
    entries = []
    numbered = all(_NUMBERED.match(line) for line in lines)
    for line in lines:
        match = _NUMBERED.match(line) if numbered else None
        if match:
            entries.append(_words(match[2], int(match[1])))
        elif not line.lstrip().startswith("#"):
            entries.append(_words(line))
    return entries


def _colored(line: str, path: Path) -> ListedClass:
    parts = [part.strip() for part in line.split(",")]
    try:
        red, green, blue = (int(part) for part in parts[1:4])
    except ValueError as error:
        raise LexisegError(f"The class list '{path}' has the line '{line}', which is not name,r,g,b.") from error
    return ListedClass(parts[0], color=parse_color((red, green, blue), f"the class '{parts[0]}' of '{path}'"))


def _words(text: str, value: int | None = None) -> ListedClass:
    words = [part.strip() for part in text.split(",") if part.strip()]
    return ListedClass(words[0] if words else text.strip(), value, tuple(words[1:]))


def _refuse_repeats(entries: list[ListedClass], path: Path) -> None:
    names: set[str] = set()
    values: set[int] = set()
    for entry in entries:
        key = word_key(entry.text)
        if key in names:
            raise LexisegError(f"The class list '{path}' names the class '{entry.text}' twice; remove one.")
        if entry.value is not None and entry.value in values:
            raise LexisegError(f"The class list '{path}' gives the number {entry.value} to two classes; mend one.")
        names.add(key)
        if entry.value is not None:
            values.add(entry.value)
