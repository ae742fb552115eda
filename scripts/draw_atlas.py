"""Draw the glyphs of the picture worlds: the first's from a font, the second's from icon sets, a sheet a drawing style.

    for set in noto fluent-emoji-flat twemoji; do npm pack @iconify-json/$set; done
    pip install resvg_py
    python -m scripts.draw_atlas iconify-json-*.tgz NotoColorEmoji.ttf

Each package is an archive with the SVG source of every icon. resvg_py renders it; nothing else needs that library.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lexiseg.data.picture_world.classes import ASSETS, CELL, COLUMNS, SECOND
from lexiseg.files import atomic_write

FONT_SIZE = 109  # the one size at which the font holds bitmaps


def render(icons: dict[str, Any], name: str) -> Image.Image:
    """Return an icon as an RGBA picture, trimmed and scaled so that its longer side fills the cell."""
    from resvg_py import svg_to_bytes

    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{2 * CELL}" '
        f'height="{2 * CELL}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    return trimmed(Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg)))).convert("RGBA"))


def trimmed(canvas: Image.Image) -> Image.Image:
    """Return what is opaque, scaled so that its longer side fills the cell."""
    glyph = canvas.crop(canvas.getchannel("A").getbbox())
    scale = CELL / max(glyph.size)
    return glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)


def draw(archive: Path) -> Path:
    """Write the sheet of one icon set beside the world's description and return its path."""
    with tarfile.open(archive) as packed:
        member = packed.extractfile("package/icons.json")
        assert member is not None
        icons = json.load(member)
    drawings = json.loads((ASSETS / "world2.json").read_text())["families"].values()
    names = [icon for family in drawings for icon in family.values()]
    assert len(names) == len(SECOND.things)
    output = ASSETS / f"{icons['prefix'].removesuffix('-emoji-flat')}.webp"
    options = {"quality": 80, "method": 6, "alpha_quality": 80}
    return write([render(icons, name) for name in names], output, **options)


def cut(font: Path) -> Path:
    """Write the sheet of the first world, out of the font's own bitmaps, and return its path."""
    face = ImageFont.truetype(str(font), FONT_SIZE)
    glyphs = []
    for code in json.loads((ASSETS / "world1.json").read_text())["things"].values():
        canvas = Image.new("RGBA", (2 * CELL, 2 * CELL))
        ImageDraw.Draw(canvas).text((32, 32), chr(int(code, 16)), font=face, embedded_color=True)
        glyphs.append(trimmed(canvas))
    return write(glyphs, ASSETS / "glyphs.png", optimize=True)


def write(glyphs: list[Image.Image], output: Path, **options: Any) -> Path:
    """Write glyphs as one sheet and return its path."""
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(glyphs) // COLUMNS) * CELL))
    for index, glyph in enumerate(glyphs):
        left, top = (index % COLUMNS) * CELL, (index // COLUMNS) * CELL
        sheet.paste(glyph, (left + (CELL - glyph.width) // 2, top + (CELL - glyph.height) // 2))
    with atomic_write(output) as temporary:
        sheet.save(temporary, **options)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path, help="what `npm pack` downloaded, and the font")
    for path in parser.parse_args().archives:
        print("wrote", cut(path) if path.suffix == ".ttf" else draw(path))
