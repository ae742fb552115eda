"""From text, lists, mappings and files to plain class records; ``lexiseg.vocabulary`` makes classes of them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lexiseg.errors import LexisegError
from lexiseg.words import describe, flag, null, refuse_unknown, shorten

_SUFFIXES = (".txt", ".json", ".yaml", ".yml")
_MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Record:
    """One class as it was written: nothing but the shape of it is checked."""

    name: Any
    synonyms: tuple[Any, ...] = ()
    seen: bool | None = None
    color: Any = None


@dataclass(frozen=True)
class Source:
    """What a source says: its classes, its templates and background where it has any, and the file it came from."""

    records: list[Record]
    templates: Any = None
    background: Any = None
    path: Path | None = None


def split_words(text: str) -> list[str]:
    """Split words joined by commas.

    Raises:
        LexisegError: one of them is empty.
    """
    words = text.split(",")
    for word in words:
        if not word.strip():
            raise LexisegError(
                f"'{describe(text.strip())}' has a comma with no word beside it; write a word or remove the comma."
            )
    return words


def split_classes(text: str) -> list[Record]:
    """Split ``"cat; tree, bush"``: semicolons and line breaks separate classes, commas join synonyms.

    Raises:
        LexisegError: a class or a word of it is empty.
    """
    # NFC first: it turns the Greek question mark into a semicolon, which must then separate classes as it looks.
    text = unicodedata.normalize("NFC", text)
    records: list[Record] = []
    for line in text.splitlines():
        parts = line.split(";")
        if not parts[-1].strip():
            parts.pop()  # an empty line, or a semicolon that ends one
        for part in parts:
            if not part.strip():
                raise LexisegError(
                    f"Class {len(records) + 1} in '{describe(line.strip())}' is empty; write a name or remove the "
                    "semicolon."
                )
            name, *synonyms = split_words(part)
            records.append(Record(name, tuple(synonyms)))
    return records


def read_source(source: object) -> Source:
    """Read anything a user may give for classes, except the finished dataclasses.

    Raises:
        LexisegError: the source has another shape, or its file cannot be read.
    """
    if isinstance(source, Path):
        return read_file(source)
    if isinstance(source, str):
        name = source.strip()
        is_file_name = name.lower().endswith(_SUFFIXES) and not any(mark in name for mark in ";,\n")
        return read_file(Path(name)) if is_file_name else Source(split_classes(source))
    if isinstance(source, Mapping):
        refuse_unknown(source, ("classes", "templates", "background"), "a vocabulary")
        if "classes" not in source:
            raise LexisegError("The vocabulary has no classes; add the key 'classes' with a list of names.")
        classes = source["classes"]
        if isinstance(classes, str):
            records = split_classes(classes)
        elif isinstance(classes, Mapping | bytes) or not isinstance(classes, Iterable):
            raise LexisegError(f"'classes' must be a list of names, not {describe(classes)}.")
        else:
            records = _read_classes(classes)
        return Source(records, null(source.get("templates")), null(source.get("background")))
    if isinstance(source, set | frozenset):
        raise LexisegError("A set of class names has no order; give them as a list.")
    if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
        raise LexisegError(f"Classes must be text, a list, a mapping or a path, not {describe(source)}.")
    return Source(_read_classes(source))


def read_file(path: Path) -> Source:
    """Read a text, JSON or YAML file of classes; any other ending is read as text.

    Raises:
        LexisegError: the file cannot be read or says something wrong; the sentence begins with its name.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable file name"
        raise LexisegError(f"Cannot read the class list '{path}' ({reason}); check the path.") from error
    if len(data) > _MAX_FILE_BYTES:
        raise LexisegError(
            f"The class list '{path}' is larger than {_MAX_FILE_BYTES >> 20} MiB; give a text file of names."
        )
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise LexisegError(f"The class list '{path}' is not UTF-8 text; save it as UTF-8.") from error
    try:
        return replace(_read_text(text, path.suffix.lower()), path=path)
    except LexisegError as error:
        raise LexisegError(f"{path}: {error}") from error


def _read_text(text: str, suffix: str) -> Source:
    if suffix not in (".json", ".yaml", ".yml"):
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        return Source(split_classes("\n".join(lines)))
    try:
        # The base loader leaves every scalar as text, so that classes named no, on or 2024 stay what they say.
        value = json.loads(text) if suffix == ".json" else yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise LexisegError(f"The file is not valid YAML{where}; mend it or write a text file instead.") from error
    except json.JSONDecodeError as error:
        raise LexisegError(f"The file is not valid JSON in line {error.lineno} ({error.msg}); mend it.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LexisegError(
            f"The file is not valid {suffix[1:].upper()}; mend it or write a text file instead."
        ) from error
    if isinstance(value, str):
        return Source(split_classes(value))
    if not isinstance(value, list | dict):
        raise LexisegError("The file holds no list of names and no mapping with the key 'classes'.")
    return read_source(value)


def _read_classes(values: Iterable[object]) -> list[Record]:
    records: list[Record] = []
    for value in values:
        position = len(records) + 1
        if isinstance(value, str):
            if not value.strip():
                raise LexisegError(f"Class {position} is empty; write a name or remove it.")
            records.extend(split_classes(value))
        elif isinstance(value, Mapping):
            records.append(_read_mapping(value, position))
        else:
            raise LexisegError(
                f"Class {position} must be text or a mapping with a name, not {describe(value)}; put it in quotes."
            )
    return records


def _read_mapping(value: Mapping[str, Any], position: int) -> Record:
    refuse_unknown(value, ("name", "synonyms", "seen", "color"), f"class {position}")
    if "name" not in value:
        raise LexisegError(f"Class {position} has no name; add the key 'name'.")
    what = shorten(describe(value["name"]))
    synonyms = value.get("synonyms")
    if isinstance(synonyms, str):
        synonyms = split_words(synonyms) if null(synonyms) is not None else ()
    elif synonyms is None:
        synonyms = ()
    elif not isinstance(synonyms, Sequence):
        raise LexisegError(f"The synonyms of the class '{what}' must be a list of texts, not {describe(synonyms)}.")
    seen = flag(null(value.get("seen")), f"'seen' of the class '{what}'")
    return Record(value["name"], tuple(synonyms), seen, null(value.get("color")))
