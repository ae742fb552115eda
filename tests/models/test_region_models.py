"""ZSSeg, ZegFormer and FreeSeg, each plain and with MAFT: the systems, and what they share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, SegmentationModel
from lexiseg.models.maft import MaskAttention
from lexiseg.models.region_base import RegionModel
from lexiseg.proposals.base import HARD_LOGIT, Proposals
from lexiseg.regions.crops import CropEncoder
from lexiseg.scores import RegionScores
from lexiseg.training.init import start_from
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.weights import load_model, save_model
from tests.proposals.test_sam_proposals import tiny_sam
from tests.references import pseudo_label
from tests.system_tester import DIM, SystemTester
from tests.towers import SMALL_PROPOSALS, small_clip, unit_rows

QUERIES: dict[str, Any] = {**SMALL_PROPOSALS, "num_queries": 5, "hidden_dim": 32}
MASKFORMER = {"kind": "maskformer", **QUERIES}
LINEAR = {**MASKFORMER, "class_head": "linear"}
MASK2FORMER = {"kind": "mask2former", **QUERIES, "encoder_layers": 1, "encoder_ffn_dim": 32, "interaction_dim": 32}
GENERATORS = {"zsseg": MASKFORMER, "zegformer": LINEAR, "freeseg": MASK2FORMER}
ATTENTION = {"image_size": 48}


def make(system: str = "zsseg", **changes: Any) -> RegionModel:
    torch.manual_seed(1)
    options = {"proposals": GENERATORS[system], "attention": ATTENTION, **changes}
    model = SYSTEMS[system].build(small_clip(), options, seen_names=("cat", "sky")).eval()
    assert isinstance(model, RegionModel)
    return model


class RegionModelTester(SystemTester):
    """What differs for systems that compare the words of a region with each other."""

    # The classes share a softmax, so that only the images are apart.
    def test_classes_and_images_do_not_touch_each_other(self, model: SegmentationModel) -> None:
        text, images = unit_rows(9, DIM), self.images(count=3)
        together = self.dense(model, images, text)
        torch.testing.assert_close(self.dense(model, images[1:2], text), together[1:2], rtol=1e-3, atol=1e-4)

    # A factor of 100 on cosines leaves little of what bfloat16 says; it must run, and stay in range.
    def test_bfloat16(self, model: SegmentationModel) -> None:
        text, images = unit_rows(6, DIM), self.images()
        with torch.autocast("cpu", torch.bfloat16):
            half = self.dense(model, images, text)
        assert half.dtype == torch.float32
        assert torch.isfinite(half).all()

    def test_a_checkpoint_of_other_shapes_is_refused(self, model: SegmentationModel, tmp_path: Path) -> None:
        folder = save_model(model, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config["options"]["proposals"]["num_queries"] = 4
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(LexisegError, match=r"is \(5, 32\) instead of \(4, 32\)"):
            load_model(folder)


class TestZSSeg(RegionModelTester):
    system = "zsseg"
    options: ClassVar = {"proposals": MASKFORMER}


class TestZegFormer(RegionModelTester):
    system = "zegformer"
    options: ClassVar = {"proposals": LINEAR}

    # Synonyms are one vector, their mean.
    def test_the_best_synonym_counts(self, model: SegmentationModel) -> None:
        text, images = unit_rows(4, DIM), self.images()
        same = text[[0, 0, 1, 2, 3, 3]]
        joined = self.dense(model, images, same, word_to_class=torch.tensor([0, 0, 1, 2, 3, 3]))
        torch.testing.assert_close(joined, self.dense(model, images, text), rtol=1e-4, atol=1e-5)

    def test_synonyms_are_averaged_over_words_and_templates(self, model: SegmentationModel) -> None:
        embedder = TextEmbedder(model.clip)
        text = model.embed_text(embedder, Vocabulary.parse("grass, lawn; sky"))
        assert text.shape == (3, 2, DIM)
        assert torch.equal(text[0], text[1])
        words = embedder.embed(["a photo of a grass", "a photo of a lawn"], ["{}"])
        own = Vocabulary.parse("grass, lawn; sky").templates
        assert own == ("a photo of a {}",)
        mean = words.mean(dim=0)
        torch.testing.assert_close(text[0, 0], mean / mean.norm())

    def test_a_name_of_several_words_is_their_mean(self, model: SegmentationModel) -> None:
        embedder = TextEmbedder(model.clip)
        whole = Vocabulary((VocabularyClass("building, edifice"), VocabularyClass("sky")))
        apart = Vocabulary.parse("building, edifice; sky")
        both = Vocabulary((VocabularyClass("building, edifice", ("edifice",)), VocabularyClass("sky")))
        rows = model.embed_text(embedder, whole)
        assert rows.shape == (2, 2, DIM)
        torch.testing.assert_close(rows, model.embed_text(embedder, apart)[[0, 2]])
        torch.testing.assert_close(rows, model.embed_text(embedder, both)[[0, 2]])

    def test_the_no_object_row_is_not_of_unit_length(self, model: SegmentationModel) -> None:
        assert isinstance(model, RegionModel)
        model.no_object.data *= 3.0
        assert torch.equal(model.text_rows(unit_rows(2, DIM))[-1:], model.no_object)


class TestFreeSeg(RegionModelTester):
    system = "freeseg"
    options: ClassVar = {"proposals": MASK2FORMER}


class WithMaft(RegionModelTester):
    # What is trained is a quarter of a CLIP; its scores move slowly.
    def test_training_lowers_the_loss(self, model: SegmentationModel) -> None:
        train_a_little(model)


class TestZSSegWithMaft(WithMaft):
    system = "zsseg"
    options: ClassVar = {"proposals": MASKFORMER, "maft": {}, "attention": ATTENTION, "ensemble": {"rule": "paper"}}


class TestZegFormerWithMaft(WithMaft, TestZegFormer):
    options: ClassVar = {"proposals": LINEAR, "maft": {}, "attention": ATTENTION}


class TestFreeSegWithMaft(WithMaft):
    system = "freeseg"
    options: ClassVar = {"proposals": MASK2FORMER, "maft": {}, "attention": ATTENTION, "ensemble": {"rule": "region"}}


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sam")
    for part in tiny_sam():
        part.save_pretrained(folder)
    return str(folder)


class WithSam(RegionModelTester):
    """SAM in the generator's place: other masks in every picture, and no classes."""

    @pytest.fixture
    def model(self, sam_folder: str) -> SegmentationModel:
        torch.manual_seed(1)
        sam = {"kind": "sam", "weights": sam_folder, "points_per_side": 2, "pred_iou": -10.0, "stability": -1.0}
        options = {**self.options, "proposals": {**sam, "nms": 1.0, "overlaps": "all"}}
        return SYSTEMS[self.system].build(small_clip(), options, seen_names=("cat", "sky")).eval()

    # There are no queries to count.
    test_a_checkpoint_of_other_shapes_is_refused = SystemTester.test_a_checkpoint_of_other_shapes_is_refused


class TestSam(WithSam):
    system, trainable = "zsseg", False
    options: ClassVar = {"ensemble": {"rule": "region"}}


class TestSamWithMaft(WithMaft, WithSam):
    system = "zsseg"
    options: ClassVar = {"ensemble": {"rule": "region"}, "maft": {}, "attention": ATTENTION}


def train_a_little(model: SegmentationModel) -> None:
    text, images, labels = unit_rows(4, DIM), SystemTester.images(), SystemTester().labels()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = model.losses(images, labels, text)["loss"].item()
    model.train()
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.trainable_parameters()], lr=3e-4)
    for _ in range(8):
        loss = model.losses(images, labels, text)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model.losses(images, labels, text)["loss"].item() < first
    names = set(model.trainable_names())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name


@pytest.mark.parametrize("system", sorted(GENERATORS))
def test_maft_is_one_key(system: str, tmp_path: Path) -> None:
    """The same host with one more option: it looks at all regions at once, and trains a copy of CLIP's tower."""
    # Recipes of hosts say that they look at crops, and so the key has to be enough where they do.
    plain, tuned = make(system, regions="crops"), make(system, regions="crops", maft={})
    assert isinstance(plain.region_encoder, CropEncoder) and isinstance(tuned.region_encoder, MaskAttention)
    assert all(name.startswith("student.") for name in tuned.trainable_names())
    assert not any(".mlp." in name or "conv1" in name for name in tuned.trainable_names())
    assert tuned.generator.trainable is False and plain.generator.trainable is True
    train_a_little(tuned)
    again = load_model(save_model(tuned, tmp_path / "model"))
    text, images = unit_rows(3, DIM), SystemTester.images()
    with torch.no_grad():
        ours, theirs = (each(images, text).dense((20, 24)) for each in (tuned, again))
    assert torch.equal(ours, theirs)


def test_the_papers_frozen_units_leave_the_projection_free() -> None:
    released, paper = make(maft={}), make(maft={"frozen": ["conv", "cls", "pos", "mlp"], "distillation": 1.0})
    more = set(paper.trainable_names()) - set(released.trainable_names())
    assert more == {"student.proj", "student.ln_pre.weight", "student.ln_pre.bias"}
    losses = paper.losses(SystemTester.images(), SystemTester().labels(), unit_rows(4, DIM))
    assert float(losses["loss_distillation"]) == pytest.approx(0.0, abs=1e-7)  # the student is the teacher still


def test_a_second_stage_starts_from_the_first(tmp_path: Path) -> None:
    first = make(prompts={"prefix": 3})
    first.no_object.data.fill_(0.5)
    assert first.prompts is not None
    folder = str(save_model(first, tmp_path / "proposals"))
    kind, vocabulary = SYSTEMS["zsseg"], Vocabulary.parse("cat; sky")
    options = kind.parse_options({**first.options.model_dump(), "maft": {}})
    second = start_from(folder, kind, options, ("cat", "sky"), vocabulary)
    assert isinstance(second, RegionModel) and second.prompts is not None and second.student is not None
    assert torch.equal(second.no_object, first.no_object)
    assert torch.equal(second.prompts.state_dict()["prefix_prompt"], first.prompts.state_dict()["prefix_prompt"])
    for name, value in first.generator.state_dict().items():
        assert torch.equal(second.generator.state_dict()[name], value)
    assert torch.equal(second.student.state_dict()["proj"], first.clip.visual.proj)


@pytest.mark.parametrize("count", [0, 1, 300])
@pytest.mark.parametrize("regions", ["mask-attention", "none"])
@pytest.mark.parametrize("system", ["zsseg", "zegformer"])
def test_any_number_of_proposals_encoded_otherwise(system: str, regions: str, count: int) -> None:
    model = make(system, regions=regions)
    dense = with_masks(model, torch.randn(1, count, 8, 12)).dense((32, 48))
    assert torch.isfinite(dense).all()
    assert bool((dense > 0).any()) == bool(count)


def with_masks(model: RegionModel, mask_logits: Tensor, **more: Any) -> RegionScores:
    """Score an image of 32 x 48 with the given masks instead of proposed ones."""
    images, count = SystemTester.images(32, 48, 1), mask_logits.shape[1]
    with torch.no_grad():
        embeddings = torch.randn(1, count, DIM, generator=torch.Generator().manual_seed(0))
        features = model.with_proposals(model.frame(images), Proposals(mask_logits, embeddings))
        return model.score(features, unit_rows(3, DIM), **more)


HEEDED: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "tight crops": ("zsseg", {"crops": {"size": 24}}, [
        *({"crops": {"size": 24, **crops}} for crops in ({"size": 16}, {"threshold": 0.7}, {"merge": "crop"},
          {"merge": "mask"}, {"fill": "zero"}, {"matting": True}, {"expand": 0.7}, {"align_corners": True})),
        {"positions": "bicubic-corners"}, {"align_corners": True}, {"temperature": 2.0}, {"region_temperature": 2.0},
        {"seen_offset": 0.3}, {"ensemble": {"weight": 0.3}},
    ]),
    "RoIAlign": ("zegformer", {}, [
        *({"crops": {"convention": "roi-align", **crops}} for crops in ({"size": 16}, {"threshold": 0.7},
          {"merge": "crop"}, {"merge": "mask"})),
        {"crops": {"convention": "tight"}}, {"region_no_object": False},
    ]),
    "MAFT": ("zsseg", {"maft": {}, "ensemble": {"rule": "region"}}, [
        {"attention": {**ATTENTION, "start_block": 0}}, {"attention": {"image_size": 40}},
        {"attention": {**ATTENTION, "positions": "bicubic"}},
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", HEEDED)
def test_options_of_prediction_are_heeded(name: str) -> None:
    system, given, changes = HEEDED[name]
    model = make(system, temperature=5.0, **given)
    coarse = 8 * torch.randn(1, 5, 3, 4, generator=torch.Generator().manual_seed(3))
    masks = torch.nn.functional.interpolate(coarse, size=(8, 12), mode="bilinear")
    options, seen = model.options, torch.tensor([True, False, False])
    plain = with_masks(model, masks, seen=seen).dense((32, 48))
    for change in changes:
        model.options = model.parse_options({**options.model_dump(), **change})
        assert not torch.allclose(with_masks(model, masks, seen=seen).dense((32, 48)), plain, rtol=1e-4), change


def test_options_of_maft_are_heeded() -> None:
    model = make(maft={}, temperature=5.0)
    assert model.student is not None
    with torch.no_grad():
        model.student.proj.mul_(torch.linspace(0.5, 2.0, DIM))
    options, found = model.options, []
    for change in ({}, {"distance": "l1"}, {"distance": "l2"}, {"distance": "kl"}, {"normalise": "matrix"},
                   {"binary": True}, {"distillation": 0.7}):  # fmt: skip
        model.options = options.with_values({"maft": change})
        losses = model.losses(SystemTester.images(), SystemTester().labels(), unit_rows(4, DIM))
        found.append(round(float(losses["loss"].detach()), 5))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("system", ["zsseg", "zegformer"])
def test_masks_of_nothing_or_everything_encoded_otherwise(system: str) -> None:
    model = make(system, regions="mask-attention")
    for value in (-1000.0, -HARD_LOGIT, HARD_LOGIT, 1000.0):
        scores = with_masks(model, torch.full((1, 4, 8, 12), value))
        assert torch.isfinite(scores.class_scores).all()
        assert torch.isfinite(scores.dense((32, 48))).all()


def test_the_papers_ensemble_takes_what_clip_says_of_empty_masks() -> None:
    """With A^c = 1 for them, as released, Eq. 9 would give every unseen class more than any region that is there."""
    empty = torch.full((1, 4, 8, 12), -1000.0)
    paper, alone = (
        with_masks(make(maft={}, ensemble={"rule": rule}), empty).class_scores for rule in ("paper", "region")
    )
    torch.testing.assert_close(paper, alone**0.8)
    assert bool((with_masks(make(ensemble={"rule": "paper"}), empty).class_scores == 1).all())  # nothing was shown


def test_regions_without_classes_are_classified_by_clip_alone() -> None:
    for more in ({}, {"maft": {}}):
        model = make(proposals={"kind": "ground-truth"}, **more)
        labels = SystemTester().labels()
        model.generator.labels = labels
        with torch.no_grad():
            scores = model(SystemTester.images(), unit_rows(4, DIM))
        total = scores.class_scores.sum(dim=-1)
        assert scores.class_scores.shape[1] == 4
        torch.testing.assert_close(total, torch.ones_like(total))
        assert bool(model.trainable_names()) == bool(more)
        if more:
            model.losses(SystemTester.images(), labels, unit_rows(4, DIM))["loss"].backward()
        else:
            with pytest.raises(LexisegError, match="training-free"):
                model.losses(SystemTester.images(), labels, unit_rows(4, DIM))


@pytest.mark.parametrize("system", sorted(GENERATORS))
def test_a_generator_without_classes_is_trained_by_its_masks(system: str) -> None:
    model = make(system, proposals={**GENERATORS[system], "class_head": "none"}, prompts={"prefix": 2})
    vocabulary, images, labels = Vocabulary.parse("cat; sky; sea; road"), SystemTester.images(), SystemTester().labels()
    # FreeSeg's features look at the words, so that masks depend on prompts and "no object"; the others' do not.
    parts = {name.split(".")[0] for name in model.trainable_names()}
    assert parts == ({"generator", "no_object", "prompts"} if system == "freeseg" else {"generator"})
    assert model.generator.trainable
    text = model.training_text(vocabulary, unit_rows(4, DIM))
    assert text.requires_grad == ("prompts" in parts)
    losses = model.losses(images, labels, text)
    assert {"loss_mask", "loss_dice"} <= losses.keys() and "loss_ce" not in losses
    losses["loss"].backward()
    missing = [name for name, parameter in model.trainable_parameters() if parameter.grad is None]
    assert not missing


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(LexisegError, match="not regions 'none'; remove one of the two"):
        make(maft={}, regions="none")
    with pytest.raises(LexisegError, match="have no classes"):
        make(proposals={"kind": "ground-truth"}, regions="none")
    with pytest.raises(LexisegError, match="embed_dim to 16"):
        make(proposals={**MASKFORMER, "embed_dim": 8})
    with pytest.raises(LexisegError, match=r"unknown option 'criterion\.focal'"):
        make(criterion={"focal": 2.0})


def test_prompts_train_with_the_proposals_and_not_with_maft() -> None:
    vocabulary, text = Vocabulary.parse("cat; sky"), unit_rows(2, DIM)
    model = make(prompts={"prefix": 3})
    fresh = model.training_text(vocabulary, text)
    assert fresh.requires_grad
    labels = SystemTester().labels().clamp(max=1)
    model.losses(SystemTester.images(), labels, fresh)["loss"].backward()
    missing = [name for name, parameter in model.trainable_parameters() if parameter.grad is None]
    assert not missing
    assert make(prompts={"prefix": 3}, maft={}).training_text(vocabulary, text) is text
    both = make(prompts={"prefix": 3, "proposals": False})
    assert both.embed_text(TextEmbedder(both.clip), vocabulary).shape == (2, 2, DIM)
    assert not any(name.startswith("prompts.") for name in both.trainable_names())


def test_self_training_labels_pixels_with_the_best_unseen_class() -> None:
    model = make()
    images, text = SystemTester.images(), unit_rows(3, DIM)
    seen = torch.tensor([True, False, True])
    given = torch.full((2, 40, 48), -1)
    given[:, :8], given[:, 8:16] = 255, 2
    expected = torch.where(given == -1, 1, given)  # there is one unseen class only
    features = model.encode_images(images)
    assert torch.equal(model.pseudo_labels(features, given, text, seen), expected)
    with pytest.raises(LexisegError, match="unseen class"):
        model.pseudo_labels(features, given, text, torch.ones(3, dtype=torch.bool))


def test_self_training_in_steps_is_the_rule_that_the_released_code_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pseudo_label` needs all scores at once, and is compared with the authors'; the model looks at unseen ones."""
    images, text = SystemTester.images(), unit_rows(5, DIM)
    seen = torch.tensor([True, False, True, False, False])
    given = torch.full((2, 40, 48), -1)
    given[:, :8], given[:, 8:16], given[:, 16:20] = 255, 2, 3
    model = make()
    with torch.no_grad():
        features = model.encode_images(images)
    # So untrained a model would say the same everywhere.
    features.values["mask_logits"] = 5 * torch.randn_like(features.values["mask_logits"])
    scores = torch.rand(*features.values["mask_logits"].shape[:2], 5)
    monkeypatch.setattr(model, "class_scores", lambda *_: scores)
    dense = model.pixel_scores(scores, features).dense((40, 48))
    expected = torch.stack([pseudo_label(one, label, [0, 2]) for one, label in zip(dense, given, strict=True)])
    assert set(expected.unique().tolist()) == {1, 2, 3, 4}
    hidden = given.where(given != 255, -1)  # the released rule labels what has no label as well
    assert torch.equal(model.pseudo_labels(features, hidden, text, seen), expected)


def test_near_duplicates_are_not_shown() -> None:
    masks = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(4))
    masks = torch.cat([masks, masks + 1e-3], dim=1)
    runs: list[int] = []
    for duplicates in (None, 0.95):
        model = make(crops={"duplicates": duplicates})
        assert model.region_encoder is not None
        frame = model.clip_frame(SystemTester.images(32, 48, 1), (32, 48))
        regions, _ = model.region_encoder.encode(model.clip, model.clip.visual, frame, (32, 48), masks, None)
        runs.append(len(regions[0].unique(dim=0)))
        torch.testing.assert_close(regions[:, :3], regions[:, 3:], rtol=0.1, atol=0.1)
    assert runs[1] == 3
