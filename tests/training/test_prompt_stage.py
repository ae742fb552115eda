"""The recipe kind "prompts": what it learns from, that it can be resumed, and what a dry run says of it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lexiseg.clip.model import save_clip
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.transforms import random_short_edge, short_edge_pipeline, top_left
from lexiseg.recipes import load_recipe, parse_recipe
from lexiseg.training.dry_run import dry_run
from lexiseg.training.prompts import PromptTask, read_prompts
from lexiseg.training.run import build_task
from tests.miniatures import voc2012
from tests.towers import small_clip
from tests.training.runs import quietly, same


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    voc2012(root)
    save_clip(small_clip(), root / "clip")
    return root


def recipe_of(home: Path, **changes: Any) -> Any:
    values = {
        "kind": "prompts",
        "model": {"clip": str(home / "clip"), "prefix": 2, "suffix": 1, "task": 2, "per_class": 2, "size": 32},
        "data": {"source": "voc2012", "root": str(home), "train": "train"},
        "train": {
            **{"steps": 4, "batch_size": 3, "optimizer": "sgd", "lr": 0.02, "schedule": "cosine", "min_lr": 0.0},
            **{"workers": 0, "checkpoint_every": 2, "weight_decay": 5e-4, "clip_norm": 0.01},
        },
        **changes,
    }
    return parse_recipe(yaml.safe_dump(values), "test.yaml")


def test_a_resumed_run_learns_the_same(home: Path, tmp_path: Path) -> None:
    recipe = recipe_of(home)
    whole, _ = read_prompts(quietly(recipe, tmp_path / "whole"))
    quietly(recipe, tmp_path / "parts", stop_after=2)
    folder = quietly(recipe, tmp_path / "parts", resume=True)
    parts, card = read_prompts(folder)
    assert same(parts, whole)
    assert card["pictures"] > 0 and read_prompts(tmp_path / "parts")[1] == card
    (folder / "prompts.json").unlink()
    assert read_prompts(folder)[1] == {}
    shutil.copytree(home / "clip", tmp_path / "clip")  # another path to the same towers
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"clip": str(tmp_path / "clip")})})
    assert same(read_prompts(quietly(moved, tmp_path / "parts", resume=True))[0], whole)
    assert yaml.safe_load((tmp_path / "parts" / "recipe.yaml").read_text())["kind"] == "prompts"


def test_which_classes_are_learned_from(home: Path) -> None:
    seen, every = build_task(recipe_of(home)), build_task(recipe_of(home, setting="supervised"))
    assert isinstance(seen, PromptTask) and isinstance(every, PromptTask)
    assert len(seen.names) == 15 and "sheep" not in seen.names and len(every.names) == 20
    assert torch.isfinite(seen.losses(seen.batch(0))["loss"])


def test_labels_are_read_without_pictures(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data_set("voc2012", home, "train")
    assert torch.equal(data.label(0), data[0].label)
    recipe = recipe_of(home)
    monkeypatch.setattr("lexiseg.data.sets.dataset.read_pixels", None)
    assert isinstance(build_task(recipe), PromptTask)


def test_dry_run(home: Path) -> None:
    train = {**recipe_of(home).train.model_dump(), "accumulate": 3}
    shown = dict(dry_run(recipe_of(home, train=train)).rows())
    assert shown["trainable"] == f"{5 * 16}" and shown["classes with masks"].startswith("15: ")
    assert shown["classes with masks"].count(",") == 8 and shown["classes with masks"].endswith(", ...")
    assert shown["steps"] == "4, batches of 9 on one process"
    assert "; rate 0.02 at the first step, 0.00293 at the last" in shown["schedule"]
    assert shown["SGD"].startswith("peak rate 0.02, decay 0.0005, momentum 0.9")
    released = load_recipe("prompts-freeseg-voc2012").model_copy(update={"model": recipe_of(home).model})
    assert "half a cosine to 0" in dict(dry_run(released).rows())["schedule"]


def test_the_decoupled_papers_pipeline() -> None:
    image, label = torch.randint(0, 255, (3, 40, 60), dtype=torch.uint8), torch.zeros(40, 60, dtype=torch.long)
    rng = np.random.default_rng
    sizes = {
        tuple(random_short_edge(image, label, rng(seed), short_edge_length=(20, 30), max_size=36)[0].shape)
        for seed in range(9)
    }
    assert sizes == {(3, 20, 30), (3, 24, 36)}  # the longer side stops the second one
    assert top_left(image, label, rng(0), size=8)[0].shape == (3, 8, 8)
    steps = short_edge_pipeline(
        (0.0,) * 3, (1.0,) * 3, crop=64, short_edge_length=[32], top_left_crop=48, pad_label=255
    )
    cropped, labels = steps(image, label, rng(1))
    assert cropped.shape == (3, 48, 48) and labels.shape == (48, 48)
    assert set(labels.unique().tolist()) == {0, 255}
    assert bool((cropped[:, labels == 255] == 128 / 255).all())  # grey, not black
    defaults = short_edge_pipeline((0.0,) * 3, (1.0,) * 3, crop=640).steps[0]
    assert isinstance(defaults, partial) and defaults.keywords["short_edge_length"] == tuple(range(320, 961, 64))
