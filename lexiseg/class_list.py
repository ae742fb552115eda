"""Lists of classes, however people and datasets write them: the one reader of all commands.

Text, lists and mappings in Python, and files, whose content decides what they are, whatever they are called:

* one class per line, or several separated by semicolons; a comma joins synonyms, a line that begins with # is skipped;
* lines with numbers: "12: cat", "12<tab>cat", "12 cat", "12. cat", "12=cat", "cat: 12", "cat,12", and with colours:
  "cat,255,0,0", "255 0 0 cat", "cat:255,0,0::";
* a table with a heading: name and any of id, synonyms, r/g/b, color (class_dict.csv, ADE20K's objectInfo150.txt);
* JSON, YAML or Python: a list of names or of mappings (name, id, synonyms, seen, color), by itself or under "classes";
  a mapping of ids to names, names to ids or names to colours; COCO's "categories", YOLO's "names", "id2label".

Numbers are what label files hold: any from 0 to 65535, wherever they start and with gaps. Class ids are positions in
the list all the same. An entry called "(ignore)" is not a class: pixels with its number or colour have none.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lexiseg.class_forms import IGNORED, ListedClass, entries_read, lines_read, mapping_read, number_of, split_classes
from lexiseg.colors import parse_color
from lexiseg.errors import LexisegError, warn
from lexiseg.exemplars import PREFIX
from lexiseg.files import write_text
from lexiseg.words import describe, is_deep, null, refuse_unknown, shorten, word_key

_MAX_FILE_BYTES = 64 * 2**20
_ENDINGS = (
    *(".txt", ".json", ".pbtxt", ".yaml", ".yml", ".csv", ".tsv", ".names", ".list", ".lst", ".labels"),
    *(".classes", ".data", ".md", ".jsonl", ".xml", ".toml", ".ini", ".cfg", ".conf", ".doc", ".docx", ".xlsx", ".rtf"),
)
_KEYS = ("classes", "templates", "background", "ignore", "masks", "exif")
_LISTS = ("classes", "categories", "names", "labels", "id2label", "label2id")
_YAML_START = re.compile(rf"(?:-\s|---|(?:{'|'.join((*_KEYS, *_LISTS, 'nc', 'path', 'train', 'val'))})\s*:(?!\S))")
_BRACKETED = re.compile(r"\s*(?:\[.*\]|\{\s*[\"'0-9][^:]*:.*\}|\((\s*[\"'].*[\"'],?\s*)\))\s*", re.DOTALL)
_FOREIGN = re.compile(r"<\?xml|\[\[?[\w.-]+\]\]?$|[\w-]+\s*=\s*\[")
_JSON_START = re.compile(r"\s*(?:\[\s*[\"\[{\]]|\{\s*[\"}])")


@dataclass(frozen=True)
class ClassList:
    """What a list says."""

    classes: tuple[ListedClass, ...]  # in order
    ignored: tuple[int, ...] = ()  # values of label files that are no class
    ignored_colors: tuple[tuple[int, int, int], ...] = ()  # the same for masks that hold colours
    templates: Any = None  # sentences for the words, as they were written; None where it says none
    background: Any = None  # what counts as background, as it was written; None where it says nothing
    # how the mask of the picture NAME is called, such as "NAME_mask" ("masks: NAME_mask"); None for NAME
    masks: str | None = None
    # whether masks were drawn on the pixels as the file holds them ("raw") or as the camera's orientation turns them
    # ("apply"); None where it says nothing
    exif: str | None = None
    path: Path | None = None  # the file; None where there is none

    def shared_words(self) -> list[tuple[str, str]]:
        """Synonyms that are words of another class too, so that they cannot say which is meant, with their class."""
        count = Counter(key for one in self.classes for key in {word_key(word) for word in (one.name, *one.synonyms)})
        return [(one.name, word) for one in self.classes for word in one.synonyms if count[word_key(word)] > 1]

    def without_shared(self) -> ClassList:
        """The same without those synonyms."""
        shared = set(self.shared_words())
        if not shared:
            return self
        classes = (
            replace(one, synonyms=tuple(word for word in one.synonyms if (one.name, word) not in shared))
            for one in self.classes
        )
        return replace(self, classes=tuple(classes))


def class_source(text: str) -> str | Path:
    """Tell a file of classes from words: an existing file, "@FILE" and what looks like a path are never words.

    ``text``: what a user wrote, such as "cat; tree, bush", "classes.csv" or "@classes". Returns the path, whether it
    exists or not, or ``text`` as it is.
    """
    name = text.strip()
    if PREFIX in name:
        return text
    if name.startswith("@") and len(name) > 1:
        return Path(name[1:])
    try:
        if name and Path(name).is_file():
            return Path(name)
    except OSError:  # too long to be a file's name
        return text
    if not name or any(mark in name for mark in ";,\n\0"):
        return text
    last = re.split(r"[/\\]", name)[-1]
    is_path = last != name and (
        re.match(r"\.{0,2}/|~/|\.{1,2}\\|[A-Za-z]:[/\\]", name) or re.fullmatch(r".*\.\w{1,8}", last)
    )
    return Path(name) if is_path or name.lower().endswith(_ENDINGS) else text


def read_classes(source: object) -> ClassList:
    """Read anything a user may give for classes: text or a path, a list of names or mappings, or a mapping.

    Raises LexisegError if the source has another shape, or its file cannot be read.
    """
    if isinstance(source, str):
        source = class_source(source)
    if isinstance(source, Path):
        return read_class_list(source)
    if isinstance(source, str):
        return typed_read(source)
    if isinstance(source, set | frozenset):
        raise LexisegError("A set of class names has no order; give them as a list.")
    if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
        raise LexisegError(f"Classes must be text, a list, a mapping or a path, not {describe(source)}.")
    return _structured(source)


def typed_read(text: str) -> ClassList:
    """Read classes that somebody typed: "cat; tree, bush", a list or mapping as Python writes it, or what a file holds.

    ``text``: never the name of a file; of several lines it is read as a file's. Raises LexisegError if a class or a
    word of it is empty.
    """
    if len(text.strip().splitlines()) > 1:
        return read_class_text(text)
    return _bracketed(text) or ClassList(tuple(split_classes(text)))


def read_class_list(path: str | Path, *, settings_only: bool = False) -> ClassList:
    """Read a file of classes; see the module for what it may hold.

    ``settings_only``: take a mapping without classes as well, which only says how masks are to be read. Raises
    LexisegError if the file is missing, empty or none of these, names a class or a number twice, or numbers some
    classes and not others; the sentence begins with its name.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise LexisegError(f"The class list '{path}' does not exist; check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable file name"
        raise LexisegError(f"Cannot read the class list '{path}' ({reason}); check the path.") from error
    if len(data) > _MAX_FILE_BYTES:
        raise LexisegError(
            f"The class list '{path}' is larger than {_MAX_FILE_BYTES >> 20} MiB; give a text file of names."
        )
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if "\0" in text:
            raise ValueError("text of another encoding, or none")
    except ValueError as error:
        raise LexisegError(f"The class list '{path}' is not UTF-8 text; save it as UTF-8.") from error
    try:
        found = read_class_text(text, path.suffix.lower())
        if not found.classes and not settings_only:
            raise LexisegError("The list of classes is empty; name at least one.")
        _check(found.classes)
        return replace(found, path=path)
    except LexisegError as error:
        raise LexisegError(f"{path}: {error}") from error


def read_class_text(text: str, ending: str = "") -> ClassList:
    """Read the text of a file of classes.

    ``ending``: of its name; .yaml and .json are taken at their word where the content could be either. Raises
    LexisegError if it says something wrong.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    first = lines[0].strip() if lines else ""
    tagged = first.startswith("<") and "</" in text and text.rstrip().endswith(">")
    if tagged or (_FOREIGN.match(first) and (first[0] != "[" or any("=" in line for line in lines[1:]))):
        raise LexisegError("TOML, INI and XML are not read; write one class per line, JSON or YAML.")
    if ending == ".json" or (_JSON_START.match(text) and ending not in (".yaml", ".yml")):
        try:
            return _structured(json.loads(text, object_pairs_hook=_without_twins))
        except (ValueError, RecursionError) as error:
            where = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise LexisegError(f"The file is not valid JSON{where}; fix it or write a text file instead.") from error
    if ending == ".pbtxt":
        raise LexisegError("TensorFlow's label maps are not read; write a text file with a line 'id: name' per class.")
    # Lines of bare words are lines in a .yaml too, which YAML itself would fold into one text.
    if _YAML_START.match(first) or (ending in (".yaml", ".yml") and re.search(r"[:{}\[\]&*]", text)):
        value = _load_yaml(text)
        if not isinstance(value, str):
            return _structured(value)
    return _bracketed(text) or (_sorted_out(lines_read(lines)) if lines else ClassList(()))


def write_class_list(folder: Path, names: Sequence[str]) -> Path:
    """Write the names of classes as ``classes.txt``, a line each, or as ``classes.yaml``.

    The latter, a mapping that YOLO's tools read too, is for names such as "red; blue" and "#1", whose lines would be
    read as other classes. A list of other classes is replaced, with a note. Returns the path. Raises LexisegError if it
    cannot be written.
    """
    path, text = folder / "classes.txt", "".join(f"{name}\n" for name in names)
    paths = [path]
    if not _reads_as(text, tuple(names)):
        import yaml

        path = folder / "classes.yaml"
        paths.append(path)
        # In "names" a comma joins synonyms for `read_class_list`, which takes those of "categories" as they are.
        entries = [{"id": index, "name": name} for index, name in enumerate(names)]
        content = {"names": dict(enumerate(names)), "categories": entries}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    before = [place.read_text("utf-8", "replace") for place in paths if place.is_file()]
    if before != [text]:
        write_text(path, text)
        for place in paths[:-1]:  # which would be read first
            place.unlink(missing_ok=True)
        if before:
            said = f"'{path}' replaced a list of other classes; results of earlier runs beside it use the old list, so "
            warn(f"{said}write runs with other classes into other folders.")
    return path


@lru_cache(maxsize=1)  # as many results have the same classes
def _reads_as(text: str, names: tuple[str, ...]) -> bool:
    """Whether the text of a file is read as these classes and nothing more."""
    with warnings.catch_warnings(), suppress(LexisegError):
        warnings.simplefilter("ignore")
        return read_class_text(text).classes == tuple(map(ListedClass, names))
    return False


def _bracketed(text: str) -> ClassList | None:
    """Read a list or tuple of names, or a mapping of numbers, as Python writes them; None where the text is none."""
    inside = _BRACKETED.fullmatch(text)
    if inside is None:
        return None
    return _structured(_load_yaml(text if inside[1] is None else f"[{inside[1]}]"))


def _without_twins(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping, of whose keys readers of JSON and YAML would keep the last without a word."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise LexisegError(f"The key '{describe(key)}' is given twice; remove one.")
        found[key] = value
    return found


def _load_yaml(text: str) -> Any:
    import yaml

    # The base loader leaves every scalar as text, so that classes named no, on or 2024 stay what they say.
    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _without_twins((key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            return dict(super().construct_mapping(node, deep))

    if is_deep(text):
        raise LexisegError("The file has too many nested lists; write one class per line instead.")
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise LexisegError(f"The file is not valid YAML{where}; fix it or write a text file instead.") from error


def _structured(value: Any) -> ClassList:
    """Read what JSON, YAML or Python hold."""
    if not isinstance(value, Mapping):
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise LexisegError("The file holds no list of names; write one, or put it under the key 'classes'.")
        return _sorted_out(entries_read(value))
    key = next((key for key in _LISTS if key in value), None)
    settings_given = value.keys() & set(_KEYS)
    # Beside names with numbers or colours, background is a class as they are.
    if key is None and value and (not settings_given or (settings_given == {"background"} and len(value) > 1)):
        return _sorted_out(mapping_read(value))
    if key == "classes" or key is None:
        refuse_unknown(value, _KEYS, "a list of classes")
    inner = value.get(key) if key else ()
    if isinstance(inner, bytes) or not isinstance(inner, Iterable):
        raise LexisegError(f"'{key}' must be a list of names, not {describe(inner)}.")
    read: Callable[[Any], list[ListedClass]] = (
        split_classes if isinstance(inner, str) else mapping_read if isinstance(inner, Mapping) else entries_read
    )
    classes = read(inner)
    if key is not None and str(value.get("nc", len(classes))) != str(len(classes)):
        raise LexisegError(f"'nc' says {describe(value['nc'])} and '{key}' has {len(classes)} names; correct one.")
    if key == "categories":
        classes.sort(key=lambda one: -1 if one.value is None else one.value)
    settings = {name: null(value.get(name)) for name in _KEYS[1:]}
    if key is None and not any(settings[name] is not None for name in ("ignore", "masks", "exif")):
        raise LexisegError("There are no classes; add the key 'classes' with a list of names.")
    found = _sorted_out(classes)
    if settings["exif"] not in (None, "raw", "apply"):
        raise LexisegError(
            "'exif' must be raw (masks match the stored pixels) or apply (masks match the rotated picture), "
            f"not {describe(settings['exif'])}."
        )
    masks = settings["masks"]
    if masks is not None and (not isinstance(masks, str) or masks.count("NAME") != 1):
        raise LexisegError(
            f"'masks' must be a pattern for the names of masks, such as NAME_mask, not {describe(masks)}."
        )
    numbers, colors = _ignored(settings.pop("ignore"))
    return replace(
        found, ignored=(*found.ignored, *numbers), ignored_colors=(*found.ignored_colors, *colors), **settings
    )


def _ignored(given: Any) -> tuple[list[int], list[tuple[int, int, int]]]:
    entries = given if isinstance(given, list | tuple) else () if given is None else (given,)
    numbers, colors = [], []
    for entry in entries:
        if isinstance(entry, list | tuple) or (isinstance(entry, str) and entry.startswith("#")):
            colors.append(parse_color(entry, "an ignored mask value"))
        else:
            numbers.append(number_of(entry, "ignore"))
    return numbers, colors


def _sorted_out(entries: Sequence[ListedClass]) -> ClassList:
    """The classes, and the values and colours of entries that are called "(ignore)"."""
    marks = [one.name.strip().casefold() in IGNORED for one in entries]
    if any(marks) and all(one.value is None and one.color is None for one in entries):
        entries = [replace(one, value=index) for index, one in enumerate(entries)]
    return ClassList(
        tuple(one for one, mark in zip(entries, marks, strict=True) if not mark),
        tuple(one.value for one, mark in zip(entries, marks, strict=True) if mark and one.value is not None),
        tuple(one.color for one, mark in zip(entries, marks, strict=True) if mark and one.color is not None),
    )


def _check(classes: Sequence[ListedClass]) -> None:
    """Refuse a file that names a class or a number twice, or numbers some classes and not others."""
    bare = next((one.name for one in classes if one.value is None), None)
    numbered = next((one for one in classes if one.value is not None), None)
    if bare is not None and numbered is not None:
        raise LexisegError(
            f"The list numbers '{shorten(numbered.name)}' and not '{shorten(bare)}'; number all classes or none."
        )
    names: set[str] = set()
    values: set[int] = set()
    for one in classes:
        key = word_key(one.text)
        if key in names:
            raise LexisegError(f"The list names the class '{shorten(one.text)}' twice; remove one.")
        if one.value in values:
            raise LexisegError(f"The list gives the number {one.value} to two classes; fix one.")
        names.add(key)
        if one.value is not None:
            values.add(one.value)
