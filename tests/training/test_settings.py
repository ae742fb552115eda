"""Inductive, transductive and supervised training: which text, which labels, and where a run starts from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import lexiseg.training.init
from lexiseg.cli import main
from lexiseg.data.picture_world import FIRST, write_voc
from lexiseg.data.transforms import light_pipeline, paper_pipeline
from lexiseg.errors import LexisegError
from lexiseg.evaluation.run import run_evaluation
from lexiseg.losses.masks import pseudo_labels
from lexiseg.recipes import SegmentationRecipe, load_recipe
from lexiseg.segmenter import Segmenter
from lexiseg.training.checkpoint import find_checkpoints
from lexiseg.training.dry_run import dry_run
from lexiseg.training.init import first_stage, prompt_stage, with_stages
from lexiseg.training.run import build_task, train
from lexiseg.training.segmentation import (
    PADDING,
    UNLABELLED,
    SegmentationTask,
    masked_names,
    self_training_labels,
    training_vocabulary,
)
from lexiseg.training.trainer import Trainer
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model
from tests.recipes import texts
from tests.training.runs import OPTIONS, flat_task, quietly, recipe_of, same

CASCADE = {"base": "spt-seg", "groups": "{2-3},{4}"}


def test_a_trained_cascade_on_spt_seg_has_its_parts_and_is_read_again(clip_folder: Path, tmp_path: Path) -> None:
    """It was an ordinary cascade under the options of the other, whose folder could not be read."""
    model = {"system": "cascade-clip", "clip": str(clip_folder), "options": {**OPTIONS["spt-seg"], **CASCADE}}
    recipe = recipe_of(clip_folder, "cascade-clip", model=model, train={"steps": 1})
    read = load_model(quietly(recipe, tmp_path / "run"))
    assert any("guide" in name for name in read.state_dict())


# --- which text and which labels --------------------------------------------------------------------------------


def test_vocabulary_of_each_setting() -> None:
    data = Vocabulary.parse("cat, kitten; dog; sky").with_seen(["cat", "sky"])
    assert training_vocabulary(data).words == ("cat", "sky")
    every = training_vocabulary(data, setting="transductive")
    assert every.words == ("cat", "dog", "sky") and masked_names(every) == ("cat", "sky")
    assert masked_names(training_vocabulary(data, setting="supervised")) == ("cat", "dog", "sky")
    with pytest.raises(LexisegError, match="no unseen class"):
        training_vocabulary(Vocabulary.parse("cat; dog"), setting="transductive")
    assert len(training_vocabulary(Vocabulary.parse([f"c{index}" for index in range(300)]))) == 300


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 254, 255, PADDING]), min_size=1, max_size=30), st.sets(st.integers(0, 3)))
def test_self_training_labels(values: list[int], seen: set[int]) -> None:
    label = torch.tensor(values)
    marked = self_training_labels(label, sorted(seen))
    ignored = self_training_labels(label, sorted(seen), unlabelled="ignored")
    for value, one, other in zip(values, marked.tolist(), ignored.tolist(), strict=True):
        if value in seen:
            assert one == other == value
        elif value == PADDING:
            assert one == other == 255
        else:
            assert other == UNLABELLED
            assert one == (255 if value == 255 else UNLABELLED)


@pytest.mark.parametrize("pad_label", [255, PADDING])
def test_both_pipelines_fill_up_with_the_label_they_are_told(pad_label: int) -> None:
    image, label = torch.zeros(3, 20, 24, dtype=torch.uint8), torch.zeros(20, 24, dtype=torch.long)
    for pipeline in (light_pipeline, paper_pipeline):
        steps = pipeline((0.0,) * 3, (1.0,) * 3, crop=64, pad_label=pad_label)
        found = {value for seed in range(4) for value in steps(image, label, np.random.default_rng(seed))[1].unique()}
        assert {int(value) for value in found} == {0, pad_label}


@pytest.mark.parametrize(
    ("setting", "unlabelled", "void", "cat", "sky", "dog", "classes", "seen"),
    [
        ("inductive", "marked", 255, 0, 255, 1, 2, None),
        ("transductive", "marked", 255, 0, -1, 2, 3, [True, False, True]),
        ("transductive", "ignored", -1, 0, -1, 2, 3, [True, False, True]),
        ("supervised", "marked", 255, 0, 1, 2, 3, None),
    ],
)
def test_what_the_loss_is_given(
    clip_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    unlabelled: str,
    void: int,
    cat: int,
    sky: int,
    dog: int,
    classes: int,
    seen: list[bool] | None,
) -> None:
    task = flat_task(clip_folder, setting, unlabelled=unlabelled)
    given: dict[str, Any] = {}
    losses = type(task.model).losses

    def spy(self: Any, images: Any, labels: Any, text: Any, **more: Any) -> Any:
        given.update(labels=labels, text=text, **more)
        return losses(self, images, labels, text, **more)

    monkeypatch.setattr(type(task.model), "losses", spy)
    result = task.losses(task.batch(0))
    assert result["loss"].isfinite()
    expected = torch.full((16, 16), 255)  # padding is void in every setting
    expected[:12, :6], expected[:12, 6:12], expected[11, :12], expected[0, :12] = cat, sky, dog, void
    assert all(torch.equal(label, expected) for label in given["labels"])
    assert len(given["text"]) == classes
    assert (given["seen"].tolist() if "seen" in given else None) == seen
    if seen:
        assert result["unlabelled"] == pytest.approx(100 * (expected == -1).float().mean())


def test_pixels_without_a_label_get_unseen_classes_only(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = flat_task(clip_folder, "transductive", unlabelled="ignored")
    found = {}

    def spy(*arguments: Any) -> Any:
        found["labels"] = pseudo_labels(*arguments)
        return found["labels"]

    monkeypatch.setattr("lexiseg.models.one_stage.pseudo_labels", spy)
    task.losses(task.batch(0))
    label = found["labels"][0]
    assert set(label.unique().tolist()) == {0, 1, 2, 255}
    assert (label[1:11, 6:12] == 1).all() and (label[0, :12] == 1).all() and (label[12:] == 255).all()


# --- where a run starts from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", sorted(OPTIONS))
def test_self_training_from_a_recipe_or_a_folder(tmp_path: Path, clip_folder: Path, system: str) -> None:
    first = quietly(recipe_of(clip_folder, system), tmp_path / "first", stop_after=2)
    start = load_model(first)
    assert start.metadata["steps"] == 2 and start.seen_names == FIRST.seen
    recipe = recipe_of(clip_folder, system, setting="transductive", initial=str(tmp_path / "first"), initial_steps=2)
    task = build_task(recipe)
    assert isinstance(task, SegmentationTask)
    before = start.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert task.vocabulary.names == FIRST.classes and task.model.seen_names == FIRST.seen
    folder = quietly(recipe, tmp_path / "second")
    model = load_model(folder)
    assert model.options.seen_offset == 0 and model.seen_names == FIRST.seen
    assert model.metadata["setting"] == "transductive" and model.metadata["initial"]["steps"] == 2
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    record = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < record["unlabelled"] < 100


def test_the_first_stage_is_trained_with_this_data_and_clip(tmp_path: Path, clip_folder: Path) -> None:
    options = {"num_prompts": 2, "decoder_layers": 1, "decoder_heads": 2}
    recipe = recipe_of(clip_folder, setting="transductive", initial="tiny", initial_steps=2)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"options": options})})
    folder = quietly(recipe, tmp_path)
    first = load_model(tmp_path / "initial" / "model")
    assert first.metadata["steps"] == 2 and first.metadata["data"]["length"] == 6
    assert [path.name for path in find_checkpoints(tmp_path / "initial" / "checkpoints")] == ["step-00000002"]
    assert load_model(folder).metadata["initial"]["model"] == str(tmp_path / "initial" / "model")
    quietly(recipe, tmp_path, resume=True)  # both are finished: nothing is trained again
    wrong = recipe.model_copy(update={"initial_steps": 5})
    with pytest.raises(LexisegError, match="only 4 steps"):
        quietly(wrong, tmp_path / "other")
    with pytest.raises(LexisegError, match="does not train a segmentation system"):
        quietly(recipe.model_copy(update={"initial": "clip-emoji"}), tmp_path / "other")


def changed(name: str, **options: Any) -> SegmentationRecipe:
    recipe = texts.recipe_of(name)
    model = recipe.model.model_copy(update={"options": recipe.model.options | options})
    return recipe.model_copy(update={"model": model})


def test_the_first_stage_has_the_options_that_weights_depend_on() -> None:
    own = changed("zegclip-picture-world").model.options
    assert first_stage(changed("zegclip-picture-world-transductive")).model.options == own
    recipe = changed("zegclip-picture-world-transductive", num_prompts=3, mask_weight=5.0, seen_offset=0.2)
    assert first_stage(recipe).model.options == own | {"num_prompts": 3}
    said = dict(dry_run(recipe).rows())["options"]
    assert "num_prompts 3" in said and "mask_size null" in said and "antialias true" in said  # as a recipe has them
    look = changed("second-look-picture-world", decoder_layers=1).model_copy(
        update={"initial": "zegclip-picture-world"}
    )
    assert first_stage(look).model.options["decoder_layers"] == 1 and dry_run(look).starts_from


def test_the_stages_of_a_decoupled_system_fit_each_other() -> None:
    recipe = changed("zsseg-picture-world")
    own = first_stage(recipe).model.options["proposals"]
    proposals = recipe.model.options["proposals"]
    more = changed("zsseg-picture-world", proposals={**proposals, "num_queries": 7, "frozen_dropout": True})
    assert first_stage(more).model.options["proposals"] == {**own, "num_queries": 7}
    with pytest.raises(LexisegError, match="proposals of the kind 'mask2former'"):
        first_stage(changed("zsseg-picture-world", proposals={"kind": "maskformer", "embed_dim": 64}))
    first = prompt_stage(changed("zsseg-voc2012", prompts={"prefix": 3, "suffix": 2}))
    assert (first.model.prefix, first.model.suffix, first.model.task) == (3, 2, 0)
    with pytest.raises(LexisegError, match="has no learned prompts"):
        prompt_stage(changed("zsseg-voc2012", prompts=None))


@pytest.mark.parametrize(("initial", "words"), [("zegclip-picture-world", "is of the system 'zegclip'"),
                                                ("zsseg-picture-world", "is of the system 'zsseg'")])  # fmt: skip
def test_a_first_stage_that_cannot_fit_is_not_trained(tmp_path: Path, initial: str, words: str) -> None:
    recipe = changed("cascade-clip-picture-world-transductive").model_copy(
        update={"initial": initial, "initial_steps": None}
    )
    with pytest.raises(LexisegError, match=words):
        dry_run(recipe)
    with pytest.raises(LexisegError, match=words):
        with_stages(recipe, tmp_path, lambda *args, **named: pytest.fail("it was trained"))


def test_no_stage_is_trained_before_all_are_seen_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("cat-seg-coco-stuff", {"initial": "zegclip-coco-stuff"})
    monkeypatch.setattr(lexiseg.training.init, "load_clip", lambda name: pytest.fail("its weights were loaded"))
    with pytest.raises(LexisegError, match="is of the system 'zegclip'"):
        with_stages(recipe, tmp_path, lambda *args, **named: pytest.fail("it was trained"))
    recipe = load_recipe("zegclip-picture-world-transductive", {"prompts_from": "prompts-voc2012"})
    monkeypatch.undo()
    with pytest.raises(LexisegError, match="has no learned prompts"):
        with_stages(recipe, tmp_path, lambda *args, **named: pytest.fail("it was trained"))
    with pytest.raises(LexisegError, match="has no learned prompts"):
        dry_run(recipe)


@pytest.mark.parametrize(("rules", "words"), [({"nothing": {}}, "matches no parameter"),
                                              ({"": {"lr": 0}}, "rate is 0")])  # fmt: skip
def test_a_dry_run_refuses_rules_that_a_training_refuses(rules: Any, words: str) -> None:
    with pytest.raises(LexisegError, match=words):
        dry_run(load_recipe("tiny", {"train.multipliers": rules}))


def test_what_needs_unseen_classes_is_not_measured_without_any(tmp_path: Path) -> None:
    root = write_voc(tmp_path, num_train=1, num_val=1, size=32)
    for unseen in (True, False):
        task = build_task(load_recipe("tiny", {"train.snapshot_every": 1}, data=root))
        assert isinstance(task, SegmentationTask) and "val/miou" in task.measures()
        assert ("val/hiou" in task.measures()) == unseen
        (root / "unseen.txt").unlink(missing_ok=True)


class StopError(Exception):
    pass


def test_resume_of_self_training_is_bit_for_bit(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quietly(recipe_of(clip_folder), tmp_path / "first")
    recipe = recipe_of(clip_folder, setting="transductive", initial=str(tmp_path / "first"))
    whole = quietly(recipe, tmp_path / "whole")
    step = Trainer.run_step

    def stopping(self: Trainer, number: int, batches: Any) -> Any:
        if number == 3:
            raise StopError
        return step(self, number, batches)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(Trainer, "run_step", stopping)
        quietly(recipe, tmp_path / "broken")
    torch.rand(3)
    resumed = quietly(recipe, tmp_path / "broken", resume=True)
    assert same(*(load_file(folder / "model.safetensors") for folder in (whole, resumed)))
    with pytest.raises(LexisegError, match="'setting' was transductive"):
        quietly(recipe_of(clip_folder, initial=str(tmp_path / "first")), tmp_path / "whole", resume=True)


def test_stopping_and_going_on_is_the_same_run(tmp_path: Path, clip_folder: Path) -> None:
    recipe = recipe_of(clip_folder)
    whole = quietly(recipe, tmp_path / "whole")
    half = quietly(recipe, tmp_path / "half", stop_after=3)
    assert load_model(half).metadata["steps"] == 3
    with pytest.raises(LexisegError, match="step 3 already"):
        quietly(recipe, tmp_path / "half", resume=True, stop_after=1)
    rest = quietly(recipe, tmp_path / "half", resume=True)
    assert same(*(load_file(folder / "model.safetensors") for folder in (whole, rest)))
    with pytest.raises(LexisegError, match="cannot stop after 9"):
        quietly(recipe, tmp_path / "new", stop_after=9)
    with pytest.raises(LexisegError, match="cannot stop after 99999"):  # before another one is trained for days
        quietly(load_recipe("zegclip-picture-world-transductive"), tmp_path / "staged", stop_after=99999)
    assert not (tmp_path / "new").exists() and not (tmp_path / "staged").exists()


def test_the_towers_of_the_initial_model_are_named(
    tmp_path: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They took the place of those in the recipe without a word, and the dry run named the recipe's."""
    start = str(quietly(recipe_of(clip_folder), tmp_path / "first", stop_after=1))
    recipe = recipe_of(clip_folder, initial=start)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"clip": "clip-emoji"})})
    assert dry_run(recipe).clip == str(clip_folder)
    assert f"'{start}' brings its CLIP, so the recipe's 'clip-emoji' is not used" in caplog.text


def test_what_cannot_be_started_from(tmp_path: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = quietly(recipe_of(clip_folder), tmp_path / "first", stop_after=1)
    start = str(folder)
    with pytest.raises(LexisegError, match="'zegclip', but the recipe trains 'spt-seg'"):
        build_task(recipe_of(clip_folder, "spt-seg", initial=start))
    other = recipe_of(clip_folder, initial=start)
    other.model.options["num_prompts"] = 3
    with pytest.raises(LexisegError, match=r"prompts.* is \(.*\) in it and"):
        build_task(other)
    with pytest.raises(LexisegError, match="nowhere"):
        build_task(recipe_of(clip_folder, initial="nowhere"))
    with caplog.at_level(logging.WARNING, "lexiseg"):
        build_task(recipe_of(clip_folder, setting="transductive", initial=start, initial_steps=2))
    assert "trained for 1 steps" in caplog.text and "brings its CLIP" not in caplog.text
    config = json.loads((folder / "config.json").read_text())
    config["seen_names"] = [*FIRST.classes]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LexisegError, match="masks of 'cow', which is unseen"):
        build_task(recipe_of(clip_folder, setting="transductive", initial=start))


# --- supervised -------------------------------------------------------------------------------------------------


def test_picture_world_is_never_supervised(clip_folder: Path) -> None:
    with pytest.raises(LexisegError, match=r"'test\.yaml' contradicts itself: picture-world has no masks"):
        recipe_of(clip_folder, setting="supervised")
    with pytest.raises(LexisegError, match="'initial' is trained, which is missing"):
        recipe_of(clip_folder, initial_steps=3)


def test_supervised_training_and_its_evaluation(tmp_path: Path, clip_folder: Path) -> None:
    root = write_voc(tmp_path / "data", num_train=2, num_val=1, size=32)
    data = {"source": "own", "root": str(root), "augment": "light", "crop": 32}
    folder = quietly(recipe_of(clip_folder, setting="supervised", data=data, train={"steps": 1}), tmp_path / "run")
    model = load_model(folder)
    assert model.seen_names == FIRST.classes and model.options.seen_offset == 0.1
    dataset = build_task(recipe_of(clip_folder, data=data)).dataset
    reports = {
        offsets: run_evaluation(
            Segmenter(model, disk_cache=False), dataset, name="x", split="train", progress=False, **more
        )
        for offsets, more in {"auto": {}, "all": {"offsets": "all"}, "data": {"offsets": "data"}}.items()
    }
    # A constant off every class changes nothing; off the data's seen classes only it does.
    assert reports["auto"].protocol["offsets"] == "all" and reports["auto"].protocol["num_unseen"] == 17
    predicted = {offsets: report.confusion.predicted.tolist() for offsets, report in reports.items()}
    assert predicted["auto"] == predicted["all"] != predicted["data"]


# --- a dataset of the papers -----------------------------------------------------------------------------------


def write_mini_voc(root: Path) -> Path:
    """VOC 2012 with one picture each in train, aug and val: background, aeroplane, the unseen sofa, and a border."""
    home = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    values = np.zeros((20, 24), np.uint8)
    values[:, 8:16], values[:, 16:], values[9:11] = 1, 18, 255
    for split, folder in {"train": "", "aug": "Aug", "val": ""}.items():
        Image.fromarray(np.full((20, 24, 3), 90, np.uint8)).save(home / "JPEGImages" / f"{split}.jpg")
        mask = Image.fromarray(values, "P")
        mask.putpalette([index for index in range(256) for _ in range(3)])
        mask.save(home / f"SegmentationClass{folder}" / f"{split}.png")
        (home / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{split}\n")
    return root


@pytest.mark.parametrize(
    ("setting", "unlabelled", "expected"),
    [
        ("inductive", "marked", {0, 255}),
        ("transductive", "marked", {0, -1, 255}),
        ("transductive", "ignored", {0, -1}),
        ("supervised", "marked", {0, 17, 255}),
    ],
)
def test_settings_on_voc(tmp_path: Path, clip_folder: Path, setting: str, unlabelled: str, expected: set[int]) -> None:
    data = {"source": "voc2012", "root": str(write_mini_voc(tmp_path)), "augment": "light", "crop": 16}
    task = build_task(recipe_of(clip_folder, data=data, setting=setting, unlabelled=unlabelled))
    assert isinstance(task, SegmentationTask)
    assert sorted(task.batch(0).names) == ["aug", "train"]
    found = {value for index in range(8) for value in task.batch(index).labels.unique().tolist()}
    assert found == expected
    assert len(task.vocabulary) == (15 if setting == "inductive" else 20)
    assert task.losses(task.batch(0))["loss"].isfinite()


def test_evaluation_on_another_data_set(tmp_path: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_mini_voc(tmp_path)
    quietly(recipe_of(clip_folder), tmp_path / "run", stop_after=1)
    values = yaml.safe_load(texts.recipe_text("coco-to-voc2012"))
    values["data"]["root"] = str(root)
    values["window"] = {"size": 32, "stride": 16, "short_side": 32}
    (tmp_path / "cross.yaml").write_text(yaml.safe_dump(values))
    arguments = ["evaluate", tmp_path / "cross.yaml", "-w", tmp_path / "run", "-o", tmp_path / "out", "--json"]
    assert main([str(word) for word in arguments]) == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert (protocol["dataset"], protocol["num_pictures"], protocol["offsets"]) == ("voc2012", 1, "none")
    assert protocol["window"]["size"] == 32 and protocol["window"]["stride"] == 16
    assert protocol["templates"] == ["a photo of a {}"]
    assert main(["train", str(tmp_path / "cross.yaml")]) == 2
    assert "only evaluates" in capsys.readouterr().err
    with pytest.raises(LexisegError, match="only evaluates"):
        train(tmp_path / "cross.yaml", tmp_path / "trained")


def test_a_training_that_cannot_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LexisegError, match="data/coco_stuff164k"):
        train("cat-seg-coco-stuff", "runs/cat-seg")
    assert not list(tmp_path.iterdir())
