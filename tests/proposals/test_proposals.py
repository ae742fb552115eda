"""Proposal generators: shapes, sizes, training, and what users get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lexiseg.errors import LexisegError
from lexiseg.losses.proposals import MaskTargets, ProposalWeights, mask_targets, match, proposal_losses
from lexiseg.proposals.base import HARD_LOGIT, ProposalGenerator, Proposals
from lexiseg.proposals.given import GroundTruth
from lexiseg.proposals.options import GroundTruthOptions, Mask2FormerOptions, MaskFormerOptions
from tests.towers import SMALL_PROPOSALS

SMALL: dict[str, Any] = {**SMALL_PROPOSALS, "embed_dim": 12}
MASKED: dict[str, Any] = {
    "hidden_dim": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "interaction_dim": 16,
    "interaction_heads": 2,
}
KINDS = ("maskformer", "mask2former")


def make(kind: str, **changes: Any) -> ProposalGenerator:
    torch.manual_seed(0)
    if kind == "maskformer":
        return MaskFormerOptions(**{**SMALL, **changes}).build()
    return Mask2FormerOptions(**{**SMALL, **MASKED, **changes}).build()


def words(count: int = 4) -> Tensor:
    return nn.functional.normalize(torch.randn(count, SMALL["embed_dim"]), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (32, 160)])
def test_any_padded_size(kind: str, size: tuple[int, int]) -> None:
    generator = make(kind).eval()
    with torch.no_grad():
        found = generator(torch.randn(2, 3, *size), words())
    assert found.mask_logits.shape == (2, 6, size[0] // 4, size[1] // 4)
    assert found.embeddings is not None and found.embeddings.shape == (2, 6, 12)
    # MaskFormer makes masks of earlier layers only where there is a loss to come.
    assert len(found.aux) == (0 if kind == "maskformer" else 2)
    assert len(found.levels) == len(found.aux) + 1
    assert all(level.mask_logits.shape == found.mask_logits.shape for level in found.aux)
    assert found.levels[-1].aux == ()


@pytest.mark.parametrize("kind", KINDS)
def test_one_query_and_no_class_head(kind: str) -> None:
    found = make(kind, num_queries=1, class_head="none").eval()(torch.randn(1, 3, 32, 32), words(1))
    assert found.mask_logits.shape == (1, 1, 8, 8)
    assert found.embeddings is None


def test_linear_class_head() -> None:
    generator = make("maskformer", class_head="linear")
    assert generator.embed_dim == 12
    assert isinstance(generator.class_embed, nn.Linear)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str) -> None:
    images, text = torch.randn(1, 3, 64, 32), words()
    first, second = make(kind).eval(), make(kind)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first(images, text).mask_logits, second.eval()(images, text).mask_logits)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind: str) -> None:
    generator = make(kind, dropout=0.0).train()
    images = torch.randn(2, 3, 32, 64)
    labels = torch.zeros(2, 32, 64, dtype=torch.long)
    labels[:, :, 32:] = 1
    labels[0, :8] = 2
    labels[1, 20:] = 255
    rows = words(4)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=3e-3)
    values = []
    for _ in range(6):
        found = generator(images, rows)
        logits = [10 * nn.functional.normalize(level.embeddings, dim=-1) @ rows.T for level in found.levels]
        losses = proposal_losses(found, logits, mask_targets(labels), ProposalWeights(dice_weight=5.0))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        values.append(float(losses["loss"].detach()))
    assert values[-1] < 0.9 * values[0]
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_images_without_targets() -> None:
    generator = make("maskformer", class_head="none", dropout=0.0)
    found = generator(torch.randn(2, 3, 32, 32))
    labels = torch.full((2, 32, 32), 255)
    losses = proposal_losses(found, None, mask_targets(labels))
    assert float(losses["loss"].detach()) == 0.0
    losses["loss"].backward()
    labels[1, :16] = 3
    classes = [torch.randn(2, 6, 5) for _ in found.levels]
    mixed = proposal_losses(generator(torch.randn(2, 3, 32, 32)), classes, mask_targets(labels))
    assert torch.isfinite(mixed["loss"]) and "loss_ce_0" in mixed


def test_more_targets_than_queries() -> None:
    found = make("maskformer", num_queries=1)(torch.randn(1, 3, 32, 32))
    labels = torch.arange(32).expand(1, 32, 32) // 8
    queries, targets = match(found.mask_logits, None, mask_targets(labels), ProposalWeights())[0]
    assert len(queries) == len(targets) == 1
    assert torch.isfinite(proposal_losses(found, None, mask_targets(labels))["loss"])


def test_the_level_before_the_last_can_be_left_out() -> None:
    found = make("mask2former")(torch.randn(1, 3, 32, 32), words())
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    names = proposal_losses(found, None, mask_targets(labels), ProposalWeights(skip_level_before_last=True)).keys()
    assert {"loss_mask", "loss_mask_0"} <= names and "loss_mask_1" not in names


def test_targets_of_padded_images() -> None:
    labels = torch.tensor([[[0, 2], [255, 2]]])
    target = mask_targets(labels, (3, 4))[0]
    assert isinstance(target, MaskTargets)
    assert target.classes.tolist() == [0, 2]
    assert target.masks.sum((1, 2)).tolist() == [1.0, 2.0]
    assert target.masks.shape == (2, 3, 4)


def test_matching_without_class_costs_ignores_the_classes() -> None:
    masks = torch.full((1, 2, 4, 4), -5.0)
    masks[0, 1, :, :2] = 5.0
    labels = torch.full((1, 4, 4), 255)
    labels[0, :, :2] = 0
    logits = torch.tensor([[[9.0, 0.0], [0.0, 9.0]]])
    targets = mask_targets(labels)
    assert match(masks, logits, targets, ProposalWeights(cost_class=0.0))[0][0].tolist() == [1]
    assert match(masks, logits, targets, ProposalWeights(cost_class=1000.0))[0][0].tolist() == [0]


def test_focal_and_dice_weigh_in_the_matching() -> None:
    labels = torch.full((1, 8, 8), 255)
    labels[0, :2, :2] = 0
    masks = torch.full((1, 2, 8, 8), -5.0)  # the first says nothing, and is wrong about few pixels
    masks[0, 1, :, :4] = 2.0  # the second overlaps, and is wrong about many
    targets = mask_targets(labels)
    for weights, query in (({}, 0), ({"dice_weight": 0.0}, 0), ({"mask_weight": 0.0}, 1)):
        assert match(masks, None, targets, ProposalWeights(**weights))[0][0].tolist() == [query], weights


def test_weights_of_the_criterion() -> None:
    masks, classes = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4)
    targets = mask_targets(torch.arange(16).reshape(1, 4, 4) // 8)
    weights = [
        ProposalWeights(cost_class=factor, class_weight=2 * factor, mask_weight=20 * factor, dice_weight=factor,
                        no_object=0.3)
        for factor in (1.0, 3.0)
    ]  # fmt: skip
    ours, thrice = (proposal_losses(Proposals(masks), [classes], targets, each) for each in weights)
    queries, found = match(masks, classes, targets, weights[0])[0]
    goal = torch.full((3,), 3)
    goal[queries] = targets[0].classes[found]
    expected = nn.functional.cross_entropy(classes[0], goal, torch.tensor([1.0, 1.0, 1.0, 0.3]))
    torch.testing.assert_close(ours["loss_ce"], 2 * expected)
    for name, value in ours.items():  # the costs grow alike, so that the matching stays
        torch.testing.assert_close(thrice[name], 3 * value)


def test_predictions_in_half_precision() -> None:
    masks, classes = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4)
    targets = mask_targets(torch.arange(16).reshape(1, 4, 4) // 6)
    full = proposal_losses(Proposals(masks), [classes], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = proposal_losses(Proposals(masks.bfloat16()), [classes.bfloat16()], targets)
    assert float(half["loss"]) == pytest.approx(float(full["loss"]), rel=0.02)
    assert half["loss"].dtype == torch.float32


def test_class_logits_for_every_level() -> None:
    found = make("maskformer")(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="shorter"):
        proposal_losses(found, [torch.zeros(1, 6, 3)], mask_targets(torch.zeros(1, 32, 32, dtype=torch.long)))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_a_frozen_generator(kind: str) -> None:
    images, text = torch.randn(1, 3, 32, 32), words()
    still, released = make(kind), make(kind, frozen_dropout=True)
    for generator, same in ((still, True), (released, False)):
        generator.requires_grad_(False)
        generator.train()
        with torch.no_grad():
            first, second = (generator(images, text).mask_logits for _ in range(2))
        assert torch.equal(first, second) == same


@pytest.mark.parametrize("backbone", ["r50", "r50c"])
def test_resnets(backbone: str) -> None:
    generator = make("maskformer", backbone=backbone, widths=(4, 4, 8, 8))
    body = generator.backbone.body
    assert not any("bn" in name or "downsample.1" in name for name, _ in generator.named_parameters())
    assert {"bn1.weight", "bn1.running_var"} <= {name for name, _ in body.named_buffers()}
    dilations = [block.conv2.dilation[0] for block in body.layer4]
    assert dilations == ([1, 2, 4] if backbone == "r50c" else [1, 1, 1])
    generator.train()
    with torch.no_grad():
        before = body.bn1.running_mean.clone()
        features = generator.backbone(torch.randn(1, 3, 64, 64))
    assert [feature.shape[1:] for feature in features] == [(16, 16, 16), (16, 8, 8), (32, 4, 4), (32, 2, 2)]
    assert torch.equal(before, body.bn1.running_mean)


def test_sizes_of_the_published_generators() -> None:
    published = {
        61_067_200: MaskFormerOptions(),
        60_287_424: MaskFormerOptions(backbone="r101", class_head="linear"),
        42_518_208 + 6_036_000 + 16_825_000 + 3_154_000: Mask2FormerOptions(),
    }
    for count, options in published.items():
        with torch.device("meta"):
            found = sum(parameter.numel() for parameter in options.build().parameters())
        assert abs(found - count) < 2000


def test_what_does_not_fit() -> None:
    generator = make("mask2former")
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(LexisegError, match="reads the words"):
        generator(images)
    with pytest.raises(LexisegError, match="width 12, but got 5"):
        generator(images, torch.randn(3, 5))
    with pytest.raises(ValueError, match="multiples of 32, not 30 x 32"):
        generator(torch.randn(1, 3, 30, 32), words())
    for kind, changes, sentence in (
        ("maskformer", {"pixel_dim": 40}, "pixel_dim must be a multiple of 32"),
        ("maskformer", {"hidden_dim": 18}, "hidden_dim must be a multiple of 4"),
        ("maskformer", {"heads": 3}, "cannot be split into 3 heads"),
        ("maskformer", {"backbone": "r50", "stem_width": 7}, "must be even"),
        ("mask2former", {"mask_dim": 64}, "must equal pixel_dim"),
        ("mask2former", {"encoder_heads": 3}, "change encoder_heads"),
        ("mask2former", {"interaction_heads": 3}, "change interaction_heads"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            make(kind, **changes)


def test_ground_truth() -> None:
    labels = torch.full((2, 20, 40), 255)
    labels[0, :10] = 3
    labels[0, 10:, :5] = 1
    generator = GroundTruthOptions().build()
    assert isinstance(generator, GroundTruth)
    images = torch.zeros(2, 3, 32, 64)
    with pytest.raises(LexisegError, match="need labels"):
        generator(images)
    generator.labels = labels
    found = generator(images)
    with pytest.raises(LexisegError, match="give the labels of these images"):
        generator(images[:1])
    assert found.valid is not None
    assert found.valid.tolist() == [[True, True], [False, False]]
    assert found.mask_logits.shape == (2, 2, 32, 64)
    assert (found.mask_logits[0] > 0).sum((1, 2)).tolist() == [50, 400]
    assert set(found.mask_logits.unique().tolist()) == {-HARD_LOGIT, HARD_LOGIT}
    generator.labels = torch.full((1, 4, 4), 255)
    assert generator(images[:1]).mask_logits.shape == (1, 1, 32, 64)
    generator.labels, generator.ignored = labels.where(labels != 1, 65535), 65535  # of 300 classes one has the id 255
    found = generator(images)
    assert found.valid is not None and found.valid.tolist() == [[True, True], [True, False]]
    assert (found.mask_logits > 0).sum((2, 3)).tolist() == [[400, 350], [800, 0]]
