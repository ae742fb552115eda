"""The picture worlds: their things and stuff, which classes never have a mask in training, and how scenes look.

The things of the first world (``assets/world1.json``, with the code point each is drawn from) are curated from the
nouns of the emoji names: no flags, signs, buttons or people, and no two that a person would mix up at 32 pixels. Those
of the second (``assets/world2.json``) come in families that look alike. The stuff is the same.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lexiseg.errors import LexisegError
from lexiseg.vocabulary import Vocabulary, VocabularyClass

ASSETS = Path(__file__).parent / "assets"
CELL = 128  # side of a drawing in pixels
COLUMNS = 12
_FIRST = json.loads((ASSETS / "world1.json").read_text(encoding="utf-8"))
STUFF: tuple[str, ...] = tuple(_FIRST["stuff"])


@dataclass(frozen=True)
class World:
    """What scenes are made of."""

    name: str  # of the dataset
    families: tuple[tuple[str, ...], ...]  # names of the things; those of one family look alike
    unseen: tuple[str, ...]  # classes whose masks no training gets
    # files in ``assets`` with one drawing a thing, in the order of ``things``; a scene mixes them
    styles: tuple[str, ...]
    train_textures: tuple[int, int] = (0, 4)  # the first and the number of the variants of each kind of stuff
    held_out_textures: tuple[int, int] = (0, 4)  # the same of the val and test splits
    min_visible: float = 0.55  # a thing keeps at least this fraction of its pixels when later things cover it
    varied: bool = False  # whether things come with their like, over clutter, in strong light and out of focus
    extents: tuple[float, float] = (0.36, 0.64)  # smallest and largest size of a thing as a fraction of the side
    num_scenes: tuple[int, int, int] = (20_000, 200, 200)  # of the train, val and test splits

    @functools.cached_property
    def things(self) -> tuple[str, ...]:
        """Names of the things in the order of their ids."""
        return tuple(name for family in self.families for name in family)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Every class in the order of the ids: things, then stuff."""
        return self.things + STUFF

    @functools.cached_property
    def seen(self) -> tuple[str, ...]:
        """The classes whose masks trainings get."""
        return tuple(name for name in self.classes if name not in self.unseen)

    @functools.cached_property
    def class_ids(self) -> dict[str, int]:
        """The id of a name."""
        return {name: index for index, name in enumerate(self.classes)}

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The classes in the order of the ids, flagged seen or unseen."""
        return Vocabulary(tuple(VocabularyClass(name, seen=name not in self.unseen) for name in self.classes))


def _second(name: str, styles: tuple[str, ...], held_out_textures: tuple[int, int]) -> World:
    said = json.loads((ASSETS / "world2.json").read_text(encoding="utf-8"))
    return World(
        name,
        tuple(tuple(family) for family in said["families"].values()),
        tuple(said["unseen"]),
        styles,
        train_textures=(4, 8),
        held_out_textures=held_out_textures,
        min_visible=0.4,
        varied=True,
        extents=(0.4, 0.75),
        num_scenes=(20_000, 200, 500),
    )


FIRST = World(
    "picture-world", tuple((name,) for name in _FIRST["things"]), tuple(_FIRST["unseen"]), styles=("glyphs.png",)
)
SECOND = _second("picture-world-2", ("noto.webp", "fluent.webp"), (12, 4))
# The same words in another drawing style over textures of its own, for models trained in the second world.
ABROAD = _second("picture-world-2-twemoji", ("twemoji.webp",), (16, 4))

WORLDS: dict[str, World] = {world.name: world for world in (FIRST, SECOND, ABROAD)}


def find_world(name: str) -> World:
    """The world of a name. Raises LexisegError if there is none."""
    if name not in WORLDS:
        raise LexisegError(f"There is no picture world '{name}'; choose one of {', '.join(WORLDS)}.")
    return WORLDS[name]


@functools.cache
def load_atlas(file: str = "glyphs.png") -> tuple[Image.Image, ...]:
    """The drawings of one sheet, which ``scripts/draw_atlas.py`` made, in the order of the things.

    They are RGBA pictures of 128 x 128 pixels with premultiplied alpha, so that scaling and rotating them never bleeds
    a background colour into the edge.
    """
    sheet = np.asarray(Image.open(ASSETS / file).convert("RGBA"))
    cells = sheet.reshape(-1, CELL, COLUMNS, CELL, 4).swapaxes(1, 2).reshape(-1, CELL, CELL, 4)
    glyphs = []
    for cell in cells.astype(np.float32):
        cell[..., :3] *= cell[..., 3:] / 255.0
        glyphs.append(Image.fromarray(cell.round().astype(np.uint8), "RGBA"))
    return tuple(glyphs)
