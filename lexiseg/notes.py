"""Notes about results that are probably not what the user meant; see `lexiseg.errors.LexisegWarning`."""

import io
import os
import re
from typing import Any

from PIL import Image, PngImagePlugin

from lexiseg.class_list import ClassList
from lexiseg.errors import warn
from lexiseg.vocabulary import Vocabulary
from lexiseg.words import shorten

_MARK = "lexiseg picture world"
_LARGEST_SCENE = 512
# What other tools put between classes.
_SEPARATORS = re.compile(r"\s*(?:[|/&+•،؛]|\\n)\s*|\s*\.(?:\s+|$)|\s+and\s+")


def one_class(vocabulary: Vocabulary) -> None:
    """Warn that one class takes every pixel, and say what was most likely meant."""
    if len(vocabulary) > 1 or vocabulary.background.kind != "none":
        return
    (only,) = vocabulary.classes
    words = only.words if only.synonyms else list(filter(None, _SEPARATORS.split(only.name)))
    if len(words) > 1:
        text = f"'{shorten(', '.join(only.words))}' is one class, which takes every pixel; separate classes by "
        text += f"semicolons, '{shorten('; '.join(words))}', or as the items of a list."
    else:
        text = f"The only class, '{shorten(only.name)}', takes every pixel; name what else is in the picture, "
        text += f"'{shorten(only.name)}; grass; sky', or give a background, such as the word 'background'."
    warn(text)


def numbered(listed: ClassList) -> None:
    """Warn that results do not hold the numbers that a class file gives, as label files of one's own data do."""
    if any(one.value not in (None, place) for place, one in enumerate(listed.classes)):
        text = "Results count the classes from 0 in their order, not by the numbers in the list; as masks of your own "
        text += "data they need a class file without numbers."
        warn(text)


def no_class(threshold: float) -> None:
    """Warn that the threshold of a background has left no pixel with a class; of many pictures it is said once."""
    warn(f"No pixel reaches the background's threshold of {threshold:g}, so none has a class; give a lower one.")


def picture_world_model(source: object) -> bool:
    """Warn that the result of a picture-world model means nothing on any other picture.

    Drawn scenes and photographs have the same statistics of colour and texture, so files of the picture world carry a
    mark; arrays and tensors cannot, and are taken for scenes where they are square and small.

    ``source``: as `lexiseg.images.read_image` takes it. Returns whether it was said.
    """
    if _is_drawn(source):
        return False
    warn(
        "This model knows only the drawn scenes of lexiseg's picture world, so its labels of other pictures mean "
        "little; use a model with real weights, see `lexiseg models`."
    )
    return True


def mark_drawn(suffix: str) -> dict[str, Any]:
    """Options of Pillow's ``save`` that mark a .png or .jpg as a scene of the picture world."""
    if suffix != ".png":
        return {"comment": _MARK.encode("ascii")}
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", _MARK)
    return {"pnginfo": info}


def _is_drawn(source: Any) -> bool:
    shape = None if getattr(source, "is_nested", False) else getattr(source, "shape", None)
    if shape is not None and not isinstance(source, Image.Image):
        sides = sorted(shape)[-2:]
        return len(sides) == 2 and sides[0] == sides[1] <= _LARGEST_SCENE
    if isinstance(source, Image.Image):
        return _has_mark(source)
    file = io.BytesIO(bytes(source)) if isinstance(source, bytes | bytearray | memoryview) else source
    try:
        if isinstance(file, str | os.PathLike) and not os.path.isfile(file):  # noqa: PTH113 - of any text
            return True  # a pipe can be read once, which is not here
        place = None if isinstance(file, str | os.PathLike) else file.tell()
        with Image.open(file) as image:
            marked = _has_mark(image)
        if place is not None:
            file.seek(place)
    except Exception:  # what is wrong with the file is said by whoever reads it
        return True
    return marked


def _has_mark(image: Image.Image) -> bool:
    return image.info.get("comment") in (_MARK, _MARK.encode("ascii"))
