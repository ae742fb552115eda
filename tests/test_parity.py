"""The golden cases: the small ones that lie in ``tests/golden``, and the whole set where it is beside the checkout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import main, run_case
from tests.parity_case import Case

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "one-stage"
SUPPORTED = ("zegclip_*", "cascade_*", "spt_*", "clip_*", "lr_schedule", "resize_shapes")


def names(folder: Path) -> list[str]:
    return sorted({path.stem for pattern in SUPPORTED for path in folder.glob(f"{pattern}.json")})


@pytest.mark.parametrize("name", names(GOLDEN))
def test_small_cases(name: str) -> None:
    case = run_case(GOLDEN / f"{name}.json")
    assert case.passed, case.problems


@pytest.mark.skipif(not SHARED.is_dir(), reason="the whole golden set is not beside this checkout")
@pytest.mark.parametrize("name", sorted(set(names(SHARED)) - set(names(GOLDEN))))
def test_shared_cases(name: str) -> None:
    case = run_case(SHARED / f"{name}.json")
    assert case.passed, case.problems


def copy(name: str, folder: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    shutil.copy(GOLDEN / f"{name}.json", folder)
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    save_file(tensors, folder / f"{name}.safetensors")
    return json.loads((folder / f"{name}.json").read_text()), tensors


def test_a_wrong_tensor_fails_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tensors = copy("zegclip_loss_only", tmp_path)
    tensors["expected/grad_pred_masks"][0, 0, 0, 0] += 0.01 * tensors["expected/grad_pred_masks"].abs().max()
    save_file(tensors, tmp_path / "zegclip_loss_only.safetensors")
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  zegclip_loss_only" in printed
    assert "grad_pred_masks: relative error" in printed
    assert printed.splitlines()[-1] == "0 passed, 1 failed"


def test_what_is_not_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tensors = copy("clip_pos_embed_init", tmp_path)
    save_file({**tensors, "expected/moon_phase": torch.ones(2)}, tmp_path / "clip_pos_embed_init.safetensors")
    assert main([str(tmp_path), "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert "not compared: moon_phase" in printed
    assert printed.splitlines()[-1] == "1 passed, 0 failed"


def test_a_case_that_compares_nothing_fails(tmp_path: Path) -> None:
    _, tensors = copy("clip_pos_embed_init", tmp_path)
    kept = {key: value for key, value in tensors.items() if not key.startswith("expected/")}
    save_file(kept, tmp_path / "clip_pos_embed_init.safetensors")
    case = run_case(tmp_path / "clip_pos_embed_init.json")
    assert not case.passed
    assert case.problems == ["nothing in it was compared"]


def test_unknown_kinds_systems_and_missing_tensors_fail_with_a_sentence(tmp_path: Path) -> None:
    for content, words in (
        ({"moon_phase": 3}, "an unnamed system are not supported yet"),
        ({"repo": "ZegCLIP", "colour": 1}, "not known"),
        ({"repo": "ZegCLIP", "grid_from": 2, "grid_to": 3, "tensors": {"input/x": [[1], "float32"]}}, "is missing"),
        ({"repo": "ZegCLIP", "grid_from": 2, "grid_to": 3}, "has no input/positional_embedding"),
    ):
        (tmp_path / "case.json").write_text(json.dumps(content))
        case = run_case(tmp_path / "case.json")
        assert not case.passed
        assert words in case.problems[0]


def test_no_case_at_all_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--only", "zegclip_*"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 0 failed"


def test_labels_may_differ_at_ties_only() -> None:
    scores = torch.tensor([[[[0.5, 0.5]], [[0.5, 0.7]]]])
    case = Case("case", {}, {"expected/argmax": torch.tensor([[[0, 1]]], dtype=torch.uint8)})
    case.check_labels("argmax", torch.tensor([[[1, 1]]]), scores)
    assert case.passed
    assert "1 labels differ at ties" in case.notes[0]
    case.check_labels("argmax", torch.tensor([[[0, 0]]]), scores)
    assert not case.passed


def test_not_a_number_must_be_at_the_same_places() -> None:
    nan = float("nan")
    case = Case("case", {}, {"expected/iou": torch.tensor([nan, 1.0])})
    case.check("iou", torch.tensor([nan, 1.0]))
    assert case.passed
    case.check("iou", torch.tensor([1.0, nan]))
    assert not case.passed
