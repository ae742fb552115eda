"""The second look: the one tester, what it is made of, and that its training is ZegCLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.models import CascadeCLIP, SecondLook, SegmentationModel, ZegCLIP
from lexiseg.recipes import load_recipe
from lexiseg.scores import GridScores
from lexiseg.smoothing import edge_weights, smooth
from lexiseg.training.init import start_from
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import save_model
from tests.system_tester import DIM, SystemTester
from tests.towers import small_clip, unit_rows

SMALL: dict[str, Any] = {"num_prompts": 3, "decoder_heads": 4}


def build(system: type[SegmentationModel], **options: Any) -> Any:
    torch.manual_seed(1)
    return system.build(small_clip(), {**SMALL, **options}).eval()


def score(model: SecondLook, images: Tensor, text: Tensor, **more: Any) -> GridScores:
    with torch.no_grad():
        return cast(GridScores, model(images, text, **more))


class TestSecondLook(SystemTester):
    system = "second-look"
    options: ClassVar = SMALL

    def test_the_lattice_has_quarters_of_patches(self, model: SegmentationModel) -> None:
        assert isinstance(model, SecondLook)
        scores = score(model, self.images(), unit_rows(5, DIM))
        assert scores.logits.shape == (2, 5, 20, 24)
        assert 0 < float(scores.logits.min()) <= float(scores.logits.max()) < 1
        features = model.encode_images(self.images())
        assert features.values["patches"].shape[1:3] == (5, 6)
        assert features.values["shifted_patches"].shape[1:3] == (4, 5)

    def test_the_seen_offset(self, model: SegmentationModel) -> None:
        text, images = unit_rows(3, DIM), self.images()
        plain = self.dense(model, images, text)
        offset = self.dense(model, images, text, seen=torch.tensor([True, False, True]))
        expected = plain - torch.tensor([0.1, 0.0, 0.1])[:, None, None]
        torch.testing.assert_close(offset, expected, rtol=0, atol=1e-6)


class TestSecondLookAlone(SystemTester):
    system = "second-look"
    options: ClassVar = {**SMALL, "smoothing_distances": []}

    def test_it_is_the_mean_of_two_looks(self, model: SegmentationModel) -> None:
        assert isinstance(model, SecondLook)
        zegclip, images, text = build(ZegCLIP), self.images(), unit_rows(4, DIM)
        zegclip.load_state_dict(model.state_dict())
        with torch.no_grad():
            both = model.lattice_logits(model.encode_images(images), text)
            looks = [
                zegclip.grid_logits(zegclip.encode_images(part), text) for part in (images, images[..., 4:-4, 4:-4])
            ]
        first, second = (F.interpolate(look, scale_factor=4, mode="bilinear") for look in looks)
        expected = first.clone()
        expected[..., 2:-2, 2:-2] = (first[..., 2:-2, 2:-2] + second) / 2
        torch.testing.assert_close(both, expected)

    @pytest.mark.parametrize(("size", "grid"), [((8, 24), (1, 2)), ((24, 8), (2, 1)), ((8, 8), None)])
    def test_a_side_of_one_patch_is_not_cut(
        self, model: SegmentationModel, size: tuple[int, int], grid: tuple[int, int] | None
    ) -> None:
        values = model.encode_images(self.images(*size)).values
        assert ("shifted_patches" in values) == (grid is not None)
        if grid is not None:
            assert tuple(values["shifted_patches"].shape[1:3]) == grid


def test_training_is_zegclips() -> None:
    models = [build(system) for system in (SecondLook, ZegCLIP)]
    ours, theirs = (model.state_dict() for model in models)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    losses = []
    for model in models:
        model.train()
        torch.manual_seed(2)  # dropout
        losses.append(model.losses(SystemTester.images(), SystemTester().labels(), unit_rows(4, DIM))["loss"])
    assert torch.equal(losses[0], losses[1])


def test_the_recipe_is_zegclips() -> None:
    ours, theirs = (load_recipe(name) for name in ("second-look-picture-world", "zegclip-picture-world"))
    assert ours.model.system == "second-look"
    assert ours.model.model_dump(exclude={"system"}) == theirs.model.model_dump(exclude={"system"})
    assert ours.model_dump(exclude={"model", "name", "description"}) == theirs.model_dump(
        exclude={"model", "name", "description"}
    )


def test_a_trained_zegclip_is_taken_over(tmp_path: Path) -> None:
    zegclip, vocabulary = build(ZegCLIP), Vocabulary.parse("cat; sky")
    folder = str(save_model(zegclip, tmp_path / "zegclip"))
    options = SecondLook.parse_options(SMALL)
    model = start_from(folder, SecondLook, options, (), vocabulary)
    assert isinstance(model, SecondLook)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in zegclip.state_dict().items())
    folder = str(save_model(build(CascadeCLIP, groups="{1-2},{4}"), tmp_path / "cascade"))
    with pytest.raises(LexisegError, match="start from a model of that system"):
        start_from(folder, SecondLook, options, (), vocabulary)


def test_without_both_it_is_zegclip_on_a_lattice() -> None:
    model, zegclip = build(SecondLook, half_patch_shift=False, smoothing_distances=[]), build(ZegCLIP)
    images, text = SystemTester.images(), unit_rows(4, DIM)
    with torch.no_grad():
        expected = zegclip.grid_logits(zegclip.encode_images(images), text)
        found = model.lattice_logits(model.encode_images(images), text)
    torch.testing.assert_close(found, F.interpolate(expected, scale_factor=4, mode="bilinear"))


def test_exclusive_classes_share_the_probability() -> None:
    model = build(SecondLook, mask_loss="cross-entropy", half_patch_shift=False)
    scores = score(model, SystemTester.images(), unit_rows(4, DIM))
    whole = build(ZegCLIP, mask_loss="cross-entropy")(SystemTester.images(), unit_rows(4, DIM)).logits
    torch.testing.assert_close(whole.sigmoid().sum(1), torch.ones(2, 5, 6))
    torch.testing.assert_close(scores.logits.sum(1), torch.ones(2, 20, 24), rtol=0, atol=0.1)


def test_weights_sum_to_one_and_stop_at_edges() -> None:
    colours = torch.zeros(1, 3, 6, 8)
    colours[..., 4:] = 1
    for distance in (1, 3, 9):
        weights = edge_weights(colours, distance, 0.1)
        torch.testing.assert_close(weights.sum(1), torch.ones(1, 6, 8))
    scores = torch.rand(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    scores[..., 4:] += 5
    result = smooth(scores, colours, (1, 2, 1), 0.1)
    assert float(result[..., :4].max()) < 1 < 5 < float(result[..., 4:].min())
    assert float(result[..., :4].std()) < 0.5 * float(scores[..., :4].std())


def test_words_are_smoothed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, colours = torch.rand(2, 9, 5, 7, generator=generator), torch.rand(2, 3, 5, 7, generator=generator)
    whole = smooth(scores, colours, (1, 2), 0.3)
    monkeypatch.setattr("lexiseg.smoothing.WORDS", 4)
    assert torch.equal(smooth(scores, colours, (1, 2), 0.3), whole)
    assert torch.equal(smooth(scores[1:, 3:5], colours[1:], (1, 2), 0.3), whole[1:, 3:5])
    constant = torch.full((1, 2, 5, 7), 0.25)
    torch.testing.assert_close(smooth(constant, colours[:1], (4, 2), 0.1), constant)
