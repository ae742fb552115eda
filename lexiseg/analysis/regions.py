"""Figures of the decoupled papers: where attention and anchors look (DeOP), how a proposal is classified (MAFT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexiseg.analysis.figures import in_rows, read_picture, told_apart
from lexiseg.analysis.panels import ACCENT, INK, Panel, Point, Scale, chosen_points, compose
from lexiseg.devices import EvaluationMode
from lexiseg.errors import LexisegError
from lexiseg.images import image_name
from lexiseg.models import DeOP, SegmentationModel
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.region_base import RegionModel
from lexiseg.regions.pooling import resize_masks, unit_or_zero
from lexiseg.scores import GridScores, RegionScores
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary, VocabularySource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_PROPOSALS = 24
_MASK_SIDE = 256

ScoresBy = Literal["clip", "ensemble"]
_SCORES_OF = {"clip": "by CLIP alone", "ensemble": "as predicted"}


def attention_maps(model: DeOP, padded: Tensor) -> Tensor:
    """How much each patch attends to each other one in the last block of CLIP alone, averaged over the heads.

    No prompt and no severance takes part: this is what DeOP's Fig. 5 sets against its heatmaps.

    ``padded``: (1, 3, H', W'), see `DecoupledModel.pad`. Returns (P, P), rows attend; with the class token's column
    each row would sum to 1.
    """
    tower, (rows, columns) = model.clip.image_tower, model.grid(padded)
    patch = tower.patch_size
    images = padded[..., : rows * patch, : columns * patch]
    tokens, grid = tower.embed(images, interpolation="bicubic", by_count=True)
    tokens = tower.run(tokens, grid, stop=tower.num_blocks - 1).tokens
    query, key, _ = model.clip.patch_tower.blocks[-1].qkv(tokens)
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return weights.mean(dim=1)[0, 1:, 1:]


@torch.no_grad()
def anchor_figure(segmenter: Segmenter, image: str | Path, points: Sequence[Point] = ()) -> Figure:
    """CLIP's attention from a patch, the proposal it lies in, and the heatmap of that proposal's anchors.

    DeOP, Fig. 5 and 8: the picture with the patch, CLIP's self-attention from it in the last block, the proposal whose
    mask is largest there, and the heatmap that pools this proposal (averaged over the heads). The proposals are those
    of the whole picture at once; a generator that reads words (Mask2Former with context interaction) is shown none but
    the row "no object", so that its proposals are not quite those of any prediction. Each map has a scale of its own.

    ``points``: pixels (column, row); none takes the middle. Raises LexisegError if the model is no DeOP or has no
    proposal, the picture is wrong, or a point lies outside it.
    """
    model = segmenter.model
    if not isinstance(model, DeOP):
        raise LexisegError(f"{model.system} has no anchors to draw; choose a deop model.")
    picture = read_picture(segmenter, image)
    chosen = chosen_points(points, (picture.shape[1], picture.shape[0]), image)
    images = segmenter.pixels(image)
    height, width = images.shape[-2:]
    with EvaluationMode(model, None)():
        padded = model.pad(images)
        text = model.no_object_row() if model.generator.needs_text else None
        proposals = model.propose(padded, text, (int(height), int(width)))
        mask_logits = proposals.mask_logits
        if not mask_logits.shape[1]:
            raise LexisegError(f"The model proposes no region in '{image_name(image)}'; choose another picture.")
        features = unit_or_zero(model.patches(padded, mask_logits, (height, width)))
        heat = model.region_heatmaps(features, mask_logits).mean(dim=1)[0].cpu()  # over the heads
        attention = attention_maps(model, padded).cpu()
        masks = model.upsampled(mask_logits.float(), padded)[0, :, :height, :width].sigmoid().cpu()
    rows, columns = model.grid(padded)
    patch = model.clip.patch_size
    shown = (-(-min(rows * patch, height) // patch), -(-min(columns * patch, width) // patch))
    extent = picture.shape[0] / picture.shape[1]
    panels = []
    for column, row in chosen:
        y, x = row * height // picture.shape[0], column * width // picture.shape[1]
        place = min(y // patch, rows - 1), min(x // patch, columns - 1)
        best = int(masks[:, y, x].argmax())
        top, left = place[0] * patch / height, place[1] * patch / width
        box = (left, top, left + patch / width, top + patch / height)
        around = attention[place[0] * columns + place[1]].unflatten(0, (rows, columns))
        first = Panel(picture, f"patch at {column}, {row}", box=box, extent=extent)
        panels.append(
            [
                first,
                replace(first, image=_map(around, shown), caption="self-attention", note="CLIP, last block"),
                replace(first, image=masks[best].numpy(), caption=f"proposal {best + 1}", note="mask"),
                replace(first, image=_map(heat[best], shown), caption="anchors", note="heatmap"),
            ]
        )
    return compose(
        "Self-attention and classification anchors",
        panels,
        scale=Scale(0.0, 1.0, "fraction of the largest value"),
        subtitle=f"{Path(image_name(image)).name}; patches {columns} x {rows}; {model.options.heatmaps} anchors",
    )


def top_classes(scores: RegionScores, k: int) -> tuple[Tensor, Tensor]:
    """The best classes of each proposal of one picture.

    ``k``: how many, at most as many as there are classes. Returns values and class indices, (N, k) each, best first. A
    class of several words has the score of its best one.
    """
    column = GridScores(scores.class_scores[:1].detach().mT[..., None], word_to_class=scores.word_to_class)
    values, indices = column.top_k((scores.class_scores.shape[1], 1), min(k, scores.num_classes))
    return values[0, :, :, 0].T, indices[0, :, :, 0].T


def top_classes_figure(
    segmenters: Segmenter | Sequence[Segmenter],
    image: str | Path,
    classes: VocabularySource,
    *,
    proposals: int = 8,
    k: int = 5,
    by: ScoresBy = "clip",
    names: Sequence[str] = (),
) -> Figure:
    """The proposals that decide most of a picture, and the best classes of each (MAFT, Fig. 1, 3 and 7).

    A proposal decides a pixel if its mask there times the score of its best class is the largest in the prediction.
    Several models all classify the first one's proposals, so that only their classifiers differ.

    ``segmenters``: one or several, each with a decoupled model; a row of panels each. ``classes``: the words, as
    `Segmenter.predict` takes them; names of unseen classes are red. ``proposals``: how many are shown at most. ``by``:
    whose scores: "clip" is what CLIP, or MAFT's tuned copy of it, says of a region by itself (the paper's A^c);
    "ensemble" what the model predicts from, in which the generator may have a say. DeOP's are CLIP's in both.
    ``names``: of the models, see `told_apart`. Raises LexisegError if a model has no proposals, proposes none here, or
    CLIP is not asked about them; the picture or the classes are wrong; several models are to be compared by their
    ensembles.
    """
    several = [segmenters] if isinstance(segmenters, Segmenter) else list(segmenters)
    for segmenter in several:
        _check(segmenter.model, by)
    if len(several) > 1 and by != "clip":
        raise LexisegError(
            "Several models can be compared on the first one's proposals only by 'clip'; draw ensembles one at a time."
        )
    if not 1 <= proposals <= _MAX_PROPOSALS:
        raise LexisegError(f"{proposals} proposals do not fit into one figure; choose from 1 to {_MAX_PROPOSALS}.")
    first = several[0]
    vocabulary = first.vocabulary(classes)
    picture = read_picture(first, image)
    scores = _region_scores(first, image, vocabulary)
    if not scores.masks.shape[1]:
        raise LexisegError(f"The model proposes no region in '{image_name(image)}'; choose another picture.")
    factor = min(1.0, _MASK_SIDE / max(picture.shape[:2]))
    size = (max(1, round(picture.shape[0] * factor)), max(1, round(picture.shape[1] * factor)))
    masks = region_masks(scores, size)
    deciding = top_classes(scores, 1)[0].cpu()
    owner = (masks * deciding[:, :, None]).argmax(dim=0)
    pixels = torch.bincount(owner.flatten(), minlength=len(masks))
    order = [int(index) for index in pixels.argsort(descending=True, stable=True)[:proposals] if pixels[index]]
    labels = [*vocabulary.names, "background"]
    unseen = {index for index, entry in enumerate(vocabulary.classes) if entry.seen is False}
    rows: list[list[Panel]] = []
    titles = told_apart([segmenter.model.system for segmenter in several], names)
    for segmenter, title in zip(several, titles, strict=True):
        judged = scores if by == "ensemble" else _judged(segmenter, image, vocabulary, first)
        values, indices = (found.cpu() for found in top_classes(judged, k))
        panels = []
        for index in order:
            fraction = float(pixels[index]) / owner.numel()
            bars = tuple(
                (labels[which], value, ACCENT if which in unseen else INK)
                for value, which in zip(values[index].tolist(), indices[index].tolist(), strict=True)
            )
            note = f"decides {100 * fraction:.0f} % of the picture" if segmenter is first else "the same region"
            caption = f"proposal {index + 1}" + (f": {title}" if len(several) > 1 else "")
            panels.append(Panel(_lit(picture, masks[index]), caption, note, bars=bars))
        rows += in_rows(panels)
    return compose(
        f"Best classes of the proposals: {', '.join(titles)}",
        rows,
        subtitle=f"{Path(image_name(image)).name}; {scores.masks.shape[1]} proposals; "
        f"scores {_SCORES_OF[by]}; red: unseen in training",
    )


def _check(model: SegmentationModel, by: ScoresBy) -> None:
    if not isinstance(model, DecoupledModel):
        raise LexisegError(f"{model.system} has no proposals; choose zsseg, zegformer, freeseg or deop.")
    if by == "clip" and isinstance(model, RegionModel) and model.region_encoder is None:
        raise LexisegError("This model scores proposals without CLIP; draw by 'ensemble'.")


def _region_scores(segmenter: Segmenter, image: str | Path, vocabulary: Vocabulary) -> RegionScores:
    scores = segmenter.scores(image, vocabulary)
    if not isinstance(scores, RegionScores):
        raise LexisegError(
            "Proposals are drawn on whole pictures; this model runs in windows, so remove its window_size."
        )
    return scores


@torch.no_grad()
def _judged(segmenter: Segmenter, image: str | Path, vocabulary: Vocabulary, owner: Segmenter) -> RegionScores:
    """CLIP's own scores of the proposals of ``owner``'s model, which may be the segmenter itself."""
    model, other = segmenter.model, owner.model
    options = model.options
    if isinstance(model, RegionModel):
        model.options = model.options.with_values({"ensemble": {"rule": "region"}})
    try:
        if owner is segmenter:
            return _region_scores(segmenter, image, vocabulary)
        assert isinstance(model, DecoupledModel) and isinstance(other, DecoupledModel)
        text = [one.model.embed_text(one.embedder, vocabulary) for one in (owner, segmenter)]
        images = owner.pixels(image)
        proposals = other.propose(other.pad(images), text[0], (int(images.shape[-2]), int(images.shape[-1])))
        mine = model.with_proposals(model.frame(segmenter.pixels(image)), proposals)
        scores = model.score(mine, text[1], word_to_class=vocabulary.word_to_class)
        assert isinstance(scores, RegionScores)
        return scores
    finally:
        model.options = options


def region_masks(scores: RegionScores, size: tuple[int, int]) -> Tensor:
    """The masks of one picture's region scores at a size, (N, H, W) float32 on the CPU; logits come as 0..1."""
    masks = scores.masks[:1]
    alone = torch.eye(masks.shape[1], device=masks.device)[None]
    return replace(scores, class_scores=alone, masks=masks, word_to_class=None, offsets=None).dense(size)[0].cpu()


def _map(values: Tensor, shown: tuple[int, int]) -> NDArray[np.floating]:
    """A map over patches without the padding, 1 at its largest value."""
    inside = values[: shown[0], : shown[1]]
    largest = float(inside.max())
    return (inside / largest if largest > 0 else inside).numpy()


def _lit(picture: NDArray[np.uint8], mask: Tensor) -> NDArray[np.uint8]:
    """The picture, dark and grey outside the mask."""
    weight = resize_masks(mask[None, None], picture.shape[:2])[0, 0].clamp(0, 1).numpy()[..., None]
    grey = picture.mean(axis=2, keepdims=True) * 0.3
    return np.round(picture * weight + grey * (1 - weight)).astype(np.uint8)
