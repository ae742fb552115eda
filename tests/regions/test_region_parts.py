"""Crops, ensembles, the mask-aware loss, and the published checkpoints of the systems made of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lexiseg.clip.embeddings import image_embeddings
from lexiseg.errors import LexisegError
from lexiseg.losses.mask_aware import distillation_loss, iou_targets, mask_aware_loss, mask_ious
from lexiseg.models.maft import MaftOptions, batch_loss
from lexiseg.models.region_base import RegionModel
from lexiseg.models.zegformer import ZegFormerCrops
from lexiseg.regions.crops import CropEncoder, CropOptions, tight_crops
from lexiseg.regions.duplicates import near_duplicates
from lexiseg.regions.ensemble import EnsembleOptions, ensemble
from lexiseg.weights.decoupled_checkpoints import read_parts
from tests.models.test_region_models import make
from tests.towers import small_clip
from tests.weights.test_detectron_checkpoint import layout


def masks_of(*boxes: tuple[int, int, int, int]) -> Tensor:
    masks = torch.zeros(len(boxes), 20, 30)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1.0
    return masks


def tight(masks: Tensor, image: Tensor | None = None, size: int = 6, **options: Any) -> Any:
    image = torch.rand(3, 20, 30) + 1 if image is None else image
    black = torch.full((3,), -1.0)
    return tight_crops(image, [masks], CropOptions(**options), size=size, black=black)


def test_boxes_of_all_kinds_of_masks() -> None:
    crops = tight(masks_of((0, 0, 30, 20), (5, 7, 6, 8), (0, 0, 0, 0), (29, 19, 30, 20)))
    assert crops.boxes.tolist() == [[0, 0, 30, 20], [5, 7, 6, 8], [29, 19, 30, 20]]
    assert crops.valid.tolist() == [True, True, False, True]


def test_a_tight_crop_paints_what_is_outside() -> None:
    image = torch.rand(3, 20, 30) + 1
    masks = masks_of((4, 2, 10, 8))
    masks[0, 2:5, 4:10] = 0.4  # the box shrinks with the mask
    assert torch.allclose(
        tight(masks, image, size=6, merge="crop").images[0].mean(), image[:, 5:8, 4:10].mean(), rtol=0.1
    )
    whole = tight(masks_of((4, 2, 10, 8)), image).images[0]
    torch.testing.assert_close(whole, image[:, 2:8, 4:10])  # a square box of the crop's own size is copied
    masks = masks_of((4, 2, 10, 8))
    masks[0, 3:7, 5:9] = 0.0
    for fill, value in (("mean", 0.0), ("zero", -1.0)):
        assert torch.allclose(tight(masks, image, fill=fill).images[0, :, 1:5, 1:5], torch.tensor(value))
    everything = tight(masks_of((4, 2, 10, 8)), image, merge="mask", size=20)
    assert everything.images.shape == (1, 3, 20, 20)
    assert float(everything.images[0, :, -3:, -3:].abs().max()) == 0.0


def test_empty_masks_are_skipped_or_blank() -> None:
    masks = masks_of((0, 0, 0, 0), (3, 3, 9, 9), (0, 0, 0, 0))
    crops = tight(masks)
    assert crops.valid.tolist() == [False, True, False]
    assert crops.images.shape == (1, 3, 6, 6)
    assert tight(masks[:0]).images.shape == (0, 3, 6, 6)
    masks[2, 5, 3:9] = 1.0  # of no area
    encoder = ZegFormerCrops(False, CropOptions(convention="roi-align", size=6), "bicubic")
    frame = torch.rand(3, 20, 30) + 1
    aligned = encoder.cut(small_clip(), frame, (20, 30), (masks - 0.5) * 40)
    assert aligned.valid.tolist() == [True, True, True]
    assert aligned.boxes.tolist() == [[0, 0, 30, 20], [3, 3, 8, 8], [0, 0, 30, 20]]  # the first and last: all of it
    assert float(aligned.images[0].abs().max()) == 0.0


def test_crops_that_repeat_are_run_once() -> None:
    encoder, visual, shown = CropEncoder(False, CropOptions(), "bicubic"), small_clip().visual, []
    visual.conv1.register_forward_pre_hook(lambda _, given: shown.append(len(given[0])))
    images = torch.rand(9, 3, 32, 32)

    def compare() -> None:
        expected = image_embeddings(visual, images, position_interpolation="bicubic")
        shown.clear()
        torch.testing.assert_close(encoder.embed_crops(visual, images), expected)

    compare()
    assert sum(shown) == 9
    images[[2, 4, 7]] = 0
    compare()
    assert sum(shown) == 7


def test_a_near_duplicate_of_a_near_duplicate_stands_for_itself() -> None:
    masks = torch.stack([torch.arange(10) < width for width in (10, 9, 8)])[:, None] * 2.0 - 1.0
    assert near_duplicates(masks, 0.85).tolist() == [0, 0, 2]


def test_near_duplicates_point_at_the_first() -> None:
    masks = masks_of((0, 0, 10, 10), (20, 0, 30, 10), (0, 0, 10, 10), (0, 1, 10, 10), (0, 0, 0, 0))
    assert near_duplicates(masks * 2 - 1, 0.85).tolist() == [0, 1, 0, 0, 4]
    assert near_duplicates(masks * 2 - 1, 0.95).tolist() == [0, 1, 0, 3, 4]


def test_the_rules_of_the_ensemble() -> None:
    own, clips = torch.rand(1, 4, 3), torch.rand(1, 4, 3)
    seen = torch.tensor([True, True, False])
    encoded = torch.tensor([[True, True, True, False]])

    def by(rule: str, weight: float = 0.8, **more: Any) -> Tensor:
        return ensemble(own, clips, EnsembleOptions(rule=rule, weight=weight), **more)  # type: ignore[arg-type]

    assert torch.equal(by("proposal", seen=seen), own)
    assert torch.equal(by("region", seen=seen), clips)
    assert torch.equal(by("released", 0.0, seen=seen), clips)  # not the limit of the formula
    both = by("released", seen=seen)
    torch.testing.assert_close(both[..., 0], own[..., 0] ** 0.8 * clips[..., 0] ** 0.2)
    torch.testing.assert_close(both[..., 2], own[..., 2] ** 0.2 * clips[..., 2] ** 0.8)
    torch.testing.assert_close(by("paper", seen=seen)[..., 2], clips[..., 2] ** 0.8)
    mean = clips[..., :2].mean(dim=-1)
    torch.testing.assert_close(by("released", seen=seen, seen_mean=True)[..., 1], own[..., 1] ** 0.8 * mean**0.2)
    torch.testing.assert_close(by("released"), own**0.2 * clips**0.8)  # no flags: all count as unseen
    one = by("released", seen=seen, encoded=encoded)
    torch.testing.assert_close(one[0, 3, :2], own[0, 3, :2] ** 0.8)
    assert torch.equal(one[0, :3], both[0, :3])
    assert not by("region", encoded=encoded)[0, 3].any()
    assert torch.equal(ensemble(None, clips, EnsembleOptions()), clips)
    with pytest.raises(ValueError, match="neither"):
        ensemble(None, None, EnsembleOptions())


def test_targets_of_the_mask_aware_loss() -> None:
    labels = torch.full((20, 30), 255)
    labels[:10, :10], labels[:10, 20:] = 1, 3
    masks = masks_of((0, 0, 10, 10), (0, 0, 10, 20), (20, 0, 30, 10), (0, 0, 0, 0))
    ious, present = mask_ious(masks, labels, 4)
    assert present.tolist() == [1, 3]
    torch.testing.assert_close(ious, torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]), rtol=1e-5, atol=1e-6)
    half = ious * torch.tensor([[0.5], [1.0]])
    assert iou_targets(half, "row").amax(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert iou_targets(half, "matrix").amax(dim=1).tolist() == pytest.approx([0.5, 1.0])
    assert float(iou_targets(torch.full((2, 3), 0.7)).abs().max()) == 0.0
    with pytest.raises(LexisegError, match="label is 9"):
        mask_ious(masks, torch.full((20, 30), 9), 4)


@pytest.mark.parametrize("distance", ["smooth-l1", "l1", "l2", "kl"])
def test_the_four_forms_of_the_loss(distance: Any) -> None:
    targets = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert float(mask_aware_loss(targets, targets, distance)) == pytest.approx(0.0, abs=1e-6)
    scores = torch.full((2, 3), 0.3, requires_grad=True)
    loss = mask_aware_loss(scores, targets, distance)
    expected = {"smooth-l1": 0.5 * (0.49 + 0.04 + 0.09 * 3 + 0.49) / 6, "l1": (0.7 + 0.2 + 0.9 + 0.7) / 6}
    expected |= {"l2": (0.49 + 0.04 + 0.27 + 0.49) / 6}
    third = 2 / 3 * math.log(2) + 1 / 3 * math.log(1)
    expected["kl"] = (third + math.log(3)) / 2
    assert float(loss.detach()) == pytest.approx(expected[distance], rel=1e-4)
    loss.backward()
    assert scores.grad is not None and torch.isfinite(scores.grad).all()
    nothing = mask_aware_loss(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3), distance)
    assert float(nothing.detach()) == 0.0 and nothing.requires_grad


def test_regions_that_are_not_there_do_not_count() -> None:
    labels = torch.zeros(1, 20, 30, dtype=torch.long)
    labels[:, :, 15:] = 1
    masks = masks_of((0, 0, 15, 20), (10, 0, 30, 20), (0, 0, 30, 20))
    scores = torch.rand(1, 3, 2)
    two = batch_loss(scores[:, :2], [masks[:2]], labels, None, MaftOptions())
    valid = torch.tensor([[True, True, False]])
    three = batch_loss(scores, [masks], labels, valid, MaftOptions())
    torch.testing.assert_close(three * 3, two * 2)
    assert float(distillation_loss(scores[:, 0], scores[:, 0])) == 0.0


def test_maft_tunes_a_resnet() -> None:
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 64}
    clip = small_clip(vision_cfg={**vision, "patch_size": None})
    model = type(make()).build(clip, {**make().options.model_dump(), "maft": {}, "attention": {"image_size": 96}})
    assert isinstance(model, RegionModel)
    teacher = {name: value.clone() for name, value in model.clip.state_dict().items()}
    model.train()
    images = torch.randn(1, 3, 40, 48)
    labels = torch.arange(4).repeat(1, 40, 12)
    text = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    model.losses(images, labels, text)["loss"].backward()
    trained = dict(model.trainable_parameters())
    assert trained and all(name.startswith("student.attnpool.") for name in trained)
    assert all(parameter.grad is not None for parameter in trained.values())
    assert all(torch.equal(value, teacher[name]) for name, value in model.clip.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("system", ["zegformer", "zsseg", "freeseg", "maft"])
def test_full_size_checkpoints(system: str) -> None:
    """A random file in the published layout becomes a model, tensor for tensor, of the published size."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in layout(system).items()}
    model, unused = read_parts(state, name=system)
    assert model.system == ("freeseg" if system == "maft" else system)
    ours = model.state_dict()
    prefix = "sem_seg_head.predictor.clip_model." if system == "zegformer" else "clip_adapter.clip_model."
    for key, value in state.items():
        if key.startswith(prefix):
            assert torch.equal(ours["clip.model." + key.removeprefix(prefix)], value), key
        elif key.startswith("IPCLIP."):
            assert torch.equal(ours["student." + key.removeprefix("IPCLIP.")], value), key
    row = "sem_seg_head.predictor.bg_feature" if system == "zegformer" else "clip_adapter.non_object_embedding"
    assert torch.equal(model.no_object, state[row])
    # MAFT's file has a third image tower that nothing uses.
    millions = {"zegformer": 209.91, "zsseg": 210.70, "freeseg": 218.17, "maft": 390.54 - 86.19}[system]
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.001)
    assert all(key.startswith(("T.", "criterion.", "clip_adapter.p", "pixel_")) for key in unused)
    trained = {"zegformer": 60.29, "zsseg": 61.08, "freeseg": 68.55, "maft": 28.387}[system]
    assert model.num_parameters(trainable=True) / 1e6 == pytest.approx(trained, rel=0.01)
