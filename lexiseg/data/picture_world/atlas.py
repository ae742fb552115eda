"""The glyph atlases: sheets with one transparent picture a thing, drawn once and shipped with their licences.

The first world's is cut from the Noto Color Emoji font, which only :func:`build_atlas` needs; those of the second are
drawn by ``scripts/draw_atlas.py``.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lexiseg.data.picture_world.classes import ASSETS, GLYPHS, THINGS
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write

ATLAS = ASSETS / "glyphs.png"
CELL = 128  # pixels a side; the font's bitmaps are 136 x 128
COLUMNS = 12
_FONT_SIZE = 109  # the one size at which the font holds bitmaps


def build_atlas(font: str | Path, output: str | Path = ATLAS) -> Path:
    """Cut every thing's glyph out of the Noto Color Emoji font and write them as one RGBA PNG.

    Each glyph is trimmed to its opaque box and scaled so that its longer side fills the cell.

    Raises:
        LexisegError: the font cannot be read.
    """
    try:
        face = ImageFont.truetype(str(font), _FONT_SIZE)
    except OSError as error:
        raise LexisegError(f"Cannot read the font '{font}'; give the path of NotoColorEmoji.ttf.") from error
    rows = -(-len(THINGS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, name in enumerate(THINGS):
        canvas = Image.new("RGBA", (2 * CELL, 2 * CELL))
        ImageDraw.Draw(canvas).text((32, 32), chr(GLYPHS[name]), font=face, embedded_color=True)
        box = canvas.getchannel("A").getbbox()
        if box is None:
            raise LexisegError(f"The font '{font}' has no glyph for '{name}'; give the path of NotoColorEmoji.ttf.")
        glyph = canvas.crop(box)
        scale = CELL / max(glyph.size)
        size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
        glyph = glyph.resize(size, Image.Resampling.LANCZOS)
        left, top = (index % COLUMNS) * CELL, (index // COLUMNS) * CELL
        sheet.paste(glyph, (left + (CELL - glyph.width) // 2, top + (CELL - glyph.height) // 2))
    with atomic_write(output) as temporary:
        sheet.save(temporary, optimize=True)
    return Path(output)


@functools.cache
def load_atlas(file: str = ATLAS.name) -> tuple[Image.Image, ...]:
    """Return the drawings of one sheet in the order of the things: premultiplied RGBA pictures of 128 x 128 pixels.

    Premultiplied alpha, so that scaling and rotating them never bleeds a background colour into the edge.
    """
    sheet = np.asarray(Image.open(ASSETS / file).convert("RGBA"))
    cells = sheet.reshape(-1, CELL, COLUMNS, CELL, 4).swapaxes(1, 2).reshape(-1, CELL, CELL, 4)
    glyphs = []
    for cell in cells.astype(np.float32):
        cell[..., :3] *= cell[..., 3:] / 255.0
        glyphs.append(Image.fromarray(cell.round().astype(np.uint8), "RGBA"))
    return tuple(glyphs)
