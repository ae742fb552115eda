"""From a field to pixels: the best class, the best k, or all of them; all but the last in memory bounded for any C.

Where the grid is much coarser than the picture, candidates are pruned by bounds (`lexiseg.scores.pruning`); elsewhere,
or where that drops too few, all words are streamed over in tiles.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

from lexiseg.scores.fields import BLOCK_COLUMNS, BLOCK_ROWS, BLOCK_WORDS, Field, Words
from lexiseg.scores.pruning import Writer, budget, margin_of, prune, tile_ranges

Rectangle = tuple[int, int, int, int]
"""(top, bottom, left, right) in pixels."""
LEAST_WORK = 1 << 23
"""Scores below which a thread costs more than it saves."""


def best(field: Field, word_to_class: Tensor | None, labels: Tensor, scores: Tensor | None) -> None:
    """Write the best class of each pixel into ``labels`` (H, W) int64, its score into ``scores`` (H, W) if given."""
    writer = Writer(word_to_class, labels, scores)
    rows, columns = tile_ranges(field.cells(0)), tile_ranges(field.cells(1))
    if not _worth_pruning(field, rows, columns):
        _stream(field, _rectangles(field, (0, field.height, 0, field.width)), writer)
        return
    margin = margin_of(field)

    def decide(some_rows: Tensor) -> None:
        for part, block_rows, block_columns in _tile_blocks(field, some_rows, columns):
            if not prune(part, block_rows, block_columns, margin, writer):
                _stream(part, _rectangles(part, _around(block_rows, block_columns)), writer)

    in_threads(decide, rows, field.device, field.num_words * field.height * field.width)


def top_k(field: Field, word_to_class: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """Write the k best scores of each pixel into ``values`` (k, H, W), their classes into ``indices``, best first."""
    k = values.shape[0]
    classes = torch.arange(field.num_words, device=field.device) if word_to_class is None else word_to_class
    rows, columns = tile_ranges(field.cells(0)), tile_ranges(field.cells(1))
    if not _worth_pruning(field, rows, columns):
        for rectangle in _rectangles(field, (0, field.height, 0, field.width)):
            _rank(field, None, classes, rectangle, values, indices)
        return
    margin = margin_of(field)
    # The k classes with the highest lower bounds have at least k words, and at most k times the most synonyms.
    rank = min(k * int(classes.bincount().max()), field.num_words)
    for part, block_rows, block_columns in _tile_blocks(field, rows, columns):
        lower, upper = part.interval(block_rows, block_columns)
        keep = upper >= lower.topk(rank, dim=0).values[-1] - margin
        for i, some_rows in enumerate(block_rows.split(1, 1)):
            for j, some_columns in enumerate(block_columns.split(4, 1)):
                words = keep[:, i, 4 * j : 4 * j + 4].any(1).nonzero().view(-1)
                _rank(part, words, classes, _around(some_rows, some_columns), values, indices)


def dense(field: Field, word_to_class: Tensor | None, out: Tensor, classes: Tensor | None = None) -> None:
    """Write the scores of every class, or of some ``classes`` (K,), ascending, at every pixel into ``out``."""
    owners = torch.arange(field.num_words, device=field.device) if word_to_class is None else word_to_class
    words = None if classes is None else torch.isin(owners, classes.to(field.device)).nonzero().view(-1)
    for rectangle in _rectangles(field, (0, field.height, 0, field.width)):
        top, bottom, left, right = rectangle
        done = 0
        for chunk in _class_chunks(field, (bottom - top) * (right - left), owners, words):
            values, found = _merge_synonyms(field.block(chunk, *rectangle), owners[chunk])
            out[done : done + len(found), top:bottom, left:right] = values
            done += len(found)


def _stream(field: Field, rectangles: Iterator[Rectangle], writer: Writer) -> None:
    """Compare all words at every pixel of the rectangles."""
    for place in rectangles:
        top, bottom, left, right = place
        winner = torch.zeros(bottom - top, right - left, dtype=torch.long, device=field.device)
        score = torch.full(winner.shape, -torch.inf, dtype=torch.float32, device=field.device)
        size = _chunk_size(field, winner.numel())
        for start in range(0, field.num_words, size):
            values = field.block(slice(start, min(start + size, field.num_words)), *place)
            largest = values.amax(0)
            better = largest > score
            if bool(better.any()):
                winner = torch.where(better, _first_equal(values, largest) + start, winner)
                score = torch.maximum(score, largest)
        writer.rectangle(place, winner, score)


def _first_equal(values: Tensor, largest: Tensor) -> Tensor:
    """int64 index of the first of the ``values`` (w, ...) that equals ``largest`` (...)."""
    found = torch.full(largest.shape, len(values) - 1, dtype=torch.long, device=values.device)
    # Positions in bytes keep this a fast pass over memory; later chunks come first, and earlier ones overwrite them.
    size = 255
    for start in range((len(values) - 1) // size * size, -1, -size):
        part = values[start : start + size]
        order = torch.arange(len(part), dtype=torch.uint8, device=values.device).view(-1, *[1] * largest.dim())
        # The position where they are equal, 255 elsewhere; torch.where takes three times as long.
        first = (part != largest).view(torch.uint8).neg_().bitwise_or_(order).amin(0)
        found = torch.where(first < size, first.long() + start, found)
    return found


def _rank(
    field: Field, words: Tensor | None, classes: Tensor, rectangle: Rectangle, values: Tensor, indices: Tensor
) -> None:
    """Write the best classes of a rectangle, among ``words`` (ascending) or all words."""
    top, bottom, left, right = rectangle
    k = values.shape[0]
    shape = (bottom - top, right - left)
    leaders = values.new_empty(0, shape[0] * shape[1])
    leading = indices.new_empty(leaders.shape)
    for chunk in _class_chunks(field, leaders.shape[1], classes, words):
        found, index = _merge_synonyms(field.block(chunk, *rectangle).flatten(1), classes[chunk])
        found, names = torch.cat((leaders, found)), torch.cat((leading, index[:, None].expand(found.shape)))
        # A stable sort keeps equal scores in the order of their classes.
        found, order = found.t().sort(dim=1, descending=True, stable=True)
        leaders, leading = found[:, :k].t(), names.t().gather(1, order[:, :k]).t()
    values[:, top:bottom, left:right] = leaders.reshape(k, *shape)
    indices[:, top:bottom, left:right] = leading.reshape(k, *shape)


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


def _around(rows: Tensor, columns: Tensor) -> Rectangle:
    """The rectangle of ascending inclusive ranges (2, n) and (2, m)."""
    return int(rows[0, 0]), int(rows[1, -1]) + 1, int(columns[0, 0]), int(columns[1, -1]) + 1


def _tile_blocks(field: Field, rows: Tensor, columns: Tensor) -> Iterator[tuple[Field, Tensor, Tensor]]:
    """Groups of tiles whose bounds for all words fit the budget, each with its local field."""
    tiles = max(1, 2 * budget(field) // field.num_words)
    num_columns = min(columns.shape[1], tiles)
    num_rows = max(1, tiles // num_columns)
    for y in rows.split(num_rows, 1):
        for x in columns.split(num_columns, 1):
            yield field.local(*_around(y, x)), y, x


def _rectangles(field: Field, place: Rectangle) -> Iterator[Rectangle]:
    """Tiles that cover a rectangle: as many blocks of `Mixture` in each as the budget lets."""
    block = BLOCK_ROWS * BLOCK_COLUMNS
    blocks = max(1, 2 * budget(field) // (min(field.num_words, BLOCK_WORDS) * block))
    across = min(blocks, -(-field.width // BLOCK_COLUMNS))
    height, width = BLOCK_ROWS * max(1, blocks // across), BLOCK_COLUMNS * across
    for top in range(place[0], place[1], height):
        for left in range(place[2], place[3], width):
            yield top, min(top + height, place[1]), left, min(left + width, place[3])


def _chunk_size(field: Field, area: int) -> int:
    """How many words' scores on ``area`` pixels fit the budget, in whole blocks of `Mixture`."""
    return max(1, 2 * budget(field) // (area * BLOCK_WORDS)) * BLOCK_WORDS


def _class_chunks(field: Field, area: int, classes: Tensor, words: Tensor | None) -> Iterator[Words]:
    """All words, or some (ascending), in parts whose scores on ``area`` pixels fit the budget; no class is cut in two.

    ``classes`` (num_words,) says which class each word belongs to, non-decreasing.
    """
    size = _chunk_size(field, area) if words is None else max(1, budget(field) // area)
    owners = classes if words is None else classes[words]
    cuts = [0]
    while cuts[-1] < len(owners):
        at = min(cuts[-1] + size, len(owners))
        before = int(torch.searchsorted(owners, owners[at - 1]))
        after = int(torch.searchsorted(owners, owners[at - 1], right=True))
        cuts.append(at if after == at else before if before > cuts[-1] else after)
    for start, stop in pairwise(cuts):
        yield slice(start, stop) if words is None else words[start:stop]


def in_threads(decide: Callable[[Tensor], None], rows: Tensor, device: torch.device, work: int) -> None:
    """Decide ranges (2, n) of rows, a piece in each of torch's threads where ``work`` scores pay for more than one.

    The decode is many small steps, between which cores wait for each other; rows do not depend on each other, so each
    core takes rows of its own. An error in one of them is raised here.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or work < LEAST_WORK or min(threads, rows.shape[1]) < 2:
        return decide(rows)
    inference = torch.is_inference_mode_enabled()

    def run(piece: Tensor) -> None:
        # Gradient modes belong to a thread, so those of the caller are taken along.
        with torch.inference_mode(inference), torch.no_grad():
            decide(piece)

    try:
        # One torch thread in each: it is set for the thread that asks.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, rows.tensor_split(min(threads, rows.shape[1]), 1)))
    finally:
        torch.set_num_threads(threads)
