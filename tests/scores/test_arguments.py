"""Scores refuse what they cannot be made of, need little memory, and say the same in threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lexiseg.errors import LexisegError
from lexiseg.scores import GridScores, RegionScores, WindowScores, decode
from lexiseg.scores.words import Postprocessing, words_to_classes

LOGITS = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(bad: float) -> None:
    logits = LOGITS.clone()
    logits[0, 1, 2, 3] = bad
    scores = GridScores(logits)
    for read in (scores.label_map, scores.dense, lambda size: scores.top_k(size, 2)):
        with pytest.raises(LexisegError, match="NaN or infinite"):
            read((8, 8))
    with pytest.raises(LexisegError, match="NaN or infinite"):
        RegionScores(torch.full((1, 2, 3), bad), torch.rand(1, 2, 4, 4)).label_map((8, 8))
    fine = GridScores(LOGITS)
    with pytest.raises(LexisegError, match="NaN or infinite"):
        WindowScores([fine, scores], [(0, 0, 8, 8), (0, 4, 8, 8)], (8, 12)).label_map((8, 12))


@pytest.mark.parametrize(
    ("sentence", "wrong"),
    [
        ("float tensor", lambda: GridScores(LOGITS[0])),
        ("float tensor", lambda: GridScores(LOGITS.long())),
        ("without gaps", lambda: GridScores(LOGITS, word_to_class=torch.tensor([0, 2, 2]))),
        ("one class per word", lambda: GridScores(LOGITS, word_to_class=torch.tensor([0, 0]))),
        ("offsets", lambda: GridScores(LOGITS, offsets=torch.zeros(2))),
        ("crop", lambda: GridScores(LOGITS, crop=(5, 4))),
        ("class_scores and masks", lambda: RegionScores(torch.zeros(1, 2, 3), torch.zeros(1, 4, 5, 5))),
        ("at least 1 x 1", lambda: GridScores(LOGITS).label_map((0, 5))),
        ("between 1 and the number of classes", lambda: GridScores(LOGITS).top_k((8, 8), 4)),
        ("no window covers", lambda: WindowScores([GridScores(LOGITS)], [(0, 0, 4, 4)], (4, 6))),
        ("does not lie on the canvas", lambda: WindowScores([GridScores(LOGITS)], [(0, 3, 4, 4)], (4, 6))),
        (
            "same words",
            lambda: WindowScores([GridScores(LOGITS), GridScores(LOGITS[:, :2])], [(0, 0, 4, 4)] * 2, (4, 4)),
        ),
        ("a part for each box", lambda: WindowScores([], [], (4, 6))),
    ],
)
def test_wrong_arguments(sentence: str, wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=sentence):
        wrong()


MEMORY = """
import resource, sys, torch
from lexiseg.scores import GridScores
torch.set_num_threads(1)

scores = GridScores(torch.randn(1, int(sys.argv[1]), 12, 12))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores.label_map((384, 384))
unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_does_not_grow_with_classes() -> None:
    """Peak resident memory beyond the grid: the dense scores of 8,000 classes at this size would take 4,700 MB.

    A process of its own: what ran in it before would have raised the mark that is read.
    """
    root = Path(__file__).parents[2]
    extra = subprocess.check_output([sys.executable, "-c", MEMORY, "8000"], cwd=root, text=True)
    assert float(extra) < 200


@pytest.mark.parametrize("inference", [False, True])
def test_rows_shared_among_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, inference: bool) -> None:
    logits = torch.randn(2, 30, 8, 8, generator=torch.Generator().manual_seed(5))
    scores = GridScores(logits, resize_to=(64, 64), sigmoid=True)
    alone = scores.label_and_score((150, 130))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(decode, "LEAST_WORK", 1)
        pieces: list[int] = []
        decode.in_threads(lambda some: pieces.append(some.shape[1]), torch.arange(14).view(2, 7), logits.device, 1)
        assert sorted(pieces) == [2, 2, 3]
        with torch.inference_mode(inference):
            shared = scores.label_and_score((150, 130))
        assert torch.get_num_threads() == 3
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_torchs_default_dtype_changes_no_score(dtype: torch.dtype) -> None:
    logits, size = torch.randn(1, 30, 8, 8, generator=torch.Generator().manual_seed(6)), (50, 40)
    grid = GridScores(logits, sigmoid=True)
    regions = RegionScores(logits.flatten(2).transpose(1, 2), torch.randn(1, 64, 8, 8))
    for scores in (grid, regions, WindowScores([grid, regions], [(0, 0, 9, 9), (0, 3, 9, 9)], (9, 12))):
        expected = [*scores.label_and_score(size), *scores.top_k(size, 3), scores.dense(size)]
        torch.set_default_dtype(dtype)
        try:
            found = [*scores.label_and_score(size), *scores.top_k(size, 3), scores.dense(size)]
        finally:
            torch.set_default_dtype(torch.float32)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)  # and of one dtype


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_thread_is_the_callers(threads: int) -> None:
    def wrong(rows: torch.Tensor) -> None:
        raise LexisegError("no")

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(LexisegError, match="no"):
            decode.in_threads(wrong, torch.arange(4).view(2, 2), torch.device("cpu"), decode.LEAST_WORK)
    finally:
        torch.set_num_threads(before)


def test_words_share_a_softmax_and_the_best_of_a_class_counts() -> None:
    cosines = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])[:, None]
    classes = torch.tensor([0, 1, 1])
    labels, probabilities = words_to_classes(cosines, classes, Postprocessing(3.0, 0.0))
    best = torch.tensor([[3.0, 0.0, 0.0]]).softmax(1)[0, 0], torch.tensor([[3.0, 3.0, 0.0]]).softmax(1)[0, 0]
    torch.testing.assert_close(probabilities.amax(0)[0], torch.stack([best[0], best[1], best[1]]))
    assert labels.tolist() == [[0, 1, 1]]
    # Near-synonyms split it.
    assert words_to_classes(cosines, classes, Postprocessing(3.0, 0.6))[0].tolist() == [[0, 0, 0]]
    assert words_to_classes(cosines.flip(2), classes, Postprocessing(3.0, 0.0), 1)[0].tolist() == [[1, 1, 0]]
    assert words_to_classes(cosines.flip(2), classes, Postprocessing(3.0, 0.0, area=1.0), 1)[0].tolist() == [[1, 1, 1]]
