"""ZegCLIP and its baselines: the one tester, and what is their own."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.prompt_rows import prompts_as_rows
from lexiseg.errors import LexisegError
from lexiseg.models import SegmentationModel, ZegCLIP
from lexiseg.scores import GridScores
from tests.system_tester import DIM, SystemTester
from tests.towers import small_clip, unit_rows


class TestZegCLIP(SystemTester):
    system = "zegclip"
    options: ClassVar = {"num_prompts": 3, "decoder_heads": 4}

    def test_the_seen_offset(self, model: SegmentationModel) -> None:
        text, images = unit_rows(3, DIM), self.images()
        plain = self.dense(model, images, text)
        offset = self.dense(model, images, text, seen=torch.tensor([True, False, True]))
        expected = plain - torch.tensor([0.1, 0.0, 0.1])[:, None, None]
        torch.testing.assert_close(offset, expected, rtol=0, atol=1e-6)
        assert float(plain.min()) >= 0.0
        assert float(plain.max()) <= 1.0

    def test_many_classes_are_decoded_in_parts(self, model: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
        text, images = unit_rows(50, DIM), self.images()
        whole = self.dense(model, images, text)
        monkeypatch.setattr("lexiseg.models.zegclip.CLASS_CHUNK", 7)
        torch.testing.assert_close(self.dense(model, images, text), whole, rtol=1e-5, atol=1e-6)

    def test_mask_size_applies_to_square_images_only(self) -> None:
        model = ZegCLIP.build(small_clip(), {**self.options, "mask_size": 16}).eval()
        assert isinstance(model, ZegCLIP)
        assert model.mask_size((64, 64)) == (16, 16)
        assert model.mask_size((64, 48)) == (64, 48)

    @pytest.mark.parametrize("depth", [3, 1, 0, -2])
    def test_prompts_as_context_equal_prompts_as_rows(self, depth: int) -> None:
        model = ZegCLIP.build(small_clip(), {**self.options, "prompt_depth": depth}).eval()
        assert isinstance(model, ZegCLIP)
        with torch.no_grad():
            fast = model.project_tokens(model.run_tower(self.images()))
            with prompts_as_rows(model):
                rows = model.project_tokens(model.run_tower(self.images()))
        for ours, theirs in zip(fast, rows, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_pictures_are_resized_to_the_nearest_number_of_patches(self, model: SegmentationModel) -> None:
        assert model.fit_to_patches(torch.rand(1, 3, 3, 21)).shape[-2:] == (8, 24)

    def test_prompts_must_fit_the_tower(self) -> None:
        with pytest.raises(LexisegError, match="depth 4"):
            ZegCLIP.build(small_clip(), {**self.options, "prompt_depth": 4})
        with pytest.raises(LexisegError, match="7 heads"):
            ZegCLIP.build(small_clip(), {"decoder_heads": 7})

    def test_self_training_labels_unseen_pixels_with_the_best_unseen_class(self, model: SegmentationModel) -> None:
        assert isinstance(model, ZegCLIP)
        text, images, labels = unit_rows(5, DIM), self.images(), self.labels()
        seen = torch.tensor([True, True, False, False, True])
        marked = torch.where(labels == 2, -1, labels)
        marked[marked == 3] = 4
        once = model.losses(images, marked, text, seen=seen)
        again = model.losses(images, torch.where(marked == -1, 3, marked), text, seen=seen)
        assert torch.equal(once["loss"], again["loss"])  # where unseen pixels are matters, not what they are
        with torch.no_grad():
            logits = model.grid_logits(model.encode_images(images), text)
        large = F.interpolate(logits, size=(40, 48), mode="bilinear", align_corners=False)
        best = torch.tensor([2, 3])[large[:, 2:4].argmax(dim=1)]
        by_hand = model.losses(images, torch.where(marked == -1, best, marked), text)
        torch.testing.assert_close(once["loss"], by_hand["loss"])
        with pytest.raises(LexisegError, match="unseen class"):
            model.losses(images, marked, text, seen=torch.ones(5, dtype=torch.bool))

    def test_dropout_is_off_in_evaluation(self, model: SegmentationModel) -> None:
        text, images = unit_rows(4, DIM), self.images()
        assert torch.equal(self.dense(model, images, text), self.dense(model, images, text))
        model.train()
        assert not torch.equal(self.dense(model, images, text), self.dense(model, images, text))


class TestZegCLIPWithoutDescriptor(SystemTester):
    system = "zegclip"
    options: ClassVar = {"num_prompts": 3, "decoder_heads": 4, "descriptor": False}

    def test_the_query_does_not_depend_on_the_image(self, model: SegmentationModel) -> None:
        assert isinstance(model, ZegCLIP)
        (queries,) = model.queries(unit_rows(2, DIM, seed=5), unit_rows(3, DIM))
        assert torch.equal(queries[0], queries[1])


class TestZegCLIPWithExclusiveClasses(SystemTester):
    system = "zegclip"
    options: ClassVar = {
        "num_prompts": 3,
        "decoder_heads": 4,
        "mask_loss": "cross-entropy",
        "mask_weight": 1.0,
        "init": "clip-similarity",
    }

    def test_classes_and_images_do_not_touch_each_other(self, model: SegmentationModel) -> None:
        """Images do not, and classes share the probability of one."""
        text, images = unit_rows(9, DIM), self.images(32, 48, count=3)
        grid = self.grid(model, images, text)
        torch.testing.assert_close(grid.sum(1), torch.ones(3, 4, 6))
        torch.testing.assert_close(self.grid(model, images[1:2], text), grid[1:2], rtol=1e-4, atol=1e-5)
        fewer = self.grid(model, images, text[:4])
        torch.testing.assert_close(fewer, grid[:, :4] / grid[:, :4].sum(1, keepdim=True), rtol=1e-4, atol=1e-5)

    def grid(self, model: SegmentationModel, images: Tensor, text: Tensor) -> Tensor:
        """Scores at the patches."""
        with torch.no_grad():
            scores = model(images, text)
        assert isinstance(scores, GridScores)
        return scores.logits.sigmoid()

    def test_labels_may_be_smaller_and_must_be_classes(self, model: SegmentationModel) -> None:
        text, images = unit_rows(4, DIM), self.images()
        assert torch.isfinite(model.losses(images, self.labels(20, 24), text)["loss"])
        nothing = model.losses(images, torch.full((2, 40, 48), 255), text)
        assert nothing["loss"].item() == 0.0  # here void is left out, not negative


class TestZegCLIPShallow(SystemTester):
    system = "zegclip"
    options: ClassVar = {
        "num_prompts": 2,
        "prompt_depth": 0,
        "decoder_layers": 2,
        "mask_size": 24,
        "class_embedding_twice": True,
    }


class TestCLIPFixed(SystemTester):
    system = "zegclip"
    options: ClassVar = {"backbone": "fixed", "decoder_heads": 4}

    def test_the_tower_is_frozen_and_without_prompts(self, model: SegmentationModel) -> None:
        assert not any(name.startswith(("clip.", "prompts.")) for name in model.trainable_names())


class TestCLIPFineTuned(SystemTester):
    system = "zegclip"
    options: ClassVar = {"backbone": "finetune", "decoder_heads": 4}

    def test_the_image_tower_trains(self, model: SegmentationModel) -> None:
        assert any(name.startswith("clip.model.visual.transformer") for name in model.trainable_names())
