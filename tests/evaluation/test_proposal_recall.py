"""Judging proposals: recall, the released counters, the upper bound, pseudo labels; and the pictures of proposals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lexiseg.analysis.regions import anchor_figure, attention_maps, region_masks, top_classes, top_classes_figure
from lexiseg.cli import main
from lexiseg.data.base import Sample
from lexiseg.errors import LexisegError
from lexiseg.evaluation import evaluate
from lexiseg.evaluation.proposals import (
    ProposalRecall,
    ReleasedRecall,
    evaluate_proposals,
    region_ious,
    upper_bound_scores,
)
from lexiseg.models import DenseCLIP, DeOP
from lexiseg.scores import RegionScores
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary
from lexiseg.windows import WindowPolicy
from tests.models.test_deop import make
from tests.models.test_region_models import make as host
from tests.references import pseudo_label
from tests.system_tester import SystemTester
from tests.towers import small_clip

# Left half class 0, right half class 2, and a column that is ignored.
LABEL = torch.zeros(4, 8, dtype=torch.long)
LABEL[:, 4:] = 2
LABEL[:, 7] = 255


def masks_of(*columns: tuple[int, int]) -> Tensor:
    masks = torch.zeros(len(columns), 4, 8, dtype=torch.bool)
    for mask, (start, stop) in zip(masks, columns, strict=True):
        mask[:, start:stop] = True
    return masks


def test_overlaps_are_counted() -> None:
    ious = region_ious(masks_of((0, 4), (2, 6), (0, 0)), LABEL, [0, 2, 5])
    expected = torch.tensor([[1.0, 0.0, 0.0], [2 / 6, 2 / 5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ious, expected)
    assert region_ious(masks_of(), LABEL, [0]).shape == (0, 1)


def test_recall_counts_regions_once_and_ignores_the_ignored() -> None:
    recall = ProposalRecall([0], [2])
    # The last mask covers class 2 and the ignored column, which is left out of it.
    recall.update(masks_of((0, 4), (0, 4), (2, 6), (4, 8)), LABEL)
    found = recall.compute()
    assert (found[0.5].all, found[0.5].seen, found[0.5].unseen) == (1.0, 1.0, 1.0)
    recall.update(masks_of((2, 6)), LABEL)  # IoU 1/3 with class 0 and 2/5 with class 2
    found = recall.compute()
    assert (found[0.3].all, found[0.5].all, found[0.5].unseen) == (1.0, 0.5, 0.5)
    recall.update(masks_of(), LABEL)
    assert recall.compute()[0.3].all == pytest.approx(4 / 6)
    assert math.isnan(ProposalRecall([0], [2]).compute()[0.5].all)
    recall.update(masks_of((0, 1)), torch.full((4, 8), 255))
    assert len(recall.best) == 6


def test_the_released_counters_have_mixed_denominators() -> None:
    counter = ReleasedRecall(frozenset({2}), 0.3)
    prediction = torch.full((4, 8), 7)
    prediction[:, 4:] = 2
    prediction[0] = 5
    counter.update(prediction[None] == prediction.unique()[:, None, None], LABEL)
    assert (counter.predicted, counter.matched_seen, counter.matched_unseen) == (3, 1, 1)
    assert (counter.labelled_seen, counter.labelled_unseen) == (2, 1)  # the ignored column is a seen region
    shares = counter.compute()
    assert (shares.all, shares.seen, shares.unseen) == (pytest.approx(2 / 3), 0.5, 1.0)


def test_the_released_counters_want_more_than_their_threshold() -> None:
    counter = ReleasedRecall(frozenset(), 0.5)
    counter.update(torch.tensor([[[True, False]]]), torch.zeros(1, 2, dtype=torch.long))
    assert counter.matched_seen == 0


def test_the_upper_bound_of_perfect_masks_is_perfect() -> None:
    masks = masks_of((0, 4), (4, 8))
    scores = upper_bound_scores(masks, LABEL, 4)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]]))
    labels = RegionScores(scores[None], masks[None].float()).label_map((4, 8))[0]
    assert torch.equal(labels[LABEL != 255], LABEL[LABEL != 255])
    many = upper_bound_scores(masks, LABEL, 300)  # of so many classes one has the id 255
    assert many[:, LABEL.unique()].amax(0).min() > 0


def test_pseudo_labels() -> None:
    scores = torch.zeros(3, 1, 4)
    scores[0] = 5.0
    scores[1, 0, :2] = 1.0
    scores[2, 0, 2:] = 1.0
    label = torch.tensor([[0, 1, 2, 255]])
    assert pseudo_label(scores, label, [0]).tolist() == [[0, 1, 2, 2]]
    assert pseudo_label(scores, label, [0], prior=False).tolist() == [[0, 0, 0, 0]]
    assert pseudo_label(scores, label, [0], reject=0.5).tolist() == [[0, 255, 255, 255]]


class Pictures:
    """Two random pictures of three classes."""

    odd = 255

    vocabulary = Vocabulary.parse(
        {"classes": [{"name": "cat", "seen": True}, {"name": "sky", "seen": True}, {"name": "sea", "seen": False}]}
    )

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        image = torch.randint(0, 256, (3, 40, 48), generator=torch.Generator().manual_seed(index)).to(torch.uint8)
        label = SystemTester().labels()[index]
        return Sample(image, label.where(label != 3, self.odd), f"p{index}")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(make(), disk_cache=False)


def test_proposals_of_a_dataset_are_judged(segmenter: Segmenter) -> None:
    dataset = Pictures()
    report = evaluate_proposals(segmenter, dataset, released=True)
    assert (report.num_pictures, report.num_proposals) == (2, 12)
    assert set(report.recall) == {0.3, 0.5} == set(report.released)
    assert 0.0 <= report.recall[0.5].all <= report.recall[0.3].all <= 1.0
    assert report.to_dict()["upper_bound"]["miou"] is not None
    titles, rows = report.table()
    assert titles[1:] == ["all", "seen", "unseen"]
    counted = [f"{what} at IoU {iou}" for what in ("recall", "released counters") for iou in (0.3, 0.5)]
    assert [row[0] for row in rows] == [*counted, "mIoU they allow"]
    # At another size there are other proposals.
    larger = evaluate_proposals(segmenter, Pictures(), window=WindowPolicy(short_side=96))
    assert larger.num_proposals == 12 and larger.upper_bound.miou != report.upper_bound.miou
    dataset.odd = 3
    with pytest.raises(LexisegError, match="'p0' cannot be evaluated: the label 3"):
        evaluate_proposals(segmenter, dataset)
    with pytest.raises(LexisegError, match="has no proposals to evaluate"):
        evaluate_proposals(Segmenter(DenseCLIP(small_clip()), disk_cache=False), dataset)


def test_the_released_counters_are_of_the_predictions_asked_for(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def predict(_: Tensor, classes: Vocabulary, **how: Any) -> SimpleNamespace:
        told.update(how, classes=classes)
        label = Pictures()[0].label.clone()
        label[16:] = 1  # some regions keep less than half of their pixels
        return SimpleNamespace(label_map=label)

    monkeypatch.setattr(segmenter, "predict", predict)
    window = WindowPolicy(short_side=32)
    report = evaluate_proposals(segmenter, Pictures(), released=True, limit=1, window=window, offsets="none")
    assert told["window"] == window and {entry.seen for entry in told["classes"].classes} == {False}
    assert (report.released[0.3].all, report.released[0.5].all) == (2 / 3, 1 / 3)


def test_the_command_prints_what_the_released_code_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["evaluate", "picture-world", "-w", "deop-emoji", "--limit", "1", "--size", "64", "--device", "cpu"]
    assert main([*asked, "--proposals", "-o", str(tmp_path)]) == 0
    assert "released counters at IoU 0.3" in capsys.readouterr().out
    released = json.loads((tmp_path / "proposals.json").read_text())["released"]
    assert released.keys() == {"0.3", "0.5"} and released["0.3"]["all"] < 1
    # Where it is sure, it is right; pixels of no class are no region that could be wrong.
    assert main([*asked, "--proposals", "-o", str(tmp_path), "--background", "0.999"]) == 0
    assert json.loads((tmp_path / "proposals.json").read_text())["released"]["0.3"]["all"] == 1


def test_proposals_are_judged_as_the_predictions_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("lexiseg.evaluation.proposals.evaluate_proposals", lambda *_, **how: asked.update(how))
    data = {"source": "picture-world", "size": 32, "length": 1, "val_size": 32, "val_length": 1}
    said = {"kind": "evaluation", "data": data, "offsets": "none"}
    (tmp_path / "mine.yaml").write_text(json.dumps(said))
    evaluate(tmp_path / "mine.yaml", "deop-emoji", window=32, limit=1, proposals=True, progress=False)
    assert (asked["released"], asked["limit"], asked["window"].size, asked["offsets"]) == (True, 1, 32, "none")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_attention_maps_are_fractions(segmenter: Segmenter) -> None:
    model = segmenter.model
    assert isinstance(model, DeOP)
    with torch.no_grad():
        maps = attention_maps(model, model.pad(SystemTester.images(40, 48, 1)))
    assert maps.shape == (64, 64)
    assert bool((maps >= 0).all())
    assert bool((maps.sum(dim=1) < 1.0).all())


def test_figures(segmenter: Segmenter, picture: Path) -> None:
    figure = anchor_figure(segmenter, picture, [(3, 4), (69, 49)])
    assert sum(bool(axes.images) for axes in figure.axes) >= 8
    figure = top_classes_figure(segmenter, picture, "cat; sky, heaven; sea", proposals=3, k=2)
    assert figure.axes
    figure = top_classes_figure(
        [segmenter, Segmenter(host("zsseg"), disk_cache=False)], picture, "cat; sky", proposals=1
    )
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2
    assert np.array_equal(panels[0].images[0].get_array(), panels[1].images[0].get_array())  # the same region
    figure = top_classes_figure([segmenter, segmenter], picture, "cat; sky", proposals=1, names=["a", "b"])
    assert [axes.get_title().partition("\n")[0][-3:] for axes in figure.axes if axes.images] == [": a", ": b"]
    with pytest.raises(LexisegError, match="only by 'clip'"):
        top_classes_figure([segmenter, segmenter], picture, "cat", by="ensemble")
    with pytest.raises(LexisegError, match="70,0 lies outside"):
        anchor_figure(segmenter, picture, [(70, 0)])
    with pytest.raises(LexisegError, match="has no anchors"):
        anchor_figure(Segmenter(DenseCLIP(small_clip()), disk_cache=False), picture)
    with pytest.raises(LexisegError, match="has no proposals"):
        top_classes_figure(Segmenter(DenseCLIP(small_clip()), disk_cache=False), picture, "cat")
    with pytest.raises(LexisegError, match="25 proposals"):
        top_classes_figure(segmenter, picture, "cat", proposals=25)


def test_anchors_are_drawn_of_the_proposals_of_the_prediction(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(leftover={"count": 4, "threshold": 0.95, "min_fraction": 0.0})
    segmenter = Segmenter(model, disk_cache=False)
    seen: list[Tensor] = []
    propose = DeOP.propose

    def kept(self: DeOP, *arguments: Any) -> Any:
        found = propose(self, *arguments)
        assert found.valid is not None
        seen.append(torch.cat([found.mask_logits.sigmoid().flatten(), found.valid.flatten()]))
        return found

    monkeypatch.setattr(DeOP, "propose", kept)
    anchor_figure(segmenter, picture)
    segmenter.predict(picture, "cat; sky")
    torch.testing.assert_close(seen[0], seen[1])


def test_top_classes_of_a_host_are_clip_s_own(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = host("zsseg")
    drawn: list[Tensor] = []

    def kept(scores: RegionScores, k: int) -> tuple[Tensor, Tensor]:
        drawn.append(scores.class_scores)
        return top_classes(scores, k)

    monkeypatch.setattr("lexiseg.analysis.regions.top_classes", kept)
    segmenter = Segmenter(model, disk_cache=False)
    asked = "cat; sky, heaven; sea"
    top_classes_figure(segmenter, picture, asked)
    by_clip = drawn[-1]
    top_classes_figure(segmenter, picture, asked, by="ensemble")
    predicted = drawn[-1]
    alone = Segmenter(host("zsseg", ensemble={"rule": "region"}), disk_cache=False).scores(picture, asked)
    assert isinstance(alone, RegionScores)
    torch.testing.assert_close(by_clip, alone.class_scores)
    again = segmenter.scores(picture, asked)
    assert isinstance(again, RegionScores)
    torch.testing.assert_close(predicted, again.class_scores)
    assert not torch.allclose(by_clip, predicted)
    with pytest.raises(LexisegError, match="without CLIP; draw by 'ensemble'"):
        top_classes_figure(Segmenter(host("zsseg", regions="none"), disk_cache=False), picture, asked)


def test_top_classes_join_synonyms() -> None:
    scores = RegionScores(
        torch.tensor([[[0.1, 0.6, 0.3], [0.5, 0.1, 0.4]]]),
        torch.randn(1, 2, 4, 4),
        word_to_class=torch.tensor([0, 0, 1]),
        resize_to=(8, 8),
        crop=(6, 8),
        sigmoid=True,
    )
    values, indices = top_classes(scores, k=5)
    torch.testing.assert_close(values, torch.tensor([[0.6, 0.3], [0.5, 0.4]]))
    assert indices.tolist() == [[0, 1], [0, 1]]
    masks = region_masks(scores, (6, 8))
    # They are the masks that the scores are made of.
    expected = (scores.class_scores[0].T @ masks.flatten(1)).unflatten(1, (6, 8))
    torch.testing.assert_close(
        scores.dense((6, 8))[0], torch.stack([expected[:2].amax(dim=0), expected[2]]), rtol=1e-4, atol=1e-5
    )
