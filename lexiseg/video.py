"""Videos and cameras, frame by frame, in memory that does not grow (extra ``video``)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lexiseg.errors import LexisegError, LexisegWarning, need
from lexiseg.files import atomic_write, make_folder
from lexiseg.formats import encode_rle
from lexiseg.images import VIDEO_SUFFIXES
from lexiseg.label_ids import ignore_index
from lexiseg.labelling.record import file_state
from lexiseg.pictures import window_policy
from lexiseg.words import describe, printable

if TYPE_CHECKING:
    from lexiseg.scores.base import Scores
    from lexiseg.segmenter import Segmenter
    from lexiseg.vocabulary import Vocabulary

_FORMAT = 1
_ALPHA = 0.55


def is_video(source: str | Path, *, animations: bool = True) -> bool:
    """Whether a name is a video's, or a Linux camera's such as ``/dev/video0``.

    ``animations``: count a GIF of several frames; one of a single frame is a picture.
    """
    if Path(source).suffix.lower() == ".gif":
        if animations:
            with suppress(OSError, ValueError, SyntaxError), Image.open(source) as picture:
                return getattr(picture, "is_animated", False)
        return False  # whoever reads it as a picture says what is wrong
    return Path(source).suffix.lower() in VIDEO_SUFFIXES or str(source).startswith("/dev/video")


@dataclass(frozen=True)
class VideoOptions:
    """How a video is segmented."""

    every: int = 1  # every how many frames labels are made; those between keep the last ones
    # weight of the frames before, 0 (none) to below 1, in a running mean of the scores; it calms labels that flicker
    # and lags behind what moves. Of systems that score patches only.
    smooth: float = 0.0
    overlay: bool = True  # write a video with the classes painted over the frames
    resume: bool = False  # go on where an earlier run into the same folder stopped
    frames: int | None = None  # stop after this many frames; None goes to the end. A camera has none.

    def __post_init__(self) -> None:
        if self.every < 1 or (self.frames is not None and self.frames < 1):
            raise LexisegError("Frames are counted from 1; give --every and --frames numbers of at least 1.")
        if not 0 <= self.smooth < 1:
            raise LexisegError(f"The weight of earlier frames must be from 0 to below 1, not {describe(self.smooth)}.")


@dataclass(frozen=True)
class Frame:
    """The result of a frame."""

    index: int  # of the frame, from 0
    seconds: float  # its time in the video
    labels: NDArray[np.integer]  # (H, W) ids; 255, or 65535 beyond 255 classes, is no class
    reused: bool  # its labels are those of an earlier run


def video_files(source: str | Path, folder: str | Path) -> dict[str, Path]:
    """Where `segment_video` writes: "frames", one line of JSON per frame, and "overlay", a video."""
    stem = Path(source).stem
    return {"frames": Path(folder) / f"{stem}_frames.jsonl", "overlay": Path(folder) / f"{stem}_overlay.mp4"}


def count_frames(source: str | Path, options: VideoOptions) -> int:
    """How many frames there will be, as far as the file says; 0 where it does not. LexisegError without PyAV."""
    av = need("av", "Videos need PyAV", "video")
    try:
        with av.open(str(source)) as container:
            count = int(container.streams.video[0].frames)
    except (OSError, av.FFmpegError, IndexError):
        return options.frames or 0  # whoever opens it next says what is wrong
    return min(count, options.frames or count)


def segment_video(
    segmenter: Segmenter,
    source: str | Path,
    vocabulary: Vocabulary,
    folder: str | Path,
    options: VideoOptions | None = None,
    **settings: Any,
) -> Iterator[Frame]:
    """Segment a video as a stream, and write its labels and an overlay; see `video_files`.

    The first line of the frames' file says the classes and their colours. Each other one has ``frame``, ``seconds`` and
    ``segments``, a list of ``category_id`` and COCO's compressed run lengths ``rle``; it is written as soon as the
    frame is done, so that what was finished outlives an interruption. A class keeps its colour in all frames.

    ``source``: a file, or a camera such as ``/dev/video0``. ``settings``: ``window`` and others that
    `Segmenter.predict` takes. Returns an iterator that does the work, a frame at a time. Raises LexisegError if PyAV is
    not installed, the video cannot be read, or an earlier run had other settings.
    """
    av = need("av", "Videos need PyAV", "video")
    options = options or VideoOptions()
    files = video_files(source, make_folder(folder))
    head = {
        "format": _FORMAT,
        "video": printable(Path(source).name),
        "state": list(file_state(source)),
        "classes": list(vocabulary.names),
        "colors": vocabulary.palette().tolist(),
        "every": options.every,
        "smooth": options.smooth,
        "model": segmenter.fingerprint(),
        "window": asdict(window_policy(segmenter.model.window, settings.get("window"))),
        "dtype": str(segmenter.dtype),
        "refine": segmenter.refinement.kind,
        "vocabulary": vocabulary.hash(),
    }
    resumed = options.resume and _is_begun(files["frames"], head)
    try:
        container = av.open(str(source), format="v4l2" if str(source).startswith("/dev/video") else None)
        stream = container.streams.video[0]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise LexisegError(f"'{printable(str(source))}' cannot be read as a video; check the file.") from error
    return _segment(av, container, stream, _Labels(segmenter, vocabulary, options, settings), files, head, resumed)


def _segment(
    av: Any, container: Any, stream: Any, labels: _Labels, files: dict[str, Path], head: dict[str, Any], resumed: bool
) -> Iterator[Frame]:  # fmt: skip
    options = labels.options
    with ExitStack() as stack:
        stack.enter_context(container)
        journal = stack.enter_context(files["frames"].open("a" if resumed else "w", encoding="utf-8"))
        if not resumed:
            _append(journal, head)
        earlier = stack.enter_context(files["frames"].open("rb"))
        ahead = _next_line(earlier) and _next_line(earlier)
        overlay: _Overlay | None = None
        for index, picture in enumerate(_decoded(av, container, stream)):
            if options.frames is not None and index >= options.frames:
                break
            # As it is shown: telephones store portraits lying on their side. Older releases of PyAV do not say so.
            pixels = np.rot90(picture.to_ndarray(format="rgb24"), round(getattr(picture, "rotation", 0) / 90))
            seconds = float(picture.time or 0.0)
            if labels.current is not None and labels.current.shape != pixels.shape[:2]:
                labels.current = labels.mean = None  # the frames' size changes, so nothing of those before is kept
            reused = ahead is not None and ahead["frame"] == index
            if ahead is not None and reused:
                labels.current = _labels_of(ahead, pixels.shape[:2], len(labels.vocabulary))
                ahead = _next_line(earlier)
            elif index % options.every == 0 or labels.current is None:
                labels.make(pixels)
                _append(journal, {"frame": index, "seconds": seconds, "segments": _segments_of(labels.current)})
            if options.overlay:
                if overlay is None:
                    temporary = stack.enter_context(atomic_write(files["overlay"]))
                    rate = stream.average_rate or Fraction(25)
                    overlay = stack.enter_context(_Overlay(av, temporary, rate, pixels.shape, labels.vocabulary))
                overlay.write(pixels, labels.current)
            yield Frame(index, seconds, np.asarray(labels.current), reused)


def _decoded(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    stream.thread_type = "AUTO"
    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        raise LexisegError(f"The video ends early ({printable(str(error))}); the frames before are kept.") from error


class _Labels:
    def __init__(
        self, segmenter: Segmenter, vocabulary: Vocabulary, options: VideoOptions, settings: dict[str, Any]
    ) -> None:
        self.segmenter = segmenter
        self.vocabulary = vocabulary
        self.options = options
        self.settings = settings
        self.current: NDArray[np.integer] | None = None
        self.mean: Scores | None = None
        if options.smooth and vocabulary.background.kind == "threshold":
            raise LexisegError("Smoothing does not support a background threshold; name a background class instead.")

    def make(self, pixels: NDArray[np.uint8]) -> None:
        """Segment a frame (H, W, 3)."""
        if not self.options.smooth:
            result = self.segmenter.predict(pixels, self.vocabulary, **self.settings)
            self.current = np.asarray(result.label_map)
            return
        import torch

        from lexiseg.refine import refine

        scores = self.segmenter.scores(pixels, self.vocabulary, **self.settings).detach()
        self.mean = scores if self.mean is None else _blended(self.mean, scores, self.options.smooth)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        found = refine(self.mean, image, self.segmenter.refinement)[0].cpu().numpy()
        self.current = found.astype(np.uint8 if len(self.vocabulary) <= 255 else np.uint16)


def _blended(before: Scores, now: Scores, weight: float) -> Scores:
    """The running mean of scores that have the same form."""
    from lexiseg.scores.grid import GridScores
    from lexiseg.scores.window import WindowScores

    if isinstance(before, WindowScores) and isinstance(now, WindowScores):
        parts = [_blended(*pair, weight) for pair in zip(before.parts, now.parts, strict=True)]
        return WindowScores(parts, now.boxes, now.canvas)
    if isinstance(before, GridScores) and isinstance(now, GridScores):
        now.logits = weight * before.logits + (1 - weight) * now.logits
        return now
    raise LexisegError("Smoothing works for systems that score patches, not for those with proposals; remove it.")


class _Overlay:
    def __init__(self, av: Any, path: Path, rate: Fraction, shape: tuple[int, ...], vocabulary: Vocabulary) -> None:
        self.av = av
        self.palette = vocabulary.palette().astype(np.float32)
        self.container = av.open(str(path), "w")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self.stream = self.container.add_stream(codec, rate=rate)
        self.stream.height, self.stream.width = _even(shape[0]), _even(shape[1])
        self.stream.pix_fmt = "yuv420p"

    def __enter__(self) -> _Overlay:
        return self

    def __exit__(self, *_: object) -> None:
        for packet in self.stream.encode():
            self.container.mux(packet)
        self.container.close()

    def write(self, pixels: NDArray[np.uint8], labels: NDArray[np.integer] | None) -> None:
        """Paint a frame and write it."""
        painted = pixels.astype(np.float32)
        if labels is not None:
            inside = labels < len(self.palette)
            painted[inside] = (1 - _ALPHA) * painted[inside] + _ALPHA * self.palette[labels[inside]]
        cut = np.ascontiguousarray(painted[: _even(pixels.shape[0]), : _even(pixels.shape[1])].astype(np.uint8))
        frame = self.av.VideoFrame.from_ndarray(cut, format="rgb24")
        # A frame of another size than the first is stretched.
        for packet in self.stream.encode(frame.reformat(width=self.stream.width, height=self.stream.height)):
            self.container.mux(packet)


def _even(side: int) -> int:
    """The codecs want even sides."""
    return side - side % 2 or 2


def _append(journal: Any, value: dict[str, Any]) -> None:
    journal.write(json.dumps(value, separators=(",", ":")) + "\n")
    journal.flush()


def _next_line(journal: Any) -> dict[str, Any] | None:
    """The next whole line, or None."""
    line = journal.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _is_begun(path: Path, head: dict[str, Any]) -> bool:
    """Whether an earlier run labelled frames; a line that was cut off is taken away."""
    if not path.is_file():
        return False
    lines = whole = 0
    with path.open("rb") as file, suppress(ValueError, KeyError, TypeError):
        while (content := _next_line(file)) is not None:
            if lines == 0 and (not isinstance(content, dict) or {**content, "state": head["state"]} != head):
                raise LexisegError(f"'{path}' was written with other classes or settings; choose another folder.")
            if lines == 0 and content != head:
                text = f"The video has changed since '{path}' was written, so it starts again from its first frame."
                warnings.warn(text, LexisegWarning, stacklevel=2)
                return False
            if lines and not isinstance(content["frame"] + 1, int):
                break
            lines, whole = lines + 1, file.tell()
    os.truncate(path, whole)
    return lines > 1


def _segments_of(labels: NDArray[np.integer] | None) -> list[dict[str, Any]]:
    if labels is None:
        return []
    ids = [int(one) for one in np.unique(labels) if one != (255 if labels.dtype == np.uint8 else 65535)]
    return [{"category_id": one, "rle": encode_rle(labels == one)} for one in ids]


def _labels_of(line: dict[str, Any], size: tuple[int, ...], num_classes: int) -> NDArray[np.integer]:
    from pycocotools import mask as coco

    labels = np.full(size, ignore_index(num_classes), np.uint8 if num_classes <= 255 else np.uint16)
    for segment in line["segments"]:
        labels[coco.decode(segment["rle"]).astype(bool)] = segment["category_id"]
    return labels
