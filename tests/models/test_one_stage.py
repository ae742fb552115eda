"""Cascade-CLIP and SPT-SEG: the one tester, and what is their own."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.losses.ssim import ssim_loss
from lexiseg.models import SYSTEMS, CascadeCLIP, CascadeCLIPOptions, SegmentationModel, SPTSeg, ZegCLIP
from lexiseg.models.cascade_clip import WeightedSum, format_groups, parse_groups
from lexiseg.models.one_stage import OneStageModel
from lexiseg.models.spt_seg import SpectralFilter, SpectralGuide
from lexiseg.recipes import TrainSettings
from tests.system_tester import DIM, SystemTester
from tests.towers import small_clip, unit_rows

CASCADE: dict[str, Any] = {"groups": "{1-2},{3},{4}", "num_prompts": 3, "decoder_heads": 4}


def cascade(**options: Any) -> CascadeCLIP:
    torch.manual_seed(1)
    return cast(CascadeCLIP, CascadeCLIP.build(small_clip(), {**CASCADE, **options}).eval())


def logits(model: SegmentationModel, images: Tensor, text: Tensor) -> Tensor:
    assert isinstance(model, OneStageModel)
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
            for head, queries, memory in zip(
                model.heads(), model.queries(features.values["cls"], text), model.memories(features), strict=True
            ):
                projected = head.decoder.project_memory(memory.flatten(1, 2), (5, 6))
                parts.append(head.decoder(queries, projected))
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


class TestSPTSeg(SystemTester):
    system = "spt-seg"
    options: ClassVar = {"num_prompts": 3, "init": "clip-similarity"}

    def test_the_filter_trains_unless_told_otherwise(self, model: SegmentationModel) -> None:
        assert "spectral.weight" in model.trainable_names()
        frozen = SPTSeg.build(small_clip(), {**self.options, "train_filter": False})
        assert "spectral.weight" not in frozen.trainable_names()

    def test_the_second_loss_is_the_similarity(self, model: SegmentationModel) -> None:
        losses = model.losses(self.images(), self.labels(), unit_rows(4, DIM))
        assert set(losses) == {"loss", "loss_mask", "loss_ssim"}
        torch.testing.assert_close(losses["loss"].detach(), losses["loss_mask"] + losses["loss_ssim"])


# ---- options ----


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("zegclip", {"seen_offset": float("nan")}, "'seen_offset' of zegclip .* finite"),
        ("zegclip", {"mask_size": 0}, "'mask_size'"),
        ("zegclip", {"short_side": -5}, "'short_side'"),
        ("zegclip", {"window_size": 0}, "'window_size'"),
        ("zegclip", {"window_size": 8, "window_stride": -1}, "'window_stride'"),
        ("zegclip", {"window_size": 8, "window_stride": 9}, "do not fit each other: a window_stride of 9"),
        ("zegclip", {"mask_weight": -5}, "'mask_weight'"),
        ("cascade-clip", {"std": [0, 0, 0]}, r"'std\.0'"),
        ("cascade-clip", {"mean": [0.5, 0.5]}, r"'mean\.2'"),
        ("cascade-clip", {"aggregation": "mean"}, "'aggregation' of cascade-clip is wrong: Input should be 'nga'"),
        ("cascade-clip", {"aggregation": ["nga", "mean"]}, r"'aggregation\.1'"),
        ("dense-clip", {"window_size": 8, "window_stride": 9}, "do not fit"),
        ("deop", {"std": [1, 0, 1]}, r"'std\.1'"),
        ("deop", {"short_side": 0}, "'short_side'"),
        ("deop", {"long_side": 0}, "'long_side'"),
        ("deop", {"alpha": [0.5, 3]}, r"'alpha\.1' .* less than or equal to 1"),
        ("deop", {"dice_weight": -1}, "'dice_weight'"),
        ("zsseg", {"proposals": {"kind": "sam", "foo": 1}}, r"no option 'proposals\.foo'"),
        ("zsseg", {"criterion": {"mask_weight": -1}}, r"'criterion\.mask_weight'"),
        ("zsseg", {"ensemble": {"weight": float("nan")}}, r"'ensemble\.weight' .* finite"),
    ],
)
def test_values_that_make_no_sense(system: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LexisegError, match=words):
        SYSTEMS[system].parse_options(options)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "clip_norm", "min_lr"])
def test_numbers_of_the_loop_are_finite(key: str) -> None:
    with pytest.raises(ValueError, match="finite"):
        TrainSettings.model_validate({"steps": 1, "batch_size": 1, "lr": 1.0, key: float("inf")})


def test_the_resize_before_the_windows_is_an_option() -> None:
    assert cascade().window.antialias and not cascade(antialias=False).window.antialias


# ---- groups ----


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
    with pytest.raises(LexisegError, match="'groups' of cascade-clip is wrong"):
        CascadeCLIP.parse_options({"groups": text})


def test_groups_must_fit_the_tower_and_the_aggregations() -> None:
    with pytest.raises(LexisegError, match="name block 12, but the image tower has 4"):
        CascadeCLIP.build(small_clip())
    with pytest.raises(LexisegError, match="2 aggregations are given for 3 groups"):
        CascadeCLIP.parse_options({**CASCADE, "aggregation": ["nga", "sum"]})


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


@pytest.mark.parametrize(
    "aggregation", ["nga", "nga-fixed", "sum", "trainable-sum", "concat", "self-attention", ["concat", "nga", "sum"]]
)
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
    levels = [torch.randn(1, 2, 3) for _ in range(3)]
    torch.testing.assert_close(WeightedSum(3, None)(levels), levels[0] + levels[1] + levels[2])


# ---- starts ----


def test_a_matching_cascade_starts_as_a_matching_zegclip() -> None:
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


def test_a_matching_start_needs_something_to_compare() -> None:
    with pytest.raises(LexisegError, match=r"no group of \{1-2\},\{3\} has the last block"):
        cascade(groups="{1-2},{3}", init="clip-similarity")
    cascade(groups="{1-2},{3}", init="clip-similarity", level_projection="clip")
    with pytest.raises(LexisegError, match="put the last block in a group of its own"):
        cascade(groups="{1-2},{3-4}", init="clip-similarity", aggregation="concat")
    with pytest.raises(LexisegError, match="two layers at least"):
        SPTSeg.build(small_clip(), {"init": "clip-similarity", "decoder_layers": 1})


# ---- the spectral parts ----


def test_the_filter_of_ones_adds_the_product_itself() -> None:
    module = SpectralFilter((6, 8), 5)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.0, 0.0]).expand_as(module.weight))
    for grid in [(6, 8), (5, 7), (1, 1), (12, 3)]:
        patches, cls = torch.randn(2, grid[0] * grid[1], 5), torch.randn(2, 1, 5)
        torch.testing.assert_close(module(patches, cls, grid), patches * cls, rtol=1e-4, atol=1e-5)


def test_a_low_pass_stays_one_on_other_grids() -> None:
    module = SpectralFilter((8, 8), 1)
    with torch.no_grad():
        rows, columns = torch.fft.fftfreq(8).abs()[:, None], torch.fft.rfftfreq(8)[None]
        module.weight.copy_((1 - rows - columns)[..., None, None] * torch.tensor([1.0, 0.0]))
    for grid in [(16, 16), (4, 6), (11, 9)]:
        expected = 1 - torch.fft.fftfreq(grid[0]).abs()[:, None] - torch.fft.rfftfreq(grid[1])[None]
        torch.testing.assert_close(module.transfer(grid).real[..., 0], expected, rtol=0, atol=1e-5)


def test_where_z_points_away_from_the_prompt_it_is_zero() -> None:
    guide = SpectralGuide(16)
    memory = unit_rows(30, 16, seed=2)[None]
    z = guide(memory, (5, 6))
    assert z.shape == (1, 30, 16)
    with torch.no_grad():
        guide.prompt.mul_(-1)
    other = guide(memory, (5, 6))
    assert bool(((z == 0).all(-1) | (other == 0).all(-1)).all())


def test_similarity_and_its_gradient() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 3, 6, 5, dtype=torch.float32, requires_grad=True)
    labels = torch.randint(0, 3, (2, 12, 10))
    labels[0, :4] = 255
    loss = ssim_loss(values, labels, weight=2.0)
    loss.backward()
    assert values.grad is not None
    step = 1e-2 * torch.randn_like(values)
    with torch.no_grad():
        ahead, behind = (ssim_loss(values + sign * step, labels, weight=2.0) for sign in (1, -1))
    assert float((ahead - behind) / 2) == pytest.approx(float((values.grad * step).sum()), rel=0.02, abs=1e-4)
    perfect = torch.stack([(labels == index).float() for index in range(3)], dim=1)
    assert float(ssim_loss(perfect, labels)) == pytest.approx(0.0, abs=1e-4)
    with pytest.raises(LexisegError, match="label is 7"):
        ssim_loss(values, torch.full((2, 12, 10), 7))
