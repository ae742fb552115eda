"""Focal and dice against their definitions, written out plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError
from lexiseg.losses.mask_aware import mask_aware_loss
from lexiseg.losses.masks import (
    count_masks,
    exclusive_logits,
    exclusive_losses,
    mask_losses,
    pseudo_labels,
    with_gradient,
)
from lexiseg.losses.ssim import ssim_loss
from tests.references import pixel_accuracy


def plain_losses(logits: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The two losses as the formulas say, with one-hot targets."""
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    count = logits.shape[1]
    target = F.one_hot(torch.where(labels == 255, count, labels), count + 1)[..., :count].permute(0, 3, 1, 2).float()
    p = logits.sigmoid()
    p_t = p * target + (1 - p) * (1 - target)
    alpha_t = alpha * target + (1 - alpha) * (1 - target)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (alpha_t * (1 - p_t) ** 2 * bce).flatten(2).mean(-1).sum()
    top, bottom = 2 * (p * target).sum((2, 3)) + 1, p.sum((2, 3)) + target.sum((2, 3)) + 1
    dice = ((1 - top / bottom) * (target.sum((2, 3)) > 0)).sum()
    masks = max(float((target.sum((2, 3)) > 0).sum()), 1.0)
    return focal / masks, dice / masks


@pytest.mark.parametrize(("grid", "size"), [((6, 7), (6, 7)), ((5, 4), (13, 21)), ((9, 9), (4, 4)), ((1, 1), (8, 8))])
@pytest.mark.parametrize("classes", [1, 7])
def test_equal_to_the_definition(grid: tuple[int, int], size: tuple[int, int], classes: int) -> None:
    logits = (3 * torch.randn(3, classes, *grid)).requires_grad_()
    labels = torch.randint(0, classes, (3, *size))
    labels[torch.rand(3, *size) < 0.2] = 255
    labels[1] = 255
    ours = mask_losses(logits, labels, focal_weight=20.0, dice_weight=3.0)
    (gradient,) = torch.autograd.grad(2.0 * ours.total, logits)
    focal, dice = plain_losses(logits, labels, 0.25)
    torch.testing.assert_close(ours.mask, 20 * focal.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.dice, 3 * dice.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.total, ours.mask + ours.dice)
    (expected,) = torch.autograd.grad(2.0 * (20 * focal + 3 * dice), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_sum_over_many_pixels_keeps_its_digits() -> None:
    losses = mask_losses(torch.zeros(1, 20, 4, 4), torch.full((1, 512, 512), 255), focal_weight=1.0)
    assert float(losses.mask) == pytest.approx(20 * 0.75 * 0.25 * math.log(2), rel=1e-5)


def test_finite_for_huge_logits() -> None:
    logits = torch.tensor([1e4, -1e4, 200.0, -200.0]).reshape(1, 4, 1, 1).requires_grad_()
    losses = mask_losses(logits, torch.ones(1, 3, 3, dtype=torch.long))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_no_gradient_is_kept_without_need() -> None:
    losses = mask_losses(torch.randn(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long))
    assert not losses.total.requires_grad


def test_half_precision_logits_give_half_precision_gradients() -> None:
    logits = torch.randn(1, 2, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    mask_losses(logits, torch.zeros(1, 6, 6, dtype=torch.long)).total.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_autocast_changes_nothing() -> None:
    logits, labels = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randint(0, 5, (2, 16, 16))
    plain = mask_losses(logits, labels).total
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mask_losses(logits, labels).total
    assert torch.equal(plain, mixed)
    assert torch.equal(torch.autograd.grad(plain, logits)[0], torch.autograd.grad(mixed, logits)[0])


def test_torchs_default_dtype_changes_nothing() -> None:
    logits, labels = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 20, 24))
    expected = mask_losses(logits, labels).total, ssim_loss(logits, labels)
    torch.set_default_dtype(torch.float64)
    try:
        found = mask_losses(logits, labels).total, ssim_loss(logits, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_wrong_labels_are_refused() -> None:
    with pytest.raises(LexisegError, match="label is 5 but there are 3 classes"):
        mask_losses(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 5))
    with pytest.raises(LexisegError, match="do not match"):
        mask_losses(torch.zeros(1, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long))


def test_counting_masks() -> None:
    labels = torch.tensor([[[0, 0, 255]], [[255, 255, 255]], [[1, 2, 0]]])
    assert count_masks(labels) == 4
    assert count_masks(labels[1:2]) == 1


def test_pseudo_labels_keep_seen_and_ignored_pixels() -> None:
    logits = torch.zeros(1, 4, 1, 5)
    logits[0, 0] = 9.0
    logits[0, 3, 0, :3] = 1.0
    labels = torch.tensor([[[2, -1, 255, 3, 0]]])
    seen = torch.tensor([True, True, False, False])
    assert pseudo_labels(logits, labels, seen).tolist() == [[[3, 3, 255, 2, 0]]]


def test_pixel_accuracy() -> None:
    logits = torch.tensor([[[[1.0, 0.0, 1.0, 1.0]], [[0.0, 1.0, 0.0, 0.0]]]])
    labels = torch.tensor([[[0, 1, 1, 255]]])
    assert float(pixel_accuracy(logits, labels)) == pytest.approx(200 / 3)
    assert float(pixel_accuracy(logits, torch.full((1, 1, 4), 255))) == 0.0


@pytest.mark.parametrize("size", [(6, 7), (13, 21), (3, 3)])
def test_exclusive_losses_are_those_of_a_softmax(size: tuple[int, int]) -> None:
    logits = (3 * torch.randn(3, 5, 6, 7)).requires_grad_()
    labels = torch.randint(0, 4, (3, *size))  # class 4 is nowhere
    labels[torch.rand(3, *size) < 0.2] = 255
    labels[1] = 255
    ours = exclusive_losses(logits, labels, entropy_weight=2.0, dice_weight=3.0)
    p = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(1)
    entropies, dices = [], []
    for b in range(3):
        counted = labels[b] != 255
        entropies += [-p[b, label, y, x].log() for y, x in counted.nonzero() for label in [labels[b, y, x]]]
        for label in labels[b][counted].unique():
            inside, total = p[b, label][labels[b] == label].sum(), p[b, label][counted].sum()
            dices.append(1 - (2 * inside + 1) / (total + (labels[b] == label).sum() + 1))
    torch.testing.assert_close(ours.mask, 2 * torch.stack(entropies).mean().detach())
    torch.testing.assert_close(ours.dice, 3 * torch.stack(dices).mean().detach())
    (gradient,) = torch.autograd.grad(ours.total, logits)
    assert float(gradient[1].abs().max()) == 0.0
    torch.testing.assert_close(gradient.sum(1), torch.zeros(3, 6, 7), rtol=0, atol=1e-6)  # what one gains others lose


def test_weights_of_the_terms_are_the_papers_by_default() -> None:
    logits, labels = torch.randn(2, 4, 6, 5), torch.randint(0, 4, (2, 6, 5))
    focal, dice = plain_losses(logits, labels, alpha=0.25)
    torch.testing.assert_close(mask_losses(logits, labels).total, 100 * focal + dice)
    torch.testing.assert_close(exclusive_losses(logits, labels).total, F.cross_entropy(logits, labels))


def test_a_divergence_is_of_distributions_over_the_proposals() -> None:
    targets = torch.rand(3, 5) * 0.1
    assert mask_aware_loss(4.0 * targets, targets, "kl").item() == pytest.approx(0.0, abs=1e-6)


def test_exclusive_losses_without_labels_are_zero() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    losses = exclusive_losses(logits, torch.full((1, 4, 4), 255), dice_weight=1.0)
    losses.total.backward()
    assert losses.total == losses.mask == losses.dice == 0.0
    assert logits.grad is not None and not logits.grad.any()
    with pytest.raises(LexisegError, match="label is 5 but there are 3 classes"):
        exclusive_losses(logits, torch.full((1, 2, 2), 5))


def test_the_sigmoid_of_exclusive_logits_is_the_softmax() -> None:
    logits = 10 * torch.randn(2, 6, 4, 5)
    logits[0, 2, 0, 0] = 300.0
    result = exclusive_logits(logits)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result.sigmoid(), logits.softmax(1), rtol=1e-4, atol=1e-7)
    assert torch.isfinite(exclusive_logits(logits[:, :1])).all()


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


def test_a_known_gradient_leaves_the_value_as_it_is() -> None:
    logits, gradient = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    value = torch.tensor(1e-3)
    with_it = with_gradient(value, logits, gradient)
    assert torch.equal(with_it, value)
    (2.0 * with_it).backward()
    assert logits.grad is not None and torch.equal(logits.grad, 2.0 * gradient)
    assert with_gradient(value, logits, None) is value
