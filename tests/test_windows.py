"""Where a picture is looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lexiseg.errors import LexisegError
from lexiseg.pictures import window_policy
from lexiseg.windows import WindowPolicy, cover, working_size


def test_the_windows_of_the_published_protocol() -> None:
    assert working_size(100, 400, 512) == (512, 2048)
    assert working_size(100, 900, 512) == (228, 2048)  # a strip is not blown up
    assert working_size(600, 5400, 512) == (512, 4608)
    assert working_size(375, 500, 512) == (512, 683)
    assert working_size(375, 500, None) == (375, 500)
    boxes = cover(512, 1000, 512, 426)
    assert boxes == [(0, 0, 512, 512), (0, 426, 512, 512), (0, 488, 512, 512)]
    assert cover(20, 30, None, 0) == [(0, 0, 20, 30)]
    assert cover(20, 30, 64, 64) == [(0, 0, 20, 30)]
    for length in range(1, 70):
        rows = cover(length, 8, 8, 5)
        seen = np.zeros(length, bool)
        for top, left, height, width in rows:
            assert left == 0 and width == 8 and top >= 0 and top + height <= length
            seen[top : top + height] = True
        assert seen.all() and len(rows) == max(length - 8 + 5 - 1, 0) // 5 + 1
    wrong = (WindowPolicy(0, 1), WindowPolicy(8, 9), WindowPolicy("8", 1), WindowPolicy(short_side=-5))  # type: ignore[arg-type]
    for policy in (*wrong, WindowPolicy(short_side=10**7), WindowPolicy(canvas=64)):  # type: ignore[arg-type]
        with pytest.raises(LexisegError, match="cannot be run"):
            window_policy(WindowPolicy(), policy)


@pytest.mark.parametrize(
    ("window", "policy"),
    [
        (None, WindowPolicy(32, 24, 20)),
        (16, WindowPolicy(16, 16, 20)),
        (np.int64(48), WindowPolicy(48, 24, 20)),
        ((16, 8), WindowPolicy(16, 8, 20)),
        ([16, 8], WindowPolicy(16, 8, 20)),
        (0, WindowPolicy(None, 0, 20)),
        (WindowPolicy(9, 7), WindowPolicy(9, 7)),
    ],
)
def test_windows_in_every_form(window: Any, policy: WindowPolicy) -> None:
    assert window_policy(WindowPolicy(32, 24, 20), window) == policy


def test_a_strip_costs_no_more_than_a_picture() -> None:
    policy = WindowPolicy(512, 341, 512)

    def pixels(height: int, width: int) -> int:
        size = working_size(height, width, policy.short_side, policy.long_side)
        return sum(box[2] * box[3] for box in cover(*size, policy.size, policy.stride))

    assert max(pixels(3, 100), pixels(100, 3), pixels(2, 128)) <= pixels(512, 512)
