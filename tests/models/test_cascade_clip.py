"""Cascade-CLIP: the one tester, its groups, aggregations and bases."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.models import CascadeCLIP, CascadeCLIPOptions, SegmentationModel, SPTSeg, ZegCLIP
from lexiseg.models.cascade_clip import WeightedSum
from lexiseg.models.options import format_groups, parse_groups
from tests.system_tester import DIM, SystemTester
from tests.towers import small_clip, unit_rows

CASCADE: dict[str, Any] = {"groups": "{1-2},{3},{4}", "num_prompts": 3, "decoder_heads": 4}


def cascade(**options: Any) -> CascadeCLIP:
    torch.manual_seed(1)
    return cast(CascadeCLIP, CascadeCLIP.build(small_clip(), {**CASCADE, **options}).eval())


def logits(model: SegmentationModel, images: Tensor, text: Tensor) -> Tensor:
    assert isinstance(model, ZegCLIP)
    with torch.no_grad():
        return model.grid_logits(model.encode_images(images), text)


class TestCascadeCLIP(SystemTester):
    system = "cascade-clip"
    options: ClassVar = CASCADE

    def test_the_groups_are_summed(self, model: SegmentationModel) -> None:
        assert isinstance(model, CascadeCLIP)
        images, text = self.images(), unit_rows(5, DIM)
        whole = logits(model, images, text)
        parts = []
        with torch.no_grad():
            features = model.encode_images(images)
            for head, queries in zip(model.heads(), model.queries(features.values["cls"], text), strict=True):
                parts.append(head.decoder(queries, head.decoder.project_memory(features.values[head.feature])))
        torch.testing.assert_close(torch.stack(parts).sum(0).unflatten(2, (5, 6)), whole)
        assert all(float(part.abs().max()) > 0 for part in parts)

    def test_level_projections_stay_as_they_are_drawn(self, model: SegmentationModel) -> None:
        names = model.trainable_names()
        assert not any(name.startswith("levels.") for name in names)
        assert "aggregations.0.weights" in names
        assert any(name.startswith("levels.") for name in cascade(level_projection="trained").trainable_names())


class TestCascadeOnFrozenCLIP(SystemTester):
    system = "cascade-clip"
    options: ClassVar = {**CASCADE, "backbone": "fixed", "aggregation": "nga-fixed", "text_projection": "shared"}

    def test_what_is_shared_and_fixed(self, model: SegmentationModel) -> None:
        assert isinstance(model, CascadeCLIP)
        assert len(model.query_projs) == 1
        assert not any(name.startswith(("prompts.", "aggregations.", "clip.")) for name in model.trainable_names())


class TestCascadeOnSPT(SystemTester):
    system = "cascade-clip"
    options: ClassVar = {**CASCADE, "base": "spt-seg", "init": "clip-similarity", "level_projection": "clip"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(1, 40), min_size=1).map(lambda group: tuple(sorted(group))), min_size=1))
def test_groups_are_read_as_they_are_written(groups: list[tuple[int, ...]]) -> None:
    assert parse_groups(format_groups(tuple(groups))) == tuple(groups)
    assert parse_groups(groups) == tuple(groups)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="{}0123456789-, ", max_size=12))
def test_other_text_is_refused_or_read_as_groups(text: str) -> None:
    try:
        groups = parse_groups(text)
    except ValueError:
        return
    assert parse_groups(format_groups(groups)) == groups
    assert all(group == tuple(sorted(set(group))) and group[0] > 0 for group in groups)


def test_groups_of_the_paper() -> None:
    assert parse_groups(" {6-8}, {9-11} ,{12}") == ((6, 7, 8), (9, 10, 11), (12,))
    assert CascadeCLIPOptions(groups=[[4, 5], [9]]).groups == "{4-5},{9}"
    assert CascadeCLIPOptions().blocks == ((6, 7, 8), (9, 10, 11), (12,))


@pytest.mark.parametrize("text", ["6-8", "{}", "{6-8},{}", "{8-6}", "{3,3}", "{0}", "{a}", [[2, 1]], [], "{1-99999}"])
def test_wrong_groups_are_one_sentence(text: Any) -> None:
    with pytest.raises(LexisegError, match="'cascade-clip' has a wrong value for 'groups'"):
        CascadeCLIP.parse_options({"groups": text})


def test_groups_must_fit_the_tower_and_the_aggregations() -> None:
    with pytest.raises(LexisegError, match="name block 12, but the image tower has 4"):
        CascadeCLIP.build(small_clip())


@pytest.mark.parametrize("groups", ["{4}", "{2-3},{4}", "{1},{2},{3},{4}", "{1-2},{3-4}", "{1,3},{2}", "{4},{4},{4}"])
def test_any_groups(groups: str) -> None:
    model = cascade(groups=groups)
    assert len(model.decoders) == len(model.options.blocks)
    images, text = torch.randn(1, 3, 24, 16), unit_rows(3, DIM)
    model.losses(images, torch.randint(0, 3, (1, 24, 16)), text)["loss"].backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for _, parameter in model.trainable_parameters()
    )


@pytest.mark.parametrize("aggregation", ["nga", "nga-fixed", "sum", "trainable-sum", "concat", "self-attention"])
def test_every_aggregation(aggregation: Any) -> None:
    model = cascade(aggregation=aggregation)
    images, text = torch.randn(2, 3, 16, 24), unit_rows(3, DIM)
    model.losses(images, torch.randint(0, 3, (2, 16, 24)), text)["loss"].backward()
    trained = [name for name in model.trainable_names() if name.startswith("aggregations.0.")]
    assert bool(trained) == (aggregation not in ("nga-fixed", "sum"))
    assert all(dict(model.named_parameters())[name].grad is not None for name in trained)


def test_the_weights_of_the_gaussian() -> None:
    for sigma, expected in ((0.8, (0.04, 0.46, 1.0)), (1.0, (0.14, 0.61, 1.0)), (1.2, (0.25, 0.71, 1.0))):
        weights = WeightedSum(3, sigma).weights.detach()
        torch.testing.assert_close(weights, torch.tensor(expected), rtol=0, atol=0.006)  # Table 16, two digits
    levels = torch.randn(3, 1, 2, 3)
    torch.testing.assert_close(WeightedSum(3, None)(levels), levels[0] + levels[1] + levels[2])


def test_the_weights_as_printed() -> None:
    weights = WeightedSum(3, 1.0, nearest=1).weights.detach()
    torch.testing.assert_close(weights, torch.tensor([0.0111, 0.1353, 0.6065]), rtol=0, atol=1e-4)  # Eq. 4


def test_raw_tokens_are_joined_before_their_projection() -> None:
    """Of one block a group it is the same as joining what was projected; of several it is Eq. 4."""
    images, text = torch.randn(1, 3, 16, 24), unit_rows(3, DIM)
    groups = {"groups": "{1},{3},{4}", "level_projection": "clip"}
    raw, projected = (cascade(**groups, aggregate=how) for how in ("raw", "projected"))
    raw.load_state_dict(projected.state_dict())
    torch.testing.assert_close(logits(raw, images, text), logits(projected, images, text))
    model = cascade(groups="{1-2},{3-4}", aggregate="raw", aggregation="nga-printed").eval()
    with torch.no_grad():
        result = model.run_tower(images, levels=range(4))
        for group, blocks in enumerate(((0, 1), (2, 3))):
            first, second = (result.levels[block][:, -6:] for block in blocks)
            joined = math.exp(-2.0) * first + math.exp(-0.5) * second
            expected = model.project_level(group, joined).unflatten(1, (2, 3))
            torch.testing.assert_close(model.encode_images(images).values[f"group_{group}"], expected)
    model.losses(images, torch.randint(0, 3, (1, 16, 24)), text)["loss"].backward()
    assert all(parameter.grad is not None for _, parameter in model.trainable_parameters())


def test_prediction_from_any_subset_of_decoders() -> None:
    whole = cascade()
    images, text = torch.randn(1, 3, 16, 24), unit_rows(3, DIM)

    def part(*numbers: int) -> Tensor:
        model = cascade(predict_with=numbers)
        model.load_state_dict(whole.state_dict())
        return logits(model, images, text)

    torch.testing.assert_close(part(1, 3) + part(2), logits(whole, images, text), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(part(1), part(3))
    assert len(cascade(predict_with=[2]).train().heads()) == 3, "all of them train"
    for wrong in ([], [4], [1, 1], [0]):
        with pytest.raises(LexisegError, match="predict_with"):
            CascadeCLIP.parse_options({**CASCADE, "predict_with": wrong})


def test_on_spt_seg_it_is_both() -> None:
    model = cascade(base="spt-seg")
    assert isinstance(model, SPTSeg) and model.system == "cascade-clip" and type(cascade()) is CascadeCLIP
    again = copy.deepcopy(model)
    assert type(again) is type(model) and again.options == model.options


def test_a_cascade_starts_from_clip_similarity_as_zegclip_does() -> None:
    options = {"num_prompts": 3, "decoder_heads": 4, "init": "clip-similarity"}
    images, text = torch.randn(1, 3, 32, 32), unit_rows(5, DIM)
    torch.manual_seed(0)
    zegclip = ZegCLIP.build(small_clip(), options).eval()
    torch.manual_seed(0)
    model = cascade(init="clip-similarity", level_projection="released")
    model.prompts.load_state_dict(zegclip.prompts.state_dict())  # type: ignore[union-attr, operator]
    torch.testing.assert_close(logits(model, images, text), logits(zegclip, images, text), rtol=1e-4, atol=1e-4)
    model.losses(images, torch.randint(0, 5, (1, 32, 32)), text)["loss"].backward()
    for index in (0, 1):
        key = model.decoders[index].layers[-1].key  # type: ignore[union-attr, index]
        assert float(key.weight.grad.abs().max()) > 0


def test_clip_similarity_needs_something_to_compare() -> None:
    with pytest.raises(LexisegError, match=r"\{1-2\},\{3\}.*put the last block in a group of its own"):
        cascade(groups="{1-2},{3}", init="clip-similarity")
    cascade(groups="{1-2},{3}", init="clip-similarity", level_projection="clip")
    with pytest.raises(LexisegError, match="put the last block in a group of its own"):
        cascade(groups="{1-2},{3-4}", init="clip-similarity", aggregation="concat")
