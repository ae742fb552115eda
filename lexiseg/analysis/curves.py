"""Curves of what runs measured while they trained: S, U and hIoU over steps (Cascade-CLIP, Fig. 7; ZegCLIP, Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lexiseg.analysis.panels import new_figure
from lexiseg.errors import LexisegError
from lexiseg.files import read_lines
from lexiseg.words import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {"miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU", "unseen_to_seen": "unseen taken for seen"}
_LOG = "metrics.jsonl"


def curves_figure(runs: Sequence[str | Path], metrics: Sequence[str] = tuple(METRICS)) -> Figure:
    """Draw metrics of several runs over their steps, one panel per metric and one line per run.

    ``runs``: folders of trainings with ``train.snapshot_every``, whose logs hold ``val/...``. ``metrics``: which, by
    their names in the log without ``val/``, in percent. Raises LexisegError if a folder is no run, a run measured
    nothing of that kind, no run or metric is given, or matplotlib is not installed.
    """
    if not runs:
        raise LexisegError("No run was given; name the folder of one or more runs.")
    if not metrics:
        raise LexisegError(f"No metric was given; name one or more of {', '.join(METRICS)}.")
    found = [(Path(run).resolve().name, _read(Path(run), metrics)) for run in runs]
    figure = new_figure(4.2 * len(metrics), 3.4)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for name, lines in found:
            points = [(line["step"], line[f"val/{metric}"]) for line in lines if f"val/{metric}" in line]
            xy = zip(*points, strict=True) if points else ([], [])
            panel.plot(*xy, marker="o", markersize=3, linewidth=1.2, label=printable(name))
        panel.set_title(METRICS.get(metric, printable(metric)))
        panel.set_xlabel("step")
        panel.set_ylabel("%")
        panel.grid(alpha=0.3)
    figure.set_layout_engine("constrained")
    figure.legend(handles=panels[0].lines, loc="outside lower center", ncols=2 * len(metrics), fontsize=8)
    return figure


def _read(run: Path, metrics: Sequence[str]) -> list[dict[str, float]]:
    """The lines of a run's log that hold one of the metrics."""
    path = run / _LOG
    try:
        records = list(read_lines(path))
    except OSError as error:
        raise LexisegError(
            f"'{run}' has no training log, '{_LOG}' ({error.strerror}); give the folder of a run."
        ) from error
    lines = []
    for record in records:
        if isinstance(record.get("step"), int):
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            if any(f"val/{metric}" in numbers for metric in metrics):
                lines.append(numbers)
    if not lines:
        raise LexisegError(
            f"The run '{run}' measured none of {', '.join(metrics)} while it trained; train with "
            "--set train.snapshot_every=STEPS and evaluation.scored above 0."
        )
    return lines
