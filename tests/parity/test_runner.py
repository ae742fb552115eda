"""The golden cases: all in ``tests/golden``, and more where the whole set is beside the checkout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lexiseg.clip.text import TextEmbedder
from lexiseg.regions.crops import tight_crops
from tests.parity.case import Case, UnsupportedError, Watched, load_case
from tests.parity.clip_build import make_clip, under
from tests.parity.pictures import clip_normalised
from tests.parity.region_parts import crop_options
from tests.parity.rounding import check_gradients
from tests.parity.runner import main, run_case

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
# What of the whole set every run of the tests has the time for.
QUICK = {
    "one-stage": ("*",),
    "cat-seg": ("*",),
    "decoupled-deop": ("a_visual_*", "d_text_prompts*", "e_visual_prepending*", "f_stage1_prompt*"),
    "decoupled-maft": ("a_ipclip_*", "b_resnet_*", "c_plain_vit*", "i_text_*"),
}


def cases() -> list[Path]:
    small = sorted(GOLDEN.rglob("*.json"))
    known = {path.stem for path in small} | {"INDEX"}
    patterns = [f"{folder}/{pattern}.json" for folder, group in QUICK.items() for pattern in group]
    return small + [path for pattern in patterns for path in sorted(SHARED.glob(pattern)) if path.stem not in known]


@pytest.mark.parametrize("path", cases(), ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    case = run_case(path)
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


def test_an_expected_tensor_that_nobody_compares_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tensors = copy("clip_pos_embed_init", tmp_path)
    save_file({**tensors, "expected/moon_phase": torch.ones(2)}, tmp_path / "clip_pos_embed_init.safetensors")
    assert main([str(tmp_path), "--verbose"]) == 1
    printed = capsys.readouterr().out
    assert "problem: moon_phase: nothing of lexiseg's was compared with it" in printed
    assert printed.splitlines()[-1] == "0 passed, 1 failed"


def test_an_axis_of_length_1_may_be_missing() -> None:
    case = Case("case", {}, {"expected/cls": torch.ones(2, 3), "expected/patches": torch.ones(2, 3)})
    case.check("cls", torch.ones(2, 1, 3))
    assert case.passed
    case.check("patches", torch.ones(3, 2))
    assert case.problems == ["patches: shape (3, 2) instead of (2, 3)"]


def test_only_known_exceptions_can_be_left_out() -> None:
    tensors = {"expected/confusion": torch.ones(2), "expected/iou": torch.ones(2)}
    case = Case("case", {}, tensors)
    case.skip("confusion")
    case.skip("iou")
    case.settle()
    assert case.skipped.keys() == {"confusion"}
    assert case.problems == ["iou: nothing of lexiseg's was compared with it"]


def test_what_the_json_says_is_compared_or_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = copy("zegclip_metric_voc20", tmp_path)
    path = tmp_path / "zegclip_metric_voc20.json"
    path.write_text(json.dumps({**config, "moon": {"phase": 3}}))
    assert main([str(tmp_path)]) == 0
    assert "JSON not compared: moon/phase\n" in capsys.readouterr().out
    returned = config["returned_summary"]
    assert isinstance(returned, dict)
    for change, words in (
        ({"returned_summary": {**returned, "mAcc": 0.5}}, "returned mAcc"),
        ({"nan_iou_classes": [4]}, "nan_iou_classes"),
        ({"zero_label_but_predicted": [4]}, "zero_label_but_predicted"),
        ({"num_classes": 21}, "num"),
    ):
        path.write_text(json.dumps({**config, **change}))
        assert any(words in problem for problem in run_case(path).problems)


def test_a_tensor_that_the_json_lists_and_that_got_lost_fails(tmp_path: Path) -> None:
    _, tensors = copy("zegclip_metric_voc20", tmp_path)
    kept = {key: value for key, value in tensors.items() if key != "expected/IoU"}
    save_file(kept, tmp_path / "zegclip_metric_voc20.safetensors")
    assert "expected/IoU" in run_case(tmp_path / "zegclip_metric_voc20.json").problems[0]


def test_a_case_that_compares_nothing_fails(tmp_path: Path) -> None:
    config, tensors = copy("clip_pos_embed_init", tmp_path)
    kept = {key: value for key, value in tensors.items() if not key.startswith("expected/")}
    save_file(kept, tmp_path / "clip_pos_embed_init.safetensors")
    (tmp_path / "clip_pos_embed_init.json").write_text(json.dumps({**config, "tensors": {}}))
    case = run_case(tmp_path / "clip_pos_embed_init.json")
    assert not case.passed
    assert case.problems == ["nothing in it was compared"]


def test_reading_is_remembered_by_path() -> None:
    read: set[str] = set()
    config = Watched({"a": 1, "b": {"c": 2, "d": {}}, "e": [3]}, read)
    assert list(config.paths()) == ["a", "b/c", "b/d", "e"]
    _ = config["b"]
    assert read == set()
    assert {**config["b"]} == {"c": 2, "d": {}} and config.get("a") == 1
    assert read == {"a", "b/c", "b/d"}


def save_case(folder: Path, name: str, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    """Write a case of other sizes than the given ones; what its JSON lists no longer holds."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    path = folder / f"{name}.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "tensors"}))
    return path


def test_crops_may_be_stored_at_other_places(tmp_path: Path) -> None:
    config, tensors = copy("e_merge_zsseg_a", tmp_path)
    image, masks = clip_normalised(tensors["input/image"]), tensors["input/mask_probs"]
    black = clip_normalised(torch.zeros(3, 1, 1)).flatten()
    size = 160
    for key in [key for key in tensors if "/crops_" in key or "/full_crop" in key]:
        _, mode, what = key.split("/")
        options = crop_options(mode)
        crops = tight_crops(image, [masks], options, size=size, black=black)
        tensors[key] = {
            "crops_sub": lambda x: x[..., 2::9, 1::5],
            "crops_mean": lambda x: x.mean(dim=(2, 3)),
            "crops_std": lambda x: x.std(dim=(2, 3)),
            "full_crop_1": lambda x: x[1][None, :, ::3, ::3],
        }[what](crops.images)
    config |= {"out": size, "sub": "crops stored as [:, :, 2::9, 1::5] plus one full crop"}
    case = run_case(save_case(tmp_path, "e_merge_zsseg_a", config, tensors))
    assert case.passed, case.problems
    config["sub"] = "every third"
    assert not run_case(save_case(tmp_path, "e_merge_zsseg_a", config, tensors)).passed


@pytest.mark.parametrize("step", [1, 3, 7, 13, 20])
def test_scores_may_be_stored_at_any_step(tmp_path: Path, step: int) -> None:
    config, tensors = copy("f_ensemble_a", tmp_path)
    opinion = tensors["input/class_logits"].softmax(dim=-1)[:, :-1]
    pixels = torch.einsum("nc,nhw->chw", opinion, tensors["input/mask_logits"].sigmoid())
    kept = {key: value for key, value in tensors.items() if key.startswith("input/") or key == "expected/valid"}
    # At large steps several have this size: values tell which it is.
    kept["expected/proposal_only/sem_seg"] = pixels[:, ::step, ::step]
    case = run_case(save_case(tmp_path, "f_ensemble_a", {**config, "lambdas": []}, kept))
    assert case.passed, case.problems
    kept["expected/proposal_only/sem_seg"] = 1.001 * pixels[:, ::step, ::step]
    assert not run_case(save_case(tmp_path, "f_ensemble_a", {**config, "lambdas": []}, kept)).passed


def test_template_sets_may_have_any_name(tmp_path: Path) -> None:
    config, tensors = copy("i_text_zegformer_a", tmp_path)
    templates = config["templates"]
    assert isinstance(templates, dict)
    templates = {"clip_side": templates["clip_side"], "pictures": ["a picture of a {}."]}
    params = load_case(tmp_path / "i_text_zegformer_a.json").params()
    clip = make_clip(under(params, "clip_model."), text_heads=int(str(config["text_heads"])))
    kept = {key: value for key, value in tensors.items() if "single/" not in key and "imagenet_select/" not in key}
    for part, suffix in (("seen", ""), ("all", "_test")):
        names = config[part]
        assert isinstance(names, list)
        groups = [name.split(", ") for name in names]
        found = TextEmbedder(clip).embed_joined(groups, templates["pictures"])
        kept[f"expected/pictures/text_features{suffix}"] = found.detach()
    path = save_case(tmp_path, "i_text_zegformer_a", {**config, "templates": templates}, kept)
    case = run_case(path)
    assert case.passed, case.problems
    templates["pictures"] = ["a picture of the {}."]
    assert not run_case(save_case(tmp_path, "i_text_zegformer_a", {**config, "templates": templates}, kept)).passed


def test_crop_modes_are_read_off_their_names() -> None:
    assert crop_options("expand12_thr07").model_dump(include={"expand", "threshold"}) == {
        "expand": 1.2,
        "threshold": 0.7,
    }
    assert crop_options("fill_zero_matting").fill == "zero" and crop_options("fill_zero_matting").matting
    with pytest.raises(UnsupportedError, match="no crop mode 'moonlit'"):
        crop_options("moonlit")


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


def test_gradients_may_round_otherwise_if_they_are_the_authors_in_double_precision() -> None:
    exact = {"one": torch.tensor([1.0, 2.0]).double(), "two": torch.tensor([3.0]).double()}
    ours = {key: value.float() * 1.01 for key, value in exact.items()}  # as if a ReLU let more through
    expected = {f"expected/grad/{key}": value.float() for key, value in exact.items()}
    right, wrong = Case("x", {}, dict(expected)), Case("x", {}, dict(expected))
    check_gradients(right, ours, lambda seed: exact)
    assert right.passed
    check_gradients(wrong, ours, lambda seed: {key: value.double() for key, value in ours.items()})
    assert not wrong.passed
