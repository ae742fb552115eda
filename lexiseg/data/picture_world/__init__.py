"""The picture worlds: scenes of emoji things over procedural stuff, with exact masks and captions."""

from lexiseg.data.picture_world.classes import ABROAD, FIRST, SECOND, STUFF, WORLDS, World, find_world
from lexiseg.data.picture_world.dataset import PictureWorld, contact_sheet, write_voc
from lexiseg.data.picture_world.scene import Scene, render_scene

__all__ = [
    "ABROAD",
    "FIRST",
    "SECOND",
    "STUFF",
    "WORLDS",
    "PictureWorld",
    "Scene",
    "World",
    "contact_sheet",
    "find_world",
    "render_scene",
    "write_voc",
]
