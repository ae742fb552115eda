"""A picture on its way through a model: read, resized to its working size, cut into windows, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from lexiseg.errors import LexisegError
from lexiseg.images import ImageSource, image_name, read_image, read_pixels
from lexiseg.normalisation import normalise
from lexiseg.resampling import resize_bytes, resize_floats
from lexiseg.windows import Box, WindowPolicy, check_policy, check_proportions, cover, working_size
from lexiseg.words import quoted, shorten, whole_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lexiseg.scores import Scores

WindowSource: TypeAlias = "WindowPolicy | int | Sequence[int] | None"
_MIN_WINDOW = 8


@dataclass
class Picture:
    """A picture and its windows, in tensors, or in numpy arrays for a model that runs without torch."""

    key: Any  # whose it is, for whoever reads the results
    name: str  # for error messages
    image: Tensor  # (3, H, W) bytes
    canvas: Tensor  # (3, h, w) bytes, at the size the model works at; stretched to a size of its own, floats in 0..255
    # (top, left, height, width) of the windows on the canvas; one with `WHOLE` as its place is the whole picture
    boxes: list[Box]
    parts: list[Scores] = field(default_factory=list)  # the scores of the windows that were run, in the boxes' order
    # (3, s, s), the whole picture as one window, floats in 0..255; None where it is not run
    whole: Tensor | None = None

    def joined(self, policy: WindowPolicy) -> Scores:
        """The scores of the whole canvas, when all windows were run."""
        from lexiseg.scores import WindowScores

        if policy.size is None:
            return self.parts[0]
        size = (int(self.canvas.shape[1]), int(self.canvas.shape[2]))
        count = len(self.boxes) - (self.whole is not None)
        # Also for a single window: the published protocol goes through the working size in every case.
        windows = WindowScores(self.parts[:count], self.boxes[:count], size)
        return WindowScores([windows, self.parts[-1]], [(0, 0, *size)] * 2, size) if self.whole is not None else windows

    def crop(self, box: Box) -> Tensor:
        """The pixels of one of the boxes, (3, h, w)."""
        top, left, height, width = box
        if box[:2] == WHOLE and self.whole is not None:
            return self.whole
        return self.canvas[:, top : top + height, left : left + width]


WHOLE = (-1, -1)
"""The place of the box that is the whole picture."""


def window_policy(default: WindowPolicy, window: WindowSource = None, stride: int | None = None) -> WindowPolicy:
    """How a model is run over a picture: its own way, changed by what a user gives.

    ``window``: a policy; the side of the window in pixels; its side and stride; 0 for whole pictures; None for the
    model's own way. ``stride``: of the window, where that is no more than its side; without one it is the model's, or
    the window's side where that is smaller. Raises LexisegError if it is none of these, or numbers that cannot cover a
    picture.
    """
    if stride is not None:
        window = (default.size or 0 if window is None else window, stride)  # type: ignore[assignment]
    if window is None:
        return default
    if isinstance(window, WindowPolicy):
        try:
            return check_policy(window)
        except (TypeError, ValueError) as error:
            raise LexisegError(f"The policy {window} cannot be run ({error}); correct its numbers.") from error
    if isinstance(window, Sequence) and not isinstance(window, str | bytes) and len(window) == 2:
        side, step = (whole_number(number, "A window's side or stride") for number in window)
    elif isinstance(window, Sequence):
        raise LexisegError(f"A window is given as its side, or its side and stride, in pixels, not {quoted(window)}.")
    else:
        side, step = whole_number(window, "A window's side"), None
    if side == 0:
        if step:
            raise LexisegError(
                "A stride needs a window, and a window of 0 means whole pictures; give the window's side."
            )
        return replace(default, size=None, stride=0)
    step = min(default.stride or side, side) if step is None else step
    if side < _MIN_WINDOW or not 1 <= step <= side:
        raise LexisegError(
            f"A window of {side} with a stride of {step} does not cover a picture; use a window of at least "
            f"{_MIN_WINDOW} pixels and a stride of 1 to {max(side, _MIN_WINDOW)}."
        )
    return replace(default, size=side, stride=step)


Failure = tuple[Any, LexisegError]
"""The key of a picture that could not be read, and why."""


@dataclass(frozen=True)
class HeldPicture:
    """A picture that `lexiseg.segmenter.Segmenter.set_image` has encoded: `predict` only has to score words.

    It belongs to whoever asked for it, so that threads which share a segmenter each hold their own.
    """

    window: WindowPolicy  # how the model was run over it
    # takes ``classes`` and, by its name, ``background`` as `lexiseg.segmenter.Segmenter.predict` does, and gives a
    # `lexiseg.segmentation.Segmentation`
    predict: Callable[..., Any]


def read_picture(
    key: Any, source: ImageSource, policy: WindowPolicy, max_pixels: float, *, arrays: bool = False
) -> Picture:
    """Read a picture and plan its windows.

    ``key``: see `Picture`. ``source``: anything `lexiseg.images.read_image` takes. ``policy``: how the model is run
    over it. Raises LexisegError if the picture is broken, too large or too long and thin.
    """
    name = image_name(source)
    image: Any
    resize: Any
    stretch: Any
    if arrays:
        image, resize, stretch = read_pixels(source, max_pixels=max_pixels), resize_bytes, resize_floats
        image = image.transpose(2, 0, 1)
    else:
        image, resize, stretch = read_image(source, max_pixels=max_pixels), _resize, _stretch
    height, width = int(image.shape[1]), int(image.shape[2])
    check_proportions(height, width, f"{shorten(name, 200)}: The picture")
    size = working_size(height, width, policy.short_side, policy.long_side)
    # The picture stays bytes: a float copy of 20 megapixels would take 240 MB. Windows are normalised one by one.
    canvas = image if size == (height, width) else resize(image, size, policy.antialias)
    whole = stretch(canvas, (policy.size, policy.size)) if policy.whole and policy.size is not None else None
    if policy.canvas is not None:
        canvas = stretch(canvas, policy.canvas)
    boxes = cover(int(canvas.shape[1]), int(canvas.shape[2]), policy.size, policy.stride)
    if whole is not None:
        boxes.append((*WHOLE, int(whole.shape[1]), int(whole.shape[2])))
    return Picture(key, name, image, canvas, boxes, whole=whole)


def run_in_batches(
    pictures: Iterable[Picture | Failure], batch_size: int, run: Callable[[list[tuple[Picture, Box]]], None]
) -> Iterator[Picture | Failure]:
    """Run the windows of all pictures in batches of one shape, and yield the pictures in their order as they are done.

    ``pictures``: read one after the other as they are needed; a failure is handed on in its place. ``batch_size``:
    windows in a batch at most; pictures share batches. ``run``: adds the scores of each window to its picture's parts.
    """
    waiting: list[Picture | Failure] = []
    batch: list[tuple[Picture, Box]] = []
    for picture in pictures:
        waiting.append(picture)
        if isinstance(picture, Picture):
            for box in picture.boxes:
                if batch and (len(batch) == batch_size or box[2:] != batch[0][1][2:]):
                    run(batch)
                    batch = []
                batch.append((picture, box))
            if len(batch) == batch_size:
                run(batch)
                batch = []
        yield from _finished(waiting)
    if batch:
        run(batch)
    yield from _finished(waiting)


def _finished(waiting: list[Picture | Failure]) -> Iterator[Picture | Failure]:
    """Take what is finished off the head of the line."""
    while waiting:
        first = waiting[0]
        if isinstance(first, Picture) and len(first.parts) < len(first.boxes):
            return
        yield waiting.pop(0)


def cut_windows(
    windows: Sequence[tuple[Picture, Box]],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device,
) -> Tensor:
    """Cut out windows of one shape and normalise them: float32 (B, 3, H, W) on ``device``."""
    import torch

    return normalise(torch.stack([picture.crop(box).to(device).float() for picture, box in windows]) / 255, mean, std)


def _stretch(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to floats, whatever the aspect, bilinearly and without smoothing."""
    return _resize(image.float(), size, False)


def _resize(image: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Resize bilinearly; usually antialiased, because a photograph shrunk without it is noise to a tower."""
    from torch.nn import functional as F

    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=antialias)[0]
