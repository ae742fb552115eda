"""Refinement of any system's scores: what it does to masks, that it composes, and that its memory is bounded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.models import DenseCLIP
from lexiseg.proposals.base import ProposalGenerator, Proposals
from lexiseg.refine import Refinement, candidates, refine, region_map, vote
from lexiseg.samples import sample_path
from lexiseg.scores import GridScores
from lexiseg.segmenter import Segmenter
from lexiseg.smoothing import edge_weights, pamr, pamr_weights
from tests.towers import small_clip

SIZE = (96, 128)
KINDS = ("edges", "pamr", "regions")


def scene() -> tuple[Tensor, Tensor]:
    """A picture (3, H, W) of a red disc on green, and the disc as labels (H, W)."""
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    disc = (rows - 50).square() + (columns - 70).square() < 30**2
    noise = torch.randint(0, 20, (3, *SIZE), generator=torch.Generator().manual_seed(0))
    colours = torch.where(disc, torch.tensor([200, 30, 30])[:, None, None], torch.tensor([30, 180, 30])[:, None, None])
    return (colours + noise).to(torch.uint8), disc.long()


def coarse(labels: Tensor, cell: int = 16) -> GridScores:
    """What a system with patches of 16 pixels knows of the labels: the fraction of each class in a patch."""
    one_hot = torch.nn.functional.one_hot(labels, 2).permute(2, 0, 1)[None].float()
    return GridScores(torch.nn.functional.avg_pool2d(one_hot, cell))


class Regions(ProposalGenerator):
    """Proposes what it is given, over the frame of the images."""

    def __init__(self, masks: Tensor) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, images: Tensor, text: Tensor | None = None) -> Proposals:
        assert not any(side % self.stride for side in images.shape[-2:])
        pad = [0, images.shape[-1] - self.masks.shape[-1], 0, images.shape[-2] - self.masks.shape[-2]]
        logits = torch.nn.functional.pad(20.0 * (2 * self.masks.float() - 1), pad, value=-20.0)
        return Proposals(logits[None])


def refinement(kind: str) -> Refinement:
    disc = scene()[1].bool()
    return Refinement(kind, regions=Regions(torch.stack([disc, ~disc])), dilations=(2, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_borders_move_to_where_the_picture_has_them(kind: str) -> None:
    image, labels = scene()
    scores = coarse(labels)
    before = float((scores.label_map(SIZE)[0] == labels).float().mean())
    found, values = refine(scores, image, refinement(kind))
    after = float((found == labels).float().mean())
    assert after > before + 0.5 * (1 - before)
    assert found.shape == values.shape == SIZE and bool(torch.isfinite(values).all())


def test_none_changes_nothing() -> None:
    image, labels = scene()
    scores = coarse(labels)
    found, values = refine(scores, image, Refinement())
    expected = scores.label_and_score(SIZE)
    assert torch.equal(found, expected[0][0]) and torch.equal(values, expected[1][0])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_option_of_the_segmenter_and_said_in_the_result(kind: str) -> None:
    image, _ = scene()
    model = DenseCLIP.build(small_clip(), {"short_side": 64})
    result = Segmenter(model, disk_cache=False, refine=refinement(kind)).predict(image, ["cat", "sky", "tree, bush"])
    assert result.metadata["refine"] == kind
    assert result.label_map.shape == SIZE and result.scores is not None


def test_a_sam_that_cannot_be_had_is_said_once_and_not_of_every_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: None)
    run = Segmenter(DenseCLIP.build(small_clip()), disk_cache=False, refine="regions")
    with pytest.raises(LexisegError, match="Cannot download 'facebook/sam-vit-huge'"):
        list(run.predict_folder([sample_path("demo"), sample_path("street")], ["cat", "sky"]))


def test_only_classes_that_lead_somewhere_are_refined() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.rand(1, 1000, 6, 8, generator=generator)
    leaders = [3, 500, 999]
    for index, word in enumerate(leaders):
        logits[0, word, 2 * index : 2 * index + 2] += 2
    classes = candidates(GridScores(logits), SIZE, 48)
    assert len(classes) == 48 and set(leaders) <= set(classes.tolist())
    image, _ = scene()
    found, _ = refine(GridScores(logits), image, Refinement("edges"))
    assert set(found.unique().tolist()) == set(leaders)
    assert candidates(GridScores(logits[:, :20]), SIZE, 48).tolist() == list(range(20))


def test_where_more_classes_win_than_are_refined_the_others_keep_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lexiseg.refine.MAX_CLASSES", {"edges": 2})
    logits = torch.zeros(1, 5, 6, 8)
    for word, columns in enumerate([(0, 3), (3, 6), (6, 7), (7, 8)]):
        logits[0, word, :, slice(*columns)] = 1
    found, _ = refine(GridScores(logits), torch.zeros(3, *SIZE, dtype=torch.uint8), Refinement("edges"))
    assert set(found.unique().tolist()) == {0, 1, 2, 3}


def test_the_scores_of_some_classes_are_those_of_all() -> None:
    logits = torch.randn(2, 9, 5, 7, generator=torch.Generator().manual_seed(2))
    scores = GridScores(logits, word_to_class=torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5]))
    chosen = torch.tensor([0, 2, 5])
    assert torch.equal(scores.dense((33, 21), chosen), scores.dense((33, 21))[:, chosen])


@pytest.mark.parametrize(("kind", "name", "limit"), [("pamr", "max_pixels", 48 * 64), ("edges", "cells", 48)])
def test_what_is_refined_is_a_smaller_picture(
    monkeypatch: pytest.MonkeyPatch, kind: Any, name: str, limit: int
) -> None:
    sizes: list[tuple[int, ...]] = []
    for smoothing in ("pamr", "smooth"):
        monkeypatch.setattr(f"lexiseg.refine.{smoothing}", lambda parts, *_: sizes.append(parts.shape[-2:]) or parts)
    image, labels = scene()
    assert refine(coarse(labels), image, Refinement(kind, **{name: limit}))[0].shape == SIZE
    assert sizes == [(48, 64)]


def test_weights_by_hand() -> None:
    picture = torch.zeros(1, 3, 3, 3)
    near = [1, 2, 1, 2, 4, 2, 1, 2, 1]  # binomial, where no colour differs
    assert (16 * edge_weights(picture, 1, 0.1))[0, :, 1, 1].tolist() == pytest.approx(near)
    picture[..., 0, 0] = 0.1  # in each of three channels, so exp(-3/2)
    weights = edge_weights(picture, 1, 0.1)[0, :, 1, 1]
    assert float(weights[0] / weights[2]) == pytest.approx(math.exp(-1.5))
    # One of nine values is another: their deviation is a third of the difference, and a tenth of it counts exp(-1).
    weights = pamr_weights(picture, (1,))[0, :, 1, 1]
    assert float((weights[0] / weights[2]).log()) == pytest.approx(-30, abs=1e-3)


def test_pamr_weights_sum_to_one_and_means_stay_between() -> None:
    image, _ = scene()
    weights = pamr_weights(image[None].float(), (1, 3))
    torch.testing.assert_close(weights.sum(1), torch.ones(1, *SIZE))
    given = torch.rand(1, 11, *SIZE)
    refined = pamr(given, image[None].float(), 3, (1, 3))
    assert float(refined.min()) >= float(given.min()) and float(refined.max()) <= float(given.max())


def test_the_smallest_region_has_the_pixel_and_a_tie_goes_to_the_lower_class() -> None:
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    masks = torch.zeros(2, 40, 50, dtype=torch.bool)
    masks[0, 10:20, 10:20] = True
    masks[1, 5:30, 5:40] = True
    regions = region_map(image, Regions(masks), torch.device("cpu"))
    assert int(regions[15, 15]) == 0 and int(regions[6, 6]) == 1 and int(regions[0, 0]) == -1
    labels = torch.zeros(2, 4, dtype=torch.long)
    labels[:, 2:] = 7
    found, values = vote(labels, torch.ones(2, 4), torch.tensor([[0, 0, 0, 0], [-1, 1, 1, 1]]))
    assert found.tolist() == [[0, 0, 0, 0], [0, 7, 7, 7]] and bool((values == 1).all())


def test_wrong_refinements_are_sentences() -> None:
    with pytest.raises(LexisegError, match="no refinement 'sharp'"):
        Segmenter(DenseCLIP.build(small_clip()), refine="sharp")
    with pytest.raises(LexisegError, match="cells must be a whole number of at least 1, not 'a'"):
        Refinement(cells="a")  # type: ignore[arg-type]
    with pytest.raises(LexisegError, match="steps must be a whole number of at least 1, not 0"):
        Refinement("pamr", steps=0)
