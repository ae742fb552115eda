"""From a field to pixels: the best class, the best k, or all of them; all but the last in memory bounded for any C.

Where the grid is much coarser than the picture, words that cannot win are found by bounds (`contest`); otherwise bounds
do not pay, and all words are streamed over in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lexiseg.scores._contest import Writer, branch_and_bound, budget, first_equal, margin_of, tile_ranges
from lexiseg.scores._fields import BLOCK_COLUMNS, BLOCK_ROWS, BLOCK_WORDS, Field, Words
from lexiseg.scores._threads import run_all, shares


def best(field: Field, word_to_class: Tensor | None, labels: Tensor, scores: Tensor | None) -> None:
    """Write the best class of each pixel into ``labels`` (H, W) int64, its score into ``scores`` (H, W) if given."""
    writer = Writer(word_to_class, labels, scores)
    rows, columns = tile_ranges(field.cells(0)), tile_ranges(field.cells(1))
    if _worth_pruning(field, rows, columns):
        margin = margin_of(field)

        def decide(some_rows: Tensor) -> None:
            for part, block_rows, block_columns in _tile_blocks(field, some_rows, columns):
                branch_and_bound(part, block_rows, block_columns, margin, writer)

        work = field.num_words * field.height * field.width
        run_all([partial(decide, some) for some in shares(rows, field.device, work)])
        return
    for top, bottom, left, right in _rectangles(field):
        winner = torch.zeros(bottom - top, right - left, dtype=torch.long, device=field.device)
        score = torch.full(winner.shape, -torch.inf, device=field.device)
        for words in _word_chunks(field, (bottom - top) * (right - left)):
            values = field.block(words, top, bottom, left, right)
            largest = values.amax(0)
            better = largest > score
            if bool(better.any()):
                winner = torch.where(better, first_equal(values, largest) + words.start, winner)
                score = torch.maximum(score, largest)
        writer.rectangle(top, bottom, left, right, winner, score)


def top_k(field: Field, word_to_class: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """Write the k best scores of each pixel into ``values`` (k, H, W), their classes into ``indices``, best first."""
    k = values.shape[0]
    classes = torch.arange(field.num_words, device=field.device) if word_to_class is None else word_to_class
    rows, columns = tile_ranges(field.cells(0)), tile_ranges(field.cells(1))
    if not _worth_pruning(field, rows, columns):
        for rectangle in _rectangles(field):
            _rank(field, None, classes, rectangle, values, indices)
        return
    margin = margin_of(field)
    # The k classes with the highest lower bounds have at least k words, and at most k times the most synonyms.
    rank = min(k * int(classes.bincount().max()), field.num_words)
    for part, block_rows, block_columns in _tile_blocks(field, rows, columns):
        lower, upper = part.interval(block_rows, block_columns)
        keep = upper >= lower.topk(rank, dim=0).values[-1] - margin
        num_rows, num_columns = block_rows.shape[1], block_columns.shape[1]
        for i in range(num_rows):
            for j in range(0, num_columns, 4):
                words = keep[:, i, j : j + 4].any(1).nonzero().view(-1)
                last = min(j + 4, num_columns) - 1
                rectangle = (
                    int(block_rows[0, i]),
                    int(block_rows[1, i]) + 1,
                    int(block_columns[0, j]),
                    int(block_columns[1, last]) + 1,
                )
                _rank(part, words, classes, rectangle, values, indices)


def dense(field: Field, word_to_class: Tensor | None, out: Tensor) -> None:
    """Write the score of every class at every pixel into ``out`` (C, H, W)."""
    for top, bottom, left, right in _rectangles(field):
        for words in _word_chunks(field, (bottom - top) * (right - left), word_to_class):
            values = field.block(words, top, bottom, left, right)
            classes = words
            if word_to_class is not None:
                values, index = _merge_synonyms(values, word_to_class[words])
                classes = slice(int(index[0]), int(index[-1]) + 1)
            out[classes, top:bottom, left:right] = values


def dense_of(field: Field, word_to_class: Tensor | None, classes: Tensor, out: Tensor) -> None:
    """Write the scores of some ``classes`` (K,), ascending, at every pixel into ``out`` (K, H, W)."""
    owners = torch.arange(field.num_words, device=field.device) if word_to_class is None else word_to_class
    words = torch.isin(owners, classes.to(field.device)).nonzero().view(-1)
    for top, bottom, left, right in _rectangles(field):
        cuts = _class_cuts(owners[words], max(1, 2 * budget(field) // ((bottom - top) * (right - left))))
        done = 0
        for start, stop in pairwise(cuts):
            values = field.block(words[start:stop], top, bottom, left, right)
            values, found = _merge_synonyms(values, owners[words[start:stop]])
            out[done : done + len(found), top:bottom, left:right] = values
            done += len(found)


def _rank(
    field: Field,
    words: Tensor | None,
    classes: Tensor,
    rectangle: tuple[int, int, int, int],
    values: Tensor,
    indices: Tensor,
) -> None:
    """Write the best classes of a rectangle, among ``words`` (ascending) or all words."""
    top, bottom, left, right = rectangle
    k, area = values.shape[0], (bottom - top) * (right - left)
    chunks: list[Words] = []
    if words is None:
        chunks.extend(_word_chunks(field, area, classes))
    else:
        cuts = _class_cuts(classes[words], max(1, budget(field) // area))
        chunks.extend(words[start:stop] for start, stop in pairwise(cuts))
    leaders: Tensor | None = None
    leading: Tensor | None = None
    for chunk in chunks:
        found, index = _merge_synonyms(field.block(chunk, *rectangle).flatten(1), classes[chunk])
        names = index[:, None].expand(found.shape)
        if leaders is not None and leading is not None:
            found, names = torch.cat((leaders, found)), torch.cat((leading, names))
        # A stable sort keeps equal scores in the order of their classes.
        found, order = found.t().sort(dim=1, descending=True, stable=True)
        leaders, leading = found[:, :k].t(), names.t().gather(1, order[:, :k]).t()
    if leaders is not None and leading is not None:
        values[:, top:bottom, left:right] = leaders.reshape(k, bottom - top, right - left)
        indices[:, top:bottom, left:right] = leading.reshape(k, bottom - top, right - left)


def _merge_synonyms(values: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the ``values`` (w, ...) of each class, and those classes. ``classes`` (w,) is non-decreasing."""
    index, counts = classes.unique_consecutive(return_counts=True)
    if len(index) == len(classes):
        return values, index
    start = counts.cumsum(0) - counts
    merged = values[start]
    for synonym in range(1, int(counts.max())):
        having = (counts > synonym).nonzero().view(-1)
        merged[having] = torch.maximum(merged[having], values[start[having] + synonym])
    return merged, index


def _worth_pruning(field: Field, rows: Tensor, columns: Tensor) -> bool:
    return field.num_words > 1 and field.height * field.width >= 8 * rows.shape[1] * columns.shape[1]


def _tile_blocks(field: Field, rows: Tensor, columns: Tensor) -> Iterator[tuple[Field, Tensor, Tensor]]:
    """Groups of tiles whose bounds for all words fit the budget, each with its local field."""
    tiles = max(1, 2 * budget(field) // field.num_words)
    num_columns = min(columns.shape[1], tiles)
    num_rows = max(1, tiles // num_columns)
    for y in rows.split(num_rows, 1):
        for x in columns.split(num_columns, 1):
            yield field.local(int(y[0, 0]), int(y[1, -1]) + 1, int(x[0, 0]), int(x[1, -1]) + 1), y, x


def _rectangles(field: Field) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of tiles that cover the picture: as many blocks of `Mixture` as the budget lets."""
    block = BLOCK_ROWS * BLOCK_COLUMNS
    blocks = max(1, 2 * budget(field) // (min(field.num_words, BLOCK_WORDS) * block))
    across = min(blocks, -(-field.width // BLOCK_COLUMNS))
    height, width = BLOCK_ROWS * max(1, blocks // across), BLOCK_COLUMNS * across
    for top in range(0, field.height, height):
        for left in range(0, field.width, width):
            yield top, min(top + height, field.height), left, min(left + width, field.width)


def _word_chunks(field: Field, area: int, word_to_class: Tensor | None = None) -> Iterator[slice]:
    """Ranges of words whose scores on ``area`` pixels fit the budget; with classes, no class is cut in two."""
    size = max(1, 2 * budget(field) // (area * BLOCK_WORDS)) * BLOCK_WORDS
    if word_to_class is None:
        for start in range(0, field.num_words, size):
            yield slice(start, min(start + size, field.num_words))
        return
    cuts = _class_cuts(word_to_class, size)
    for start, stop in pairwise(cuts):
        yield slice(start, stop)


def _class_cuts(classes: Tensor, size: int) -> list[int]:
    """Where to cut a non-decreasing list of classes into pieces of about ``size`` without cutting a class."""
    cuts = [0]
    while cuts[-1] < len(classes):
        at = min(cuts[-1] + size, len(classes))
        before = int(torch.searchsorted(classes, classes[at - 1]))
        after = int(torch.searchsorted(classes, classes[at - 1], right=True))
        cuts.append(at if after == at else before if before > cuts[-1] else after)
    return cuts
