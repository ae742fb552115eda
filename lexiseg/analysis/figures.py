"""The papers' figures of what a model does, for any model and picture; each is a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexiseg.analysis.panels import ACCENT, INK, Panel, Point, Scale, chosen_points, compose, new_figure, set_title
from lexiseg.analysis.towers import (
    Blocks,
    has_own_clip,
    learnt_in_tower,
    linear_cka,
    patch_similarity,
    plain_blocks,
    system_blocks,
)
from lexiseg.devices import EvaluationMode
from lexiseg.errors import LexisegError
from lexiseg.files import read_lines
from lexiseg.images import image_name, read_image
from lexiseg.models import CascadeCLIP, SegmentationModel
from lexiseg.models.cascade_clip import WeightedSum
from lexiseg.models.options import format_groups
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import VocabularySource
from lexiseg.words import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

METRICS = {
    "miou_seen": "mIoU(S)",
    "miou_unseen": "mIoU(U)",
    "hiou": "hIoU",
    "unseen_to_seen": "unseen predicted as seen",
}
_LOG = "metrics.jsonl"
_MAX_CLASSES = 48
_SCORE_SIDE = 256
_MAX_COLUMNS = 7


def similarity_figure(
    segmenter: Segmenter, image: str | Path, points: Sequence[Point] = (), blocks: Sequence[int] = ()
) -> Figure:
    """How similar every patch is to a chosen one, block by block (Cascade-CLIP, Fig. 1 and 6).

    The tower runs as the model runs it, with its prompts; the whole picture at once.

    ``points``: pixels (column, row) whose patches are chosen; none takes the middle. ``blocks``: blocks to show,
    counted from 1; none takes all. Raises LexisegError if the picture is wrong, a point lies outside it, or a block
    does not exist.
    """
    picture = read_picture(segmenter, image)
    height, width = picture.shape[:2]
    chosen = chosen_points(points, (width, height), image)
    found = _run(segmenter, image)
    shown = _blocks_to_show(blocks, len(found.patches))
    rows, columns = found.grid
    places = [(row * rows // height, column * columns // width) for column, row in chosen]
    maps = [
        patch_similarity(found.patches, row * columns + column).unflatten(1, found.grid).cpu().numpy()
        for row, column in places
    ]
    low = min(float(values[block - 1].min()) for values in maps for block in shown)
    scale = Scale(min(0.0, np.floor(low * 10) / 10) if low < 0.3 else np.floor(low * 10) / 10, 1.0, "cosine similarity")
    panels: list[list[Panel]] = []
    for point, (row, column), values in zip(chosen, places, maps, strict=True):
        box = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        group = [Panel(picture, f"patch at {point[0]}, {point[1]}", box=box)]
        group += [Panel(values[block - 1], f"block {block}", box=box, extent=height / width) for block in shown]
        panels += in_rows(group)
    return compose(
        f"Similarity of one patch with all others: {segmenter.model.system}",
        panels,
        scale=scale,
        subtitle=f"{Path(image_name(image)).name}; {_tower_words(segmenter)}; patches {columns} x {rows}",
    )


def scores_figure(segmenter: Segmenter, image: str | Path, classes: VocabularySource) -> Figure:
    """The score of each class at every pixel (ZegCLIP, Fig. 8: semantic masks of different text queries).

    ``classes``: the words, as `Segmenter.predict` takes them; names of unseen classes are red. Raises LexisegError if
    the picture or the classes are wrong, or there are too many classes for a figure.
    """
    vocabulary = segmenter.vocabulary(classes)
    if len(vocabulary) > _MAX_CLASSES:
        raise LexisegError(
            f"{len(vocabulary)} classes are too many for one figure; choose at most {_MAX_CLASSES} of them."
        )
    picture = read_picture(segmenter, image)
    height, width = picture.shape[:2]
    factor = _SCORE_SIDE / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    scores = segmenter.scores(image, vocabulary).dense(size)[0].cpu().numpy()
    names = [*vocabulary.names, "background"][: len(scores)]
    low, high = float(scores.min()), float(scores.max())
    best = scores.argmax(0)
    # Scores of a sigmoid, seen classes' offset included, are best read from 0; cosines as they are.
    scale = Scale(0.0 if low >= -0.2 and high > 0.35 else low, max(high, low + 1e-6), "score")
    group = [Panel(picture, "picture")]
    for index, name in enumerate(names):
        unseen = index < len(vocabulary.classes) and vocabulary.classes[index].seen is False
        group.append(
            Panel(
                scores[index],
                f"{name} (unseen)" if unseen else name,
                f"highest {scores[index].max():.2f}, wins {_percent(float((best == index).mean()))}",
                ACCENT if unseen else INK,
                extent=height / width,
            )
        )
    return compose(
        f"Scores of the classes: {segmenter.model.system}",
        in_rows(group),
        scale=scale,
        subtitle=f"{Path(image_name(image)).name}; the class with the highest score at a pixel wins it",
    )


def compare_figure(
    segmenters: Sequence[Segmenter], image: str | Path, classes: VocabularySource, names: Sequence[str] = ()
) -> Figure:
    """Several models' results on one picture, side by side (Cascade-CLIP, Fig. 5 and 8; MAFT, Fig. 4).

    ``segmenters``: one or more models, in the order of the panels. ``classes``: the words, as `Segmenter.predict` takes
    them. ``names``: of the models, see `told_apart`. Raises LexisegError if the picture or the classes are wrong, or no
    model is given.
    """
    if not segmenters:
        raise LexisegError("A comparison needs at least one model; name one or more.")
    group = [Panel(read_picture(segmenters[0], image), "picture")]
    titles = told_apart([segmenter.model.system for segmenter in segmenters], names)
    for segmenter, title in zip(segmenters, titles, strict=True):
        result = segmenter.predict(image, classes)
        overlay = np.asarray(result.overlay(legend=False))
        largest = ", ".join(f"{row.name} {_percent(row.fraction)}" for row in result.table()[:3])
        group.append(Panel(overlay, title, largest))
    return compose("The same picture by several models", in_rows(group), subtitle=Path(image_name(image)).name)


def cka_figure(segmenter: Segmenter, images: Sequence[str | Path], before: Segmenter | None = None) -> Figure:
    """Alignment of the blocks of a tower with each other, before and after training (Cascade-CLIP, Fig. 4).

    Linear CKA of the patches of all pictures. "Before" is the CLIP inside the model without what was learned beside it,
    or ``before``'s tower. A model that learned nothing inside its tower has one map only. Raises LexisegError if a
    picture is wrong, or training changed CLIP itself and ``before`` is missing.
    """
    if not images:
        raise LexisegError("CKA needs the patches of at least one picture; give one or more.")
    model = segmenter.model
    if before is None and has_own_clip(model):
        raise LexisegError(
            f"This {model.system} was trained together with its CLIP and does not contain the original one; name it, "
            "such as maskclip/ViT-B-16/openai, to compare with."
        )
    after = linear_cka(_samples([_run(segmenter, image) for image in images]))
    found: list[tuple[str, Tensor]] = []
    if before is not None:
        other = linear_cka(_samples([_run(before, image) for image in images]))
        found.append((f"before: {before.model.system}", other))
    elif learnt_in_tower(model):
        plain = linear_cka(_samples([_run(segmenter, image, plain=True) for image in images]))
        found.append((f"before: {model.clip.name} alone", plain))
    found.append((f"after: {model.system}" if found else f"{model.system}: {model.clip.name}", after))
    figure = new_figure(4.2 * len(found) + 0.8, 4.8)
    all_axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (caption, matrix) in zip(all_axes, found, strict=True):
        shown = _draw_matrix(axes, matrix.cpu().numpy())
        last = float(matrix[-1, :-1].mean()) if len(matrix) > 1 else 1.0
        axes.set_title(f"{caption}\nlast block with the others: {last:.2f}", fontsize=9, parse_math=False)
    figure.colorbar(shown, ax=list(all_axes), label="linear CKA", fraction=0.04)
    pictures = f"{len(images)} pictures" if len(images) > 1 else Path(image_name(images[0])).name
    subtitle = f"linear CKA of the patches of {pictures}; the last block is framed in red"
    set_title(figure, "Similarity of the blocks of the image tower", subtitle)
    return figure


def nga_figure(segmenter: Segmenter) -> Figure:
    """Weights of the neighbourhood Gaussian aggregation before and after training (Cascade-CLIP, Table 17).

    Raises LexisegError if the model has no such weights.
    """
    groups = nga_weights(segmenter.model)
    figure = new_figure(max(4.0, 2.2 * len(groups)), 4.0)
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (blocks, (before, after)) in zip(all_axes, groups.items(), strict=True):
        places = np.arange(len(blocks))
        for shift, values, label, color in (
            (-0.2, before, "before training", "#b0bac5"),
            (0.2, after, "after training", "#2c718e"),
        ):
            axes.bar_label(axes.bar(places + shift, values, 0.4, label=label, color=color), fmt="%.2f", fontsize=7)
        axes.set_xticks(places, [f"block {block}" for block in blocks], fontsize=8)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(format_groups((blocks,)))
    all_axes[0].set_ylabel("weight")
    all_axes[0].legend(fontsize=7)
    subtitle = "neighbourhood Gaussian aggregation; a group of one block has no weights"
    set_title(figure, f"Weights of the blocks in each group: {segmenter.model.system}", subtitle)
    return figure


def nga_weights(model: SegmentationModel) -> dict[tuple[int, ...], tuple[list[float], list[float]]]:
    """The weights as `nga_figure` draws them: for each group of several blocks, as training starts and as they are.

    Blocks count from 1. Raises LexisegError if the model has no such weights.
    """
    if not isinstance(model, CascadeCLIP):
        raise LexisegError(f"{model.system} has no NGA weights; choose a cascade-clip model.")
    options = model.options
    groups = {}
    for module, blocks in zip(model.aggregations, options.blocks, strict=True):
        if isinstance(module, WeightedSum):
            start = WeightedSum(len(blocks), options.sigma if options.aggregation in ("nga", "nga-fixed") else None)
            groups[tuple(blocks)] = (start.weights.tolist(), module.weights.tolist())
    if not groups:
        raise LexisegError(
            f"This cascade-clip joins its groups {options.groups} without weights; choose one whose aggregation is nga."
        )
    return groups


def read_picture(segmenter: Segmenter, image: str | Path) -> NDArray[np.uint8]:
    """The picture at ``image``, (H, W, 3) uint8."""
    return read_image(image, max_pixels=segmenter.max_pixels).permute(1, 2, 0).numpy()


def told_apart(titles: Sequence[str], names: Sequence[str]) -> list[str]:
    """``titles``; or, where two are the same, the ``names`` that what they stand for was given by, if there are any."""
    return [printable(name) for name in names] if names and len(set(titles)) < len(titles) else list(titles)


def in_rows(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Panels in rows of about equal length, no longer than a page is wide."""
    rows = -(-len(panels) // _MAX_COLUMNS)
    columns = -(-len(panels) // rows)
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def _percent(fraction: float) -> str:
    return "<1 %" if 0 < fraction < 0.005 else f"{100 * fraction:.0f} %"


def _run(segmenter: Segmenter, image: str | Path, *, plain: bool = False) -> Blocks:
    with EvaluationMode(segmenter.model, None)():
        return (plain_blocks if plain else system_blocks)(segmenter.model, segmenter.pixels(image))


def _samples(found: Sequence[Blocks]) -> list[Tensor]:
    """Block by block, the patches of all pictures below each other."""
    return list(torch.cat([blocks.patches for blocks in found], dim=1))


def _tower_words(segmenter: Segmenter) -> str:
    model = segmenter.model
    return "tower with the learned parts" if learnt_in_tower(model) else f"the tower of {model.clip.name} as it is"


def _blocks_to_show(blocks: Sequence[int], count: int) -> list[int]:
    for block in blocks:
        if not 1 <= block <= count:
            raise LexisegError(f"There is no block {block}; the image tower has {count}, counted from 1.")
    return list(dict.fromkeys(blocks)) or list(range(1, count + 1))


def _draw_matrix(axes: Axes, values: NDArray[np.floating]) -> AxesImage:
    """A square matrix with its block numbers, its values where they fit, and its last row framed."""
    from matplotlib.patches import Rectangle

    count = len(values)
    shown = axes.imshow(values, vmin=0, vmax=1)
    every = range(0, count, 1 if count <= 16 else 4)
    axes.set_xticks(every, [str(index + 1) for index in every], fontsize=7)
    axes.set_yticks(every, [str(index + 1) for index in every], fontsize=7)
    axes.set_xlabel("block")
    axes.set_ylabel("block")
    for row, column in np.ndindex(count, count) if count <= 16 else ():
        value = float(values[row, column])
        ink = "white" if value < 0.62 else INK
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5, color=ink)
    axes.add_patch(Rectangle((-0.5, count - 1.5), count, 1, fill=False, edgecolor=ACCENT, linewidth=2))
    return shown


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
    names = told_apart([Path(run).resolve().name for run in runs], [str(run) for run in runs])
    found = [(name, _read(Path(run), metrics)) for name, run in zip(names, runs, strict=True)]
    figure = new_figure(4.2 * len(metrics), 3.4)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for name, lines in found:
            points = [(line["step"], line[f"val/{metric}"]) for line in lines if f"val/{metric}" in line]
            xy = zip(*points, strict=True) if points else ([], [])
            panel.plot(*xy, marker="o", markersize=3, linewidth=1.2, label=printable(name))
        panel.set_title(METRICS.get(metric, printable(metric)))
        panel.set_xlabel("step")
        panel.locator_params(axis="x", integer=True, min_n_ticks=1)
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
            "--set train.snapshot_every=STEPS and evaluation.num_samples above 0."
        )
    return lines
