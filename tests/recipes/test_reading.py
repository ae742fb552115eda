"""Recipes made of others: what is merged, what takes the base's place, and mistakes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lexiseg.cli import main
from lexiseg.cli.train import run_name
from lexiseg.errors import LexisegError
from lexiseg.evaluation import evaluate
from lexiseg.models import ZegCLIP
from lexiseg.recipes import SegmentationRecipe, TrainSettings, as_yaml, load_recipe, parse_recipe
from lexiseg.recipes.reading import merge
from lexiseg.regions.anchors import QueryAnchors
from lexiseg.training.prompts import read_prompts
from lexiseg.training.trainer import build_optimizer, group_parameters, identity_of, learning_rate


def write(folder: Path, name: str, **content: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_merge() -> None:
    base = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2], "g": {"kind": "one", "size": 4}}
    changes = {"b": {"c": 5}, "e": [3], "f": None, "g": {"kind": "two"}}
    assert merge(base, changes) == {"a": 1, "b": {"c": 5, "d": 3}, "e": [3], "f": None, "g": {"kind": "two"}}
    assert merge(base, {"b": None, "g": {"kind": "one", "width": 1}}) == {
        "a": 1,
        "e": [1, 2],
        "g": {"kind": "one", "size": 4, "width": 1},
    }
    assert base["b"] == {"c": 2, "d": 3}


def test_a_base(tmp_path: Path) -> None:
    flat = yaml.safe_load(as_yaml(load_recipe("tiny")))
    write(tmp_path, "first", **{**flat, "description": "first", "train": {**flat["train"], "steps": 9, "clip_norm": 1}})
    second = write(tmp_path, "second", base="first.yaml", description="second", train={"clip_norm": None})
    recipe, tiny = load_recipe(second), load_recipe("tiny")
    assert isinstance(recipe, SegmentationRecipe) and isinstance(tiny, SegmentationRecipe)
    assert (recipe.description, recipe.train.steps, recipe.train.clip_norm) == ("second", 9, None)
    assert recipe.model == tiny.model and recipe.data == tiny.data
    assert "base" not in yaml.safe_load(as_yaml(recipe)) and parse_recipe(as_yaml(recipe), "again") == recipe
    assert load_recipe(write(tmp_path, "third", base="tiny"), seed=4).train.seed == 4
    assert load_recipe(tmp_path / "third.yaml").description == ""
    assert load_recipe(str(second), ["train.steps=3"]).train.steps == 3


def test_variants(tmp_path: Path) -> None:
    rows = {"a": {"train": {"steps": 1}}, "b.5": {"base": "tiny", "model": {"options": {"num_prompts": 2}}}}
    path = write(tmp_path, "table", base="zegclip-picture-world", templates="vild", variants=rows)
    first, second = load_recipe(f"{path}:a"), load_recipe(f"{path}:b.5")
    assert isinstance(first, SegmentationRecipe) and isinstance(second, SegmentationRecipe)
    assert first.train.steps == 1 and len(first.templates) == 14 and isinstance(first.templates, list)
    assert second.model.options["num_prompts"] == 2 and second.train == load_recipe("tiny").train
    assert run_name("deop-table-4:gps-0.5-1") == "deop-table-4-gps-0.5-1" and run_name("a/my.yaml:x") == "my-x"
    assert run_name("a/my.yaml") == "my" and run_name("tiny") == "tiny"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"base": "tiny", "train": {"stepss": 3}}, "'mine.yaml' has the unknown key 'train.stepss'; did you mean"),
        ({"base": "zegclip-picture-word"}, "no recipe or file"),
        ({"base": "mine.yaml"}, "has a base of its own"),
        ({"base": "deop-table-4:mps"}, "has a base of its own, 'deop-baseline-coco-stuff'"),
        ({"base": 3}, "'base' of the recipe"),
        ({"base": "tiny", "kind": "prompts"}, "is of the kind 'prompts' and its base 'segmentation'"),
        ({"base": "tiny", "variants": {"a": {}}}, "consists of variants; name one after a colon: a"),
        ({"base": "tiny", "variants": [1]}, "'variants' of the recipe"),
        ({"base": "tiny", "variants": {"a": 1}}, "consists of variants; name one after a colon: a"),
        ({"base": "deop-table-4"}, "consists of variants"),
        ({"base": "tiny", "proposals_from": "\udce9"}, "holds a character that cannot be read"),
        ({"base": "tiny", "teacher": "x"}, "'teacher' labels pixels for self-training"),
        ({"base": "tiny", "data": {"crop": 8}}, "wrong value for 'data.crop'"),
        ({"base": "zegclip-voc2012", "data": {"top_left_crop": 32}}, "'top_left_crop' belongs to augment 'short-edge'"),
        ({"base": "deop-voc2012", "data": {"crop": 256}}, "'top_left_crop' keeps 512 pixels of a crop of 256"),
        ({"base": "prompts-voc2012", "train": {"steps": 0}}, "'train.steps' is 0"),
        ({"base": "prompts-voc2012", "model": {"prefx": 3}}, "unknown key 'model.prefx'; did you mean 'prefix'"),
        ({"base": "clip-emoji", "train": {"steps": 0}}, "'train.steps' is 0"),
    ],
)
def test_mistakes(content: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mine", **content)
    with pytest.raises(LexisegError) as caught:
        load_recipe("mine.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_lies_beside_its_recipe_whatever_its_folder_is_called(tmp_path: Path) -> None:
    (folder := tmp_path / "2026:11").mkdir()
    write(folder, "first", **yaml.safe_load(as_yaml(load_recipe("tiny"))))
    assert load_recipe(write(folder, "mine", base="first.yaml", train={"steps": 7})).train.steps == 7


@pytest.mark.parametrize("name", ["zegclip-picture-world", "shapes:mask2former"])
def test_own_data_are_cropped_to_the_size_of_the_scenes_they_replace(name: str, tmp_path: Path) -> None:
    drawn, own = load_recipe(name).data, load_recipe(name, data=tmp_path).data
    assert (own.augment, own.crop, own.label_stride) == ("light", drawn.crop or drawn.size, drawn.label_stride)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(steps=10, batch_size=1, lr=1.0, **changes)


def test_a_size_that_overflows_is_refused() -> None:
    with pytest.raises(LexisegError, match=r"'train\.batch_size': input should be at most 4294967296"):
        load_recipe("tiny", {"train.batch_size": 10**30})
    with pytest.raises(LexisegError, match="'num_prompts': input should be at most"):
        ZegCLIP.parse_options({"num_prompts": 10**17})
    with pytest.raises(LexisegError, match=r"'seen_offset': input should be at most 3\.4e\+38"):
        ZegCLIP.parse_options({"seen_offset": 1e308})


def test_layers_that_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(3, 2), nn.Sequential(nn.GroupNorm(1, 2)))
    model[0].bias.requires_grad_(False)
    rules = {"2.weight": {"lr": 0.1}}
    groups = group_parameters(model, settings(weight_decay=0.5, no_decay=("norm", "embedding"), multipliers=rules))
    assert [(group["names"], group["weight_decay"], group["initial_lr"]) for group in groups] == [
        (["0.weight"], 0.5, 1.0),
        (["1.weight", "1.bias", "3.0.weight", "3.0.bias"], 0.0, 1.0),
        (["2.weight"], 0.0, 0.1),
    ]
    assert len(group_parameters(model, settings())) == 1
    sgd = build_optimizer(groups, settings(optimizer="sgd", momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0.8
    adam = build_optimizer(groups, settings(betas=(0.7, 0.8)))
    assert isinstance(adam, torch.optim.AdamW) and adam.param_groups[0]["betas"] == (0.7, 0.8)
    anchors = QueryAnchors(8, 3, 0, 2, None, 0.0)  # whose queries are an embedding in the released code
    spared, decayed = group_parameters(anchors, settings(no_decay=("norm", "embedding")))
    assert spared["names"] == ["queries", "heatmap.norm.weight", "heatmap.norm.bias"] and decayed["weight_decay"]


def test_schedules() -> None:
    cosine = settings(schedule="cosine", min_lr=0.0, warmup="constant", warmup_steps=2, warmup_ratio=0.1)
    rates = [learning_rate(step, 1.0, cosine) for step in range(10)]
    assert rates[0] == pytest.approx(0.1) and rates[5] == pytest.approx(0.5) and rates[1] < rates[0] < rates[2]
    linear = settings(warmup_steps=4, warmup_ratio=0.0, min_lr=0.0, power=1.0)
    assert [learning_rate(step, 1.0, linear) for step in (0, 2, 4)] == pytest.approx([0.0, 0.4, 0.6])
    assert learning_rate(9, 1.0, settings(schedule="constant")) == 1.0


def test_a_run_begun_before_there_were_these_settings_can_be_resumed() -> None:
    assert not {"optimizer", "momentum", "no_decay", "warmup"} & set(identity_of(settings()))
    assert identity_of(settings(no_decay=("norm",)))["no_decay"] == ["norm"]


def test_an_initial_model_brings_its_own_proposals() -> None:
    assert load_recipe("zsseg-coco-stuff").proposals_from == "imagenet"
    recipe = load_recipe("zsseg-coco-stuff", {"initial": "zsseg-picture-world"})
    assert (recipe.initial, recipe.proposals_from) == ("zsseg-picture-world", None)


def test_a_name_too_long_for_a_file_is_one_sentence() -> None:
    long = "x" * 300
    wrong = [partial(call, long) for call in (load_recipe, read_prompts)]
    wrong += [partial(load_recipe, f"{long}:a"), partial(load_recipe, "tiny", {"proposals_from": long})]
    wrong += [partial(load_recipe, "tiny", data=long), partial(evaluate, long, "none", protocol="voc-20")]
    for call in wrong:
        with pytest.raises(LexisegError):
            call()
    assert main(["data", "verify", long]) == main(["data", "prepare", "own", long]) == main(["push", long, "a/b"]) == 2
    assert main(["train", "tiny", "--dry-run", "--set", f"model.clip={long}"]) == 2
    assert main(["evaluate", long, "--weights", "none", "--set", "a=b"]) == 2
    assert main(["data", "verify", "voc2012", long]) == 1


def test_null_takes_a_key_of_the_data_away(tmp_path: Path) -> None:
    data = {"source": "own", "root": "nowhere", "crop": 64}
    recipe = write(tmp_path, "mine", base="tiny", data=data)
    found = load_recipe(recipe, ["data.source=picture-world", "data.root=null"])
    assert isinstance(found, SegmentationRecipe) and (found.data.source, found.data.crop) == ("picture-world", 64)
    with pytest.raises(LexisegError, match=r"data.*root"):
        load_recipe(recipe, ["data.root=null"])
