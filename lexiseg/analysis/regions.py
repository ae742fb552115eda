"""Figures of the decoupled papers: where attention and anchors look (DeOP), what a proposal is taken for (MAFT)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from lexiseg.analysis.canvas import (
    ACCENT,
    GRID,
    INK,
    PAPER,
    SMALL,
    Panel,
    Scale,
    columns_for,
    compose,
    fit,
    font,
    heat_map,
    mark,
    shorten,
)
from lexiseg.analysis.points import Point, chosen_points
from lexiseg.errors import LexisegError
from lexiseg.images import image_name, read_image
from lexiseg.models import DeOP
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.region_host import RegionHost
from lexiseg.regions.ensemble import EnsembleOptions
from lexiseg.regions.pooling import resize_masks
from lexiseg.scores import RegionScores
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import VocabularySource

_MAX_PROPOSALS = 24
_LINE, _BAR = 24, 6

ScoresBy = Literal["clip", "ensemble"]
_SCORES_OF = {"clip": "by CLIP alone", "ensemble": "as predicted"}


def attention_maps(model: DeOP, padded: Tensor, block: int = -1) -> Tensor:
    """How much each patch attends to each other one in a block of CLIP alone, averaged over the heads.

    No prompt and no severance takes part: this is what DeOP's Fig. 5 sets against its heatmaps.

    Args:
        model: its CLIP is looked at.
        padded: (1, 3, H', W'), see `DecoupledModel.pad`.
        block: index of the block, negative from the end.

    Returns:
        (P, P), rows attend; with the class token's column each row would sum to 1.
    """
    tower, (rows, columns) = model.clip.image_tower, model.grid(padded)
    index = range(tower.num_blocks)[block]
    patch = tower.patch_size
    images = padded[..., : rows * patch, : columns * patch]
    tokens, grid = tower.embed(images, interpolation=model.options.position_interpolation, by_count=True)
    tokens = tower.run(tokens, grid, stop=index).tokens
    layer = tower.visual.transformer.resblocks[index]
    attention = layer.attn
    width = attention.embed_dim
    query, key = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part in F.linear(
            layer.ln_1(tokens), attention.in_proj_weight[: 2 * width], attention.in_proj_bias[: 2 * width]
        ).chunk(2, dim=-1)
    )
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return weights.mean(dim=1)[0, 1:, 1:]


@torch.no_grad()
def anchor_figure(segmenter: Segmenter, image: str | Path, points: Sequence[Point] = ()) -> Image.Image:
    """What surrounds a patch for CLIP's attention, for the proposal it lies in, and for that proposal's anchors.

    DeOP, Fig. 5 and 8: the picture with the patch, CLIP's self-attention from it in the last block, the proposal whose
    mask is largest there, and the heatmap that pools this proposal (averaged over the heads). The proposals are those
    of the whole picture at once; a generator that reads words (Mask2Former with context interaction) is shown none but
    the row "no object", so that its proposals are not quite those of any prediction. Each map has a scale of its own.

    Args:
        segmenter: with a DeOP.
        image: the picture.
        points: pixels (column, row); none takes the middle.

    Raises:
        LexisegError: the model is no DeOP or has no proposal, the picture is wrong, or a point lies outside it.
    """
    model = segmenter.model
    if not isinstance(model, DeOP):
        raise LexisegError(f"{model.system} has no anchors to draw; choose a deop model.")
    picture = Image.fromarray(read_image(image, max_pixels=segmenter.max_pixels).permute(1, 2, 0).numpy())
    chosen = chosen_points(points, picture.size, image)
    images = segmenter.pixels(image)
    height, width = images.shape[-2:]
    training = model.training
    model.eval()
    try:
        padded = model.pad(images)
        text = model.no_object_row() if model.generator.needs_text else None
        proposals = model.propose(padded, text, (int(height), int(width)))
        mask_logits = proposals.mask_logits
        if not mask_logits.shape[1]:
            raise LexisegError(f"The model proposes no region in '{image_name(image)}', so there is nothing to draw.")
        heat = model.pool(model.patches(padded, mask_logits, (height, width)), mask_logits).mean_heatmaps[0].cpu()
        attention = attention_maps(model, padded).cpu()
        masks = model.upsampled(mask_logits.float(), padded)[0, :, :height, :width].sigmoid().cpu()
    finally:
        model.train(training)
    rows, columns = model.grid(padded)
    patch, size = model.clip.patch_size, fit(*picture.size)
    shown = (min(rows * patch, height), min(columns * patch, width))
    scale = Scale(0.0, 1.0, "share of the largest value")
    small = picture.resize(size, Image.Resampling.LANCZOS)
    panels = []
    for column, row in chosen:
        y, x = row * height // picture.height, column * width // picture.width
        place = min(y // patch, rows - 1), min(x // patch, columns - 1)
        best = int(masks[:, y, x].argmax())
        box = _box(place, patch, (height, width), size)
        around = attention[place[0] * columns + place[1]].unflatten(0, (rows, columns))
        panels.append(
            [
                Panel(mark(small, box), f"patch at {column}, {row}"),
                Panel(mark(_map(around, patch, shown, size, scale), box), "self-attention", "CLIP, last block"),
                Panel(mark(heat_map(masks[best].numpy(), size, scale), box), f"proposal {best + 1}", "mask"),
                Panel(mark(_map(heat[best], patch, shown, size, scale), box), "anchors", "heatmap"),
            ]
        )
    return compose(
        "Self-attention and classification anchors",
        panels,
        scale=scale,
        subtitle=f"{Path(image_name(image)).name}; patches {columns} x {rows}; {model.options.anchors} anchors",
    )


def top_classes(scores: RegionScores, picture: int = 0, k: int = 5) -> tuple[Tensor, Tensor]:
    """The best classes of each proposal.

    Args:
        scores: of a decoupled model.
        picture: which of the batch.
        k: how many, at most as many as there are classes.

    Returns:
        values and class indices, (N, k) each, best first. A class of several words has the score of its best one.
    """
    values = scores.class_scores[picture].detach().float()
    if scores.word_to_class is not None:
        index = scores.word_to_class.expand(len(values), -1)
        lowest = values.new_full((len(values), scores.num_classes), -torch.inf)
        values = lowest.scatter_reduce(1, index, values, "amax")
    found = values.topk(min(k, values.shape[1]), dim=1)
    return found.values, found.indices


def top_classes_figure(
    segmenter: Segmenter,
    image: str | Path,
    classes: VocabularySource,
    *,
    proposals: int = 8,
    k: int = 5,
    by: ScoresBy = "clip",
) -> Image.Image:
    """The proposals that decide most of a picture, and the best classes of each (MAFT, Fig. 3 and 7).

    A proposal decides a pixel if its mask there times the score of its best class is the largest in the prediction.

    Args:
        segmenter: with a decoupled model.
        image: the picture.
        classes: the words, as `Segmenter.predict` takes them; names of unseen classes are red.
        proposals: how many are shown at most.
        k: classes a proposal.
        by: whose scores: "clip" is what CLIP, or MAFT's tuned copy of it, says of a region by itself (the paper's A^c);
            "ensemble" what the model predicts from, in which the generator may have a say. DeOP's are CLIP's in both.

    Raises:
        LexisegError: the model has no proposals, proposes none here, or CLIP is not asked about them; the picture or
            the classes are wrong.
    """
    model = segmenter.model
    if not isinstance(model, DecoupledModel):
        raise LexisegError(f"{model.system} has no proposals; choose zsseg, zegformer, freeseg or deop.")
    if by == "clip" and isinstance(model, RegionHost) and model.viewer is None:
        raise LexisegError("In this model the proposals decide alone and CLIP is shown none; draw by 'ensemble'.")
    if not 1 <= proposals <= _MAX_PROPOSALS:
        raise LexisegError(f"{proposals} proposals do not fit a figure; choose from 1 to {_MAX_PROPOSALS}.")
    vocabulary = segmenter.vocabulary(classes)
    picture = Image.fromarray(read_image(image, max_pixels=segmenter.max_pixels).permute(1, 2, 0).numpy())
    scores = segmenter.scores(image, vocabulary)
    if not isinstance(scores, RegionScores):
        raise LexisegError(
            "Proposals are drawn of whole pictures; this model runs in windows, take its window_size out."
        )
    if not scores.masks.shape[1]:
        raise LexisegError(f"The model proposes no region in '{image_name(image)}', so there is nothing to draw.")
    size = fit(*picture.size)
    masks = region_masks(scores, (size[1], size[0]))
    values, indices = (found.cpu() for found in top_classes(scores, 0, k))
    owner = (masks * values[:, :1, None]).argmax(dim=0)
    if by == "clip" and isinstance(model, RegionHost):
        with _clip_alone(model):
            said = segmenter.scores(image, vocabulary)
        values, indices = (found.cpu() for found in top_classes(cast(RegionScores, said), 0, k))
    pixels = torch.bincount(owner.flatten(), minlength=len(masks))
    order = [int(index) for index in pixels.argsort(descending=True, stable=True)[:proposals] if pixels[index]]
    names = [*vocabulary.names, "background"]
    red = {index for index, entry in enumerate(vocabulary.classes) if entry.seen is False}
    small = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
    panels = [
        Panel(
            _stacked(_lit(small, masks[index].numpy()), names, red, values[index].tolist(), indices[index].tolist()),
            f"proposal {index + 1}",
            f"decides {100 * float(pixels[index]) / owner.numel():.0f} % of the picture",
        )
        for index in order
    ]
    columns = columns_for(len(panels))
    return compose(
        f"Best classes of the proposals: {model.system}",
        [panels[start : start + columns] for start in range(0, len(panels), columns)],
        subtitle=f"{Path(image_name(image)).name}; {scores.masks.shape[1]} proposals; "
        f"scores {_SCORES_OF[by]}; red: unseen in training",
    )


@contextmanager
def _clip_alone(model: RegionHost) -> Iterator[None]:
    """Let CLIP's opinion be the score of a region, for as long as this lasts."""
    options = model.options
    model.options = options.model_copy(update={"ensemble": EnsembleOptions(rule="region")})
    try:
        yield
    finally:
        model.options = options


def region_masks(scores: RegionScores, size: tuple[int, int], picture: int = 0) -> Tensor:
    """The masks of region scores at a size: (N, H, W) float32 on the CPU, in 0..1 where they are logits or 0..1."""
    masks = scores.masks[picture][None].detach().float().cpu()
    if scores.resize_to is not None:
        masks = F.interpolate(masks, size=scores.resize_to, mode="bilinear", align_corners=scores.align_corners)
    if scores.crop is not None:
        masks = masks[..., : scores.crop[0], : scores.crop[1]]
    return resize_masks(masks.sigmoid() if scores.sigmoid else masks, size)[0]


def _box(
    place: tuple[int, int], patch: int, frame: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The patch at ``place`` (row, column) of a frame (height, width), in pixels of a panel of ``size``."""
    top, left = place[0] * patch * size[1] / frame[0], place[1] * patch * size[0] / frame[1]
    return left, top, left + patch * size[0] / frame[1], top + patch * size[1] / frame[0]


def _map(values: Tensor, patch: int, shown: tuple[int, int], size: tuple[int, int], scale: Scale) -> Image.Image:
    """A map over patches as a panel: without the padding, brightest at its largest value."""
    rows, columns = -(-shown[0] // patch), -(-shown[1] // patch)
    inside = values[:rows, :columns]
    largest = float(inside.max())
    return heat_map((inside / largest if largest > 0 else inside).numpy(), size, scale)


def _lit(picture: NDArray[np.uint8], mask: NDArray[np.floating]) -> Image.Image:
    """The picture, dark and grey outside the mask."""
    weight = np.clip(mask, 0, 1)[..., None]
    grey = picture.mean(axis=2, keepdims=True) * 0.3
    return Image.fromarray(np.round(picture * weight + grey * (1 - weight)).astype(np.uint8))


def _stacked(
    picture: Image.Image, names: Sequence[str], red: set[int], values: Sequence[float], indices: Sequence[int]
) -> Image.Image:
    """A picture with a list of classes below it, each over a bar as long as its share of the best score."""
    canvas = Image.new("RGB", (picture.width, picture.height + 8 + len(indices) * (_LINE + _BAR)), PAPER)
    canvas.paste(picture, (0, 0))
    draw, face = ImageDraw.Draw(canvas), font(SMALL)
    low, high = min([0.0, *values]), max([*values, 1e-9])
    y = picture.height + 8
    for value, index in zip(values, indices, strict=True):
        color = ACCENT if index in red else INK
        text = f"{value:.2f}"
        draw.text((0, y), shorten(names[index], face, picture.width - 52), color, face)
        draw.text((picture.width, y), text, color, face, anchor="ra")
        draw.rectangle((0, y + _LINE - 4, picture.width - 1, y + _LINE - 2), fill=GRID)
        draw.rectangle(
            (0, y + _LINE - 4, (picture.width - 1) * (value - low) / (high - low), y + _LINE - 2), fill=color
        )
        y += _LINE + _BAR
    return canvas
