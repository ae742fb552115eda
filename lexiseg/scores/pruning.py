"""Candidate pruning: which word wins at each pixel, by branch and bound.

The picture is cut into tiles that lie between the same grid points; in each, a word whose upper bound is below another
word's lower bound cannot win and is no candidate. Tiles that still have several candidates are cut into four, down to a
few pixels, where the candidates left are compared pixel by pixel with the arithmetic of ``dense``. The bounds are
widened by what rounding can do, so no winner is ever dropped: the result equals ``dense().argmax()`` bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lexiseg.scores.arithmetic import every, spread
from lexiseg.scores.fields import Field

LONGEST_TILE = 32
LEAF = 4
"""Tiles of at most this side are compared pixel by pixel."""
MANY = 8
"""Candidates a tile up to which it does not pay to compare them with the best one."""
# Where bounds drop less than half of the words, it pays; where that too drops less than a tenth, as in ties, comparing
# all of them everywhere is cheaper.
_MANY_KEPT, _MOST_KEPT = 0.5, 0.9


@dataclass(frozen=True)
class Writer:
    """Turns words into classes and puts them where they belong."""

    word_to_class: Tensor | None
    labels: Tensor
    scores: Tensor | None

    def rectangle(self, place: tuple[int, int, int, int], words: Tensor, scores: Tensor) -> None:
        """Write words and scores (h, w) of the pixels from top to bottom and left to right."""
        top, bottom, left, right = place
        self.labels[top:bottom, left:right] = self._classes(words)
        if self.scores is not None:
            self.scores[top:bottom, left:right] = scores

    def places(self, rows: Tensor, columns: Tensor, words: Tensor, scores: Tensor | None) -> None:
        """Write words (R, C, T), or (1, 1, T) where a tile has one, at rows (R, T) and columns (C, T)."""
        place = (rows * self.labels.shape[1])[:, None] + columns[None]
        flat = place.view(-1)
        self.labels.view(-1).scatter_(0, flat, self._classes(words).expand(place.shape).reshape(-1))
        if self.scores is not None and scores is not None:
            self.scores.view(-1).scatter_(0, flat, scores.reshape(-1))

    def _classes(self, words: Tensor) -> Tensor:
        return words if self.word_to_class is None else self.word_to_class[words]


@dataclass(frozen=True)
class _Candidates:
    """Tiles that are not decided, and the words that can still win in them."""

    words: Tensor  # (P,) the candidates; those of a tile are adjacent and ascending
    tiles: Tensor  # (P,) which tile each stands in, non-decreasing from 0 without gaps
    rows: Tensor  # (2, T) inclusive ranges
    columns: Tensor  # (2, T) inclusive ranges

    def part(self, pairs: Tensor) -> _Candidates:
        """These of the candidates, and the tiles they stand in."""
        tiles = self.tiles.index_select(0, pairs)
        kept, tiles = tiles.unique_consecutive(return_inverse=True)
        return _Candidates(self.words.index_select(0, pairs), tiles, self.rows[:, kept], self.columns[:, kept])

    def cut(self, limit: int) -> list[_Candidates]:
        """Two halves without common tiles, if there are more than ``limit`` candidates in more than one tile."""
        if len(self.words) <= limit or self.rows.shape[1] == 1:
            return [self]
        tile = max(1, int(self.tiles[len(self.tiles) // 2]))
        pair = int(torch.searchsorted(self.tiles, tile))
        return [
            _Candidates(self.words[:pair], self.tiles[:pair], self.rows[:, :tile], self.columns[:, :tile]),
            _Candidates(self.words[pair:], self.tiles[pair:] - tile, self.rows[:, tile:], self.columns[:, tile:]),
        ]


def prune(field: Field, rows: Tensor, columns: Tensor, margin: float, writer: Writer) -> bool:
    """Decide the pixels of the tiles ``rows`` (2, n) x ``columns`` (2, m), inclusive; False if it does not pay."""
    lower, upper = field.interval(rows, columns)
    largest = lower.amax(0)
    keep = upper >= largest - margin
    most = max(_MOST_KEPT * keep.numel(), 2 * keep[0].numel())
    if int(keep.sum()) > max(MANY * keep[0].numel(), _MANY_KEPT * keep.numel()):
        # Words that have the same value all over a tile tie there, and the first one wins.
        tied = (lower == largest) & (upper == largest)
        keep &= ~tied | (tied.byte().argmax(0) == torch.arange(len(tied), device=tied.device)[:, None, None])
        # Bounds cannot tell words apart whose scores go up and down together; in their differences that cancels.
        gaps = field.gaps(lower.add_(upper).argmax(0), rows, columns)
        keep &= True if gaps is None else gaps <= margin
    keep = keep.flatten(1)
    del lower, upper
    tiles, words = keep.t().contiguous().nonzero().unbind(1)
    start = _Candidates(words, tiles, rows.repeat_interleave(columns.shape[1], 1), columns.repeat(1, rows.shape[1]))
    if len(words) > most:
        return False
    stack = [start]
    while stack:
        candidates = stack.pop()
        halves = candidates.cut(budget(field) // 16)
        if len(halves) > 1:
            stack.extend(halves)
            continue
        decided = (candidates.tiles.bincount() == 1)[candidates.tiles]
        alone = decided.nonzero().view(-1)
        if len(alone):
            _settle(field, candidates.part(alone), writer)
            if len(alone) == len(decided):
                continue
            candidates = candidates.part((~decided).nonzero().view(-1))
        if max(_longest(candidates.rows), _longest(candidates.columns)) <= LEAF:
            _compare(field, candidates, writer)
        else:
            stack.append(_quarter(field, candidates, margin))
    return True


def _quarter(field: Field, candidates: _Candidates, margin: float) -> _Candidates:
    """Cut each tile into four and drop, in each quarter, the words that cannot win there."""
    rows, columns = _halves(candidates.rows), _halves(candidates.columns)
    num_tiles = rows.shape[2]
    size = budget(field) // 8
    chunks = zip(candidates.words.split(size), candidates.tiles.split(size), strict=True)
    bounds = [field.extremes(words, tiles, rows, columns) for words, tiles in chunks]
    # Quarter by quarter, so that the words of each new tile are adjacent.
    lower, upper = (torch.cat(bound, 2).flatten() for bound in zip(*bounds, strict=True))
    tiles = (candidates.tiles + num_tiles * torch.arange(4, device=field.device)[:, None]).flatten()
    largest = lower.new_full((4 * num_tiles,), -torch.inf).scatter_reduce_(0, tiles, lower, "amax")
    kept = (upper >= largest.index_select(0, tiles) - margin).nonzero().view(-1)
    return _Candidates(
        candidates.words.index_select(0, kept % len(candidates.words)),
        tiles.index_select(0, kept),
        rows[:, None].expand(2, 2, 2, -1).permute(2, 0, 1, 3).reshape(2, -1),
        columns[None].expand(2, 2, 2, -1).permute(2, 0, 1, 3).reshape(2, -1),
    )


def _settle(field: Field, candidates: _Candidates, writer: Writer) -> None:
    """Write tiles that have one candidate left."""
    height, width = _longest(candidates.rows), _longest(candidates.columns)
    step = max(1, budget(field) // (4 * height * width))
    for start in range(0, len(candidates.words), step):
        part = slice(start, start + step)
        words = candidates.words[part]
        y, x = every(candidates.rows[:, part]), every(candidates.columns[:, part])
        tiles = torch.arange(len(words), device=field.device)
        scores = None if writer.scores is None else field.points(words, tiles, y, x)
        writer.places(y, x, words[None, None], scores)


def _compare(field: Field, candidates: _Candidates, writer: Writer) -> None:
    """Compare the candidates of each small tile pixel by pixel: a knock-out in which a tie goes to the first."""
    tiles, num_tiles = candidates.tiles, candidates.rows.shape[1]
    y, x = every(candidates.rows), every(candidates.columns)
    values = field.points(candidates.words, tiles, y, x).flatten(0, 1)
    winner = candidates.words.expand(values.shape)
    counts = tiles.bincount()
    rank = torch.arange(len(tiles), device=field.device) - (counts.cumsum(0) - counts).index_select(0, tiles)
    while len(tiles) > num_tiles:
        stays = (rank % 2 == 0).nonzero().view(-1)
        rival = (stays + 1).clamp_(max=len(tiles) - 1)
        own_values, own_winner = spread(values, stays), spread(winner, stays)
        values, winner = spread(values, rival), spread(winner, rival)
        beaten = (values > own_values) & (tiles.index_select(0, rival) == tiles.index_select(0, stays))
        winner = torch.where(beaten, winner, own_winner)
        values = torch.where(beaten, values, own_values)
        tiles, rank = tiles.index_select(0, stays), rank.index_select(0, stays) // 2
    writer.places(y, x, winner.view(len(y), len(x), -1), values)


def margin_of(field: Field) -> float:
    """By how much an upper bound must be below a lower one to be certain of the computed values."""
    magnitude, error = field.limits()
    return 4 * error + 2.0**-22 * magnitude


def budget(field: Field) -> int:
    """How many scores are worked on at a time: about what a processor's cache holds, and more on an accelerator."""
    return 1 << 20 if field.device.type == "cpu" else 1 << 24


def tile_ranges(cells: Tensor) -> Tensor:
    """Inclusive ranges (2, n) of places in one cell, long ones cut into equal pieces."""
    ends = torch.cat(((cells[1:] != cells[:-1]).nonzero().view(-1), cells.new_tensor([len(cells) - 1])))
    starts = torch.cat((ends.new_zeros(1), ends[:-1] + 1))
    lengths = ends - starts + 1
    pieces = (lengths + LONGEST_TILE - 1) // LONGEST_TILE
    run = torch.arange(len(pieces), device=cells.device).repeat_interleave(pieces)
    piece = torch.arange(len(run), device=cells.device) - (pieces.cumsum(0) - pieces)[run]
    first = starts[run] + lengths[run] * piece // pieces[run]
    last = starts[run] + lengths[run] * (piece + 1) // pieces[run] - 1
    return torch.stack((first, last))


def _halves(ranges: Tensor) -> Tensor:
    """(2, 2, T): both halves of inclusive ranges (2, T); they share the middle place where the length is odd."""
    first, last = ranges
    half = (last - first) // 2
    return torch.stack((first, first + half, last - half, last)).view(2, 2, -1)


def _longest(ranges: Tensor) -> int:
    """The length of the longest of the inclusive ranges (2, T)."""
    return int((ranges[1] - ranges[0]).max()) + 1
