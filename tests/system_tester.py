"""What every segmentation system must do. A system's test inherits `SystemTester` and says how to build it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, SegmentationModel
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.proposals.base import HARD_LOGIT, ProposalGenerator, Proposals
from lexiseg.scores import RegionScores, Scores
from lexiseg.weights import load_model, save_model
from tests.towers import small_clip, unit_rows

DIM = 16


class GivenProposals(ProposalGenerator):
    """Proposes the same regions whatever it sees, in the place of another generator."""

    def __init__(self, proposals: Proposals, instead_of: ProposalGenerator) -> None:
        super().__init__()
        self.proposals = proposals
        self.embed_dim, self.needs_text = instead_of.embed_dim, instead_of.needs_text

    def forward(self, images: Tensor, text: Tensor | None = None) -> Proposals:
        return self.proposals


class SystemTester:
    """Tests that hold for every system; ``system`` and ``options`` choose it."""

    system: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    trainable: ClassVar[bool] = True
    classes_interact: ClassVar[bool] = False  # whether a class's scores depend on which others are asked for

    @pytest.fixture
    def model(self) -> SegmentationModel:
        torch.manual_seed(1)
        return SYSTEMS[self.system].build(small_clip(), dict(self.options), seen_names=("cat", "sky")).eval()

    @staticmethod
    def images(height: int = 40, width: int = 48, count: int = 2, seed: int = 3) -> Tensor:
        return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))

    def dense(self, model: SegmentationModel, images: Tensor, text: Tensor, **more: Any) -> Tensor:
        with torch.no_grad():
            return model(images, text, **more).dense(tuple(images.shape[-2:]))

    @pytest.mark.parametrize("size", [(32, 32), (8, 8), (24, 64), (33, 50), (5, 71), (1, 1), (131, 17)])
    def test_any_resolution_and_aspect(self, model: SegmentationModel, size: tuple[int, int]) -> None:
        with torch.no_grad():
            features = model.encode_images(self.images(*size))
            scores = model.score(features, unit_rows(5, DIM))
        assert features.size == size
        assert isinstance(scores, Scores)
        assert scores.label_map(size).shape == (2, *size)
        dense = scores.dense((2 * size[0] + 1, 7))
        assert dense.shape == (2, 5, 2 * size[0] + 1, 7)
        assert dense.dtype == torch.float32
        assert torch.isfinite(dense).all()

    @pytest.mark.parametrize("count", [1, 2, 1000])
    def test_any_number_of_classes(self, model: SegmentationModel, count: int) -> None:
        text = unit_rows(count, DIM)
        with torch.no_grad():
            scores = model(self.images(count=1), text, seen=torch.arange(count) % 3 == 0)
        labels = scores.label_map((21, 30))
        assert labels.shape == (1, 21, 30)
        assert 0 <= int(labels.min()) <= int(labels.max()) < count

    def test_streaming_decode_equals_dense_decode(self, model: SegmentationModel) -> None:
        text = unit_rows(37, DIM)
        text[11] = text[4]  # a tie everywhere
        with torch.no_grad():
            scores = model(self.images(), text, seen=torch.arange(37) < 12)
        for size in [(40, 48), (97, 31), (3, 200)]:
            dense = scores.dense(size)
            assert torch.equal(scores.label_map(size), dense.argmax(dim=1))
            values, _ = scores.top_k(size, 3)
            assert torch.equal(values, dense.topk(3, dim=1).values)

    def test_the_best_synonym_counts(self, model: SegmentationModel) -> None:
        text, images = unit_rows(5, DIM), self.images()
        words = self.dense(model, images, text)
        joined = self.dense(model, images, text, word_to_class=torch.tensor([0, 0, 1, 2, 2]))
        expected = [words[:, :2].amax(1), words[:, 2], words[:, 3:].amax(1)]
        torch.testing.assert_close(joined, torch.stack(expected, dim=1), rtol=0, atol=1e-6)

    def test_classes_and_images_do_not_touch_each_other(self, model: SegmentationModel) -> None:
        text, images = unit_rows(9, DIM), self.images(count=3)
        together = self.dense(model, images, text)
        some = slice(None) if self.classes_interact else [7, 2]
        apart = self.dense(model, images[1:2], text[some])
        torch.testing.assert_close(apart, together[1:2][:, some], rtol=1e-4, atol=1e-5)

    def test_features_can_be_kept(self, model: SegmentationModel) -> None:
        text, images = unit_rows(4, DIM), self.images()
        with torch.no_grad():
            kept = model.score(model.encode_images(images), text)
        assert torch.equal(kept.dense((40, 48)), self.dense(model, images, text))

    def test_save_and_load(self, model: SegmentationModel, tmp_path: Path) -> None:
        model.default_templates = ("a drawing of a {}",)
        model.metadata = {"steps": 3}
        save_model(model, tmp_path / "model")
        again = load_model(tmp_path / "model")
        assert type(again) is type(model)
        assert again.options == model.options
        assert again.seen_names == ("cat", "sky")
        assert again.default_templates == ("a drawing of a {}",)
        assert again.metadata == {"steps": 3}
        assert not again.training
        text, images = unit_rows(6, DIM), self.images()
        assert torch.equal(self.dense(again, images, text), self.dense(model, images, text))
        assert again.clip.fingerprint() == model.clip.fingerprint()
        assert again.trainable_names() == model.trainable_names()

    def test_a_checkpoint_of_other_shapes_is_refused(self, model: SegmentationModel, tmp_path: Path) -> None:
        folder = save_model(model, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config["clip"]["architecture"]["model_cfg"]["text_cfg"]["layers"] = 3
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(LexisegError, match="does not fit; missing"):
            load_model(folder)
        config["clip"]["architecture"]["model_cfg"]["text_cfg"]["layers"] = 2
        config["clip"]["architecture"]["model_cfg"]["embed_dim"] = 24
        (folder / "config.json").write_text(json.dumps(config))
        wrong = r"of another shape: .* is \(\d+, 16\) instead of \(\d+, 24\)|class embeddings have 16 numbers and .* 24"
        with pytest.raises(LexisegError, match=wrong):
            load_model(folder)

    def test_an_unknown_option_is_named(self) -> None:
        with pytest.raises(LexisegError, match="'colour'"):
            SYSTEMS[self.system].build(small_clip(), {**self.options, "colour": 1})

    def test_bfloat16(self, model: SegmentationModel) -> None:
        text, images = unit_rows(6, DIM), self.images()
        with torch.autocast("cpu", torch.bfloat16):
            half = self.dense(model, images, text)
        assert half.dtype == torch.float32
        full = self.dense(model, images, text)
        assert float((half - full).abs().max()) < 0.1 * max(1.0, float(full.abs().max()))

    def test_default_window(self, model: SegmentationModel) -> None:
        window = model.window
        assert window.size is None or 0 < window.stride <= window.size
        assert len(model.mean) == len(model.std) == 3
        assert all(0 < value < 1 for value in (*model.mean, *model.std))

    def test_what_trains(self, model: SegmentationModel) -> None:
        names = set(model.trainable_names())
        assert bool(names) == self.trainable
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
        assert not any(name.startswith("clip.model.transformer") for name in names)  # the text tower never trains
        assert model.num_parameters(trainable=True) <= model.num_parameters()

    def labels(self, height: int = 40, width: int = 48) -> Tensor:
        rows = torch.arange(height)[:, None] * 3 // height
        columns = torch.arange(width)[None] * 2 // width
        labels = (rows + columns).expand(2, -1, -1).clone()
        labels[1, :8] = 255
        return labels

    def test_training_lowers_the_loss(self, model: SegmentationModel) -> None:
        text, images, labels = unit_rows(4, DIM), self.images(), self.labels()
        if not self.trainable:
            with pytest.raises(LexisegError, match="training-free"):
                model.losses(images, labels, text)
            return
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        first = model.losses(images, labels, text)["loss"].item()
        model.train()
        optimizer = torch.optim.AdamW([parameter for _, parameter in model.trainable_parameters()], lr=3e-3)
        for _ in range(8):
            losses = model.losses(images, labels, text)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
        model.eval()
        last = model.losses(images, labels, text)["loss"].item()
        assert last < 0.9 * first, (
            f"eight steps of AdamW at 3e-3 took the loss from {first:.4g} to {last:.4g} only; check the gradients, and "
            "give `options` of a small system that learns fast: no zeros to start from, a large scale of the logits"
        )
        names = set(model.trainable_names())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name not in names), name

    def test_labels_may_be_smaller_and_must_be_classes(self, model: SegmentationModel) -> None:
        if not self.trainable:
            pytest.skip("training-free")
        text, images = unit_rows(4, DIM), self.images()
        assert torch.isfinite(model.losses(images, self.labels(20, 24), text)["loss"])
        with pytest.raises(LexisegError, match="label is 9 but there are 4 classes"):
            model.losses(images, torch.full((2, 40, 48), 9), text)
        nothing = model.losses(images, torch.full((2, 40, 48), 255), text)
        assert torch.isfinite(nothing["loss"])
        nothing["loss"].backward()
        if not isinstance(model, DecoupledModel):  # where regions are matched with classes there may be nothing to do
            assert float(nothing.get("loss_dice", torch.zeros(()))) == 0.0
            assert float(nothing["loss_mask"]) > 0.0

    # ---- of systems that propose regions, whatever regions there are

    def propose(self, model: SegmentationModel, mask_logits: Tensor, valid: Tensor | None = None) -> DecoupledModel:
        """Let the model propose regions with these masks (2, N, 8, 16), on images of 32 x 48 that are padded."""
        if not isinstance(model, DecoupledModel):
            pytest.skip("proposes no regions")
        embeddings, dim = None, model.generator.embed_dim
        if dim is not None:
            drawn = torch.randn(300, 2, dim, generator=torch.Generator().manual_seed(0))
            embeddings = drawn[: mask_logits.shape[1]].transpose(0, 1)
        model.generator = GivenProposals(Proposals(mask_logits, embeddings, valid), model.generator)
        return model

    def region_scores(self, model: SegmentationModel, *given: Tensor) -> RegionScores:
        with torch.no_grad():
            scores = self.propose(model, *given)(self.images(32, 48), unit_rows(3, DIM))
        assert isinstance(scores, RegionScores)
        return scores

    def test_any_number_of_proposals(self, model: SegmentationModel) -> None:
        for count in (0, 1, 300):
            scores = self.region_scores(model, torch.randn(2, count, 8, 16))
            dense = scores.dense((32, 48))
            assert scores.class_scores.shape == (2, count, 3) and dense.shape == (2, 3, 32, 48)
            assert torch.isfinite(dense).all() and bool((dense != 0).any()) == bool(count)
            assert torch.equal(scores.label_map((32, 48)), dense.argmax(dim=1))
            assert torch.equal(scores.top_k((32, 48), 2)[0], dense.topk(2, dim=1).values)

    def test_masks_that_cover_nothing_or_everything(self, model: SegmentationModel) -> None:
        for value in (-1000.0, -HARD_LOGIT, HARD_LOGIT, 1000.0):
            scores = self.region_scores(model, torch.full((2, 4, 8, 16), value))
            assert torch.isfinite(scores.class_scores).all() and torch.isfinite(scores.dense((32, 48))).all()
            labels = scores.label_map((32, 48))
            assert value < 0 or bool((labels == labels[:, :1, :1]).all())

    def test_a_slot_without_a_region_takes_no_part(self, model: SegmentationModel) -> None:
        masks = 3 * torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(5))
        alone = self.region_scores(model, masks).dense((32, 48))
        more = torch.cat([masks, torch.full((2, 3, 8, 16), HARD_LOGIT)], dim=1)
        valid = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
        together = self.region_scores(model, more, valid).dense((32, 48))
        torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(together[1], torch.zeros_like(together[1]))

    def test_training_on_any_number_of_proposals(self, model: SegmentationModel) -> None:
        if not isinstance(model, DecoupledModel) or model.generator.trainable or not self.trainable:
            pytest.skip("proposes nothing, trains the proposals themselves, or trains nothing at all")
        for count in (0, 1, 300):
            masks, labels, text = torch.randn(2, count, 8, 16), self.labels(32, 48), unit_rows(4, DIM)
            for valid in (None, torch.arange(count).expand(2, -1) > 150):
                model.zero_grad()
                loss = self.propose(model, masks, valid).losses(self.images(32, 48), labels, text)["loss"]
                loss.backward()
                grads = [parameter.grad for _, parameter in model.trainable_parameters()]
                assert torch.isfinite(loss) and all(grad is None or bool(torch.isfinite(grad).all()) for grad in grads)
