"""The picture worlds: their things and stuff, which classes never have a mask in training, and how scenes look.

The things of the first world are curated from the nouns of the emoji names: no flags, signs, buttons or people, and no
two that a person would mix up at 32 pixels. Class ids are positions in :data:`CLASSES`: things first, then stuff. The
things of the second come in families that look alike; ``assets/world2.json`` lists them.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from lexiseg.errors import LexisegError

ASSETS = Path(__file__).parent / "assets"

# name -> Unicode code point of the glyph it is drawn with
GLYPHS: dict[str, int] = {
    "dog": 0x1F415,
    "cat": 0x1F408,
    "horse": 0x1F40E,
    "cow": 0x1F404,
    "pig": 0x1F416,
    "sheep": 0x1F411,
    "elephant": 0x1F418,
    "giraffe": 0x1F992,
    "zebra": 0x1F993,
    "camel": 0x1F42B,
    "kangaroo": 0x1F998,
    "turtle": 0x1F422,
    "frog": 0x1F438,
    "whale": 0x1F433,
    "tropical fish": 0x1F420,
    "octopus": 0x1F419,
    "crab": 0x1F980,
    "butterfly": 0x1F98B,
    "bee": 0x1F41D,
    "ladybug": 0x1F41E,
    "snail": 0x1F40C,
    "penguin": 0x1F427,
    "owl": 0x1F989,
    "parrot": 0x1F99C,
    "flamingo": 0x1F9A9,
    "rooster": 0x1F413,
    "tiger": 0x1F405,
    "lion": 0x1F981,
    "panda": 0x1F43C,
    "crocodile": 0x1F40A,
    "apple": 0x1F34E,
    "banana": 0x1F34C,
    "grapes": 0x1F347,
    "watermelon": 0x1F349,
    "strawberry": 0x1F353,
    "pineapple": 0x1F34D,
    "lemon": 0x1F34B,
    "pear": 0x1F350,
    "cherries": 0x1F352,
    "carrot": 0x1F955,
    "corn": 0x1F33D,
    "broccoli": 0x1F966,
    "mushroom": 0x1F344,
    "pumpkin": 0x1F383,
    "cheese": 0x1F9C0,
    "pizza": 0x1F355,
    "hamburger": 0x1F354,
    "doughnut": 0x1F369,
    "cake": 0x1F370,
    "ice cream": 0x1F366,
    "tree": 0x1F333,
    "palm tree": 0x1F334,
    "cactus": 0x1F335,
    "sunflower": 0x1F33B,
    "tulip": 0x1F337,
    "rose": 0x1F339,
    "car": 0x1F697,
    "bus": 0x1F68C,
    "truck": 0x1F69A,
    "tractor": 0x1F69C,
    "bicycle": 0x1F6B2,
    "airplane": 0x2708,
    "helicopter": 0x1F681,
    "rocket": 0x1F680,
    "sailboat": 0x26F5,
    "locomotive": 0x1F682,
    "house": 0x1F3E0,
    "tent": 0x26FA,
    "castle": 0x1F3F0,
    "umbrella": 0x2602,
    "balloon": 0x1F388,
    "guitar": 0x1F3B8,
    "trumpet": 0x1F3BA,
    "drum": 0x1F941,
    "alarm clock": 0x23F0,
    "bell": 0x1F514,
    "chair": 0x1FA91,
    "teddy bear": 0x1F9F8,
    "soccer ball": 0x26BD,
    "basketball": 0x1F3C0,
    "crown": 0x1F451,
    "top hat": 0x1F3A9,
    "telephone": 0x260E,
    "camera": 0x1F4F7,
}

THINGS: tuple[str, ...] = tuple(GLYPHS)

STUFF: tuple[str, ...] = (
    "sky",
    "night",
    "grass",
    "water",
    "sand",
    "snow",
    "road",
    "soil",
    "gravel",
    "leaves",
    "brick",
    "wood",
    "tiles",
    "carpet",
)

CLASSES: tuple[str, ...] = THINGS + STUFF

UNSEEN: tuple[str, ...] = (
    "cow",
    "giraffe",
    "turtle",
    "butterfly",
    "owl",
    "strawberry",
    "carrot",
    "pizza",
    "sunflower",
    "bus",
    "sailboat",
    "umbrella",
    "guitar",
    "chair",
    "water",
    "brick",
    "leaves",
)

SEEN: tuple[str, ...] = tuple(name for name in CLASSES if name not in UNSEEN)

CLASS_IDS: dict[str, int] = {name: index for index, name in enumerate(CLASSES)}


@dataclass(frozen=True)
class World:
    """What scenes are made of.

    Attributes:
        name: of the data set.
        families: names of the things; those of one family look alike.
        unseen: classes whose masks no training gets.
        styles: files in ``assets`` with one drawing a thing, in the order of ``things``; a scene's things are drawn in
            any of them.
        train_textures: the first and the number of the variants of each kind of stuff in training pictures.
        held_out_textures: the same of the val and test splits.
        min_visible: a thing keeps at least this fraction of its pixels when later things cover it.
        varied: whether things come with their like, over clutter, in strong light and out of focus.
        extents: smallest and largest size of a thing as a fraction of the picture's side.
        num_scenes: of the train, val and test splits.
    """

    name: str
    families: tuple[tuple[str, ...], ...]
    unseen: tuple[str, ...]
    styles: tuple[str, ...]
    train_textures: tuple[int, int] = (0, 4)
    held_out_textures: tuple[int, int] = (0, 4)
    min_visible: float = 0.55
    varied: bool = False
    extents: tuple[float, float] = (0.36, 0.64)
    num_scenes: tuple[int, int, int] = (20_000, 200, 200)

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


FIRST = World("picture-world", tuple((name,) for name in THINGS), UNSEEN, ("glyphs.png",))
SECOND = _second("picture-world-2", ("noto.webp", "fluent.webp"), (12, 4))
# The same words in another drawing style over textures of its own, for models trained in the second world.
ABROAD = _second("picture-world-2-twemoji", ("twemoji.webp",), (16, 4))

WORLDS: dict[str, World] = {world.name: world for world in (FIRST, SECOND, ABROAD)}


def find_world(name: str) -> World:
    """Return the world of a name.

    Raises:
        LexisegError: there is none of this name.
    """
    if name not in WORLDS:
        raise LexisegError(f"There is no picture world '{name}'; choose one of {', '.join(WORLDS)}.")
    return WORLDS[name]
