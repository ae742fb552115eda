"""The training-free methods, each as a system of its own."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.library_towers import OpenCLIPTower
from lexiseg.errors import LexisegError
from lexiseg.models import DenseCLIP, SegmentationModel
from lexiseg.models.dense_clip import DenseCLIPOptions, methods
from lexiseg.models.last_block import label_agreement, line_weights, majority, mix, neighbourhood, proxy_attention
from tests.system_tester import DIM, SystemTester
from tests.towers import small_clip, unit_rows


class DenseTester(SystemTester):
    """What every method must do; windows are left to the tests of windows."""

    system = "dense-clip"
    trainable = False

    def test_scores_are_cosines(self, model: SegmentationModel) -> None:
        dense = self.dense(model, self.images(), unit_rows(6, DIM))
        assert float(dense.abs().max()) <= 1.0 + 1e-5

    def test_the_default_window_is_the_authors(self, model: SegmentationModel) -> None:
        settings = methods()[str(self.options.get("method", "maskclip"))]
        assert model.window.size == settings.get("window_size")
        assert model.window.short_side == settings.get("short_side", 64)


def test_naclips_gaussian_is_its_papers() -> None:
    assert DenseCLIPOptions().neighbour_std == 5.0  # patches; no protocol sets it


class TestMaskCLIP(DenseTester):
    def test_a_patch_keeps_to_itself_in_the_last_block(self) -> None:
        clip = small_clip(vision_cfg={"layers": 1})
        images = self.images(32, 32, 1)
        changed = images.clone()
        changed[:, :, :8, :8] += 1.0
        text = unit_rows(3, DIM)
        for method, touched in (("maskclip", False), ("clip", True)):
            model = DenseCLIP.build(clip, {"method": method}).eval()
            with torch.no_grad():
                a, b = model(images, text).logits, model(changed, text).logits
            difference = (a - b).abs().amax(dim=1)[0]
            assert difference[0, 0] > 1e-4
            assert bool((difference.flatten()[1:] > 1e-6).any()) == touched

    def test_more_last_blocks_than_the_tower_has_are_all_of_them(self) -> None:
        images, text = self.images(), unit_rows(3, DIM)
        few, many = (DenseCLIP.build(small_clip(), {"last_blocks": count}).eval() for count in (4, 9))
        assert torch.equal(self.dense(few, images, text), self.dense(many, images, text))

    def test_the_short_side_follows_the_tower(self) -> None:
        assert DenseCLIP.build(small_clip(), {"short_side": 0}).window.short_side is None


class TestSCLIP(DenseTester):
    options: ClassVar = {"method": "sclip"}


class TestClearCLIP(DenseTester):
    options: ClassVar = {"method": "clearclip"}


class TestNACLIP(DenseTester):
    options: ClassVar = {"method": "naclip"}


class TestGEM(DenseTester):
    options: ClassVar = {"method": "gem", "depth": 3}


class TestResCLIP(DenseTester):
    options: ClassVar = {"method": "resclip", "middle_blocks": (1, 2)}
    classes_interact = True  # in the second pass

    def test_many_words_are_refined_only_where_they_lead(self, model: SegmentationModel) -> None:
        assert isinstance(model, DenseCLIP)
        generator = torch.Generator().manual_seed(5)
        logits = 0.2 * torch.rand(1, 40, 4, 6, generator=generator)
        logits[:, :30] += 0.3
        image = torch.randn(1, 3, 32, 48, generator=generator)
        few, many = model.first_labels(logits[:, :30], image), model.first_labels(logits, image)
        assert float((few == many).float().mean()) > 0.95

    def test_a_word_that_leads_somewhere_is_refined_however_low_it_is(self, model: SegmentationModel) -> None:
        assert isinstance(model, DenseCLIP)
        logits = torch.full((1, 40, 4, 6), 0.1)
        logits[:, :39, :, :3], logits[:, 39, :, 3:] = 0.9, 0.3
        image = torch.ones(1, 3, 32, 48)
        image[..., :24] = -1.0
        assert bool((model.first_labels(logits, image)[..., 40:] == 39).all())

    def test_the_first_pass_labels_the_pixels_that_fill_no_patch_too(
        self, model: SegmentationModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(model, DenseCLIP)
        patch, labelled, first = model.patch_size, [], model.first_labels
        height, width = 3 * patch, 5 * patch
        monkeypatch.setattr(model, "first_labels", lambda *given: labelled.append(first(*given)) or labelled[-1])
        features = model.encode_images(torch.randn(1, 3, height + 3, width + 1))
        found = model.patch_labels(features, unit_rows(3, DIM))
        assert labelled[0].shape == (1, height + 3, width + 1)
        assert torch.equal(found, majority(labelled[0][:, :height, :width], (3, 5)))

    def test_a_tower_without_the_middle_blocks_is_refused(self) -> None:
        with pytest.raises(LexisegError, match=r"reads the blocks .* has 4"):
            DenseCLIP.build(small_clip(), {"method": "resclip"})


class FakeProxy(nn.Module):
    """Features of twice as many places a side: colours, and the place."""

    def forward(self, pixels: Tensor) -> Tensor:
        size = [max(int(side) // 4, 1) for side in pixels.shape[-2:]]
        return F.interpolate(pixels, size=size, mode="area") + 0.1


class TestProxyCLIP(DenseTester):
    options: ClassVar = {"method": "proxyclip"}

    @pytest.fixture(autouse=True)
    def _proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lexiseg.clip.proxy.load_proxy", lambda name: FakeProxy())
        monkeypatch.setattr(type(self), "options", {"method": "proxyclip", "proxy": "fake.weights"})

    def test_without_a_proxy_it_is_refused(self) -> None:
        with pytest.raises(LexisegError, match="second encoder"):
            DenseCLIP.build(small_clip(), {"method": "proxyclip"})

    def test_a_picture_of_one_colour_has_weights(self) -> None:
        weights = proxy_attention(torch.ones(2, 3, 4, 5), 1.2, 3.0)
        assert torch.isfinite(weights).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 20))


def test_our_blocks_are_the_towers_own() -> None:
    clip = small_clip()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tower = OpenCLIPTower(clip.image_tower)
    with torch.no_grad():
        tokens, grid = tower.embed(images)
        ours, kept = tower.run(tokens, attending=(1, 3))
        theirs = clip.image_tower.run(tokens, grid).tokens
        cls = tower.project(ours)[:, 0]
        torch.testing.assert_close(cls, clip.model.encode_image(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert set(kept) == {1, 3} and kept[1][0].shape == (2, 4, 17, 6)


def test_the_neighbourhood_draws_the_weights_to_the_patch() -> None:
    torch.manual_seed(0)
    query, key = 0.1 * torch.randn(2, 1, 2, 13, 8)
    eye = torch.eye(13).expand(1, 2, -1, -1)
    near = mix((query, key, eye), "kk+neighbours", neighbourhood((3, 4), 1.0))
    plain = mix((query, key, eye), "kk")
    assert bool((near.diagonal(dim1=2, dim2=3)[..., 1:] > plain.diagonal(dim1=2, dim2=3)[..., 1:]).all())
    assert neighbourhood((3, 4), 2.0)[1, 1] == 1.0 and neighbourhood((3, 4), 2.0)[0].sum() == 0.0


def test_agreement_falls_where_another_label_lies_between() -> None:
    labels = torch.tensor([[0, 0, 1, 0, 0]])
    agree = label_agreement(labels, 1e-3)
    assert agree[0, 1] > agree[0, 4] > agree[0, 2]
    torch.testing.assert_close(label_agreement(labels, 1.0).sum(-1), torch.ones(labels.numel()))
    free = label_agreement(labels, 1e-3, same_entity_only=False)
    assert free[0, 1] == free[0, 4] > free[0, 2]
    assert majority(torch.tensor([[1, 1, 2, 2], [1, 0, 3, 3]]), (1, 2)).tolist() == [[1, 2]]


@pytest.mark.parametrize("grid", [(5, 9), (8, 8), (1, 6)])
def test_lines_are_walked_in_steps_of_the_longest_one(grid: tuple[int, int]) -> None:
    """Pair by pair as the rule says it."""
    labels = torch.randint(0, 2, grid)
    weights, longest = line_weights(labels), max(grid) - 1
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    for first, start in enumerate(places):
        for second, end in enumerate(places):
            step = [last - begin for begin, last in zip(start, end, strict=True)]
            distance = max(map(abs, step))
            line = [
                tuple(round(begin + length * (index / longest)) for begin, length in zip(start, step, strict=True))
                for index in range(1, distance + 1)
            ]
            crossed = any(labels[place] != labels[start] for place in line)
            expected = math.exp(-distance / longest) if crossed else 1.0
            assert float(weights[first, second]) == pytest.approx(expected)


@pytest.mark.parametrize("method", sorted(set(methods()) - {"proxyclip", "resclip"}))
def test_the_settings_of_every_method_are_options(method: str) -> None:
    options = DenseCLIPOptions(method=method)  # type: ignore[arg-type]
    stated: dict[str, Any] = methods()[method]
    for name, changes in stated.get("protocols", {}).items():
        known = set(DenseCLIPOptions.model_fields) | {"threshold", "area"}
        assert set(changes) <= known, name
    assert options.method == method and options.mixing == stated["mixing"]
