"""The authors' checkpoint of DeOP: found, converted, refused; a full-size file in the published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lexiseg.clip.model import build_clip
from lexiseg.errors import LexisegError
from lexiseg.models import DeOP
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.deop import DeOPOptions
from lexiseg.weights import load_model
from lexiseg.weights.convert import convert
from lexiseg.weights.decoupled_checkpoints import read_parts
from lexiseg.weights.detectron_checkpoint import generator_source, recognise_detectron
from lexiseg.weights.filling import authors_key
from tests.parity.case import load_case
from tests.references import put_tensors
from tests.system_tester import SystemTester
from tests.towers import unit_rows

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """The authors' tensors of a small DeOP."""
    return load_case(GOLDEN / "g_e2e_train.json").params()


def test_a_small_checkpoint_becomes_a_folder(small: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": small, "iteration": 7}, tmp_path / "model_final.pth")
    report = convert(tmp_path / "model_final.pth", tmp_path / "out", class_names=["cat", "road"], heads=4, text_heads=4)
    assert report.kind == "deop" and report.num_tensors == 492
    assert set(report.unused) >= {"decoder.norm.weight", "criterion.empty_weight"}
    model = load_model(tmp_path / "out")
    assert isinstance(model, DeOP)
    assert model.options.severance == "released"
    assert model.options.prompt_blocks == (1, 2)
    assert model.seen_names == ("cat", "road")
    for name, value in model.state_dict().items():
        key = authors_key(name, "deop")
        if key is not None:
            assert torch.equal(value, small[key].float()), name
    with torch.no_grad():
        scores = model(SystemTester.images(40, 48, 1), unit_rows(3, 48))
    assert torch.isfinite(scores.dense((40, 48))).all()


def test_what_does_not_fit_is_named(small: dict[str, Tensor]) -> None:
    without = {key: value for key, value in small.items() if key != "decoder.outlayer.norm1.weight"}
    with pytest.raises(LexisegError, match=r"missing: decoder.outlayer.norm1.weight"):
        read_parts(without, heads=4, text_heads=4)
    with pytest.raises(LexisegError, match=r"left over: decoder.moon"):
        read_parts({**small, "decoder.moon": torch.ones(1)}, heads=4, text_heads=4)
    with pytest.raises(LexisegError, match=r"looks like DeOP, does not fit; left over: sun"):
        read_parts({**small, "sun": torch.ones(1)}, heads=4, text_heads=4)
    wrong = {**small, "query_embedding.weight": torch.ones(100, 7)}
    with pytest.raises(LexisegError, match=r"query_embedding.weight is \(100, 7\) instead of \(100, 48\)"):
        read_parts(wrong, heads=4, text_heads=4)


def authors_tensors(model: DecoupledModel) -> dict[str, Tensor]:
    """A model's tensors by the authors' keys, with those that their files have beside."""
    own = {
        str(authors_key(name, "deop")): value for name, value in model.state_dict().items() if "generator." not in name
    }
    source = generator_source(model.options.proposals)  # type: ignore[arg-type]
    found = own | put_tensors(model.generator.state_dict(), source)
    width = found["query_embedding.weight"].shape[1]
    text_width = found["clip_adapter.clip_model.ln_final.weight"].shape[0]
    found |= {f"decoder.norm.{kind}": torch.randn(width) for kind in ("weight", "bias")}
    found |= {
        f"clip_adapter.prompt_learner.{kind}_signal": torch.randn(1, text_width)
        for kind in ("start", "dot", "end", "pad")
    }
    return {**found, "criterion.empty_weight": torch.ones(157)}


@pytest.mark.slow
def test_a_full_size_checkpoint_makes_the_round_trip(tmp_path: Path) -> None:
    architecture = {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    }
    clip = build_clip({"model_cfg": architecture})
    model = DeOP(clip, DeOPOptions(heatmaps="query-released")).eval()
    assert model.num_parameters() == pytest.approx(218.4e6, rel=0.01)
    assert model.num_parameters(trainable=True) == pytest.approx(7.7e6, rel=0.01)
    state = authors_tensors(model)
    assert len(state) == 1020
    assert recognise_detectron(state) == "deop"
    assert state["clip_adapter.clip_model.visual.learned_position"].shape == (577, 768)
    assert state["decoder.outlayer.multihead_attn_my.in_proj_weight"].shape == (1536, 512)
    torch.save({"model": state}, tmp_path / "model_final.pth")
    report = convert(tmp_path / "model_final.pth", tmp_path / "out")
    assert report.num_tensors == 1020
    again = load_model(tmp_path / "out")
    ours = model.state_dict()
    assert again.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in again.state_dict().items())
