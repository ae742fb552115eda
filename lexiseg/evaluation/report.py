"""What an evaluation found, and under which protocol: JSON, table and picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import lexiseg
from lexiseg.evaluation.metrics import Confusion, Metrics, percent, percent_text
from lexiseg.files import atomic_write, make_folder, write_json
from lexiseg.overlay import LegendEntry, draw_legend, paint_classes
from lexiseg.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lexiseg.evaluation.proposals import ProposalReport

FORMAT = 1
_PACKAGES = ("open_clip_torch", "numpy", "Pillow")
_TITLES = {"pacc": "pAcc", "miou": "mIoU", "miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU"}
_OF_SEEN = ("miou_seen", "miou_unseen", "hiou")
_GAP, _HEADER, _LETTERS = 6, 28, 16
_PAPER, _INK = (250, 250, 250), (33, 33, 33)
_COLUMNS = ("picture", "truth", "prediction")
_ALPHA = 0.75


@dataclass(frozen=True, eq=False)
class Example:
    """What one row shows."""

    image: NDArray[np.uint8]  # ``(H, W, 3)`` uint8
    truth: NDArray[np.integer]  # ``(H, W)`` integer ids; one that is no class is drawn faded
    prediction: NDArray[np.integer]  # ``(H, W)``, the same
    name: str = ""  # of the sample


def draw_grid(examples: Sequence[Example], vocabulary: Vocabulary, *, width: int = 256) -> Image.Image:
    """Draw the rows, with a legend of every class that occurs in them.

    ``vocabulary``: gives names, colours and which classes are unseen; the legend says so. ``width``: of a cell in
    pixels; heights follow from the pictures. Returns a picture of mode RGB.
    """
    palette = vocabulary.palette()
    rows = [_cells(example, palette, width) for example in examples]
    height = _HEADER + sum(row[0].height + _GAP for row in rows)
    canvas = Image.new("RGB", (len(_COLUMNS) * (width + _GAP) + _GAP, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_LETTERS)
    for column, title in enumerate(_COLUMNS):
        draw.text((_GAP + column * (width + _GAP) + width / 2, _HEADER / 2), title, _INK, font, anchor="mm")
    top = _HEADER
    for row in rows:
        for column, cell in enumerate(row):
            canvas.paste(cell, (_GAP + column * (width + _GAP), top))
        top += row[0].height + _GAP
    return draw_legend(canvas, _legend(examples, vocabulary, palette), size=_LETTERS)


def _cells(example: Example, palette: NDArray[np.uint8], width: int) -> list[Image.Image]:
    maps = (example.truth, example.prediction)
    painted = [paint_classes(example.image, labels, palette, alpha=_ALPHA, outlines=True) for labels in maps]
    cells = [Image.fromarray(np.ascontiguousarray(example.image)), *painted]
    size = width, max(1, round(cells[0].height * width / cells[0].width))
    return cells if cells[0].width == width else [cell.resize(size, Image.Resampling.LANCZOS) for cell in cells]


def _legend(examples: Sequence[Example], vocabulary: Vocabulary, palette: NDArray[np.uint8]) -> list[LegendEntry]:
    truth, predicted = np.zeros((2, len(vocabulary)), np.int64)
    for example in examples:
        for counts, labels in ((truth, example.truth), (predicted, example.prediction)):
            counts += np.bincount(labels[(labels >= 0) & (labels < len(vocabulary))], minlength=len(vocabulary))
    total = max(1, sum(example.truth.size for example in examples))
    # Unseen classes first: they are what a reader looks for. Then by fraction of the truth.
    order = sorted(
        (int(index) for index in np.flatnonzero(truth + predicted)),
        key=lambda index: (vocabulary.classes[index].seen is not False, -truth[index]),
    )
    names = [f"{entry.name} (unseen)" if entry.seen is False else entry.name for entry in vocabulary.classes]
    return [LegendEntry(names[index], tuple(palette[index].tolist()), truth[index] / total) for index in order]


@dataclass(frozen=True, eq=False)
class Report:
    """The result of an evaluation."""

    metrics: Metrics  # the numbers, as fractions
    confusion: Confusion  # the counts they were made of
    vocabulary: Vocabulary  # the classes in the order of the ids
    # everything needed to repeat it: data, resolution, window, templates, background, weights, versions
    protocol: dict[str, Any]
    seconds: float  # time the predictions took, added up over processes and parts
    examples: Sequence[Example] = field(default_factory=tuple)  # pictures for the grid
    proposals: ProposalReport | None = None  # how good a decoupled model's proposals are, where that was asked for

    def summary(self) -> dict[str, float | None]:
        """The scalars of `Metrics` in percent; None where there is nothing to measure."""
        return self.metrics.summary()

    def class_rows(self) -> list[dict[str, Any]]:
        """The table by class, in the order of the ids.

        ``name``, ``seen`` (None where nobody said), ``iou`` and ``accuracy`` in percent (None where there is nothing to
        measure), ``labelled``, the pixels of the class, and ``predicted``, the evaluated pixels predicted as it.
        """
        return [
            {
                "name": entry.name,
                "seen": entry.seen,
                "iou": percent(self.metrics.iou[index]),
                "accuracy": percent(self.metrics.accuracy[index]),
                "labelled": int(self.confusion.labelled[index]),
                "predicted": int(self.confusion.predicted[index]),
            }
            for index, entry in enumerate(self.vocabulary.classes)
        ]

    @property
    def has_seen(self) -> bool:
        """Whether classes count as seen and unseen; across datasets they do not."""
        return any(entry.seen is not None for entry in self.vocabulary.classes)

    def summary_line(self) -> str:
        """The numbers the papers print, as one line: five, or across datasets the first two."""
        summary = self.summary()
        keys = [key for key in _TITLES if self.has_seen or key not in _OF_SEEN]
        return "  ".join(f"{_TITLES[key]} {percent_text(summary[key])}" for key in keys)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column titles and rows of text, by class, for printing.

        Across datasets, where no class counts as seen or unseen, there is no column for it.
        """
        words = {True: "seen", False: "unseen", None: "-"}
        titles, rows = ["class", "IoU", "Acc", "pixels"], []
        for row in self.class_rows():
            scores = [percent_text(row["iou"]), percent_text(row["accuracy"])]
            rows.append([row["name"], *scores, f"{row['labelled']:,}"])
            if self.has_seen:
                rows[-1].insert(1, words[row["seen"]])
        if self.has_seen:
            titles.insert(1, "masks in training")
        return titles, rows

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON holds it."""
        return {
            "format": FORMAT,
            "metrics": self.summary(),
            "protocol": self.protocol,
            "seconds": round(self.seconds, 3),
            "classes": self.class_rows(),
        }

    def grid(self) -> Image.Image | None:
        """Picture, ground truth and prediction of the examples; None if there are none."""
        return draw_grid(self.examples, self.vocabulary) if self.examples else None

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``report.json``, and what there is of ``grid.png`` and ``proposals.json``; the paths come back.

        Raises LexisegError if the folder cannot be written.
        """
        folder = make_folder(folder)
        paths = []
        if (grid := self.grid()) is not None:
            path = folder / "grid.png"
            with atomic_write(path) as temporary:
                grid.save(temporary)
            paths.append(path)
        if self.proposals is not None:
            paths.append(write_json(folder / "proposals.json", self.proposals.to_dict()))
        # Last, so that where there is a new report there is everything.
        paths.insert(0, write_json(folder / "report.json", self.to_dict()))
        return paths


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    return {
        "python": platform.python_version(),
        "lexiseg": lexiseg.__version__,
        "torch": torch.__version__,
        **{package: metadata.version(package) for package in _PACKAGES},
    }
