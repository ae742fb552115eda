"""SPT-SEG: the one tester, and its spectral parts."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from lexiseg.errors import LexisegError
from lexiseg.models import SegmentationModel, SPTSeg
from lexiseg.models.spt_seg import SpectralFilter, SpectralGuide
from tests.system_tester import DIM, SystemTester
from tests.towers import small_clip, unit_rows


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


def test_clip_similarity_needs_a_norm() -> None:
    with pytest.raises(LexisegError, match="two layers at least"):
        SPTSeg.build(small_clip(), {"init": "clip-similarity", "decoder_layers": 1})


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
        torch.testing.assert_close(module.weights(grid)[..., 0, 0], expected, rtol=0, atol=1e-5)


def test_where_z_points_away_from_the_prompt_it_is_zero() -> None:
    guide = SpectralGuide(16)
    memory = unit_rows(30, 16, seed=2)[None]
    z = guide(memory, (5, 6))
    assert z.shape == (1, 30, 16)
    with torch.no_grad():
        guide.prompt.mul_(-1)
    other = guide(memory, (5, 6))
    assert bool(((z == 0).all(-1) | (other == 0).all(-1)).all())
