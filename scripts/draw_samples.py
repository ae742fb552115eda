"""Draw the sample pictures that the package carries again: ``python -m scripts.draw_samples [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from lexiseg import samples
from lexiseg.data.picture_world import render_scene
from lexiseg.files import atomic_write, make_folder, write_text
from lexiseg.notes import mark_drawn

SEED = 3  # neither of the train split nor of the val split
SIZE = 512

# name -> (suffix, seed, things); every picture shows classes with and without masks in training. The demo is a scene in
# which nothing is hidden, and one of the better results; what is typical is in docs/results.
SAMPLES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "demo": (".png", 1185, ("giraffe", "elephant", "tree", "butterfly")),
    "meadow": (".png", 11, ("giraffe", "elephant", "tree", "butterfly")),
    "street": (".jpg", 2, ("bus", "car", "bicycle", "owl")),
    "kitchen": (".jpg", 25, ("pizza", "hamburger", "carrot", "guitar")),
    "harbour": (".jpg", 34, ("sailboat", "whale", "penguin", "umbrella")),
}


def write_samples(folder: Path) -> list[Path]:
    """Write the pictures, each with the list of its classes, and return the pictures' paths."""
    make_folder(folder)
    paths = []
    for name, (suffix, seed, things) in SAMPLES.items():
        scene = render_scene([SEED, seed], SIZE, things=things, extents=(0.42, 0.6))
        path = folder / f"{name}{suffix}"
        options = {"quality": 92, "subsampling": 0} if suffix == ".jpg" else {"optimize": True}
        with atomic_write(path) as temporary:
            Image.fromarray(scene.image).save(temporary, **options, **mark_drawn(suffix))
        write_text(path.with_suffix(".txt"), "".join(f"{word}\n" for word in scene.names))
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write_samples(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(samples.__file__).parent):
        print(written)
