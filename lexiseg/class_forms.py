"""The forms that lists of classes have: lines, tables, entries, mappings; `class_list` tells them apart."""

import csv
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lexiseg.colors import parse_color
from lexiseg.errors import LexisegError, warn
from lexiseg.exemplars import PREFIX
from lexiseg.words import describe, flag, null, refuse_unknown, shorten

_LAST_VALUE = 65535  # of label files, which have 16 bits at most
_ENTRY_KEYS = ("name", "synonyms", "seen", "color", "scored", "id")
IGNORED = ("(ignore)", "(ignored)", "(void)")
"""Names of entries that are not classes."""

_LONGEST = 2000
_COLUMNS = {  # headings without spaces and underscores
    **dict.fromkeys(("name", "class", "label", "category", "classname", "labelname", "categoryname"), "name"),
    **dict.fromkeys(("id", "idx", "index", "value", "classid", "labelid", "categoryid", "pixelvalue"), "id"),
    **{"r": "r", "red": "r", "g": "g", "green": "g", "b": "b", "blue": "b"},
    **{"color": "color", "colour": "color", "hex": "color"},
    **dict.fromkeys(("synonyms", "synonym", "aliases"), "synonyms"),
}
# What a column of names alone may have; "label" could be a class.
_HEADINGS = ("name", "class", "category", "classname", "labelname", "categoryname")
_QUOTED = re.compile(r"""(["']).*\1|[“„].*[”“]|«.*»""")
_NUMBERED = re.compile(r"(?P<id>[0-9]+)\s*[:\t]\s*(?P<name>.+)")
_RGB = r"(?P<r>[0-9]{1,3})\s*[,\s]\s*(?P<g>[0-9]{1,3})\s*[,\s]\s*(?P<b>[0-9]{1,3})"
_FORMS = (  # of all lines of a list, and the fewest lines that are taken for it
    (re.compile(rf"{_RGB}[\s,:]+(?P<name>.+)"), 1),
    (re.compile(rf"(?P<name>.+?)\s*[,:\s]\s*{_RGB}\s*(?::.*)?"), 1),
    (re.compile(r"(?P<id>[0-9]+)\s*(?:[\s,;=]|[.)]\s)\s*(?P<name>.*\D.*)"), 2),  # "7 up" alone is a class
    (re.compile(r"(?P<name>.*\D.*?)\s*[:\t,;=]\s*(?P<id>[0-9]+)"), 2),
)


@dataclass(frozen=True)
class ListedClass:
    """One entry of a list; ``lexiseg.vocabulary`` says which names are valid."""

    name: str  # of the class
    synonyms: tuple[str, ...] = ()  # further words
    seen: bool | None = None  # whether masks of it were trained on; None where nobody says
    color: tuple[int, int, int] | None = None  # red, green, blue in 0..255; None where nobody says
    # whether the name is one of the words; not so where it only names others, as in "mug = cup, tumbler"
    scored: bool = True
    value: int | None = None  # the number that label files give it; None where nobody says

    @property
    def text(self) -> str:
        """Name and synonyms in one, such as "building, edifice": what lists with repeated first words tell apart."""
        return ", ".join((self.name, *self.synonyms))


def split_words(text: str) -> list[str]:
    """Split words joined by commas, and take quotation marks off. Raises LexisegError if a word is empty."""
    words = [word.strip() for word in re.split("[,\uff0c\u3001]", text)]
    words = [word[1:-1].strip() if len(word) > 1 and _QUOTED.fullmatch(word) else word for word in words]
    open_mark = next((word for word in words if word[:1] in ('"', "“", "„", "«")), None)
    if open_mark is not None:
        raise LexisegError(
            f"'{describe(open_mark)}' has an unclosed quotation mark; remove quotation marks, because a comma joins "
            "synonyms inside them too."
        )
    if not all(words):
        raise LexisegError(
            f"'{describe(text.strip())}' has a comma with no word beside it; write a word or remove the comma."
        )
    return words


def split_classes(text: str) -> list[ListedClass]:
    """Split ``"cat; tree, bush"``: semicolons and line breaks separate classes, commas join synonyms; Chinese ones too.

    ``"mug = cup, tumbler"`` is a class that is called mug and looked for as cup and tumbler only. Raises LexisegError
    if a class or a word of it is empty.
    """
    # NFC first: it turns the Greek question mark into a semicolon, which must then separate classes as it looks.
    text = unicodedata.normalize("NFC", text)
    found: list[ListedClass] = []
    for line in text.splitlines():
        parts = re.split("[;\uff1b]", line)
        if not parts[-1].strip():
            parts.pop()  # an empty line, or a semicolon that ends one
        for part in parts:
            if not part.strip():
                raise LexisegError(
                    f"Class {len(found) + 1} in '{describe(line.strip())}' is empty; write a name or remove the "
                    "semicolon."
                )
            label, named, words = f"{part.rstrip()} ".partition(" = ")
            if named and label.strip():
                synonyms = split_words(words) if words.strip() else ()
                found.append(ListedClass(label.strip(), tuple(synonyms), scored=False))
                continue
            name, *synonyms = split_words(part)
            found.append(ListedClass(name, tuple(synonyms)))
    return found


def lines_read(lines: Sequence[str]) -> list[ListedClass]:
    """Read the lines of a text: names, numbers and names, colours and names, or a table with a heading.

    Raises LexisegError if a line is not as the others are, or says something wrong.
    """
    for separator in "\t,;":
        heading = [_COLUMNS.get(_bare_heading(part), "") for part in lines[0].split(separator)]
        if lines[0].startswith(separator):  # as pandas writes its index
            heading[0] = "id"
        if heading.count("name") == 1 and len(set(heading) - {""}) > 1:
            return _table(lines, heading, separator)
    bare = [re.sub(r"^[*•]\s+", "", line.strip()) for line in lines]
    if len(bare) > 1 and _bare_heading(bare[0]) in _HEADINGS:
        warn(f"The first line, '{bare[0]}', was read as a column header, not as a class.")
        lines, bare = lines[1:], bare[1:]
    numbered = [_NUMBERED.fullmatch(line) for line in bare]
    # What is longer is no such line, and would take patterns long; and the box of an exemplar is no colour.
    short = max(map(len, bare)) <= _LONGEST and not any(PREFIX in line for line in bare)
    for pattern, least in _FORMS if short and not any(numbered) else ():
        matches = [match for line in bare if (match := pattern.fullmatch(line))]
        if len(matches) == len(lines) >= least:
            return [_class_of(match.groupdict()) for match in matches]
    found: list[ListedClass] = []
    for line, match in zip(bare, numbered, strict=True):
        found += [_class_of(match.groupdict())] if match else split_classes(line)
    return found


def _bare_heading(text: str) -> str:
    return re.sub(r'["\s_]', "", text.lower())


def _class_of(cells: Mapping[str, Any]) -> ListedClass:
    """A class of cells: its name, and any of synonyms, id, color, and r, g and b."""
    name, *synonyms = split_words(", ".join(filter(None, (cells["name"], cells.get("synonyms")))))
    value = number_of(cells["id"], name) if "id" in cells else None
    color = (cells["r"], cells.get("g"), cells.get("b")) if "r" in cells else cells.get("color")
    return ListedClass(name, tuple(synonyms), color=color_of(color, name), value=value)


def _table(lines: Sequence[str], heading: Sequence[str], separator: str) -> list[ListedClass]:
    found = []
    for line in lines[1:]:
        try:
            row = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:  # a cell without end
            row = []
        cells = {column: cell.strip().replace(";", ",") for column, cell in zip(heading, row, strict=False) if column}
        if len(cells) < len(set(heading) - {""}) or not cells["name"]:
            columns = ", ".join(column for column in heading if column)
            raise LexisegError(f"The line '{describe(line)}' does not match the columns {columns}.")
        found.append(_class_of(cells))
    return found


def mapping_read(value: Mapping[Any, Any]) -> list[ListedClass]:
    """Read a mapping of ids to names, names to ids, or names to colours. Raises LexisegError if it is none of these."""
    if all(_is_number(key) for key in value):
        for key, name in value.items():
            if not isinstance(name, str):
                raise LexisegError(f"Class {describe(key)} must be text, not {describe(name)}; put it in quotes.")
        found = [_class_of({"name": name, "id": key}) for key, name in value.items()]
        return sorted(found, key=lambda one: one.value or 0)
    if all(isinstance(name, str) and _is_number(number) for name, number in value.items()):
        return [_class_of({"name": name, "id": number}) for name, number in value.items()]
    colors = [color for color in value.values() if isinstance(color, list | tuple) and all(map(_is_number, color))]
    if len(colors) == len(value) and all(isinstance(name, str) for name in value):
        return [_class_of({"name": name, "color": color}) for name, color in value.items()]
    raise LexisegError("There are no classes; add the key 'classes' with a list of names.")


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().isdecimal()
    return isinstance(value, int) and not isinstance(value, bool)


def number_of(value: Any, name: str) -> int:
    """A number that a label file may hold. Raises LexisegError if it is not one."""
    number = None
    if isinstance(value, float) and value.is_integer():
        number = int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]+\s*", value):
        number = int(value.strip()[:20])  # thousands of digits are more than int() takes
    if number is None:
        raise LexisegError(f"'{shorten(describe(name))}' has the id '{describe(value)}'; ids are whole numbers.")
    if not 0 <= number <= _LAST_VALUE:
        raise LexisegError(
            f"'{shorten(describe(name))}' has an id outside the range of label files; ids go from 0 to {_LAST_VALUE}."
        )
    return number


def color_of(value: Any, name: str) -> tuple[int, int, int] | None:
    """A colour, or None where nothing is said. Raises LexisegError if it is not one."""
    return None if null(value) is None else parse_color(value, f"the class '{shorten(describe(name))}'")


def entries_read(values: Iterable[object]) -> list[ListedClass]:
    """Read a list of names, mappings and classes that are ready.

    Raises LexisegError if an entry is neither, or says something wrong; the sentence says which.
    """
    found: list[ListedClass] = []
    for value in values:
        position = len(found) + 1
        if isinstance(value, ListedClass):
            found.append(value)
        elif isinstance(value, str):
            if not value.strip():
                raise LexisegError(f"Class {position} is empty; write a name or remove it.")
            found.extend(split_classes(value))
        elif isinstance(value, Mapping):
            found.append(_entry(value, position))
        else:
            raise LexisegError(
                f"Class {position} must be text or a mapping with a name, not {describe(value)}; put it in quotes."
            )
    return found


def _entry(value: Mapping[str, Any], position: int) -> ListedClass:
    if "id" not in value:  # lists of datasets carry keys of their own
        refuse_unknown(value, _ENTRY_KEYS, f"class {position}")
    if "name" not in value:
        raise LexisegError(f"Class {position} has no name; add the key 'name'.")
    name = value["name"]
    if not isinstance(name, str):
        raise LexisegError(f"The name of class {position} must be text, not {describe(name)}; put it in quotes.")
    what = shorten(describe(name))
    synonyms = value.get("synonyms")
    if null(synonyms) is None:
        synonyms = ()
    elif isinstance(synonyms, str):
        synonyms = split_words(synonyms)
    elif not isinstance(synonyms, Sequence) or not all(isinstance(word, str) for word in synonyms):
        raise LexisegError(f"The synonyms of the class '{what}' must be a list of texts, such as [kitten, tomcat].")
    number = null(value.get("id"))
    return ListedClass(
        name,
        tuple(synonyms),
        flag(null(value.get("seen")), f"'seen' of the class '{what}'"),
        color_of(value.get("color"), name),
        flag(null(value.get("scored")), f"'scored' of the class '{what}'") is not False,
        None if number is None else number_of(number, name),
    )
