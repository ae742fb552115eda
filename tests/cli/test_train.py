"""``lexiseg train``, ``evaluate`` and ``convert``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lexiseg.models import CascadeCLIPOptions
from lexiseg.recipes import SegmentationRecipe, load_recipe
from lexiseg.training.init import system_of
from tests.cli.calling import WORDS, Call, assert_sentence


def write_recipe(path: Path, clip: Path, **changes: object) -> Path:
    recipe = {
        "kind": "segmentation",
        "model": {
            "system": "zegclip",
            "clip": str(clip),
            "options": {"num_prompts": 2, "decoder_layers": 1, "decoder_heads": 2},
        },
        "data": {"source": "picture-world", "size": 32, "length": 4, "val_size": 32, "val_length": 2},
        "train": {"steps": 2, "batch_size": 2, "lr": 0.001, "workers": 0, "checkpoint_every": 1},
        **changes,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_train_evaluate_predict(call: Call, tiny_clip: Path, picture: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", tiny_clip)
    options = ("--device", "cpu", "--no-tensorboard", "--set", "train.log_every=1")
    code, out, err = call("train", recipe, *options)
    assert code == 0, err
    assert f"wrote {Path('runs') / 'small' / 'model'}" in out
    assert_sentence(*call("train", recipe, *options), "--resume")
    assert call("train", recipe, *options, "--resume", "--json")[0] == 0

    code, out, err = call("evaluate", recipe, "--weights", "runs/small", "-o", "report", "--device", "cpu")
    assert code == 0, err
    assert "hIoU" in out and "wrote report" in out.replace("\\", "/")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["protocol"]["num_pictures"] == 2
    code, out, _ = call("evaluate", "picture-world", "-w", "runs/small", "--size", 32, "--limit", 1, "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["miou"] is not None
    assert call("predict", picture, WORDS, "-m", "runs/small/model", "--save", "json")[0] == 0


def test_train_mistakes(call: Call, tiny_clip: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "wrong.yaml", tiny_clip, lerning_rate=1)
    assert_sentence(*call("train", recipe), "wrong.yaml", "lerning_rate")
    recipe = write_recipe(tmp_path / "right.yaml", tiny_clip)
    assert_sentence(*call("train", recipe, "--set", "train.stebs=3"), "train.stebs")
    assert_sentence(*call("train", recipe, "--set", "train.steps=many"), "train.steps")
    assert_sentence(*call("train", recipe, "--set", "nothing"), "nothing")
    assert_sentence(*call("train", recipe, "-o", recipe / "run"), "right.yaml")
    assert_sentence(*call("train", "no-such-recipe"), "no-such-recipe")
    assert_sentence(*call("train"), "recipe")
    assert_sentence(*call("train", recipe, "--device", "cuda:7"), "--device")
    assert not (tmp_path / "runs").exists()


def test_dry_run_and_until(call: Call, tiny_clip: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", tiny_clip)
    code, out, _ = call("train", recipe, "--dry-run")
    assert code == 0 and "trainable" in out and "picture-world" in out and not (tmp_path / "runs").exists()
    code, out, _ = call("train", recipe, "--dry-run", "--json", "--set", "train.steps=7")
    found = json.loads(out)
    assert found["system"] == "zegclip" and found["train"]["steps"] == 7 and len(found["unseen"]) == 17
    code, _, _ = call("train", recipe, "-o", "half", "--stop-after", 1, "--device", "cpu", "--no-tensorboard")
    assert code == 0 and json.loads((Path("half") / "model" / "config.json").read_text())["metadata"]["steps"] == 1
    assert_sentence(*call("train", recipe, "-o", "new", "--stop-after", 5, "--device", "cpu"), "2 steps", "5")
    assert_sentence(*call("train", recipe, "--dry-run", "--set", "model.clip=nonsense"), "nonsense")


@pytest.mark.parametrize("groups", ["{6-8},{9-11},{12}", "{12}", "{6-8}", '"{9-11},{12}"', "[[6, 7], [12]]"])
def test_groups_of_blocks_can_be_typed(groups: str) -> None:
    recipe = load_recipe("cascade-clip-voc2012", [f"model.options.groups={groups}"])
    assert isinstance(recipe, SegmentationRecipe)
    options = system_of(recipe)[1]
    assert isinstance(options, CascadeCLIPOptions)
    assert options.groups == ("{6-7},{12}" if groups[0] == "[" else groups.strip('"'))


@pytest.mark.parametrize("value", ["[1", "{6-8},{12}", "'"])
def test_what_is_no_yaml_is_text_and_judged_as_such(call: Call, value: str) -> None:
    assert_sentence(*call("train", "tiny", "--dry-run", "--set", f"train.lr={value}"), "train.lr", "number")


def test_train_lists_recipes(call: Call) -> None:
    code, out, _ = call("train", "--list", "--json")
    assert code == 0
    entries = json.loads(out)
    assert "tiny" in {entry["name"] for entry in entries}
    lines = call("train", "--list")[1].splitlines()  # one a recipe, whatever the terminal's width
    assert [line.split(maxsplit=1) for line in lines] == [list(entry.values()) for entry in entries]


def test_evaluate_mistakes(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    said = "neither a data folder nor a recipe"
    assert_sentence(*call("evaluate", "no/such/recipe", "-w", tiny_model), said, "'no/such/recipe'", "train --list")
    (tmp_path / "photos").mkdir()
    assert_sentence(*call("evaluate", "phtos", "-w", tiny_model), said, "did you mean 'photos'")
    assert_sentence(*call("evaluate", "tinny", "-w", tiny_model), said, "did you mean 'tiny'")
    assert_sentence(*call("evaluate", "a" * 5000, "-w", tiny_model), said)
    assert_sentence(*call("evaluate", "picture-world", "-w", tiny_model, "--split", "train"), "test split")
    assert_sentence(*call("evaluate", "picture-world"), "--weights")
    assert_sentence(*call("evaluate", "tiny", "-w", tiny_model, "--size", 32), "--size")
    assert_sentence(*call("evaluate", "tiny", "-w", tiny_model, "--split", "train"), "--split")
    assert_sentence(*call("evaluate", "clip-emoji", "-w", tiny_model), "captions")
    (tmp_path / "empty").mkdir()
    assert_sentence(*call("evaluate", "empty", "-w", tiny_model), "no folder of pictures")
    call("data", "world", "void", "--train", 1, "--val", 1, "--size", 32)
    for mask in (tmp_path / "void" / "SegmentationClass").iterdir():
        Image.new("L", (32, 32), 255).save(mask)
    # Metrics of nothing would be dashes, and the exit code of a success.
    assert_sentence(*call("evaluate", "void", "-w", tiny_model, "-o", "report"), "no pixel of any class", "'val'")
    assert not (tmp_path / "report" / "report.json").exists()
    assert not (tmp_path / "out").exists()


def test_convert(call: Call, tiny_clip: Path, picture: Path, tmp_path: Path) -> None:
    state = load_file(tiny_clip / "open_clip_model.safetensors")
    torch.save(state, tmp_path / "clip.pt")
    code, out, err = call("convert", "clip.pt", "-o", "clip", "--gelu", "--half", "--transductive")
    assert code == 0, err
    assert "--transductive has no effect" in err
    assert "wrote clip" in out and "--model naclip/clip" in out
    assert load_file("clip/open_clip_model.safetensors")["text_projection"].dtype == torch.float16
    assert call("predict", picture, WORDS, "-m", "naclip/clip", "--save", "json")[0] == 0

    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    torch.save({**state, name: torch.zeros_like(state[name])}, tmp_path / "clip.pt")
    assert f"1 weight, {name} first" in call("convert", "clip.pt", "-o", "clip", "--gelu")[2]
    torch.save({key: value * 0 if "visual" in key else value for key, value in state.items()}, tmp_path / "zero.pt")
    assert_sentence(*call("convert", "zero.pt", "-o", "other"), "weights of 'visual' in 'zero.pt' are zero", "again")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    assert_sentence(*call("convert", "garbage.pth", "-o", "other"), "garbage.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert_sentence(*call("convert", "other.pth", "-o", "other"), "other.pth")
    assert_sentence(*call("convert", "nowhere.pth", "-o", "other"), "nowhere.pth")
    assert not (tmp_path / "other").exists()
