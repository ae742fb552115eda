"""A picture as a class: an image with a mask or a box, which takes the place of a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from lexiseg.errors import LexisegError
from lexiseg.words import describe, whole_number

PREFIX = "photo:"


@dataclass(frozen=True, eq=False)
class Exemplar:
    """An example of a class. Raises LexisegError if there is neither a mask nor a box, or both, or the box is none."""

    image: Any  # the picture: anything `lexiseg.images.read_image` takes
    # where the thing is: a picture that is not black there, or an array (H, W); None where there is a box
    mask: Any = None
    box: Sequence[int] | None = None  # left, top, right, bottom in pixels; None where there is a mask

    def __post_init__(self) -> None:
        if (self.mask is None) == (self.box is None):
            raise LexisegError(
                "An exemplar needs a mask or a box of the thing, and not both; write for example "
                "'mug = photo:mug.png#mask.png' or 'mug = photo:mug.png#10 20 110 220'."
            )
        if self.box is not None:
            sides = self.box if isinstance(self.box, Iterable) else [self.box]
            box = tuple(whole_number(side, "A side of an exemplar's box") for side in sides)
            if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
                said = " ".join(map(str, box))
                raise LexisegError(f"The box {said} is not left, top, right, bottom in pixels; correct it.")
            object.__setattr__(self, "box", box)

    @classmethod
    def parse(cls, text: str, folder: Path | None = None) -> Exemplar:
        """Read ``photo:IMAGE#MASK`` or ``photo:IMAGE#LEFT TOP RIGHT BOTTOM``; no file is opened yet.

        ``folder``: where relative paths begin, if the file is there. Raises LexisegError if it is neither.
        """
        image, mark, where = text.removeprefix(PREFIX).strip().rpartition("#")
        image, where = image.strip(), where.strip()
        if not mark or not image or not where:
            raise LexisegError(
                f"'{describe(text)}' does not say where in the picture the thing is; write a mask or a box after a #, "
                "such as 'photo:mug.png#mask.png' or 'photo:mug.png#10 20 110 220'."
            )
        numbers = where.split()
        if len(numbers) == 4 and all(number.isdecimal() and len(number) < 10 for number in numbers):
            return cls(_beside(folder, image), box=[int(number) for number in numbers])
        return cls(_beside(folder, image), _beside(folder, where))

    @cached_property
    def word(self) -> str:
        """What stands for it among the words of a vocabulary."""
        return f"{PREFIX}{_said(self.image)}#{_said(self.box if self.mask is None else self.mask)}"

    def content_hash(self) -> str:
        """SHA-256 of its files, which may change under their names; what is in memory its word tells from others."""
        digest = sha256()
        for file in (self.image, self.mask):
            if isinstance(file, str | Path):
                with suppress(OSError, ValueError):  # whoever reads it says what is wrong
                    digest.update(Path(file).read_bytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Exemplar) and self.word == other.word

    def __hash__(self) -> int:
        return hash(self.word)


def _beside(folder: Path | None, name: str) -> str:
    return str(folder / name) if folder is not None and (folder / name).is_file() else name


def _said(value: Any) -> str:
    """A path or a box as it was written; of a picture in memory what tells it from others."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, bytes):
        data = value
    else:
        import numpy as np

        if hasattr(value, "is_floating_point"):  # a tensor, of any device and type
            value = value.detach().cpu().float() if value.is_floating_point() else value.cpu()
        data = np.asarray(value).tobytes()
    return sha256(data).hexdigest()[:16]
