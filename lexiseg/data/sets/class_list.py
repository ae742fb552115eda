"""Class lists as distributions carry them and as people write them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lexiseg.colors import parse_color
from lexiseg.errors import LexisegError
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.words import describe, shorten, word_key

_NUMBERED = re.compile(r"^\s*([0-9]+)\s*[:\t]\s*(.+?)\s*$")
_LAST_VALUE = 65535  # of label files, which have 16 bits at most


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
    labels.txt, or number, tab, name); a comma joins synonyms, and lines that begin with # are left out. A table with a
    heading line: objectInfo150.txt of ADE20K (its columns Idx and Name), or name,r,g,b separated by commas. JSON or
    YAML: a list, or one under "classes", of names or of mappings with name, id, synonyms and color; "trainId" gives
    the order where it is there.

    Numbers and ids are what the label files hold: any from 0 to 65535, wherever they start and with gaps. Class ids
    are places in the list all the same.

    Raises:
        LexisegError: the file is missing, empty or none of these, names a class or a number twice, or numbers some
            classes and not others.
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
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        entries = _lines(lines, path)
    if not entries:
        raise LexisegError(f"The class list '{path}' is empty; it must list the classes, one a line.")
    _check_numbers(entries, path)
    _refuse_repeats(entries, path)
    return entries


def check_unseen(path: Path, unseen: Sequence[str], known: Sequence[str], source: str) -> None:
    """Refuse a list of unseen classes that does not fit the classes.

    Args:
        path: of the list, for the sentence.
        unseen: the names in it.
        known: names of all classes.
        source: where those come from, for the sentence.

    Raises:
        LexisegError: it names a class that there is not, or every one there is.
    """
    keys = {word_key(name) for name in known}
    hidden = {word_key(name): name for name in unseen}
    stranger = next((name for key, name in hidden.items() if key not in keys), None)
    if stranger is not None:
        raise LexisegError(f"'{path}' names '{shorten(stranger)}', which {source} does not; mend one of them.")
    if len(hidden) == len(keys):
        raise LexisegError(f"'{path}' names every class, which leaves none to train on; name only the unseen ones.")


def shared_words(entries: Sequence[ListedClass]) -> list[tuple[str, str]]:
    """The synonyms that :func:`vocabulary_of` leaves out, each with its class's name."""
    count = _count_words(entries)
    return [(entry.name, word) for entry in entries for word in entry.synonyms if count[word_key(word)] > 1]


def vocabulary_of(entries: Sequence[ListedClass], unseen: Sequence[str] = ()) -> Vocabulary:
    """The vocabulary of a list; classes are flagged seen and unseen where ``unseen`` names any.

    A synonym that several classes share is left out, because it could not say which of them it means.
    """
    count = _count_words(entries)
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


def _count_words(entries: Sequence[ListedClass]) -> Counter[str]:
    """In how many classes a word occurs."""
    return Counter(key for entry in entries for key in {word_key(word) for word in (entry.name, *entry.synonyms)})


def _structured(text: str, path: Path) -> list[ListedClass]:
    try:
        content: Any = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except Exception as error:  # besides its own errors PyYAML lets through whatever a tag's constructor raises
        raise LexisegError(f"The class list '{path}' is not right {path.suffix[1:].upper()}; mend it.") from error
    if isinstance(content, dict):
        content = content.get("classes")
    if not isinstance(content, list):
        raise LexisegError(f"The class list '{path}' must hold a list of classes.")
    ordered = [isinstance(entry, dict) and isinstance(entry.get("trainId"), int) for entry in content]
    if any(ordered) and not all(ordered):
        raise LexisegError(
            f"The class list '{path}' gives a 'trainId' to some classes and not to others; give it to all."
        )
    if all(ordered):
        content = sorted(content, key=lambda entry: entry["trainId"])
    return [_entry(entry, path) for entry in content]


def _entry(entry: Any, path: Path) -> ListedClass:
    if isinstance(entry, str):
        return _words(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise LexisegError(f"The class list '{path}' must hold names, or mappings with a 'name'.")
    words = _words(entry["name"])
    color, value = entry.get("color"), entry.get("id")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise LexisegError(
            f"The class list '{path}' gives '{shorten(words.name)}' the id {describe(value)}; ids are whole numbers."
        )
    synonyms = entry.get("synonyms") or []
    if not isinstance(synonyms, list) or not all(isinstance(word, str) for word in synonyms):
        raise LexisegError(
            f"The class list '{path}' gives '{shorten(words.name)}' synonyms that are no list of texts; write them as "
            "[kitten, tomcat]."
        )
    return ListedClass(
        words.name,
        value,
        (*words.synonyms, *synonyms),
        None if color is None else parse_color(color, f"the class '{shorten(words.name)}' of '{path}'"),
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
    matches = [_NUMBERED.match(line) for line in lines]
    # Int refuses thousands of digits; whatever is too large for a label file is refused with the others.
    return [
        _words(line) if match is None else _words(match[2], int(match[1][:20]))
        for line, match in zip(lines, matches, strict=True)
    ]


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


def _check_numbers(entries: list[ListedClass], path: Path) -> None:
    bare = next((entry.name for entry in entries if entry.value is None), None)
    numbered = next((entry for entry in entries if entry.value is not None), None)
    if bare is not None and numbered is not None:
        raise LexisegError(
            f"The class list '{path}' numbers '{shorten(numbered.name)}' and not '{shorten(bare)}'; number all classes "
            "or none."
        )
    for entry in entries:
        if entry.value is not None and not 0 <= entry.value <= _LAST_VALUE:
            raise LexisegError(
                f"The class list '{path}' gives '{shorten(entry.name)}' a number that no label file can hold; numbers "
                f"go from 0 to {_LAST_VALUE}."
            )


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
