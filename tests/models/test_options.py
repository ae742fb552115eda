"""Options of the systems: mistakes are one sentence that names them."""

from __future__ import annotations

from typing import Any

import pytest

from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, CATSeg, CATSegOptions, ZegCLIP
from lexiseg.recipes import TrainSettings
from tests.towers import small_clip


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("zegclip", {"seen_offset": float("nan")}, "'zegclip' has a wrong value for 'seen_offset': .* finite"),
        ("zegclip", {"mask_size": 0}, "'mask_size'"),
        ("zegclip", {"short_side": -5}, "'short_side'"),
        ("zegclip", {"window_size": 0}, "'window_size'"),
        ("zegclip", {"window_size": 8, "window_stride": -1}, "'window_stride'"),
        ("zegclip", {"window_size": 8, "window_stride": 9}, "'zegclip' contradicts itself: a window_stride of 9"),
        ("zegclip", {"mask_weight": -5}, "'mask_weight'"),
        ("cascade-clip", {"std": [0, 0, 0]}, r"'std\.0'"),
        ("cascade-clip", {"mean": [0.5, 0.5]}, r"'mean\.2'"),
        ("cascade-clip", {"aggregation": "mean"}, "'aggregation': input should be 'nga'"),
        ("dense-clip", {"window_size": 8, "window_stride": 9}, "contradicts itself"),
        ("dense-clip", {"method": ["naclip"]}, "'method'"),
        ("deop", {"std": [1, 0, 1]}, r"'std\.1'"),
        ("deop", {"short_side": 0}, "'short_side'"),
        ("deop", {"long_side": 0}, "'long_side'"),
        ("deop", {"alpha": [0.5, 3]}, r"'alpha\.1': .* less than or equal to 1"),
        ("deop", {"dice_weight": -1}, "'dice_weight'"),
        ("zsseg", {"proposals": {"kind": "sam", "foo": 1}}, r"unknown option 'proposals\.foo'"),
        ("zsseg", {"criterion": {"mask_weight": -1}}, r"'criterion\.mask_weight'"),
        ("zsseg", {"ensemble": {"weight": float("nan")}}, r"'ensemble\.weight': .* finite"),
    ],
)
def test_values_that_make_no_sense(system: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LexisegError, match=words):
        SYSTEMS[system].parse_options(options)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "clip_norm", "min_lr"])
def test_numbers_of_the_loop_are_finite(key: str) -> None:
    with pytest.raises(ValueError, match="finite"):
        TrainSettings.model_validate({"steps": 1, "batch_size": 1, "lr": 1.0, key: float("inf")})


def test_the_learning_rate_does_not_rise_to_its_smallest_value() -> None:
    numbers = {"steps": 1, "batch_size": 1, "lr": 1e-7}
    with pytest.raises(ValueError, match=r"would rise from 'lr', 1e-07, to 'min_lr', 1e-06; lower that"):
        TrainSettings.model_validate(numbers)
    TrainSettings.model_validate({**numbers, "schedule": "constant"})


def test_the_resize_before_the_windows_is_an_option() -> None:
    assert ZegCLIP.build(small_clip()).window.antialias
    assert not ZegCLIP.build(small_clip(), {"antialias": False}).window.antialias


def test_a_long_side_limits_the_resize_of_the_short_one_alone() -> None:
    """It must not stand in the description of an exported model, where it is refused without the other."""
    model = CATSeg(small_clip(), CATSegOptions(long_side=100))
    assert model.window.long_side is None
    assert CATSegOptions(long_side=100, short_side=50).window().long_side == 100
