"""Reading the words and small values a user writes: cleaning, comparing, and naming them in errors."""

import difflib
import math
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

from lexiseg.errors import LexisegError

# Characters that draw nothing and never change a word's meaning; they would hide a duplicate. The zero-width
# joiners stay: emoji and several scripts need them.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
_JOINERS = "\u200c\u200d"


_DEEP = re.compile(r"(?:[\[{]\s*|- ){300}")


def shorten(text: str, limit: int = 60) -> str:
    """Cut a text for an error message, so that one long name cannot fill the screen."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_line(error: BaseException) -> str:
    """What an error says in its first line, no more than a sentence can hold; its type's name where it says nothing."""
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], 300)


def printable(text: object) -> str:
    r"""A text from a file, a path or a user as it may be shown on a terminal: on one line, without any power over it.

    Control characters (escape sequences begin with one), line breaks, bidirectional marks and other characters that
    draw nothing become ``\x1b`` or ``\u202e``. The bytes of a file name that is not UTF-8, which Python holds as
    lone surrogates, become the bytes they are, ``\xe9``. Everything that draws stays, joined emoji too.
    """
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(map(_shown, shown))


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return character.encode("unicode_escape", "surrogatepass").decode("ascii") if hidden else character


def is_deep(text: str) -> bool:
    """Say whether a text of YAML or JSON begins hundreds of lists or mappings within each other, which no one writes.

    A parser would need a time that grows with the square of their number, or all of Python's stack.
    """
    return _DEEP.search(text) is not None


def describe(value: object) -> str:
    """Name a value of any kind in an error message."""
    # Containers are named by type only: the repr of a YAML file with nested aliases can be exponentially long.
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a huge number"
    if value is None or isinstance(value, bool | int | float | str):
        return shorten(printable(value))
    return kind(value)


def quoted(value: object) -> str:
    """The same of a value that should not be text: text is in quotation marks, so that '4' does not look like 4."""
    return f"'{describe(value)}'" if isinstance(value, str) else describe(value)


def kind(value: object) -> str:
    """What a value is, by the name of its type, with an article: "an Image", "a list"."""
    name = type(value).__name__
    return f"{'an' if name[:1] in 'AEIOaeio' else 'a'} {name}"


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural but for one: "1 picture", "2 classes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def clean_word(text: object, what: str) -> str:
    """Bring a name into the form that is kept: NFC, single spaces, no invisible characters. Case stays.

    Raises LexisegError if the value is not text, is empty, or holds control characters.
    """
    if not isinstance(text, str):
        raise LexisegError(f"{what} must be text, not {describe(text)}; put it in quotes.")
    cleaned = text
    if not text.isascii():
        cleaned = unicodedata.normalize("NFC", text.translate(_INVISIBLE))
    cleaned = " ".join(cleaned.split())
    if not cleaned.isprintable() and any(unicodedata.category(character) in ("Cc", "Cs") for character in cleaned):
        raise LexisegError(f"{what} ('{describe(cleaned)}') holds characters that cannot be read; type it again.")
    if not any(character.isprintable() and character != " " for character in cleaned):
        raise LexisegError(f"{what} is empty; write a word or remove it.")
    return cleaned


def word_key(text: str) -> str:
    """What two spellings of one word share: Unicode's canonical caseless matching, with white space folded."""
    if text.isascii():
        return " ".join(text.casefold().split())
    folded = unicodedata.normalize("NFD", text.translate(_INVISIBLE)).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def near_names(name: str, known: Iterable[str], otherwise: str | None = None, most: int = 3) -> str:
    """The end of a sentence about a name that is not known: some near ones, else ``otherwise``, else all there are."""
    if near := difflib.get_close_matches(shorten(name), known := list(known), n=most, cutoff=0.5):
        return did_you_mean(near)
    return f"there are {', '.join(known)}." if otherwise is None else otherwise


def did_you_mean(names: Iterable[str]) -> str:
    """The end of a sentence about a name that is not known, when these are meant most likely."""
    return f"did you mean {' or '.join(map(repr, names))}?"


def refuse_unknown(value: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    """Check that ``value`` has no keys but the ``known`` ones.

    Raises LexisegError if it has; the sentence names the first.
    """
    for key in value:
        if key not in known:
            raise LexisegError(f"Unknown key '{describe(key)}' in {what}; known keys are {', '.join(known)}.")


def null(value: Any) -> Any:
    """None for the spellings of null in YAML, else the value itself."""
    return None if isinstance(value, str) and value.strip().lower() in ("", "null", "~") else value


def flag(value: object, what: str) -> bool | None:
    """Read true, false or nothing, also from text as a YAML file holds it.

    Raises LexisegError if it is something else; ``what`` begins the sentence.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise LexisegError(f"{what} must be true or false, not {quoted(value)}.")


def whole_number(value: object, what: str, low: int = 0) -> int:
    """Read a whole number of any integer type.

    Raises LexisegError if it is not one, or below ``low``; ``what`` begins the sentence.
    """
    number = None
    with suppress(TypeError):
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    if number is None or number < low:
        raise LexisegError(f"{what} must be a whole number of at least {low}, not {quoted(value)}.")
    return number


def finite(value: object, what: str) -> float:
    """Read a finite number, also from text as a YAML file holds it.

    Raises LexisegError if it is not one; ``what`` begins the sentence.
    """
    number = math.nan
    if isinstance(value, Real | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise LexisegError(f"{what} must be a finite number, not {quoted(value)}.")
    return number
