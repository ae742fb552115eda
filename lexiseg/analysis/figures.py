"""The papers' figures of what a model does, for any model and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lexiseg.analysis.canvas import (
    ACCENT,
    CAPTION,
    INK,
    MUTED,
    PANEL,
    Panel,
    Scale,
    colors,
    columns_for,
    compose,
    fit,
    font,
    heat_map,
    mark,
    ticks,
)
from lexiseg.analysis.charts import Group, bar_chart
from lexiseg.analysis.measures import linear_cka, patch_similarity
from lexiseg.analysis.points import Point, chosen_points
from lexiseg.analysis.towers import Blocks, has_own_clip, learnt_in_tower, plain_blocks, system_blocks
from lexiseg.errors import LexisegError
from lexiseg.images import image_name, read_image
from lexiseg.models import CascadeCLIP, SegmentationModel
from lexiseg.models.levels import WeightedSum, format_groups
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import VocabularySource

_MAX_CLASSES = 48
_CELL, _CELL_WITH_NUMBER = 24, 46


def similarity_figure(
    segmenter: Segmenter, image: str | Path, points: Sequence[Point] = (), blocks: Sequence[int] = ()
) -> Image.Image:
    """How similar every patch is to a chosen one, block by block (Cascade-CLIP, Fig. 1 and 6).

    The tower runs as the model runs it, with its prompts; the whole picture at once.

    Args:
        segmenter: with the model.
        image: the picture.
        points: pixels (column, row) whose patches are chosen; none takes the middle.
        blocks: blocks to show, counted from 1; none takes all.

    Raises:
        LexisegError: the picture is wrong, a point lies outside it, or a block does not exist.
    """
    picture = _picture(read_image(image, max_pixels=segmenter.max_pixels))
    width, height = picture.size
    chosen = chosen_points(points, picture.size, image)
    found = _run(segmenter, image)
    shown = _blocks_to_show(blocks, len(found.patches))
    rows, columns = found.grid
    size = fit(width, height)
    maps = []
    for column, row in chosen:
        index = (row * rows // height) * columns + column * columns // width
        maps.append(patch_similarity(found.patches, index).unflatten(1, found.grid).cpu().numpy())
    low = min(float(values[block - 1].min()) for values in maps for block in shown)
    scale = Scale(min(0.0, np.floor(low * 10) / 10) if low < 0.3 else np.floor(low * 10) / 10, 1.0, "cosine similarity")
    panels: list[list[Panel]] = []
    for (column, row), values in zip(chosen, maps, strict=True):
        patch = (column * columns // width, row * rows // height)
        box = (
            patch[0] * size[0] / columns,
            patch[1] * size[1] / rows,
            (patch[0] + 1) * size[0] / columns,
            (patch[1] + 1) * size[1] / rows,
        )
        small = picture.resize(size, Image.Resampling.LANCZOS)
        group = [Panel(mark(small, box), f"patch at {column}, {row}")]
        group += [Panel(mark(heat_map(values[block - 1], size, scale), box), f"block {block}") for block in shown]
        panels += _in_rows(group)
    return compose(
        f"Similarity of one patch with all others: {segmenter.model.system}",
        panels,
        scale=scale,
        subtitle=f"{Path(image_name(image)).name}; {_tower_words(segmenter)}; patches {columns} x {rows}",
    )


def scores_figure(segmenter: Segmenter, image: str | Path, classes: VocabularySource) -> Image.Image:
    """The score of each class at every pixel (ZegCLIP, Fig. 8: semantic masks of different text queries).

    Args:
        segmenter: with the model.
        image: the picture.
        classes: the words, as `Segmenter.predict` takes them; names of unseen classes are red.

    Raises:
        LexisegError: the picture or the classes are wrong, or there are too many classes for a figure.
    """
    vocabulary = segmenter.vocabulary(classes)
    if len(vocabulary) > _MAX_CLASSES:
        raise LexisegError(
            f"{len(vocabulary)} classes are too many for one figure; choose at most {_MAX_CLASSES} of them."
        )
    picture = _picture(read_image(image, max_pixels=segmenter.max_pixels))
    size = fit(*picture.size)
    scores = segmenter.scores(image, vocabulary).dense((size[1], size[0]))[0].cpu().numpy()
    names = [*vocabulary.names, "background"][: len(scores)]
    low, high = float(scores.min()), float(scores.max())
    best = scores.argmax(0)
    # Scores of a sigmoid, seen classes' offset included, are best read from 0; cosines as they are.
    scale = Scale(0.0 if low >= -0.2 and high > 0.35 else low, max(high, low + 1e-6), "score")
    group = [Panel(picture.resize(size, Image.Resampling.LANCZOS), "picture")]
    for index, name in enumerate(names):
        unseen = index < len(vocabulary.classes) and vocabulary.classes[index].seen is False
        group.append(
            Panel(
                heat_map(scores[index], size, scale),
                f"{name} (unseen)" if unseen else name,
                f"highest {scores[index].max():.2f}, wins {_share(float((best == index).mean()))}",
                ACCENT if unseen else INK,
            )
        )
    return compose(
        f"Scores of the classes: {segmenter.model.system}",
        _in_rows(group),
        scale=scale,
        subtitle=f"{Path(image_name(image)).name}; the class with the highest score at a pixel wins it",
    )


def cka_figure(segmenter: Segmenter, images: Sequence[str | Path], before: Segmenter | None = None) -> Image.Image:
    """Alignment of the blocks of a tower with each other, before and after training (Cascade-CLIP, Fig. 4).

    Linear CKA of the patches of all pictures. "Before" is the CLIP inside the model without what was learnt beside it,
    or ``before``'s tower. A model that learnt nothing inside its tower has one map only.

    Args:
        segmenter: with the model.
        images: one or more pictures.
        before: the model to compare with.

    Raises:
        LexisegError: a picture is wrong, or training changed CLIP itself and ``before`` is missing.
    """
    if not images:
        raise LexisegError("CKA needs the patches of at least one picture; give one or more.")
    model = segmenter.model
    if before is None and has_own_clip(model):
        raise LexisegError(
            f"This {model.system} was trained with its CLIP, so that the CLIP it started from is not in it; "
            "name that one, such as dense-clip/ViT-B-16/openai, to compare with."
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
    scale = Scale(0.0, 1.0, "linear CKA")
    panels = []
    for caption, matrix in found:
        last = float(matrix[-1, :-1].mean()) if len(matrix) > 1 else 1.0
        panels.append(Panel(_matrix(matrix.cpu().numpy(), scale), caption, f"last block with the others: {last:.2f}"))
    pictures = f"{len(images)} pictures" if len(images) > 1 else Path(image_name(images[0])).name
    return compose(
        "How alike the blocks of the image tower are",
        [panels],
        scale=scale,
        subtitle=f"linear CKA of the patches of {pictures}; the last block is framed in red",
    )


def nga_figure(segmenter: Segmenter) -> Image.Image:
    """Weights of the neighbourhood Gaussian aggregation before and after training (Cascade-CLIP, Table 17).

    Raises:
        LexisegError: the model has no such weights.
    """
    groups = nga_weights(segmenter.model)
    chart = bar_chart(
        groups, series=("before training", "after training"), y_label="weight", width=max(560, 250 * len(groups))
    )
    return compose(
        f"Weights of the blocks in each group: {segmenter.model.system}",
        [[Panel(chart, "")]],
        subtitle="neighbourhood Gaussian aggregation; a group of one block has no weights",
    )


def nga_weights(model: SegmentationModel) -> list[Group]:
    """The weights as `nga_figure` draws them: one group of bars for each group of several blocks.

    Raises:
        LexisegError: the model has no such weights.
    """
    if not isinstance(model, CascadeCLIP):
        raise LexisegError(f"{model.system} has no NGA weights; choose a cascade-clip model.")
    options = model.options
    groups = []
    for module, kind, blocks in zip(model.aggregations, options.aggregations, options.blocks, strict=True):
        if isinstance(module, WeightedSum):
            start = WeightedSum(len(blocks), options.sigma if kind in ("nga", "nga-fixed") else None)
            values = [part.weights.detach().cpu().tolist() for part in (start, module)]
            groups.append(Group(format_groups((blocks,)), [f"block {block}" for block in blocks], values))
    if not groups:
        raise LexisegError(
            f"This cascade-clip joins its groups {options.groups} without weights; choose one whose aggregation is nga."
        )
    return groups


def _share(value: float) -> str:
    return "<1 %" if 0 < value < 0.005 else f"{100 * value:.0f} %"


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _run(segmenter: Segmenter, image: str | Path, *, plain: bool = False) -> Blocks:
    model = segmenter.model
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return (plain_blocks if plain else system_blocks)(model, segmenter.pixels(image))
    finally:
        model.train(training)


def _samples(found: Sequence[Blocks]) -> list[Tensor]:
    """Block by block, the patches of all pictures below each other."""
    return list(torch.cat([blocks.patches for blocks in found], dim=1))


def _tower_words(segmenter: Segmenter) -> str:
    model = segmenter.model
    return "tower with what was learnt in it" if learnt_in_tower(model) else f"the tower of {model.clip.name} as it is"


def _blocks_to_show(blocks: Sequence[int], count: int) -> list[int]:
    for block in blocks:
        if not 1 <= block <= count:
            raise LexisegError(f"There is no block {block}; the image tower has {count}, counted from 1.")
    return list(dict.fromkeys(blocks)) or list(range(1, count + 1))


def _in_rows(panels: Sequence[Panel]) -> list[list[Panel]]:
    columns = columns_for(len(panels))
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def _matrix(values: np.ndarray, scale: Scale) -> Image.Image:
    """A square matrix with its block numbers, its numbers where they fit, and its last row framed."""
    count = len(values)
    with_numbers = count <= 16
    cell = _CELL_WITH_NUMBER if with_numbers else _CELL
    side, left, below = count * cell, 58, 58
    canvas = Image.new("RGB", (left + side + 4, side + below), (255, 255, 255))
    blocks = Image.fromarray(colors(values, scale)).resize((side, side), Image.Resampling.NEAREST)
    canvas.paste(blocks, (left, 0))
    draw = ImageDraw.Draw(canvas)
    small, caption = font(14), font(CAPTION - 2)
    every = max(1, len(ticks(0, count, count)) // 13 + 1) if count > 16 else 1
    for index in range(count):
        middle = (index + 0.5) * cell
        if index % every == 0 or index == count - 1:
            draw.text((left - 8, middle), str(index + 1), INK, small, anchor="rm")
            draw.text((left + middle, side + 8), str(index + 1), INK, small, anchor="ma")
        for other in range(count if with_numbers else 0):
            value = float(values[index, other])
            ink = (255, 255, 255) if value < 0.62 else (25, 25, 25)
            draw.text((left + (other + 0.5) * cell, middle), f"{value:.2f}", ink, font(13), anchor="mm")
    draw.rectangle((left, side - cell, left + side - 1, side - 1), outline=ACCENT, width=3)
    draw.text((left + side / 2, side + below - 4), "block", MUTED, caption, anchor="md")
    label = Image.new("RGB", (round(caption.getlength("block")) + 4, 26), (255, 255, 255))
    ImageDraw.Draw(label).text((2, 0), "block", MUTED, caption)
    upright = label.rotate(90, expand=True)
    canvas.paste(upright, (0, round(side / 2 - upright.height / 2)))
    if side < PANEL:
        factor = PANEL / side
        return canvas.resize((round(canvas.width * factor), round(canvas.height * factor)), Image.Resampling.LANCZOS)
    return canvas
