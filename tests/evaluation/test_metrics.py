"""The streaming metrics against the authors' printed numbers, a slow definition, and edge cases."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from lexiseg.evaluation.metrics import Confusion, harmonic_mean, nanmean, percent
from tests.references import reduce_zero_label

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("case", ["zegclip_metric_voc20", "zegclip_metric_coco171"])
def test_golden(case):
    config = json.loads((GOLDEN / f"{case}.json").read_text())
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    confusion = Confusion(config["num_classes"], ignore_index=config["ignore_index"])
    for label, pred in zip(tensors["input/raw_labels"], tensors["input/predictions"], strict=True):
        confusion.update(pred, reduce_zero_label(label) if config["reduce_zero_label"] else label)
    found = confusion.compute(tensors["input/seen_idx"], tensors["input/unseen_idx"])
    pairs = {
        "area_intersect": confusion.intersection,
        "area_union": confusion.predicted + confusion.labelled - confusion.intersection,
        "area_pred": confusion.predicted,
        "area_label": confusion.labelled,
        "IoU": found.iou,
        "Acc": found.accuracy,
        "pAcc": found.pacc,
        "mIoU_all": found.miou,
        "mIoU_seen": found.miou_seen,
        "mIoU_unseen": found.miou_unseen,
        "hIoU": found.hiou,
    }
    assert {f"expected/{name}" for name in pairs} == {name for name in tensors if name.startswith("expected/")}
    for name, value in pairs.items():
        np.testing.assert_allclose(np.atleast_1d(value), tensors[f"expected/{name}"], rtol=1e-12, err_msg=name)
    printed = config["printed_by_authors_code"]
    summary = found.summary()
    assert summary["pacc"] == float(printed["Summary:"]["aAcc"])
    assert summary["macc"] == float(printed["Summary:"]["mAcc"])
    assert summary["miou_seen"] == float(printed["Seen Summary:"]["mIoU"])
    assert summary["miou_unseen"] == float(printed["Unseen Summary:"]["mIoU"])


ids = hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.sampled_from([0, 1, 2, 3, 255]))


@settings(max_examples=100, deadline=None)
@given(ids, st.data())
def test_equals_the_definition(label, data):
    pred = data.draw(hnp.arrays(np.uint8, label.shape, elements=st.sampled_from([0, 1, 2, 3, 255])))
    confusion = Confusion(4, seen=[0, 1])
    confusion.update(pred, label)
    found = confusion.compute([0, 1], [2, 3])
    judged = label != 255
    hidden = judged & (label >= 2)
    if hidden.any():
        assert found.unseen_to_seen == (hidden & (pred < 2)).sum() / hidden.sum()
    else:
        assert math.isnan(found.unseen_to_seen)
    for index in range(4):
        intersection = (judged & (pred == index) & (label == index)).sum()
        union = (judged & ((pred == index) | (label == index))).sum()
        if union:
            assert found.iou[index] == intersection / union
        else:
            assert math.isnan(found.iou[index])
    if judged.any():
        assert found.pacc == ((pred == label) & judged).sum() / judged.sum()
    else:
        assert math.isnan(found.pacc)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(ids, st.integers(0, 2**31)), min_size=1, max_size=5))
def test_pictures_can_come_in_any_order_and_parts(pictures):
    pairs = [(np.random.default_rng(seed).integers(0, 4, label.shape), label) for label, seed in pictures]
    forward, merged = Confusion(4, seen=[1]), Confusion(4)
    for pair in pairs:
        forward.update(*pair)
    for pair in reversed(pairs):
        part = Confusion(4, seen=[1])
        part.update(*pair)
        merged.merge(part)
    assert (forward.counts == merged.counts).all()


def test_absent_class_does_not_spoil_the_mean():
    confusion = Confusion(4)
    confusion.update([0, 0, 1, 2], [0, 0, 1, 1])
    found = confusion.compute([0, 3], [1])
    assert math.isnan(found.iou[3]) and found.iou[2] == 0
    assert found.miou == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.miou_seen == 1 and found.miou_unseen == 0.5 and found.hiou == pytest.approx(2 / 3)
    assert math.isnan(found.accuracy[2])
    assert math.isnan(found.unseen_to_seen)  # no class is said to be seen


def test_nothing_to_judge():
    confusion = Confusion(2)
    confusion.update([[0, 1]], [[255, 255]])
    assert set(confusion.compute([0], [1]).summary().values()) == {None}
    assert math.isnan(confusion.compute([0, 1]).miou_unseen)


def test_a_pixel_without_class_is_a_miss():
    confusion = Confusion(2)
    confusion.update([255, 0], [0, 0])
    assert confusion.predicted.tolist() == [1, 0]
    assert confusion.compute().pacc == 0.5


def test_more_classes_than_bytes():
    confusion = Confusion(1000)
    confusion.update(np.array([999, 255, 3]), np.array([999, 255, 65535]))
    assert confusion.labelled[[255, 999]].tolist() == [1, 1] and confusion.compute().pacc == 1


def test_wrong_input():
    confusion = Confusion(2)
    for wrong in (7, 2, -1):
        with pytest.raises(ValueError, match=f"label {wrong} is"):
            confusion.update([0], [wrong])
    with pytest.raises(ValueError, match=r"\(1,\)"):
        confusion.update([0], [0, 1])
    for pair in (([0.9], [0]), ([0], [0.5]), ([float("nan")], [0])):
        with pytest.raises(ValueError, match="whole numbers, not float64"):
            confusion.update(*pair)
    assert not confusion.counts.any()
    with pytest.raises(ValueError, match="3 classes"):
        confusion.merge(Confusion(3))
    with pytest.raises(ValueError, match="num_classes"):
        Confusion(0)


def test_reduce_zero_label():
    assert reduce_zero_label(np.array([0, 1, 20, 254, 255], np.uint8)).tolist() == [255, 0, 19, 253, 255]


def test_small_functions():
    assert harmonic_mean(0, 0) == 0 and math.isnan(harmonic_mean(math.nan, 1)) and harmonic_mean(0.5, 0.5) == 0.5
    assert math.isnan(nanmean(np.array([np.nan]))) and percent(0.12344) == 12.34 and percent(math.nan) is None
