"""Names, synonyms, templates, seen and unseen, colours, and what counts as background."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import yaml

from lexiseg.background import Background, BackgroundSource
from lexiseg.class_forms import ListedClass, split_words
from lexiseg.class_list import ClassList, class_source, read_class_text, read_classes
from lexiseg.colors import BACKGROUND_COLOR, distinct_colors, parse_color
from lexiseg.errors import LexisegError, warn
from lexiseg.exemplars import PREFIX, Exemplar
from lexiseg.files import as_path, write_json, write_text
from lexiseg.renames import renamed_method
from lexiseg.templates import SINGLE_TEMPLATE, TEMPLATE_SETS
from lexiseg.words import clean_word, describe, shorten, word_key

if TYPE_CHECKING:
    import torch

VocabularySource: TypeAlias = (
    "str | Path | Vocabulary | ClassList | Mapping[str, Any] | Iterable[str | Mapping[str, Any]]"
)
TemplateSource: TypeAlias = "str | Sequence[str] | None"


@dataclass(frozen=True)
class VocabularyClass(ListedClass):
    """One class, checked: its name, other words for it, whether it had masks in training, and its colour.

    The best-scoring word of a class wins. Without a colour it has one by its position in the vocabulary. Raises
    LexisegError if nothing of the class is scored; a word is empty, holds control characters or begins with "photo:";
    or a colour is not three numbers in 0..255.
    """

    exemplars: tuple[Exemplar, ...] = ()  # pictures of the class, which count as further words

    def __post_init__(self) -> None:
        name = clean_word(self.name, "A class name")
        if isinstance(self.synonyms, str) or not isinstance(self.synonyms, Iterable):
            said = describe(self.synonyms)
            raise LexisegError(f"The synonyms of '{shorten(name)}' must be a list of texts, not '{said}'; give one.")
        synonyms = tuple(clean_word(word, f"A synonym of the class '{shorten(name)}'") for word in self.synonyms)
        if shown := next((word for word in (name, *synonyms) if word.startswith(PREFIX)), None):
            raise LexisegError(
                f"'{shorten(shown)}' is a picture and needs a name; write for example 'mug = {shorten(shown)}', or "
                "give it among the exemplars."
            )
        if self.seen not in (None, True, False):
            raise LexisegError(f"'seen' of the class '{shorten(name)}' must be true, false or absent.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "synonyms", synonyms)
        object.__setattr__(self, "seen", None if self.seen is None else bool(self.seen))
        exemplars = tuple(self.exemplars) if isinstance(self.exemplars, Iterable) else (self.exemplars,)
        if not all(isinstance(one, Exemplar) for one in exemplars):
            raise LexisegError(f"The exemplars of '{shorten(name)}' must be a list of Exemplar.")
        object.__setattr__(self, "exemplars", exemplars)
        if not (self.scored or synonyms or self.exemplars):
            raise LexisegError(f"The class '{shorten(name)}' has no words; give one after the =.")
        if self.color is not None:
            object.__setattr__(self, "color", parse_color(self.color, f"the class '{shorten(name)}'"))

    @property
    def words(self) -> tuple[str, ...]:
        """What is scored: the name followed by the synonyms and what stands for the exemplars."""
        name = (self.name,) if self.scored else ()
        return (*name, *self.synonyms, *(exemplar.word for exemplar in self.exemplars))

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold; what is not set is left out."""
        value: dict[str, Any] = {"name": self.name}
        if self.synonyms or self.exemplars:
            value["synonyms"] = [*self.synonyms, *(exemplar.word for exemplar in self.exemplars)]
        if not self.scored:
            value["scored"] = False
        if self.seen is not None:
            value["seen"] = self.seen
        if self.color is not None:
            value["color"] = list(self.color)
        return value


@dataclass(frozen=True)
class Vocabulary:
    """The classes a picture is segmented into, in the user's order.

    Raises LexisegError if there are no classes, two words are the same after NFC, case folding and folding of white
    space (within one class or across two), or a template has not exactly one ``{}``.
    """

    # at least one; a background of kind "class" that is not among them is appended as the last
    classes: tuple[VocabularyClass, ...]
    templates: tuple[str, ...] = SINGLE_TEMPLATE  # sentences with one ``{}`` each, into which every word is put
    background: Background = field(default_factory=Background)  # what happens to pixels that no class fits

    def __post_init__(self) -> None:
        classes = list(self.classes) if isinstance(self.classes, Iterable) else [self.classes]
        background = self.background
        if not classes:
            raise LexisegError("The list of classes is empty; name at least one class, for example 'cat; tree, bush'.")
        if not all(isinstance(entry, VocabularyClass) for entry in classes):
            raise LexisegError("A Vocabulary is made of VocabularyClass; use Vocabulary.parse for names.")
        if not isinstance(background, Background):
            raise LexisegError("The background of a Vocabulary is a Background; use Background.parse for its name.")
        if background.name is not None:
            classes, background = _with_background_class(classes, background.name)
        _refuse_duplicates(classes)
        object.__setattr__(self, "classes", tuple(classes))
        object.__setattr__(self, "background", background)
        object.__setattr__(self, "templates", _check_templates(self.templates))

    @classmethod
    def parse(
        cls,
        source: VocabularySource,
        *,
        templates: TemplateSource = None,
        background: BackgroundSource = None,
        default_templates: TemplateSource = None,
    ) -> Vocabulary:
        """Read classes from whatever a user has.

        ``source``: text such as ``"cat; tree, bush"`` (a semicolon or a line break separates classes, a comma joins
        synonyms); a list of such texts, of mappings with name, synonyms, seen and color, or of ``VocabularyClass``; a
        mapping with classes, templates and background; a path, or text that is an existing file or looks like a path
        (`lexiseg.class_list.class_source`); what `lexiseg.class_list.read_class_list` gives; or a
        vocabulary. Of a file, a synonym that belongs to two classes is left out. ``templates``: replaces the source's
        templates: a list, one template, "single" or "paper". ``background``: replaces the source's background; see
        ``Background.parse``. ``default_templates``: used where neither ``templates`` nor the source gives any.
        Returns the vocabulary, in the order of the source. Raises LexisegError if anything is wrong with the source;
        the sentence names the class or file.
        """
        if isinstance(source, Vocabulary):
            vocabulary = source
        else:
            said = source if isinstance(source, ClassList) else read_classes(source)
            chosen = default_templates if said.templates is None else said.templates
            kept = said if said.path is None else said.without_shared()
            if kept is not said:
                name, word = said.shared_words()[0]
                text = f"{said.path}: the word '{word}' of the class '{name}' belongs to another class too, so it is "
                warn(f"{text}dropped; remove it from one.")
            folder = None if said.path is None else said.path.parent
            try:
                classes = tuple(_class_of(one, folder) for one in kept.classes)
                vocabulary = cls(classes, _read_templates(chosen), Background.parse(said.background))
            except LexisegError as error:
                if said.path is None:
                    raise
                raise LexisegError(f"{said.path}: {error}") from error
        if templates is not None:
            vocabulary = replace(vocabulary, templates=_read_templates(templates))
        if background is not None:
            vocabulary = replace(vocabulary, background=Background.parse(background))
        return vocabulary

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a file of classes in any of the forms of `lexiseg.class_list`.

        Raises LexisegError if the file cannot be read or says something wrong.
        """
        return cls.parse(as_path(path, "A file of classes"))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Vocabulary:
        """The inverse of ``to_dict``."""
        return cls.parse(value)

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold and ``from_dict`` reads back."""
        return {
            "classes": [entry.to_dict() for entry in self.classes],
            "templates": list(self.templates),
            "background": self.background.to_dict(),
        }

    def to_text(self) -> str:
        """The short form, such as ``cat; tree, bush``: names and synonyms only.

        Raises LexisegError if a word holds a comma, a semicolon or " = ", or it all reads like the name of a file or
        like other classes.
        """
        for word in (word for entry in self.classes for word in (entry.name, *entry.words)):
            if "," in word or ";" in word or " = " in word:
                raise LexisegError(
                    f"The word '{shorten(word)}' holds a comma, a semicolon or an equals sign; save it as JSON instead."
                )
        text = "; ".join(
            ("" if entry.scored else f"{entry.name} = ") + ", ".join(entry.words) for entry in self.classes
        )
        if class_source(text) is not text:
            raise LexisegError(f"'{shorten(text)}' would be read as the name of a file; save it as JSON instead.")
        with suppress(LexisegError):
            if Vocabulary.parse(text).words == self.words:
                return text
        raise LexisegError(f"'{shorten(text)}' would be read as other classes; save it as JSON instead.")

    def save(self, path: str | Path) -> Path:
        """Write the vocabulary to a .json, .yaml, .yml or .txt file, atomically, and return the path.

        Raises LexisegError if the ending is another one, an exemplar is in memory, a text file would lose something
        (templates, background, seen, colours, a word with a comma or semicolon or beginning with #), or the file cannot
        be written.
        """
        path = as_path(path, "A file of classes")
        suffix = path.suffix.lower()
        for entry in self.classes:
            for one in entry.exemplars:
                if not isinstance(one.image, str | Path) or not isinstance(one.mask, str | Path | None):
                    raise LexisegError(
                        f"A picture of the class '{shorten(entry.name)}' is in memory, which a file of classes cannot "
                        "hold; save it with its mask, and give their paths."
                    )
        if suffix == ".json":
            return write_json(path, self.to_dict())
        if suffix in (".yaml", ".yml"):
            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
            return write_text(path, text)
        if suffix != ".txt":
            raise LexisegError(f"Cannot save a vocabulary as '{path}'; end the name in .json, .yaml or .txt.")
        text = "\n".join(self.to_text().split("; ")) + "\n"
        with suppress(LexisegError):  # a class called "[" or "0: a" is something else in a file
            if self == Vocabulary.parse(read_class_text(text)):
                return write_text(path, text)
        raise LexisegError(f"A text file such as '{path}' holds only names and synonyms; save it as .json instead.")

    def hash(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON of everything the vocabulary says."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return sha256(canonical.encode("ascii")).hexdigest()

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The C class names in the user's order."""
        return tuple(entry.name for entry in self.classes)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The W >= C words that are scored: each class's name followed by its synonyms, class by class."""
        return tuple(word for entry in self.classes for word in entry.words)

    @cached_property
    def exemplars(self) -> tuple[tuple[int, Exemplar], ...]:
        """The exemplars, each with its place among `words`."""
        by_word = {exemplar.word: exemplar for entry in self.classes for exemplar in entry.exemplars}
        return tuple((index, by_word[word]) for index, word in enumerate(self.words) if word in by_word)

    def with_placeholders(self) -> Vocabulary:
        """The same with a plain word in each exemplar's place, for a text tower to read."""
        if not self.exemplars:
            return self
        names = {exemplar.word: f"exemplar {number}" for number, (_, exemplar) in enumerate(self.exemplars)}
        classes = tuple(
            replace(entry, synonyms=(*entry.synonyms, *(names[one.word] for one in entry.exemplars)), exemplars=())
            for entry in self.classes
        )
        return replace(self, classes=classes)

    spoken = renamed_method("spoken", "with_placeholders")

    @cached_property
    def word_to_class(self) -> torch.Tensor:
        """The class of each word: int64, shape (W,), non-decreasing, in 0..C-1."""
        import torch

        return torch.tensor([index for index, entry in enumerate(self.classes) for _ in entry.words], device="cpu")

    @cached_property
    def seen_words(self) -> torch.Tensor:
        """True for the words of classes known to be seen in training: bool, shape (W,)."""
        import torch

        return torch.tensor([entry.seen is True for entry in self.classes for _ in entry.words], device="cpu")

    @cached_property
    def background_index(self) -> int | None:
        """The index of the background class, or None where there is none."""
        if self.background.name is None:
            return None
        keys = [word_key(name) for name in self.names]
        return keys.index(word_key(self.background.name))

    def with_seen(self, names: Iterable[str]) -> Vocabulary:
        """Say which classes were seen in training, where the vocabulary does not say so itself.

        ``names``: the seen classes, or one. They match a class by its name or a synonym, after NFC, case and white
        space folding. Returns a vocabulary in which every ``seen`` is True or False.
        """
        keys = {word_key(name) for name in ([names] if isinstance(names, str) else names)}
        classes = tuple(
            entry
            if entry.seen is not None
            else replace(entry, seen=any(word_key(word) in keys for word in entry.words))
            for entry in self.classes
        )
        return replace(self, classes=classes)

    def prompts(self, word: str) -> tuple[str, ...]:
        """The sentences for one word, one per template."""
        return tuple(template.replace("{}", word) for template in self.templates)

    def palette(self) -> np.ndarray:
        """A colour for each class: uint8, shape (C, 3), red, green, blue.

        The classes' own colours where given; black for a background class; otherwise distinct colours that depend
        only on the position in the vocabulary.
        """
        given = [entry.color for entry in self.classes]
        if self.background_index is not None and given[self.background_index] is None:
            given[self.background_index] = BACKGROUND_COLOR
        return distinct_colors(given)

    def check_lengths(self, count_tokens: Callable[[str], int], context_length: int) -> None:
        """Check that the text tower can read every word in every template.

        ``count_tokens``: the number of tokens of a sentence, start and end tokens included. ``context_length``: the
        most tokens the text tower reads. Raises LexisegError if a sentence is longer; the sentence names the class and
        the template.
        """
        for entry in self.classes:
            for word in entry.words:
                for template, prompt in zip(self.templates, self.prompts(word), strict=True):
                    # A byte-pair token covers at least one byte, so short ASCII sentences need no counting. With
                    # 100,000 classes that is the difference between minutes and a moment.
                    if prompt.isascii() and len(prompt) + 4 <= context_length:
                        continue
                    count = count_tokens(prompt)
                    if count > context_length:
                        what = f"class '{shorten(entry.name)}'"
                        if word != entry.name:
                            what = f"synonym '{shorten(word)}' of the {what}"
                        raise LexisegError(
                            f"The {what} needs {count} tokens in the template '{shorten(template)}', but the text "
                            f"tower reads at most {context_length}; use a shorter name."
                        )


def _class_of(one: ListedClass, folder: Path | None) -> VocabularyClass:
    """A class of a list, checked; words that begin with "photo:" are exemplars, whose files may lie beside it."""
    if isinstance(one, VocabularyClass):
        return one
    words = tuple(word for word in one.synonyms if not word.startswith(PREFIX))
    exemplars = tuple(Exemplar.parse(word, folder) for word in one.synonyms if word.startswith(PREFIX))
    return VocabularyClass(one.name, words, one.seen, one.color, one.scored, exemplars=exemplars)


def _with_background_class(classes: list[VocabularyClass], name: str) -> tuple[list[VocabularyClass], Background]:
    """Find the background's class among the classes, or append it."""
    names = {word_key(entry.name): entry.name for entry in classes}
    if word_key(name) in names:
        return classes, Background("class", names[word_key(name)])
    first, *synonyms = split_words(name)
    extra = VocabularyClass(first, tuple(synonyms))
    if word_key(extra.name) in names:
        raise LexisegError(
            f"The background '{shorten(extra.name)}' is already among the classes; give its synonyms there."
        )
    return [*classes, extra], Background("class", extra.name)


def _refuse_duplicates(classes: Sequence[VocabularyClass]) -> None:
    owners: dict[str, tuple[VocabularyClass, str]] = {}
    for entry in classes:
        for word in entry.words:
            key = word_key(word)
            if key not in owners:
                owners[key] = entry, word
                continue
            owner, first = owners[key]
            name, said = shorten(entry.name), shorten(word)
            if owner is not entry and word == entry.name and first == owner.name:
                detail = f"The class '{said}' is given twice"
                detail += "" if word == first else f" (also as '{shorten(first)}')"
            elif owner is entry:
                detail = f"The class '{name}' holds the word '{said}' twice"
            else:
                detail = f"The word '{said}' of the class '{name}' already belongs to the class '{shorten(owner.name)}'"
            raise LexisegError(f"{detail}; remove one of them.")


def _check_templates(templates: object) -> tuple[str, ...]:
    if isinstance(templates, str) or not isinstance(templates, Sequence):
        raise LexisegError(f"The templates must be a list of texts, not {describe(templates)}.")
    if not templates:
        raise LexisegError("The list of templates is empty; give at least one, for example 'a photo of a {}'.")
    for template in templates:
        if not isinstance(template, str):
            raise LexisegError(f"A template must be text, not {describe(template)}.")
        if template.count("{}") != 1:
            raise LexisegError(f"The template '{shorten(template)}' must hold exactly one {{}}, where the name goes.")
        clean_word(template, "A template")
    return tuple(templates)


def _read_templates(source: object) -> tuple[str, ...]:
    if source is None:
        return SINGLE_TEMPLATE
    given = [source] if isinstance(source, str) else source
    if isinstance(given, Sequence) and len(given) == 1 and isinstance(given[0], str) and given[0] in TEMPLATE_SETS:
        return TEMPLATE_SETS[given[0]]
    return _check_templates(given)
