"""Mask attention: what must hold for any tower, any size and any number of masks."""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lexiseg.clip.embeddings import image_embeddings
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import CLIP, build_clip, save_clip
from lexiseg.clip.resnet import resnet_features
from lexiseg.clip.tower import block_attention
from lexiseg.errors import LexisegError
from lexiseg.models import DenseCLIP
from lexiseg.models.maft import (
    FROZEN_UNITS,
    AttentionOptions,
    MaskAttention,
    attend_regions,
    attention_mask,
    region_embeddings,
    tuned_names,
)
from lexiseg.regions.pooling import resize_masks
from tests.towers import small_clip

DEPTH = 4


@lru_cache(maxsize=2)
def tower_of(kind: str) -> CLIP:
    if kind == "vit":
        return small_clip()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}
        text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        clip = build_clip({"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}, name="resnet")
        for parameter in clip.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return clip


@pytest.fixture(params=["vit", "resnet"])
def clip(request: pytest.FixtureRequest) -> CLIP:
    return tower_of(request.param)


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@given(
    kind=st.sampled_from(["vit", "resnet"]),
    height=st.integers(8, 50),
    width=st.integers(8, 50),
    count=st.sampled_from([0, 1, 3, 20]),
    start=st.integers(0, DEPTH - 1),
    mask_size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_any_size_and_any_number(
    kind: str, height: int, width: int, count: int, start: int, mask_size: tuple[int, int]
) -> None:
    if kind == "resnet":
        height, width = max(height, 32), max(width, 32)
    visual = tower_of(kind).visual
    images, masks = torch.randn(2, 3, height, width), torch.rand(2, count, *mask_size)
    found = region_embeddings(visual, images, masks, start_block=start)
    assert found.shape == (2, count, 16)
    assert bool(torch.isfinite(found).all())
    if count:
        alone = region_embeddings(visual, images, masks[:, -1:], start_block=start)
        close(found[:, -1:], alone)


@torch.no_grad()
def test_a_full_mask_in_the_last_block_is_plain_clip(clip: CLIP) -> None:
    images = torch.randn(2, 3, 64, 96)
    plain = image_embeddings(clip.visual, images)
    masks = torch.ones(2, 3, 5, 7)
    close(region_embeddings(clip.visual, images, masks, start_block=DEPTH - 1), plain[:, None].expand(-1, 3, -1))


@torch.no_grad()
def test_at_its_own_size_it_is_open_clip(clip: CLIP) -> None:
    images = torch.randn(2, 3, clip.image_size, clip.image_size)
    close(image_embeddings(clip.visual, images), clip.model.encode_image(images))


@torch.no_grad()
def test_a_full_mask_from_earlier_on_is_not_plain_clip() -> None:
    visual, images = tower_of("vit").visual, torch.randn(1, 3, 32, 32)
    early = region_embeddings(visual, images, torch.ones(1, 1, 4, 4), start_block=1)
    assert not torch.allclose(early[:, 0], image_embeddings(visual, images), atol=1e-3)


@torch.no_grad()
def test_equal_masks_give_equal_embeddings_and_so_do_empty_ones(clip: CLIP) -> None:
    images = torch.randn(1, 3, 96, 64)
    masks = torch.rand(1, 6, 12, 8)
    masks[:, 3] = masks[:, 0]
    masks[:, 4:] = torch.tensor([0.0, 0.49])[:, None, None]
    found = region_embeddings(clip.visual, images, masks, start_block=2)
    close(found[:, 3], found[:, 0])
    close(found[:, 5], found[:, 4])
    assert not torch.allclose(found[:, 1], found[:, 0], atol=1e-4)


@torch.no_grad()
def test_an_empty_region_sees_nothing_of_the_picture_behind_the_start() -> None:
    tower = tower_of("vit").image_tower
    tokens, grid = tower.embed(torch.randn(1, 3, 32, 32))
    other = tokens.clone()
    other[:, 1:] += torch.randn(16, 24)
    inside = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    runs = [attend_regions(tower, x, grid, inside, start_block=1) for x in (tokens, other)]
    close(*runs)


@torch.no_grad()
def test_only_pixels_of_the_region_matter_from_the_first_block() -> None:
    """With L = 0 and one block a class token sees the patches inside its mask and no others."""
    tower = small_clip(vision_cfg={"layers": 1}).image_tower
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[..., 16:] += 1.0
    masks = torch.zeros(1, 2, 4, 4)
    masks[:, 0, :, :2] = 1.0
    masks[:, 1, :, 2:] = 1.0
    runs = [region_embeddings(tower.visual, x, masks, start_block=0) for x in (images, other)]
    close(runs[0][:, 0], runs[1][:, 0])
    assert not torch.allclose(runs[0][:, 1], runs[1][:, 1], atol=1e-3)


@torch.no_grad()
def test_one_run_equals_the_definition() -> None:
    """All tokens in one sequence with one boolean mask, as the paper writes it."""
    tower = tower_of("vit").image_tower
    images, masks, start = torch.randn(2, 3, 40, 24), torch.rand(2, 5, 10, 6), 1
    tokens, grid = tower.embed(images, interpolation="bicubic-corners")
    tokens = tower.run(tokens, grid, stop=start).tokens
    inside = resize_masks(masks, grid) >= 0.5
    stops = range(start + 1, DEPTH + 1)
    ours = [attend_regions(tower, tokens, grid, inside, start_block=start, stop=stop) for stop in stops]
    tokens = torch.cat([tokens[:, :1].expand(-1, 5, -1), tokens[:, 1:]], dim=1)
    regions = attention_mask(inside)
    patches = (torch.arange(20) >= 5).expand(2, 1, 15, -1)
    allowed = torch.cat([regions, patches], dim=2)
    masked = dict.fromkeys(range(DEPTH), partial(block_attention, mask=allowed))
    whole = tower.run(tokens, grid, first=start, attention=masked, levels=range(DEPTH))
    for index, level in zip(range(start, DEPTH), ours, strict=True):
        close(level, whole.levels[index][:, :5])
    close(tower.project(ours[-1]), region_embeddings(tower.visual, images, masks, start_block=start))


def test_exactly_one_half_is_inside() -> None:
    allowed = attention_mask(torch.tensor([[[[0.5, 0.49999]]]]) >= 0.5)
    assert allowed.tolist() == [[[[True, True, False]]]]


def test_pixels_left_over_are_cut_off() -> None:
    visual, images = tower_of("vit").visual, torch.randn(1, 3, 39, 37)
    with torch.no_grad():
        close(image_embeddings(visual, images), image_embeddings(visual, images[..., :32, :32]))
    with pytest.raises(LexisegError, match="8 x 8 patches"):
        image_embeddings(visual, images[..., :7, :])


@torch.no_grad()
def test_without_options_it_is_in_proportion_to_the_authors_towers() -> None:
    visual, images, masks = tower_of("vit").visual, torch.randn(1, 3, 32, 32), torch.rand(1, 2, 4, 4)
    found = region_embeddings(visual, images, masks)
    assert torch.equal(found, region_embeddings(visual, images, masks, start_block=3))  # of 4 blocks
    assert not torch.equal(found, region_embeddings(visual, images, masks, start_block=2))
    square = MaskAttention(False, 0.5, AttentionOptions()).square(tower_of("vit"), images)
    assert square.shape == (1, 3, 69, 69)  # 32 * 480 / 224


@torch.no_grad()
def test_masks_lie_on_the_towers_grid_and_are_found_in_the_picture() -> None:
    clip, frame = tower_of("resnet"), torch.randn(1, 3, 64, 64)
    encoder = MaskAttention(False, 0.9, AttentionOptions(image_size=95))
    image = encoder.square(clip, frame)
    logits = torch.full((1, 3, 8, 8), -5.0)
    logits[0, 0, :4], logits[0, 1, 5:], logits[0, 2] = (
        5.0,
        5.0,
        1.0,
    )  # the second in the padding, the third weak
    masks, found = encoder.square_masks(clip.visual, image, frame, logits, (32, 64))
    assert masks.shape[-2:] == resnet_features(clip.visual, image).shape[-2:] == (3, 3)
    assert found.tolist() == [[True, False, False]]


@torch.no_grad()
def test_positions_are_resized_in_two_ways(clip: CLIP) -> None:
    images = torch.randn(1, 3, 96, 128)
    ways = [image_embeddings(clip.visual, images, position_interpolation=way) for way in ("bicubic-corners", "bicubic")]
    assert not torch.allclose(*ways, atol=1e-5)


@pytest.mark.parametrize("start", [-1, DEPTH])
def test_a_start_that_is_no_block_is_refused(start: int) -> None:
    with pytest.raises(LexisegError, match="from 0 to 3"):
        region_embeddings(tower_of("vit").visual, torch.randn(1, 3, 8, 8), torch.ones(1, 1, 1, 1), start_block=start)


# ---- what fine-tuning changes ----


def test_the_authors_trainable_set() -> None:
    visual = tower_of("vit").visual
    names = tuned_names(visual)
    per_block = 3 * 24 * 24 + 3 * 24 + 24 * 24 + 24 + 4 * 24
    sizes = {name: parameter.numel() for name, parameter in visual.named_parameters()}
    assert sum(sizes[name] for name in names) == DEPTH * per_block + 2 * 24
    assert not any("mlp" in name or name in ("proj", "class_embedding") for name in names)
    assert set(tuned_names(visual, [unit for unit in FROZEN_UNITS if unit != "proj"])) - set(names) == {"proj"}
    assert set(tuned_names(visual, ())) == set(sizes)


def test_the_trainable_set_of_a_resnet() -> None:
    names = tuned_names(tower_of("resnet").visual)
    assert {name.split(".")[1] for name in names} == {"q_proj", "k_proj", "v_proj", "c_proj"}


def test_masks_train_the_tower(clip: CLIP) -> None:
    visual = clip.visual
    images, masks = torch.randn(1, 3, 64, 64), torch.rand(1, 4, 8, 8)
    visual.zero_grad()
    region_embeddings(visual, images, masks, start_block=2).square().sum().backward()
    gradients = dict(visual.named_parameters())
    for name in tuned_names(visual):
        gradient = gradients[name].grad
        assert gradient is not None
        assert bool(torch.isfinite(gradient).all())
    visual.zero_grad()


# ---- ResNets elsewhere ----


def test_a_resnet_is_loaded_and_systems_of_patches_refuse_it(tmp_path: object) -> None:
    clip = tower_of("resnet")
    again = load_clip(save_clip(clip, str(tmp_path)))
    assert again.fingerprint() == clip.fingerprint()
    assert again.patch_size == 32
    with pytest.raises(LexisegError, match="has no patches; choose a ViT"):
        DenseCLIP.build(again)
    narrow = load_clip(save_clip(clip, f"{tmp_path}/half", dtype=torch.float16))
    assert narrow.visual.bn1.num_batches_tracked.dtype == torch.long
