"""The papers' pipeline: golden sizes, ranges, determinism, and that picture and label stay together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import adjust_hue
from torchvision.tv_tensors import Image

from lexiseg.data.transforms import (
    distort_colours,
    light_pipeline,
    normalise_bytes,
    pad_to,
    paper_pipeline,
    random_crop,
    random_flip,
    random_resize,
    resize,
    scale_saturation,
    train_size,
    turn_hue,
)
from lexiseg.windows import working_size

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "resize_shapes.json").read_text())
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample(height=40, width=60, seed=0):
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
    return image, torch.from_numpy(rng.integers(0, 5, (height, width)))


def test_golden_sizes():
    for height, width, *expected in GOLDEN["test"]:
        if max(height, width) <= 4 * min(height, width):  # longer ones stay smaller than in the released code
            assert working_size(height, width, 512) == tuple(expected)
    for height, width, ratio, *expected in GOLDEN["train"]:
        assert train_size(height, width, ratio) == tuple(expected)


def test_golden_normalisation():
    mean, std = GOLDEN["normalisation"]["mean"], GOLDEN["normalisation"]["std"]
    image, _ = sample()
    expected = (image.double() - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std)[:, None, None]
    found, _ = normalise_bytes(image, image[0], np.random.default_rng(0), mean=MEAN, std=STD)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.5, 2.0))
def test_sizes_keep_to_their_bounds(height, width, ratio):
    new = train_size(height, width, ratio)
    assert min(new) >= 1 and max(new) <= int(2048 * ratio) + 1
    assert min(new) <= int(512 * ratio) + 1


def test_labels_are_resized_to_the_nearest_and_stay_ids():
    image, label = sample()
    label[label == 3] = 255
    _, small = resize(image, label, (17, 29))
    assert small.shape == (17, 29) and small.dtype == torch.int64
    assert set(small.unique().tolist()) <= {0, 1, 2, 4, 255}


def test_random_resize_covers_its_range():
    image, label = sample(10, 20)
    sizes = {random_resize(image, label, np.random.default_rng(seed), scale=(80, 20))[1].shape[0] for seed in range(60)}
    assert min(sizes) == 10 and max(sizes) >= 38 and len(sizes) > 15


def test_crop_cuts_the_same_window():
    image, label = sample()
    image[0] = label.to(torch.uint8)
    for seed in range(10):
        crop, cut = random_crop(image, label, np.random.default_rng(seed), size=16)
        assert crop.shape == (3, 16, 16) and torch.equal(crop[0].long(), cut)
    small, cut = random_crop(image, label, np.random.default_rng(0), size=50)
    assert small.shape == (3, 40, 50) and cut.shape == (40, 50)
    place, rng = torch.arange(9).reshape(3, 3), np.random.default_rng(0)
    cuts = [random_crop(place[None], place, rng, size=2, max_fraction=1.0)[1] for _ in range(50)]
    assert {int(cut[0, 0]) for cut in cuts} == {0, 1, 3, 4}  # each place where it fits


def test_crop_avoids_windows_of_one_class():
    label = torch.zeros(32, 200, dtype=torch.long)
    label[:, 96:104] = 1
    label[:, 104:] = 255
    image = torch.zeros(3, 32, 200, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    plain = [random_crop(image, label, rng, size=32, max_fraction=1.0)[1] for _ in range(200)]
    careful = [random_crop(image, label, rng, size=32)[1] for _ in range(200)]

    def mixed(windows):
        return sum(len(set(window.unique().tolist()) - {255}) > 1 for window in windows)

    assert mixed(careful) > 3 * mixed(plain)


def test_flip_mirrors_both():
    image, label = sample()
    flipped, mirrored = random_flip(image, label, np.random.default_rng(0), probability=1.0)
    assert torch.equal(flipped, image.flip(2)) and torch.equal(mirrored, label.flip(1))
    same, _ = random_flip(image, label, np.random.default_rng(0), probability=0.0)
    assert torch.equal(same, image)


def test_saturation_is_that_of_hsv():
    import colorsys

    image, _ = sample(6, 6)
    for factor in (0.5, 0.8, 1.0, 1.5):
        found = scale_saturation(image, factor).permute(1, 2, 0).reshape(-1, 3).tolist()
        for before, after in zip(image.permute(1, 2, 0).reshape(-1, 3).tolist(), found, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in before))
            expected = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
            assert after == pytest.approx([channel * 255 for channel in expected], abs=0.51)


def test_distortion_changes_colours_only_and_half_of_the_time_each():
    image, label = sample()
    found = [distort_colours(image, label, np.random.default_rng(seed)) for seed in range(60)]
    assert all(torch.equal(after, label) and picture.dtype == torch.uint8 for picture, after in found)
    unchanged = sum(torch.equal(picture, image) for picture, _ in found)
    assert 0 < unchanged < 15  # expected 1/16, a little more for small draws


def test_brightness_changes_by_up_to_32_and_contrast_by_half():
    black, label = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(2, 2)
    largest = max(int(distort_colours(black, label, np.random.default_rng(seed))[0].max()) for seed in range(200))
    assert 24 < largest <= 1.5 * 32


def test_turning_the_hue_is_what_torchvision_does():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), np.uint8))
    image[:, :5] = image[:1, :5]  # greys have no hue
    image[:, 5], image[:, 6] = 0, 255
    for turn in (-0.5, -0.1, 0.0, 0.05, 0.1):
        expected = adjust_hue(Image(image), turn).as_subclass(torch.Tensor)
        found = turn_hue(image, turn)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert torch.equal(turn_hue(image, 0.0), image)


def test_normalise_then_pad():
    image, label = sample(3, 4)
    rng = np.random.default_rng(0)
    picture, target = pad_to(*normalise_bytes(image, label, rng, mean=MEAN, std=STD), rng, size=6)
    assert picture.shape == (3, 6, 6) and target.shape == (6, 6)
    assert (picture[:, 3:] == 0).all() and (picture[:, :, 4:] == 0).all()
    assert (target[3:] == 255).all() and (target[:, 4:] == 255).all() and torch.equal(target[:3, :4], label)


@pytest.mark.parametrize("make", [paper_pipeline, light_pipeline])
def test_pipelines_are_pure_functions_of_the_generator(make):
    pipeline = make(MEAN, STD, crop=32)
    image, label = sample()
    state = torch.get_rng_state()
    first = [pipeline(image, label, np.random.default_rng([5, index])) for index in range(4)]
    torch.rand(3)
    again = [pipeline(image, label, np.random.default_rng([5, index])) for index in range(4)]
    for (a, b), (c, d) in zip(first, again, strict=True):
        assert a.shape == (3, 32, 32) and b.shape == (32, 32) and a.dtype == torch.float32
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(first[0][0], first[1][0])
    torch.set_rng_state(state)
