"""``lexiseg predict`` of a video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lexiseg.cli.console import say_json, say_note, say_table, say_written, with_progress

if TYPE_CHECKING:
    from lexiseg.segmenter import Segmenter
    from lexiseg.video import VideoOptions
    from lexiseg.vocabulary import Vocabulary


def predict_video(
    segmenter: Segmenter,
    source: str,
    vocabulary: Vocabulary,
    output: Path,
    options: VideoOptions,
    json: bool,
    **settings: Any,
) -> None:
    """Segment a video, and say what was found and where it is."""
    from lexiseg.video import count_frames, segment_video, video_files

    pixels = np.zeros(len(vocabulary), np.int64)
    total, frames, reused = 0, 0, 0

    def counted() -> Iterator[None]:
        nonlocal total, frames, reused
        for frame in segment_video(segmenter, source, vocabulary, output, options, **settings):
            found = np.bincount(frame.labels.reshape(-1), minlength=len(vocabulary))
            pixels[:] += found[: len(vocabulary)]
            total, frames, reused = total + frame.labels.size, frames + 1, reused + frame.reused
            yield

    for _ in with_progress(counted(), count_frames(source, options), "segmenting"):
        pass
    files = {kind: path for kind, path in video_files(source, output).items() if kind != "overlay" or options.overlay}
    fractions = pixels / max(1, total)
    order = [int(index) for index in np.argsort(-fractions, kind="stable")]
    if json:
        classes = [{"class": vocabulary.names[index], "fraction": float(fractions[index])} for index in order]
        written = {kind: str(path) for kind, path in files.items()}
        say_json({"video": source, "frames": frames, "classes": classes, "files": written})
        return
    rows = [[vocabulary.names[index], f"{100 * fractions[index]:.1f} %"] for index in order]
    say_table(f"{source}, {frames} frames", ["class", "of all pixels"], rows)
    if reused:
        say_note(f"{reused} frames were labelled by an earlier run")
    say_written(files.values())
