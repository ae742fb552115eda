"""The picture world: scenes of emoji things over procedural stuff, with exact masks and captions."""

from lexiseg.data.picture_world.classes import CLASS_IDS, CLASSES, SEEN, STUFF, THINGS, UNSEEN
from lexiseg.data.picture_world.dataset import PictureWorld, contact_sheet, vocabulary, write_voc
from lexiseg.data.picture_world.scene import Scene, render_scene

__all__ = [
    "CLASSES",
    "CLASS_IDS",
    "SEEN",
    "STUFF",
    "THINGS",
    "UNSEEN",
    "PictureWorld",
    "Scene",
    "contact_sheet",
    "render_scene",
    "vocabulary",
    "write_voc",
]
