"""Decoded labels equal those of the dense scores bit for bit, and the dense scores equal torch's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lexiseg.scores import GridScores, RegionScores, Scores, WindowScores, decode, fields, pruning
from lexiseg.scores import resize as resizing
from lexiseg.scores.arithmetic import sigmoid

Size = tuple[int, int]
SHARED = {"shared": 1e-2, "hairs": 1e-6}


def resize(values: Tensor, size: Size) -> Tensor:
    return F.interpolate(values.double(), size=size, mode="bilinear", align_corners=False)


def check_agreement(scores: Scores, size: Size, k: int = 3) -> Tensor:
    """Every way to decode says the same as ``dense``, and so in every bit."""
    dense = scores.dense(size)
    assert dense.shape == (scores.batch_size, scores.num_classes, *size)
    assert torch.equal(scores.label_map(size), dense.argmax(1))
    labels, best = scores.label_and_score(size)
    assert torch.equal(labels, dense.argmax(1))
    assert torch.equal(best, dense.amax(1))
    count = min(k, scores.num_classes)
    values, indices = scores.top_k(size, count)
    expected, order = dense.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :count])
    assert torch.equal(indices, order[:, :count])
    return dense


@dataclass(frozen=True)
class Case:
    scores: Scores
    size: Size
    budget: int


sizes = st.tuples(st.integers(1, 48), st.integers(1, 48))


def numbers(seed: int, kind: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(-1, 3, shape, generator=generator).float()
    if kind == "equal":
        return torch.full(shape, 0.7)
    values = torch.randn(shape, generator=generator)
    if kind in SHARED:  # what the words have in common is far larger than their differences
        return 4 * torch.randn(shape[0], 1, *shape[2:], generator=generator) + SHARED[kind] * values
    return values * 30 if kind == "steep" else values


@st.composite
def word_lists(draw: st.DrawFn, num_words: int) -> Tensor | None:
    if draw(st.booleans()):
        return None
    steps = draw(st.lists(st.integers(0, 1), min_size=num_words - 1, max_size=num_words - 1))
    return torch.tensor([0, *steps]).cumsum(0)


@st.composite
def grids(draw: st.DrawFn, num_words: int, word_to_class: Tensor | None) -> GridScores:
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["ties", "equal", "normal", "steep", *SHARED]))
    resize_to = draw(st.none() | sizes)
    height, width = resize_to or shape
    offsets = numbers(draw(st.integers(0, 99)), draw(st.sampled_from(["ties", "normal"])), num_words) * 0.1
    return GridScores(
        numbers(draw(st.integers(0, 999)), kind, 2, num_words, *shape).to(
            draw(st.sampled_from([torch.float32, torch.bfloat16]))
        ),
        word_to_class=word_to_class,
        resize_to=resize_to,
        crop=draw(st.none() | st.just((max(1, height - 2), width))),
        sigmoid=draw(st.booleans()),
        offsets=draw(st.sampled_from([None, offsets])),
    )


@st.composite
def regions(draw: st.DrawFn, num_words: int, word_to_class: Tensor | None) -> RegionScores:
    num_regions, seed = draw(st.integers(0, 5)), draw(st.integers(0, 999))
    kind = draw(st.sampled_from(["ties", "equal", "normal"]))
    return RegionScores(
        numbers(seed, kind, 2, num_regions, num_words),
        numbers(seed + 1, kind, 2, num_regions, draw(st.integers(1, 12)), draw(st.integers(1, 70))),
        word_to_class=word_to_class,
        resize_to=draw(st.none() | sizes),
        align_corners=draw(st.booleans()),
        sigmoid=draw(st.booleans()),
        offsets=draw(st.sampled_from([None, numbers(seed, "normal", num_words)])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_words = draw(st.integers(1, 40))
    word_to_class = draw(word_lists(num_words))
    parts = st.one_of(grids(num_words, word_to_class), regions(num_words, word_to_class))
    scores: Scores = draw(parts)
    if draw(st.booleans()):
        height, width = draw(sizes)
        bottom, left = draw(st.integers(1, height)), draw(st.integers(0, width - 1))
        boxes = [(0, 0, height, width), (0, left, bottom, width - left), (height - 1, 0, 1, width)]
        boxes = boxes[: draw(st.integers(1, 3))]
        scores = WindowScores([draw(parts) for _ in boxes], boxes, (height, width))
    return Case(scores, draw(sizes), draw(st.sampled_from([1 << 10, 1 << 20])))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_decoding_is_exact(case: Case) -> None:
    """Also when the budget is so small that everything is cut into pieces."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pruning, decode):
            patch.setattr(module, "budget", lambda field: case.budget)
        patch.setattr(pruning, "MANY", 0 if case.budget == 1 << 10 else 8)
        if case.budget == 1 << 10:
            for module in (fields, decode):
                patch.setattr(module, "BLOCK_WORDS", 4)
        check_agreement(case.scores, case.size)


@pytest.mark.parametrize("kind", ["normal", "steep", "ties", "equal", *SHARED])
@pytest.mark.parametrize("nested", [False, True])
def test_pruning_is_exact(kind: str, nested: bool) -> None:
    """Magnified as patches are, so that branch and bound decides."""
    options = {"resize_to": (112, 128), "sigmoid": True, "offsets": (torch.arange(60) % 2) * 0.1} if nested else {}
    scores = GridScores(numbers(0, kind, 1, 60, 7, 8), **options)
    for size in ((112, 128), (90, 133)):
        check_agreement(scores, size)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), seed=st.integers(0, 999))
def test_bounds_are_certain(case: Case, seed: int) -> None:
    """No value in a tile lies outside its bounds, and no word is less than its gap below another, but for rounding."""
    field = case.scores.field(0, case.size)
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, top: int) -> Tensor:
        return torch.randint(0, top, (count,), generator=generator)

    words, tiles, leaders = some(30, field.num_words), some(30, 5), some(25, field.num_words).view(5, 5)
    rows, columns = (torch.stack((some(5, n), some(5, n))).sort(0).values.sort(1).values for n in case.size)
    lower, upper = field.extremes(words, tiles, rows[None], columns[None])
    lowest, highest = field.interval(rows, columns)
    gaps = field.gaps(leaders, rows, columns)
    dense = field.block(slice(None), 0, case.size[0], 0, case.size[1])
    slack = 2 * field.limits()[1] + 1e-6

    def at(i: int, j: int) -> Tensor:
        (top, bottom), (left, right) = rows[:, i].tolist(), columns[:, j].tolist()
        return dense[:, top : bottom + 1, left : right + 1].flatten(1)

    for index, (word, tile) in enumerate(zip(words.tolist(), tiles.tolist(), strict=True)):
        place = at(tile, tile)[word]
        assert float(place.min()) >= float(lower[0, 0, index]) - slack
        assert float(place.max()) <= float(upper[0, 0, index]) + slack
    for i, j in product(range(5), range(5)):
        assert bool((at(i, j) >= lowest[:, i, j, None] - slack).all())
        assert bool((at(i, j) <= highest[:, i, j, None] + slack).all())
        if gaps is not None:
            assert bool((at(i, j)[leaders[i, j]] - at(i, j) >= gaps[:, i, j, None] - slack).all())


@pytest.mark.parametrize("kind", ["grid", "nested", "windows"])
def test_words_that_rise_and_fall_together_are_told_apart(kind: str) -> None:
    """Bounds alone would keep them all, and the words would be streamed."""
    size = (112, 128)
    logits = torch.randn(1, 1, 7, 8) + 0.1 * torch.randn(1, 60, 1, 1) + 0.01 * torch.randn(1, 60, 7, 8)
    scores: Scores = GridScores(logits, resize_to=None if kind == "grid" else size, sigmoid=True)
    if kind == "windows":
        scores = WindowScores([scores, scores], [(0, 0, *size), (0, 48, *size)], (112, 176))
        size = (90, 140)
    field = scores.field(0, size)
    rows, columns = (pruning.tile_ranges(field.cells(axis)) for axis in (0, 1))
    writer = pruning.Writer(None, torch.empty(size, dtype=torch.long), None)
    assert pruning.prune(field, rows, columns, pruning.margin_of(field), writer)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), seed=st.integers(0, 999))
def test_some_rows_and_columns_have_the_bits_of_all(case: Case, seed: int) -> None:
    """Far apart, so that what lies between is not computed."""
    field = case.scores.field(0, case.size)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(0, n, (3,), generator=generator).unique() for n in case.size)
    dense = field.block(slice(None), 0, case.size[0], 0, case.size[1])
    assert torch.equal(field.lattice(slice(None), rows, columns), dense[:, rows][:, :, columns])


def test_a_coarse_map_computes_no_fine_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, 4, 8, 8)
    largest, mix = 0, resizing.mix

    def counted(*parts: Tensor) -> Tensor:
        nonlocal largest
        mixed = mix(*parts)
        largest = max(largest, mixed.numel())
        return mixed

    monkeypatch.setattr(resizing, "mix", counted)
    coarse = GridScores(logits, resize_to=(512, 512)).dense((16, 16))
    assert largest <= 4 * 32 * 32
    expected = resize(resize(logits, (512, 512)), (16, 16))
    torch.testing.assert_close(coarse.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (13, 40), (64, 64), (31, 100)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 16)])
def test_grid_follows_torch(shape: Size, size: Size) -> None:
    logits = torch.randn(2, 6, *shape)
    torch.testing.assert_close(GridScores(logits).dense(size).double(), resize(logits, size), atol=1e-5, rtol=0)


def test_order_of_the_stages() -> None:
    """Interpolated, cut, squashed, offset, interpolated: as ZegCLIP's evaluation does it."""
    logits, offsets = torch.randn(1, 5, 6, 6) * 4, torch.tensor([0.1, 0, 0.1, 0, 0])
    scores = GridScores(logits, resize_to=(48, 48), crop=(40, 48), sigmoid=True, offsets=offsets)
    expected = resize(resize(logits, (48, 48))[:, :, :40].sigmoid() - offsets[:, None, None], (33, 57))
    torch.testing.assert_close(check_agreement(scores, (33, 57)).double(), expected, atol=1e-5, rtol=0)


def test_half_precision_is_decoded_in_float32() -> None:
    logits = torch.randn(1, 9, 4, 4).bfloat16()
    assert torch.equal(GridScores(logits).dense((20, 20)), GridScores(logits.float()).dense((20, 20)))


def test_any_strides() -> None:
    logits = torch.randn(4, 4, 9, 1)
    view = logits.permute(3, 2, 0, 1)
    assert torch.equal(GridScores(view).label_map((40, 40)), GridScores(view.contiguous()).label_map((40, 40)))


def test_ties_go_to_the_lowest_class() -> None:
    assert GridScores(torch.zeros(1, 300, 4, 4)).label_map((64, 64)).unique().tolist() == [0]
    logits = torch.zeros(1, 300, 4, 4)
    logits[:, [7, 290]] = 1.0
    assert GridScores(logits).label_map((64, 64)).unique().tolist() == [7]
    assert GridScores(logits).top_k((64, 64), 3)[1][0, :, 9, 9].tolist() == [7, 290, 0]


def test_best_synonym_wins() -> None:
    logits = torch.randn(1, 7, 5, 5)
    classes = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    scores = GridScores(logits, word_to_class=classes)
    assert (scores.num_words, scores.num_classes) == (7, 4)
    words = resize(logits, (40, 33)).float()
    expected = torch.stack([words[:, classes == c].amax(1) for c in range(4)], 1)
    torch.testing.assert_close(check_agreement(scores, (40, 33), 4), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_words", [1, 255, 256, 600])
def test_number_of_classes(num_words: int) -> None:
    check_agreement(GridScores(torch.randn(1, num_words, 3, 2)), (24, 20), 2)
    check_agreement(GridScores(torch.randn(1, num_words, 3, 2)), (2, 5), 1)


def test_hundred_thousand_classes() -> None:
    logits = torch.randn(1, 100_000, 4, 4)
    scores = GridScores(logits)
    size = (16, 16)
    assert torch.equal(scores.label_map(size), scores.dense(size).argmax(1))


def test_regions_follow_einsum() -> None:
    class_scores, masks = torch.rand(2, 9, 12), torch.randn(2, 9, 10, 14)
    size = (37, 90)

    def mixed(masks: Tensor) -> Tensor:
        return torch.einsum("bnc,bnhw->bchw", class_scores.double(), masks.double())

    dense = check_agreement(RegionScores(class_scores, masks.sigmoid()), size)
    torch.testing.assert_close(dense.double(), mixed(resize(masks.sigmoid(), size)), atol=1e-5, rtol=0)
    dense = check_agreement(RegionScores(class_scores, masks, sigmoid=True), size)
    torch.testing.assert_close(dense.double(), mixed(resize(masks, size).sigmoid()), atol=1e-5, rtol=0)
    padded = RegionScores(class_scores, masks, sigmoid=True, resize_to=(40, 56), crop=(38, 50), align_corners=True)
    larger = F.interpolate(masks.double(), size=(40, 56), mode="bilinear", align_corners=True)
    expected = resize(mixed(larger[:, :, :38, :50].sigmoid()), size)
    torch.testing.assert_close(check_agreement(padded, size).double(), expected, atol=1e-5, rtol=0)


def test_no_regions() -> None:
    scores = RegionScores(torch.empty(1, 0, 5), torch.empty(1, 0, 8, 8))
    labels, best = scores.label_and_score((30, 20))
    assert labels.unique().tolist() == [0]
    assert best.unique().tolist() == [0.0]


def test_windows_are_averaged() -> None:
    """As mmsegmentation's sliding window: sums of scores, divided by their count, then interpolated."""
    canvas, side, stride = (50, 70), 32, 20
    tops = [0, canvas[0] - side]
    lefts = [0, stride, canvas[1] - side]
    boxes = [(top, left, side, side) for top in tops for left in lefts]
    logits = torch.randn(len(boxes), 8, 4, 4) * 3
    offsets = torch.arange(8) * 0.01
    batch = GridScores(logits, resize_to=(side, side), sigmoid=True, offsets=offsets)
    total, count = torch.zeros(1, 8, *canvas).double(), torch.zeros(canvas)
    for (top, left, height, width), window in zip(boxes, logits, strict=True):
        place = slice(top, top + height), slice(left, left + width)
        total[0, :, place[0], place[1]] += resize(window[None], (side, side))[0].sigmoid() - offsets[:, None, None]
        count[place] += 1
    scores = WindowScores(list(batch), boxes, canvas)
    for size in (canvas, (61, 99), (40, 150)):
        dense = check_agreement(scores, size)
        torch.testing.assert_close(dense.double(), resize(total / count, size), atol=1e-5, rtol=0)


def test_windows_of_regions() -> None:
    parts = [RegionScores(torch.rand(1, 6, 10), torch.randn(1, 6, 8, 8), sigmoid=True) for _ in range(2)]
    check_agreement(WindowScores(parts, [(0, 0, 24, 24), (0, 16, 24, 24)], (24, 40)), (30, 44))


def test_batches_are_single_pictures() -> None:
    scores = GridScores(torch.randn(3, 5, 4, 4), sigmoid=True)
    together = scores.label_map((32, 32))
    assert len(scores) == 3
    for picture, alone in enumerate(scores):
        assert torch.equal(alone.label_map((32, 32))[0], together[picture])


def test_moving_and_detaching() -> None:
    class_scores, masks = torch.rand(1, 3, 4, requires_grad=True), torch.rand(1, 3, 6, 6, requires_grad=True)
    scores = RegionScores(class_scores, masks, offsets=torch.zeros(4))
    assert not scores.dense((5, 5)).requires_grad
    assert scores.masks.requires_grad
    assert not scores.detach().masks.requires_grad
    window = WindowScores([scores], [(0, 0, 6, 6)], (6, 6)).to("cpu").detach()
    assert torch.equal(window.label_map((20, 20)), scores.label_map((20, 20)))


def test_sigmoid() -> None:
    x = torch.cat((torch.linspace(-86, 40, 100_003), torch.tensor([0.0, -0.0, -1e4, 1e4])))
    torch.testing.assert_close(sigmoid(x).double(), x.double().sigmoid(), rtol=1e-6, atol=1e-37)
    scattered = torch.stack([sigmoid(x[i : i + 1])[0] for i in range(0, 100_000, 997)])
    assert torch.equal(scattered, sigmoid(x)[0:100_000:997]), "bits depend on where in a tensor a number stands"
