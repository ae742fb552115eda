"""Videos and cameras, frame by frame, in memory that does not grow (extra ``video``)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lexiseg.errors import LexisegError, need, warn
from lexiseg.files import atomic_write, make_folder, read_lines, writing
from lexiseg.formats import encode_rle
from lexiseg.images import VIDEO_SUFFIXES
from lexiseg.journal import changed
from lexiseg.label_ids import ignore_index
from lexiseg.labelling.pictures import file_state
from lexiseg.overlay import paint_classes
from lexiseg.windows import check_proportions
from lexiseg.words import describe, finite, printable, whole_number

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
        for name in ("every", "frames"):
            if name == "every" or self.frames is not None:
                whole_number(getattr(self, name), f"A video's '{name}'", 1)
        object.__setattr__(self, "smooth", finite(self.smooth, "The weight of earlier frames"))
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
        "state": file_state(source),
        "classes": list(vocabulary.names),
        "colors": vocabulary.palette().tolist(),
        "every": options.every,
        "smooth": options.smooth,
        "run": segmenter.identity(vocabulary, settings.get("window")),
    }
    label = _labeller(segmenter, vocabulary, options.smooth, settings)
    resumed = options.resume and _is_begun(files["frames"], head)
    try:
        container = av.open(str(source), format="v4l2" if str(source).startswith("/dev/video") else None)
        stream = container.streams.video[0]
    except (OSError, av.FFmpegError, IndexError) as error:
        reason = getattr(error, "strerror", None) or "it has no pictures"
        raise LexisegError(f"'{printable(source)}' cannot be read as a video ({reason}); check the file.") from error
    if stream.height:  # which a camera may not say
        check_proportions(stream.height, stream.width, f"'{printable(source)}'")
    return _segment(av, container, stream, label, vocabulary, options, files, None if resumed else head)


def _segment(
    av: Any, container: Any, stream: Any, label: Callable[[NDArray[np.uint8]], NDArray[np.integer]],
    vocabulary: Vocabulary, options: VideoOptions, files: dict[str, Path], head: dict[str, Any] | None,
) -> Iterator[Frame]:  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(container)
        with writing(f"write '{files['frames']}'"):
            journal = stack.enter_context(files["frames"].open("w" if head else "a", encoding="utf-8"))
        if head:
            _append(journal, head)
        earlier = stack.enter_context(closing(read_lines(files["frames"])))
        next(earlier)  # the head
        ahead = next(earlier, None)
        labels: Any = None
        paint: Any = None
        for index, picture in enumerate(_decoded(av, container, stream)):
            if options.frames is not None and index >= options.frames:
                break
            # As it is shown: telephones store portraits lying on their side. Older releases of PyAV do not say so.
            pixels = np.rot90(picture.to_ndarray(format="rgb24"), round(getattr(picture, "rotation", 0) / 90))
            seconds = float(picture.time or 0.0)
            reused = ahead is not None and ahead.get("frame") == index
            if ahead is not None and reused:
                try:
                    labels = _labels_of(ahead, pixels.shape[:2], len(vocabulary))
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    problem = f"The line of frame {index} in '{files['frames']}' is damaged; leave out --resume."
                    raise LexisegError(problem) from error
                ahead = next(earlier, None)
            elif index % options.every == 0 or labels.shape != pixels.shape[:2]:  # whose size may change
                labels = label(pixels)
                ids = [int(one) for one in np.unique(labels) if one < len(vocabulary)]
                segments = [{"category_id": one, "rle": encode_rle(labels == one)} for one in ids]
                _append(journal, {"frame": index, "seconds": seconds, "segments": segments})
            if options.overlay:
                if paint is None:
                    temporary = stack.enter_context(atomic_write(files["overlay"]))
                    rate = stream.average_rate or Fraction(25)
                    base = stream.time_base or 1 / rate
                    paint = stack.enter_context(_overlay(av, temporary, rate, base, labels.shape, vocabulary))
                    # Of the file, not of its pictures, which may set in after the sound.
                    start = seconds if container.start_time is None else container.start_time / av.time_base
                paint(pixels, labels, index / float(rate) if picture.time is None else seconds - start)
            yield Frame(index, seconds, labels, reused)


def _decoded(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    stream.thread_type = "AUTO"
    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        raise LexisegError(f"The video ends early ({printable(str(error))}); the frames before are kept.") from error


def _labeller(
    segmenter: Segmenter, vocabulary: Vocabulary, smooth: float, settings: dict[str, Any]
) -> Callable[[NDArray[np.uint8]], NDArray[np.integer]]:
    """A function that labels frames (H, W, 3) in their order; ``smooth`` is the weight of those before."""
    if not smooth:
        return lambda pixels: np.asarray(segmenter.predict(pixels, vocabulary, **settings).label_map)
    if vocabulary.background.kind == "threshold":
        raise LexisegError("Smoothing does not support a background threshold; name a background class instead.")
    import torch

    from lexiseg.refine import refine

    mean: Scores | None = None
    shape: tuple[int, ...] = ()

    def label(pixels: NDArray[np.uint8]) -> NDArray[np.integer]:
        nonlocal mean, shape
        scores = segmenter.scores(pixels, vocabulary, **settings).detach()
        mean = _blended(mean, scores, smooth) if mean is not None and pixels.shape == shape else scores
        shape = pixels.shape
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        found = refine(mean, image, segmenter.refinement)[0].cpu().numpy()
        return found.astype(np.uint8 if len(vocabulary) <= 255 else np.int32)

    return label


def _blended(before: Scores, now: Scores, weight: float) -> Scores:
    """The running mean of scores that have the same form."""
    from lexiseg.scores import GridScores, WindowScores

    if isinstance(before, WindowScores) and isinstance(now, WindowScores):
        parts = [_blended(*pair, weight) for pair in zip(before.parts, now.parts, strict=True)]
        return WindowScores(parts, now.boxes, now.canvas)
    if isinstance(before, GridScores) and isinstance(now, GridScores):
        now.logits = weight * before.logits + (1 - weight) * now.logits
        return now
    raise LexisegError("Smoothing works for systems that score patches, not for those with proposals; remove it.")


@contextmanager
def _overlay(
    av: Any, path: Path, rate: Fraction, base: Fraction, size: tuple[int, ...], vocabulary: Vocabulary
) -> Iterator[Callable[[NDArray[np.uint8], NDArray[np.integer], float], None]]:
    """A video of frames of this height and width; gives a function that paints a frame and writes it.

    ``rate``: frames per second, on average. ``base``: the unit of their times, which the function takes in seconds.
    """
    palette, unpainted = vocabulary.palette(), ignore_index(len(vocabulary))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        stream.height, stream.width = map(_even, size)
        stream.pix_fmt = "yuv420p"
        base = stream.codec_context.time_base = max(base, Fraction(1, 65535))  # the finest that mpeg4 takes
        last = -1

        def write(pixels: NDArray[np.uint8], labels: NDArray[np.integer], seconds: float) -> None:
            nonlocal last
            painted = paint_classes(pixels, labels, palette, alpha=_ALPHA, outlines=False, background=unpainted)
            cut = np.ascontiguousarray(np.asarray(painted)[: _even(labels.shape[0]), : _even(labels.shape[1])])
            frame = av.VideoFrame.from_ndarray(cut, format="rgb24")
            # A frame of another size than the first is stretched.
            frame = frame.reformat(width=stream.width, height=stream.height)
            frame.pts, frame.time_base = max(last + 1, round(seconds / base)), base  # files take no time twice
            last = frame.pts
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode())


def _even(side: int) -> int:
    """The codecs want even sides."""
    return side - side % 2 or 2


def _append(journal: Any, value: dict[str, Any]) -> None:
    with writing(f"write '{journal.name}'"):
        journal.write(json.dumps(value, separators=(",", ":")) + "\n")
        journal.flush()


def _is_begun(path: Path, head: dict[str, Any]) -> bool:
    """Whether an earlier run of the same settings began; a line that was cut off is taken away."""
    if not path.is_file():
        return False
    head = json.loads(json.dumps(head))
    with path.open("rb") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
    begun = next(read_lines(path), {})
    if whole and (difference := changed({**begun, "state": head["state"]}, head)):
        raise LexisegError(f"'{path}' was written with other settings: {difference}; choose another folder.")
    if whole and begun != head:
        warn(f"The video has changed since '{path}' was written, so it starts again from its first frame.")
        return False
    os.truncate(path, whole)
    return whole > 0


def _labels_of(line: dict[str, Any], size: tuple[int, ...], num_classes: int) -> NDArray[np.integer]:
    from pycocotools import mask as coco

    labels = np.full(size, ignore_index(num_classes), np.uint8 if num_classes <= 255 else np.int32)
    for segment in line["segments"]:
        labels[coco.decode(segment["rle"]).astype(bool)] = segment["category_id"]
    return labels
