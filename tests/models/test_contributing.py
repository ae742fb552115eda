"""The system that CONTRIBUTING.md walks through is one: it passes the tester, and its golden runner runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import lexiseg.models
from lexiseg.models import SYSTEMS, SegmentationModel
from tests.parity.case import Case
from tests.system_tester import DIM, SystemTester
from tests.towers import small_clip, unit_rows

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The system, its tester and its golden runner.
BLOCKS = [
    re.sub("^   ", "", block, flags=re.MULTILINE)
    for block in re.findall(r"^ *```python\n(.*?)^ *```", TEXT, re.DOTALL | re.M)
]


def names_of(block: str) -> dict[str, Any]:
    """What is defined in a block of the page."""
    names: dict[str, Any] = {"__name__": "lexiseg.models.linear_probe"}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return names


class TestLinearProbe(SystemTester):
    system = "linear-probe"
    options: ClassVar = {"scale": 5.0}

    @pytest.fixture(autouse=True)
    def _known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = names_of(BLOCKS[0])
        monkeypatch.setitem(SYSTEMS, "linear-probe", names["LinearProbe"])
        for name in ("LinearProbe", "LinearProbeOptions"):
            monkeypatch.setattr(lexiseg.models, name, names[name], raising=False)

    def test_the_golden_runner_compares_everything(self) -> None:
        model: Any = SYSTEMS["linear-probe"].build(small_clip(quick_gelu=True), {"scale": 5.0}).eval()
        torch.nn.init.normal_(model.probe.weight)
        image, text = self.images(), unit_rows(3, DIM)
        with torch.no_grad():
            features = model.encode_images(image)
            expected = {"patches": features.values["patches"], "logits": model.grid_logits(features, text)}
        tensors = {f"param/{name.replace('clip.model.', 'clip.')}": value for name, value in model.state_dict().items()}
        tensors |= {"input/image": image, "input/text": text}
        tensors |= {f"expected/{name}": value for name, value in expected.items()}
        case = Case("linear_probe", {"heads": 4, "image_size": 32, "scale": 5.0}, tensors)
        names_of(BLOCKS[2])["compare"](case)
        assert case.touched == {"expected/patches", "expected/logits"} and not case.problems

    def test_a_failed_check_shows_what_it_compared(self, model: SegmentationModel) -> None:
        model.requires_grad_(True)
        with pytest.raises(AssertionError, match=r"clip\.model\.visual"):
            self.test_what_trains(model)

    def test_features_must_have_the_size_of_the_images(self, model: SegmentationModel) -> None:
        encode = model.encode_images
        model.encode_images = lambda images: replace(encode(images), size=(1, 2))  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match=r"assert .* == "):
            self.test_any_resolution_and_aspect(model, (24, 64))
