"""``lexiseg predict`` of a map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lexiseg.cli.console import say_json, say_table, say_written, with_progress
from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from lexiseg.maps import MapOptions
    from lexiseg.segmenter import Segmenter
    from lexiseg.vocabulary import Vocabulary


def read_bands(text: str | None) -> tuple[int, int, int] | None:
    """Read ``4,3,2``.

    Raises:
        LexisegError: it is something else.
    """
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if text is not None and (len(parts) != 3 or not all(part.isdigit() for part in parts)):
        raise LexisegError(f"--bands takes three numbers for red, green and blue, such as 4,3,2, not '{text}'.")
    return (int(parts[0]), int(parts[1]), int(parts[2])) if parts else None


def predict_map(
    segmenter: Segmenter,
    source: str,
    vocabulary: Vocabulary,
    output: Path,
    options: MapOptions,
    json: bool,
    **settings: Any,
) -> None:
    """Segment a map, and say what was found and where it is."""
    from lexiseg.maps import count_tiles, map_files, segment_map

    pixels = np.zeros(len(vocabulary), np.int64)

    def counted() -> Iterator[None]:
        for _, _, labels in segment_map(segmenter, source, vocabulary, output, options, **settings):
            found = np.bincount(labels.reshape(-1), minlength=len(vocabulary))
            pixels[:] += found[: len(vocabulary)]
            yield

    for _ in with_progress(counted(), count_tiles(source, options), "segmenting"):
        pass
    fractions = pixels / max(1, int(pixels.sum()))
    order = [int(index) for index in np.argsort(-fractions, kind="stable")]
    files = map_files(source, output, options)
    if json:
        classes = [{"class": vocabulary.names[index], "fraction": float(fractions[index])} for index in order]
        say_json({"map": source, "classes": classes, "files": {kind: str(path) for kind, path in files.items()}})
        return
    rows = [[vocabulary.names[index], f"{100 * fractions[index]:.1f} %"] for index in order]
    say_table(source, ["class", "of what has a class"], rows)
    say_written(files.values())
