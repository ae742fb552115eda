"""The picture worlds: scenes of emoji things over procedural stuff, with exact masks and captions."""

from lexiseg.data.picture_world.classes import (
    ABROAD,
    CLASS_IDS,
    CLASSES,
    FIRST,
    SECOND,
    SEEN,
    STUFF,
    THINGS,
    UNSEEN,
    WORLDS,
    World,
    find_world,
)
from lexiseg.data.picture_world.dataset import PictureWorld, contact_sheet, vocabulary, write_voc
from lexiseg.data.picture_world.scene import Scene, render_scene

__all__ = [
    "ABROAD",
    "CLASSES",
    "CLASS_IDS",
    "FIRST",
    "SECOND",
    "SEEN",
    "STUFF",
    "THINGS",
    "UNSEEN",
    "WORLDS",
    "PictureWorld",
    "Scene",
    "World",
    "contact_sheet",
    "find_world",
    "render_scene",
    "vocabulary",
    "write_voc",
]
