"""Draw the glyphs of the second picture world from icon sets, one sheet a drawing style.

    for set in noto fluent-emoji-flat twemoji; do npm pack @iconify-json/$set; done
    pip install resvg_py
    python -m scripts.draw_atlas iconify-json-*.tgz

Each package is an archive with the SVG source of every icon. resvg_py renders it; nothing else needs that library.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from lexiseg.data.picture_world.atlas import CELL, COLUMNS
from lexiseg.data.picture_world.classes import ASSETS, SECOND
from lexiseg.files import atomic_write


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
    canvas = Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg)))).convert("RGBA")
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
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(names) // COLUMNS) * CELL))
    for index, name in enumerate(names):
        glyph = render(icons, name)
        left, top = (index % COLUMNS) * CELL, (index // COLUMNS) * CELL
        sheet.paste(glyph, (left + (CELL - glyph.width) // 2, top + (CELL - glyph.height) // 2))
    output = ASSETS / f"{icons['prefix'].removesuffix('-emoji-flat')}.webp"
    with atomic_write(output) as temporary:
        sheet.save(temporary, "WEBP", quality=80, method=6, alpha_quality=80)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path, help="what `npm pack` downloaded")
    for path in parser.parse_args().archives:
        print("wrote", draw(path))
