"""What an evaluation found, and under which protocol: JSON, table and picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

import lexiseg
from lexiseg.evaluation.grid import Example, draw_grid
from lexiseg.evaluation.metrics import Confusion, Metrics, percent, percent_text
from lexiseg.files import atomic_write, make_folder, write_json
from lexiseg.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lexiseg.evaluation.proposal_report import ProposalReport

FORMAT = 1
_PACKAGES = ("open_clip_torch", "numpy", "Pillow")
_TITLES = {"pacc": "pAcc", "miou": "mIoU", "miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU"}
_OF_SEEN = ("miou_seen", "miou_unseen", "hiou")


@dataclass(frozen=True)
class ClassRow:
    """One class of the table."""

    name: str  # of the class
    seen: bool | None  # whether it had masks in training; None where nobody said
    iou: float | None  # intersection over union in percent; None where the class is in neither labels nor predictions
    accuracy: float | None  # fraction of its pixels found, in percent; None where it has no pixel
    labelled: int  # pixels of the class
    predicted: int  # evaluated pixels predicted as it


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

    def class_rows(self) -> list[ClassRow]:
        """The table by class, in the order of the ids."""
        counts = self.confusion
        return [
            ClassRow(
                entry.name,
                entry.seen,
                percent(self.metrics.iou[index]),
                percent(self.metrics.accuracy[index]),
                int(counts.labelled[index]),
                int(counts.predicted[index]),
            )
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
            rows.append([row.name, percent_text(row.iou), percent_text(row.accuracy), f"{row.labelled:,}"])
            if self.has_seen:
                rows[-1].insert(1, words[row.seen])
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
            "classes": [vars(row) for row in self.class_rows()],
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
        grid = self.grid()
        if grid is not None:
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
