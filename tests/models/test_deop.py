"""DeOP: the system and its variants, heatmaps, the loss of its last stage, golden cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.text import TextEmbedder
from lexiseg.clip.tower import block_attention
from lexiseg.errors import LexisegError
from lexiseg.losses.proposals import label_frame
from lexiseg.losses.regions import region_map_losses
from lexiseg.models import SYSTEMS, DeOP, SegmentationModel
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.deop import patch_severance
from lexiseg.models.deop_ablations import ConvAnchors, PrependedPrompts, ReleasedConvAnchors, ReleasedQueryAnchors
from lexiseg.proposals.base import HARD_LOGIT, Proposals
from lexiseg.regions.anchors import AnchorLayer, QueryAnchors, pool
from lexiseg.regions.pooling import unit_or_zero
from lexiseg.scores import RegionScores
from lexiseg.training.init import start_from
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model, save_model
from tests.system_tester import DIM, SystemTester
from tests.towers import SMALL_PROPOSALS as SMALL
from tests.towers import small_clip, unit_rows

OPTIONS: dict[str, Any] = {
    "proposals": {"kind": "maskformer", **SMALL},
    "text_prompts": "templates",
    "table_side": 3,
    "prompt_blocks": (1, 2),
}


def make(**changes: Any) -> DeOP:
    torch.manual_seed(1)
    model = DeOP.build(small_clip(), {**OPTIONS, **changes}, seen_names=("cat", "sky")).eval()
    assert isinstance(model, DeOP)
    return model


class TestDeOP(SystemTester):
    system = "deop"
    options: ClassVar = {**OPTIONS, "heatmaps": "query-released"}
    classes_interact = True  # in a softmax

    def test_labels_may_be_smaller_and_must_be_classes(self, model: SegmentationModel) -> None:
        text, images = unit_rows(4, DIM), self.images()
        assert torch.isfinite(model.losses(images, self.labels(20, 24), text)["loss"])
        with pytest.raises(LexisegError, match="label is 9 but there are 4 classes"):
            model.losses(images, torch.full((2, 40, 48), 9), text)
        nothing = model.losses(images, torch.full((2, 40, 48), 255), text)
        assert float(nothing["loss_mask"]) > 0.0

    def test_a_checkpoint_of_other_shapes_is_refused(self, model: SegmentationModel, tmp_path: Path) -> None:
        folder = save_model(model, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config["options"]["table_side"] = 2
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(LexisegError, match=r"tables.table is \(10, 24\) instead of \(5, 24\)"):
            load_model(folder)

    @pytest.mark.parametrize("count", [0, 1, 300])
    @pytest.mark.parametrize("anchors", ["query", "query-released", "conv", "conv-released", "none"])
    def test_any_number_of_proposals_under_any_anchors(self, count: int, anchors: str) -> None:
        model = make(heatmaps=anchors, severance="released")
        with torch.no_grad():
            scores = with_masks(model, torch.randn(1, count, 8, 12), unit_rows(3, DIM))
        dense = scores.dense((40, 48))
        assert torch.isfinite(dense).all()
        assert bool(dense.any()) == bool(count)

    @pytest.mark.parametrize("severance", ["gps", "mps", "mps-sum", "released", "none"])
    @pytest.mark.parametrize("value", [-1000.0, -HARD_LOGIT, HARD_LOGIT])
    def test_severance_by_masks_of_nothing_or_everything(self, severance: str, value: float) -> None:
        model = make(severance=severance)
        with torch.no_grad():
            scores = with_masks(model, torch.full((1, 6, 8, 12), value), unit_rows(3, DIM))
        assert torch.isfinite(scores.dense((40, 48))).all()
        assert torch.isfinite(scores.class_scores).all()


class TestDeOPBaseline(SystemTester):
    """Patches of the plain tower pooled under the masks, and the stage that trains the masks."""

    system = "deop"
    options: ClassVar = {
        **OPTIONS,
        "severance": "none",
        "heatmaps": "none",
        "visual_prompts": "none",
        "train": "proposals",
    }
    classes_interact = True


def with_masks(model: DeOP, mask_logits: Tensor, text: Tensor) -> RegionScores:
    """Score an image of 32 x 48 with the given masks instead of proposed ones."""
    features = model.encode_images(SystemTester.images(32, 48, 1))
    return model.score(model.with_proposals(features, Proposals(mask_logits)), text)


VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {"severance": "none", "heatmaps": "none", "visual_prompts": "none"},
    "baseline+": {"severance": "none", "heatmaps": "none", "text_prompts": "end-to-end"},
    "Table 3: severance only": {"heatmaps": "none"},
    "Table 3: anchors only": {"severance": "none"},
    "Table 4: two blocks": {"severed_blocks": (-2, -1), "alpha": (0.5, 1.0), "visual_prompts": "none"},
    "Table 4: masks": {"severance": "mps", "heatmaps": "none"},
    "Table 5: convolutions": {"heatmaps": "conv", "anchor_layers": 2, "anchor_hidden": 8},
    "Table 5: K = 0": {"anchor_layers": 0},
    "Eq. 3": {"heatmaps": "query"},
    "released queries": {"heatmaps": "query-released"},
    "Table 7: prepended": {"visual_prompts": "prepended", "num_prompts": 2},
    "Table 9: three blocks": {"severed_blocks": (-3, -2, -1)},
    "released": {"severance": "released", "released_residual": True, "visual_prompts": "none", "masks": "patches"},
    "released convolution": {"heatmaps": "conv-released", "class_scores": "cosine", "masks": "logits"},
    "CLIP's own statistics": {"clip_images": "own"},
    "words before masks": {"proposals": {"kind": "mask2former", **SMALL, "hidden_dim": 32, "encoder_layers": 1,
                                         "encoder_ffn_dim": 32, "interaction_dim": 16, "interaction_heads": 2}},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_predict_and_train(name: str) -> None:
    model = make(**VARIANTS[name])
    images, text = SystemTester.images(), unit_rows(4, DIM)
    with torch.no_grad():
        dense = model(images, text).dense((40, 48))
    assert torch.isfinite(dense).all()
    labels = torch.arange(4).repeat(2, 40, 12)
    model.train()
    text = model.training_text(Vocabulary.parse("cat; sky; sea; road"), text)
    model.losses(images, labels, text)["loss"].backward()
    missing = [name for name, parameter in model.trainable_parameters() if parameter.grad is None]
    assert not missing
    assert all(
        parameter.grad is None for name, parameter in model.named_parameters() if name not in model.trainable_names()
    )


def test_options_reach_the_parts() -> None:
    sizes = {"anchor_queries": 3, "anchor_heads": 2, "anchor_hidden": 20, "anchor_dropout": 0.3}
    model = make(**sizes, visual_prompts="prepended", num_prompts=2, prompt_dropout=0.2)
    anchors, tables = model.anchors, model.tables
    assert isinstance(anchors, QueryAnchors) and isinstance(tables, PrependedPrompts)
    assert (len(anchors.queries), anchors.num_heads, anchors.heatmap.dropout.p) == (3, 2, 0.3)
    assert isinstance(layer := anchors.layers[0], AnchorLayer) and layer.ffn_in.out_features == 20
    assert tables.embeddings.shape[:2] == (2, 2) and tables.dropout.p == 0.2
    assert list(make(prompt_blocks=None).tables.block_tables) == ["1", "2", "3"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes", [{"squash": 2.0}, {"focal_weight": 1.0}, {"dice_weight": 0.1}, {"alpha": 0.5}, {"clip_images": "own"}]
)
def test_options_of_the_last_stage_are_heeded(changes: dict[str, Any]) -> None:
    labels = torch.arange(4).repeat(2, 40, 12)
    plain, other = (make(**more).losses(SystemTester.images(), labels, unit_rows(4, DIM)) for more in ({}, changes))
    assert float(other["loss"].detach()) != pytest.approx(float(plain["loss"].detach()), rel=1e-4)


def test_the_proposal_stage_trains_the_generator() -> None:
    model = make(train="proposals")
    model.train()
    labels = torch.arange(4).repeat(2, 20, 6)  # half as large as the images
    losses = model.losses(SystemTester.images(), labels, unit_rows(4, DIM))
    losses["loss"].backward()
    names = model.trainable_names()
    assert {name.split(".")[0] for name in names} == {"generator", "no_object"}
    alone = make(train="proposals", proposals={**OPTIONS["proposals"], "class_head": "none"})
    assert {name.split(".")[0] for name in alone.trainable_names()} == {"generator"}
    assert all(dict(model.named_parameters())[name].grad is not None for name in names)
    assert {"loss_ce", "loss_mask", "loss_dice"} <= losses.keys()
    with pytest.raises(LexisegError, match="label is 7"):
        model.losses(SystemTester.images(), torch.full((2, 40, 48), 7), unit_rows(4, DIM))


@pytest.mark.parametrize("stage", ["regions", "proposals"])
def test_self_training_labels_pixels_with_the_best_unseen_class(stage: str) -> None:
    model = make(train=stage)
    images, text = SystemTester.images(), unit_rows(3, DIM)
    seen = torch.tensor([True, False, True])
    given = torch.full((2, 40, 48), -1)
    given[:, :8], given[:, 8:16] = 255, 2
    losses = model.losses(images, given, text, seen=seen)
    same = model.losses(images, torch.where(given == -1, 1, given), text)  # there is one unseen class only
    torch.testing.assert_close(losses, same)
    losses["loss"].backward()
    missing = [name for name, parameter in model.trainable_parameters() if parameter.grad is None]
    assert not missing
    with pytest.raises(LexisegError, match="unseen class"):
        model.losses(images, given, text, seen=torch.ones(3, dtype=torch.bool))


def test_learned_text_is_encoded_once(tmp_path: Path) -> None:
    model = make(text_prompts="end-to-end", prompt_prefix=3)
    embedder = TextEmbedder(model.clip, tmp_path)
    vocabulary = Vocabulary.parse("cat; sky")
    first = model.embed_text(embedder, vocabulary)
    assert torch.equal(model.embed_text(embedder, vocabulary), first)
    assert embedder.num_forwards == 1
    assert torch.equal(model.training_text(vocabulary, first), first)
    assert model.training_text(vocabulary, first).requires_grad
    offline = make(text_prompts="offline")
    assert offline.training_text(vocabulary, first) is first
    assert not any(name.startswith("prompt.") for name in offline.trainable_names())


def test_one_training_of_proposals_serves_all(tmp_path: Path) -> None:
    """A last stage of another form, or another system, starts from the proposals alone."""
    first = make(train="proposals")
    folder = str(save_model(first, tmp_path / "proposals"))
    vocabulary = Vocabulary.parse("cat; sky")

    def start(system: str, **changes: Any) -> SegmentationModel:
        kind = SYSTEMS[system]
        return start_from(folder, kind, kind.parse_options(changes), ("cat", "sky"), vocabulary)

    for changes in ({}, {"heatmaps": "conv-released"}):
        model = start("deop", **{**OPTIONS, **changes})
        assert isinstance(model, DecoupledModel)
        assert all(
            torch.equal(a, b) for a, b in zip(model.generator.parameters(), first.generator.parameters(), strict=True)
        )
        assert torch.equal(model.no_object, first.no_object)
        assert ("part" in model.metadata["initial"]) == bool(changes)
    host = start("zsseg", proposals=OPTIONS["proposals"])
    assert host.metadata["initial"]["part"] == "proposals"
    with pytest.raises(LexisegError, match="'num_queries' is 6 in the model and 5 in the recipe"):
        start("zsseg", proposals={**OPTIONS["proposals"], "num_queries": 5})
    with pytest.raises(LexisegError, match="start from a model of that system"):
        start("dense-clip")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"severed_blocks": (4,)}, "do not fit a tower of 4 blocks"),
        ({"severed_blocks": (-1, 3)}, "list each once"),
        ({"alpha": (0.5, 1.0)}, "2 numbers alpha for 1 severed blocks"),
        ({"anchor_heads": 3}, "must be a multiple of 4 and of its heads"),
        ({"proposals": {"kind": "maskformer", **SMALL, "embed_dim": 8}}, "set proposals.embed_dim to 16"),
        ({"alpha": 1.5}, "'alpha"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LexisegError, match=words):
        make(**changes)


def test_severance_keeps_patches_apart() -> None:
    """With alpha 1 in every block but the last ones a patch depends on its own pixels alone."""
    model = make(severed_blocks=(0, 1, 2, 3), visual_prompts="none")
    images = model.pad(SystemTester.images(32, 32, 1))
    other = images.clone()
    other[..., :8, :8] += 1.0
    with torch.no_grad():
        before, after = (model.patches(given, torch.zeros(1, 1, 8, 8), (32, 32)) for given in (images, other))
    changed = (before - after).abs().amax(dim=-1)[0] > 1e-6
    assert changed[0, 0]
    assert int(changed.sum()) == 1


def test_severance_lies_between_attention_and_the_value_path() -> None:
    attention, tokens = small_clip().visual.transformer.resblocks[0].attn, torch.randn(2, 5, 24)
    own, half, plain = (patch_severance(attention, tokens, alpha=alpha) for alpha in (1.0, 0.25, 0.0))
    torch.testing.assert_close(plain, block_attention(attention, tokens))
    torch.testing.assert_close(half, 0.25 * own + 0.75 * plain)


@pytest.mark.parametrize("prompts", ["none", "added"])
def test_the_released_residual_is_of_block_11_and_without_tables(prompts: str) -> None:
    clip, found = small_clip(vision_cfg={"layers": 12}), []
    for released in (False, True):
        torch.manual_seed(1)
        model = DeOP.build(clip, {**OPTIONS, "visual_prompts": prompts, "released_residual": released}).eval()
        assert isinstance(model, DeOP)
        with torch.no_grad():
            found.append(model.patches(torch.ones(1, 3, 32, 32), torch.zeros(1, 1, 8, 8), (32, 32)))
    assert torch.equal(*found) == (prompts == "added")


def test_tables_of_zeros_leave_clip_as_it_is() -> None:
    images = make().pad(SystemTester.images(32, 32, 1))
    masks = torch.zeros(1, 1, 8, 8)
    with torch.no_grad():
        found, plain, random = (
            make(**changes).patches(images, masks, (32, 32))
            for changes in ({"table_start": "zero"}, {"visual_prompts": "none"}, {})
        )
    torch.testing.assert_close(found, plain)
    assert not torch.allclose(random, plain)


def test_heatmaps_lie_inside_the_masks() -> None:
    features, masks = unit_or_zero(torch.randn(2, 3, 5, 16)), torch.rand(2, 7, 3, 5)
    masks[:, 3] = 0.0
    anchors = ReleasedQueryAnchors(16, 4, 1, 8, None, 0.0).eval()
    found = anchors(features, masks)
    assert found.shape == (2, 8, 7, 3, 5)
    assert bool((found <= masks[:, None] + 1e-6).all())
    assert torch.equal(pool(features, found)[:, 3], torch.zeros(2, 16))
    # Proposal n takes query n mod Q.
    torch.testing.assert_close(anchors(features, masks[:, [1, 5, 2, 3, 0, 1]])[:, :, 5], found[:, :, 1])


def test_the_released_convolution_equals_a_plain_one() -> None:
    features, masks = torch.randn(2, 3, 5, 16), torch.rand(2, 7, 3, 5)
    anchors = ReleasedConvAnchors(16)
    weighted = features.permute(0, 3, 1, 2)[:, None] * masks[:, :, None]
    padded = F.pad(weighted.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    expected = F.conv2d(padded, anchors.weight)[:, 0].unflatten(0, (2, 7))
    torch.testing.assert_close(anchors.scores(features, masks), expected, rtol=1e-4, atol=1e-5)


def test_stacked_convolutions_are_the_same_in_parts() -> None:
    features, masks = unit_or_zero(torch.randn(2, 3, 5, 8)), torch.rand(2, 20, 3, 5)
    anchors = ConvAnchors(8, 2, 4).eval()
    found = anchors(features, masks)
    one = anchors(features[1:], masks[1:, 17:18])
    torch.testing.assert_close(found[1:, :, 17:18], one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(dim=(3, 4)), torch.ones(2, 1, 20))


def test_a_mask_of_one_patch_pools_that_patch() -> None:
    features = unit_or_zero(torch.randn(1, 2, 2, 16))
    masks = torch.eye(4).view(1, 4, 2, 2)
    torch.testing.assert_close(pool(features, masks[:, None]), features.flatten(1, 2))
    assert pool(features, masks[:, None, :0]).shape == (1, 0, 16)


def plain_loss(probabilities: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    """The loss of `region_map_losses`, written down without any thrift."""
    size = labels.shape[-2:]
    masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False).sigmoid()
    x = torch.sigmoid(3.0 * torch.einsum("bnc,bnhw->bchw", probabilities, masks) - 3.0)
    channels = probabilities.shape[2]
    target = F.one_hot(labels.where(labels != 255, channels - 1), channels).permute(0, 3, 1, 2).float()
    p_t = torch.where(target > 0, x, 1 - x)
    focal = -torch.where(target > 0, 0.25, 0.75) * (1 - p_t) ** 2 * p_t.clamp(1e-4, 1 - 1e-4).log()
    real, wanted = x[:, :-1].flatten(1), target[:, :-1].flatten(1)
    dice = 1 - (2 * (real * wanted).sum(1) + 1) / (real.sum(1) + wanted.sum(1) + 1)
    return 2.0 * focal.mean() + 0.8 * dice.mean()


@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_the_map_loss_in_parts_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("lexiseg.losses.regions.CHUNK", chunk)
    labels = torch.randint(0, 3, (2, 9, 11))
    labels[0, :4] = 255
    found = []
    for loss in (plain_loss, lambda *given: region_map_losses(*given).total):
        torch.manual_seed(2)
        logits = (2 * torch.randn(2, 5, 4)).requires_grad_()
        masks = (3 * torch.randn(2, 5, 4, 3)).requires_grad_()
        value = loss(logits.softmax(-1), masks, labels)
        value.backward()
        assert logits.grad is not None
        assert masks.grad is not None
        found.append((value.detach(), logits.grad, masks.grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_map_loss_without_proposals_and_with_wrong_shapes() -> None:
    empty = torch.zeros(1, 0, 4), torch.zeros(1, 0, 3, 3)
    assert torch.isfinite(region_map_losses(*empty, torch.zeros(1, 6, 6, dtype=torch.long)).total)
    with pytest.raises(LexisegError, match="do not match"):
        region_map_losses(torch.zeros(1, 2, 4), torch.zeros(1, 3, 3, 3), torch.zeros(1, 6, 6, dtype=torch.long))


def test_the_label_frame_follows_smaller_labels() -> None:
    assert label_frame((64, 64), (40, 48), torch.zeros(1, 20, 24)) == (32, 32)
