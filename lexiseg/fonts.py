"""Lettering in any script for which this machine has a font."""

import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

from lexiseg.errors import LexisegError
from lexiseg.words import printable, shorten

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_NO_CHARACTER = "\U0010ffff"
_SUFFIXES = (".ttf", ".otf", ".ttc")
# Upright sans serifs of the widest coverage first; fonts that draw a placeholder for everything never.
_PREFERRED = ("notosans", "dejavusans", "arialunicode", "arial", "liberationsans", "freesans")
_UNLIKELY = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black", "math")
_PLACEHOLDERS = ("lastresort", "adobeblank", "unifont")


class Lettering:
    """Draws texts in one size, each character in the first font that has it.

    ``missing``: characters that no font on this machine has. ``files``: the machine's fonts that are used. ``font``: a
    file to use before all others; None begins with the font that Pillow carries (Latin letters). Raises LexisegError if
    the font file cannot be read.
    """

    def __init__(self, texts: Iterable[str], size: int, font: str | Path | None = None) -> None:
        self._size = size
        self._fonts: list[_Font] = [] if font is None else [_load(font, size)]
        self._fonts.append(ImageFont.load_default(size))
        # Letters with their marks, and by themselves where no font has both.
        wanted = {part for text in texts for letter in _letters(text) for part in (letter, letter[0])}
        wanted = {one for one in wanted if not any(_has(face, one) for face in self._fonts)}
        self.files: list[Path] = []
        for path in font_files() if wanted else ():
            try:
                face = _load(path, size)
                found = {one for one in wanted if _has(face, one)}
            except (LexisegError, OSError):  # a damaged font, or pictures of one size (colour emoji)
                continue
            if found:
                self._fonts.append(face)
                self.files.append(path)
                wanted -= found
            if not wanted:
                break
        alone = {one for one in wanted if len(one) == 1}
        marks = {part for one in wanted - alone if one[0] not in alone for part in one[1:]}
        self.missing = alone | {one for one in marks if not any(_has(face, one) for face in self._fonts)}

    def length(self, text: str) -> float:
        """Width of a text in pixels."""
        return float(sum(face.getlength(part) for face, part in self._runs(text)))

    def draw(self, canvas: ImageDraw.ImageDraw, left: float, middle: float, text: str, fill: tuple[int, ...]) -> None:
        """Draw a text whose left end is at ``left``, and whose letters' middle is at the height ``middle``."""
        baseline = middle + 0.36 * self._size
        for face, part in self._runs(text):
            canvas.text((left, baseline), part, fill=fill, font=face, anchor="ls")
            left += face.getlength(part)

    def _runs(self, text: str) -> Iterator[tuple[_Font, str]]:
        """The text in pieces of one font; marks are drawn by the font of their letter, or left out.

        Spaces between pieces are pieces of their own: a script that runs to the left would put them at its other end.
        """
        face, part = self._fonts[0], ""
        for letter in _letters(text):
            own, shown = (face, letter) if letter.isspace() else self._face_of(letter)
            if part and own is not face:
                yield face, part.rstrip()
                yield self._fonts[0], part[len(part.rstrip()) :]
                part = ""
            face, part = own, part + shown
        yield face, part

    def _face_of(self, letter: str) -> tuple[_Font, str]:
        """The first font that has a letter and its marks, else the letter alone; and what of it that font has."""
        faces = (face for part in (letter, letter[0]) for face in self._fonts if _has(face, part))
        face = next(faces, self._fonts[0])
        return face, letter[0] + "".join(part for part in letter[1:] if _draws(face, part))


def _letters(text: str) -> list[str]:
    """The characters of a text, each with the marks and joiners that follow it."""
    letters: list[str] = []
    for character in text:
        if letters and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
            letters[-1] += character
        else:
            letters.append(character)
    return letters


def _draws_nothing(character: str) -> bool:
    # The last are signs that choose between two forms of what is before them.
    return character.isspace() or unicodedata.category(character) in ("Cf", "Cc") or "\ufe00" <= character <= "\ufe0f"


@lru_cache(maxsize=4096)
def _glyph(face: _Font, text: str) -> tuple[tuple[int, int], int]:
    mask = face.getmask(text)
    return mask.size, hash(bytes(mask))


def _has(face: _Font, letter: str) -> bool:
    """Whether a font draws a letter and its marks."""
    return all(_draws_nothing(character) or _draws(face, character) for character in letter)


def _draws(face: _Font, character: str) -> bool:
    """Whether a font draws a character as anything but its sign for what it lacks."""
    base = "\xa0" if unicodedata.category(character)[0] == "M" else ""  # a mark alone would get a circle to stand on
    return _glyph(face, base + character) != _glyph(face, base + _NO_CHARACTER)


def _load(font: str | Path, size: int) -> _Font:
    try:
        return ImageFont.truetype(str(font), size)
    except (OSError, ValueError) as error:
        raise LexisegError(
            f"Cannot read the font '{shorten(printable(font), 200)}'; give a .ttf or .otf file."
        ) from error


def _font_folders() -> list[Path]:
    home, get = Path.home(), os.environ.get
    if sys.platform == "win32":
        return [Path(get("WINDIR", "C:/Windows"), "Fonts"), Path(get("LOCALAPPDATA", home), "Microsoft/Windows/Fonts")]
    if sys.platform == "darwin":
        return [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    shared = get("XDG_DATA_DIRS", "/usr/local/share:/usr/share").split(":")
    own = [Path(get("XDG_DATA_HOME", home / ".local/share"), "fonts"), home / ".fonts"]
    return [*own, *(Path(folder, "fonts") for folder in shared if folder)]


@lru_cache(maxsize=1)
def font_files() -> list[Path]:
    """The font files of this machine, the most widely used first."""
    found = {
        Path(folder, name)
        for start in _font_folders()
        for folder, _, names in os.walk(start)
        for name in names
        if name.lower().endswith(_SUFFIXES) and not any(part in name.lower() for part in _PLACEHOLDERS)
    }

    def rank(path: Path) -> tuple[int, float, str]:
        name = path.stem.lower().replace("-", "").replace("_", "")
        place = next((index for index, part in enumerate(_PREFERRED) if name.startswith(part)), math.inf)
        return sum(part in name for part in _UNLIKELY), place, str(path)

    return sorted(found, key=rank)
