"""The glyph atlases: sheets with one transparent picture per thing, drawn once and shipped with their licences.

``scripts/draw_atlas.py`` draws them: the first world's from the Noto Color Emoji font, the others from icon sets.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from lexiseg.data.picture_world.classes import ASSETS

CELL = 128  # pixels a side
COLUMNS = 12


@functools.cache
def load_atlas(file: str = "glyphs.png") -> tuple[Image.Image, ...]:
    """The drawings of one sheet in the order of the things: premultiplied RGBA pictures of 128 x 128 pixels.

    Premultiplied alpha, so that scaling and rotating them never bleeds a background colour into the edge.
    """
    sheet = np.asarray(Image.open(ASSETS / file).convert("RGBA"))
    cells = sheet.reshape(-1, CELL, COLUMNS, CELL, 4).swapaxes(1, 2).reshape(-1, CELL, CELL, 4)
    glyphs = []
    for cell in cells.astype(np.float32):
        cell[..., :3] *= cell[..., 3:] / 255.0
        glyphs.append(Image.fromarray(cell.round().astype(np.uint8), "RGBA"))
    return tuple(glyphs)
