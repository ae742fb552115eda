"""``lexiseg predict`` for a video or a map, which is labelled piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lexiseg.cli.console import say_json, say_note, say_table, say_written, with_progress
from lexiseg.errors import LexisegError
from lexiseg.words import counted

if TYPE_CHECKING:
    from lexiseg.maps import MapOptions
    from lexiseg.segmenter import Segmenter
    from lexiseg.video import VideoOptions
    from lexiseg.vocabulary import Vocabulary


def read_bands(text: str | None) -> tuple[int, int, int] | None:
    """Read ``4,3,2``. Raises LexisegError if it is something else."""
    if text is None:
        return None
    bands = re.fullmatch(r"\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,\s*(\d{1,5})\s*", text)
    if bands is None:
        raise LexisegError(f"--bands takes three numbers for red, green and blue, such as 4,3,2, not '{text}'.")
    return int(bands[1]), int(bands[2]), int(bands[3])


def predict_video(
    segmenter: Segmenter, source: str, vocabulary: Vocabulary, output: Path, options: VideoOptions, json: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Segment a video and print the classes and the files."""
    from lexiseg.video import count_frames, segment_video, video_files

    frames = segment_video(segmenter, source, vocabulary, output, options, **settings)
    reused: list[bool] = []

    def labels() -> Iterator[NDArray[np.integer]]:
        for frame in frames:
            reused.append(frame.reused)
            yield frame.labels

    pixels, total = _count(labels(), vocabulary, count_frames(source, options))
    files = {kind: path for kind, path in video_files(source, output).items() if kind != "overlay" or options.overlay}
    about, title = {"video": source, "frames": len(reused)}, f"{source}, {counted(len(reused), 'frame')}"
    _say(about, title, "of all pixels", pixels / max(1, total), vocabulary, files, json)
    if any(reused) and not json:
        say_note(f"{counted(sum(reused), 'frame')} labelled by an earlier run")


def predict_map(
    segmenter: Segmenter, source: str, vocabulary: Vocabulary, output: Path, options: MapOptions, json: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Segment a map and print the classes and the files."""
    from lexiseg.maps import count_tiles, map_files, segment_map

    tiles = segment_map(segmenter, source, vocabulary, output, options, **settings)
    pixels, _ = _count((labels for _, _, labels in tiles), vocabulary, count_tiles(source, options))
    fractions, files = pixels / max(1, int(pixels.sum())), map_files(source, output, options)
    _say({"map": source}, source, "of labelled pixels", fractions, vocabulary, files, json)


def _count(pieces: Iterable[NDArray[np.integer]], vocabulary: Vocabulary, length: int) -> tuple[NDArray[np.int64], int]:
    """Iterate over the labels with a progress bar: pixels of each class, and of all."""
    pixels, total = np.zeros(len(vocabulary), np.int64), 0
    for labels in with_progress(pieces, length, "segmenting"):
        pixels += np.bincount(labels[labels < len(vocabulary)], minlength=len(vocabulary))
        total += labels.size
    return pixels, total


def _say(
    about: dict[str, Any], title: str, column: str, fractions: NDArray[np.float64], vocabulary: Vocabulary,
    files: dict[str, Path], json: bool,
) -> None:  # fmt: skip
    found = [(vocabulary.names[index], float(fractions[index])) for index in np.argsort(-fractions, kind="stable")]
    if json:
        classes = [{"class": name, "fraction": fraction} for name, fraction in found]
        say_json({**about, "classes": classes, "files": {kind: str(path) for kind, path in files.items()}})
        return
    say_table(title, ["class", column], [[name, f"{100 * fraction:.1f} %"] for name, fraction in found])
    say_written(files.values())
