"""What the gates of a CLIP are made of."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gates import RESULTS, auc, half_of, mask_probabilities, measure, patch_labels
from lexiseg.data.picture_world import SECOND, PictureWorld
from tests.towers import small_clip


def test_a_patch_has_a_class_where_it_lies_inside_one_region() -> None:
    label = torch.zeros(4, 6, dtype=torch.long)
    label[:, 2:] = 7
    label[3, 5] = 9
    assert patch_labels(label, 2).tolist() == [[0, 7, 7], [0, 7, 255]]


def test_half_of_a_mask_is_a_side_of_it() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 1:7] = True
    halves = [half_of(mask, torch.Generator().manual_seed(seed)) for seed in range(12)]
    assert all((half & ~mask).sum() == 0 and 0.4 <= half.sum() / mask.sum() <= 0.7 for half in halves)
    assert len({tuple(half.flatten().tolist()) for half in halves}) == 4


def test_the_area_under_the_curve() -> None:
    positive = torch.tensor([False, False, True, True])
    assert auc(torch.tensor([0.1, 0.2, 0.3, 0.4]), positive) == 100
    assert auc(torch.tensor([0.1, 0.3, 0.2, 0.4]), positive) == 75


def test_every_gate_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gates.zero_shot_accuracy", lambda *_, **__: (0.9, 1.0))
    result = measure(small_clip(), SECOND, 2, 0)
    assert len(result["rows"]) == 5 and all(set(row) == {"gate", "value", "wanted", "ok"} for row in result["rows"])
    assert result["rows"][0]["ok"] and result["rows"][0]["value"] == 90
    plain, value = result["patches_plain"]["all"], result["patches_value_path"]["all"]
    assert result["rows"][2]["value"] == pytest.approx(value - plain, abs=0.02)


def test_the_file_of_results_is_of_the_packaged_clip() -> None:
    written = json.loads((RESULTS / "gates.json").read_text())
    assert len(written["rows"]) == 5 and "clip-world2" in written["command"] and written["machine"]


def test_a_class_that_half_a_mask_shows_keeps_its_probability() -> None:
    """Where all names are alike to CLIP, halves and exact masks give the same, over the things that count alone."""
    clip, dataset = small_clip(), PictureWorld("val", world=SECOND, size=64, length=4)
    alike = torch.zeros(len(SECOND.classes), clip.embed_dim)
    both = mask_probabilities(clip, dataset, 0, alike)
    number = both[0, 0] * len(SECOND.classes)
    assert number >= 4 and torch.equal(both[0], both[1])
    seen = [SECOND.class_ids[name] for name in SECOND.things if name not in SECOND.unseen]
    some = mask_probabilities(clip, dataset, 0, alike, seen)
    assert 0 < some[0, 0] < both[0, 0]
