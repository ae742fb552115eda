"""Scores of a picture that was cut into overlapping windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lexiseg.scores.base import Scores, Size, check_size
from lexiseg.scores.fields import Field
from lexiseg.scores.mean import Mean
from lexiseg.scores.resize import resized
from lexiseg.windows import Box


@dataclass(eq=False, repr=False)
class WindowScores(Scores):
    """Scores of windows on a canvas: at each pixel the mean of those over it, then interpolated to the size asked for.

    Each part is evaluated at the size of its window. Only the parts' own small tensors are kept.

    Source: ZegCLIP's sliding window (windows of 512, stride 426 in the authors' configurations): scores, not logits,
    are summed and divided by their count, then interpolated to the size of the picture.

    Attributes:
        parts: the scores of each window, for the same words and the same number of pictures.
        boxes: (top, left, height, width) of each window.
        canvas: (height, width) the windows lie on.

    Raises:
        ValueError: parts differ in words, pictures or device; a window leaves the canvas, or a pixel has none.
    """

    parts: Sequence[Scores]
    boxes: Sequence[Box]
    canvas: Size

    def __post_init__(self) -> None:
        parts = self.parts
        if not parts or len(parts) != len(self.boxes):
            raise ValueError(f"there must be a part for each box, and one at least: {len(parts)} and {len(self.boxes)}")
        first = parts[0]
        super().__init__(first.batch_size, first.num_words, first.device, first.word_to_class)
        kinds = {(part.num_words, part.num_classes, part.batch_size, part.device) for part in parts}
        if len(kinds) > 1:
            raise ValueError("all parts must have the same words, number of pictures and device")
        self.canvas = check_size(self.canvas, "canvas")
        self.boxes = [(int(y), int(x), int(h), int(w)) for y, x, h, w in self.boxes]
        _check_boxes(self.boxes, self.canvas)

    def map(self, change: Callable[[Tensor], Tensor]) -> WindowScores:
        return replace(self, parts=[part.map(change) for part in self.parts])

    def _magnitude(self) -> float:
        # Added up, so that one that is not finite shows.
        return sum(part.largest for part in self.parts)

    def field(self, picture: int, size: Size) -> Field:
        fields = [part.field(picture, box[2:]) for part, box in zip(self.parts, self.boxes, strict=True)]
        return resized(fields[0] if len(fields) == 1 else Mean(fields, self.boxes, *self.canvas), size)


def _check_boxes(boxes: Sequence[Box], canvas: Size) -> None:
    for y, x, height, width in boxes:
        if min(y, x) < 0 or min(height, width) < 1 or y + height > canvas[0] or x + width > canvas[1]:
            raise ValueError(f"the window {(y, x, height, width)} does not lie on the canvas {canvas}")
    # Between neighbouring edges coverage does not change, so one place of each such rectangle tells about all.
    rows = sorted({0} | {y for y, _, _, _ in boxes} | {y + h for y, _, h, _ in boxes if y + h < canvas[0]})
    columns = sorted({0} | {x for _, x, _, _ in boxes} | {x + w for _, x, _, w in boxes if x + w < canvas[1]})
    covered = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    row, column = torch.tensor(rows), torch.tensor(columns)
    for y, x, height, width in boxes:
        covered |= ((row >= y) & (row < y + height))[:, None] & ((column >= x) & (column < x + width))
    if not bool(covered.all()):
        i, j = (int(n) for n in (~covered).nonzero()[0])
        raise ValueError(f"no window covers the pixel in row {rows[i]}, column {columns[j]} of the canvas {canvas}")
