"""CAT-Seg's released layout: full-size random files go through, and what does not fit is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lexiseg.clip.model import build_clip
from lexiseg.errors import LexisegError
from lexiseg.models import CATSeg
from lexiseg.weights import load_model
from lexiseg.weights.cat_seg_checkpoint import AGGREGATOR
from lexiseg.weights.convert import convert
from lexiseg.weights.filling import authors_key
from lexiseg.windows import WindowPolicy
from tests.towers import small_clip, unit_rows

KEYS = Path(__file__).parents[3] / "shared" / "methods" / "keys" / "cat-seg.txt"
BASE: dict[str, Any] = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
LARGE: dict[str, Any] = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 336, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}
SMALL = {"hidden_dim": 16, "appearance_dim": 6, "text_dim": 5, "guidance_dims": [7, 6], "layers": 1}
SMALL |= {"decoder_guidance_dims": [4, 3], "decoder_dims": [16, 16], "released": True}


def authors_state(model: CATSeg) -> dict[str, Tensor]:
    state = {str(authors_key(name, "cat-seg")): value for name, value in model.state_dict().items()}
    for index in range(model.options.layers):
        state[f"{AGGREGATOR}layers.{index}.swin_block.block_2.attn_mask"] = torch.zeros(4, 144, 144)
    return state


def listed(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released file, of which there is a list beside some checkouts."""
    part = KEYS.read_text().split(f"# model_{size}")[1].split("# model_")[0]
    found = re.findall(r"^(\S+) \(([\d, ]*)\)$", part, re.MULTILINE)
    return {name: tuple(int(side) for side in shape.split(",") if side.strip()) for name, shape in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "architecture", "tensors", "resolution"), [("base", BASE, 484, 384), ("large", LARGE, 652, 336)]
)
def test_a_full_size_checkpoint(
    size: str, architecture: dict[str, Any], tensors: int, resolution: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = CATSeg(build_clip({"model_cfg": architecture})).eval()
    state = authors_state(model)
    assert len(state) == tensors
    if KEYS.is_file():
        assert {key: tuple(value.shape) for key, value in state.items()} == listed(size)
    path = tmp_path / f"model_{size}.pth"
    torch.save({"model": state}, path)
    report = convert(path, tmp_path / "model")
    path.unlink()
    assert (report.kind, len(report.unused), report.num_parameters) == ("cat-seg", 2, model.num_parameters())
    assert any("released: false" in note for note in report.notes)
    again = cast(CATSeg, load_model(report.folder))
    assert again.window == WindowPolicy(384, 256, 640, 2560, canvas=(640, 640), whole=True)
    assert again.options.resolution == resolution and again.default_templates == ("A photo of a {} in the scene",)
    assert again.guidance_blocks == ((3, 7) if size == "base" else (7, 15))
    images, text = torch.randn(1, 3, resolution, resolution), unit_rows(3, again.clip.embed_dim)
    with torch.no_grad():
        assert torch.equal(again(images, text).logits, model(images, text).logits)


def small_file(folder: Path, change: Any = None, **options: Any) -> tuple[Path, CATSeg]:
    torch.manual_seed(0)
    model = cast(CATSeg, CATSeg.build(small_clip(quick_gelu=True), {**SMALL, **options}))
    state = authors_state(model)
    if change is not None:
        change(state)
    path = folder / "small.pth"
    torch.save({"model": state}, path)
    return path, model


def test_prompts_and_other_sizes_show_in_the_shapes(tmp_path: Path) -> None:
    path, model = small_file(tmp_path, prompt_length=2, prompt_depth=3, finetune="prompt", templates=2)
    report = convert(path, tmp_path / "model", heads=4, text_heads=2, class_names=["cat", "sky"])
    again = cast(CATSeg, load_model(report.folder))
    same = ("prompt_length", "prompt_depth", "finetune", "templates", "padding", *(key for key in SMALL))
    assert all(getattr(again.options, key) == getattr(model.options, key) for key in same)
    assert again.seen_names == ("cat", "sky")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("upsample1.weight", None, "looks like CAT-Seg but lacks upsample1.weight"),
        ("sem_seg_head.predictor.clip_model.visual.proj", None, "lacks sem_seg_head.predictor.clip_model.visual.proj"),
        (f"{AGGREGATOR}head.bias", None, rf"missing: {AGGREGATOR}head.bias"),
        ("sem_seg_head.extra", torch.ones(1), "left over: sem_seg_head.extra"),
        ("upsample2.bias", torch.ones(3), r"upsample2.bias is \(3,\) instead of \(6,\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_keys(key: str, value: Tensor | None, words: str, tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        if value is None:
            del state[key]
        else:
            state[key] = value

    path, _ = small_file(tmp_path, change)
    with pytest.raises(LexisegError, match=words):
        convert(path, tmp_path / "model", heads=4, text_heads=2)
    assert not (tmp_path / "model").exists()
