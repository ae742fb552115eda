"""Training a segmentation system: what it sees, exact continuation after kill -9, and what it exports."""

import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lexiseg.clip.load import load_clip
from lexiseg.data.picture_world import write_voc
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.models import ZegCLIP
from lexiseg.recipes import as_yaml
from lexiseg.training.checkpoint import find_checkpoints
from lexiseg.training.run import build_task
from lexiseg.training.segmentation import SegmentationTask, training_vocabulary
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model
from tests.training import runs
from tests.training.runs import Flat, flat_task, quietly, same

CHANGES = {
    "evaluation": {"pictures": 1, "num_samples": 2},
    "train": {
        **{"accumulate": 2, "warmup_steps": 2, "clip_norm": 10, "workers": 1, "log_every": 1, "checkpoint_every": 4},
        **{"seed": 5, "multipliers": {"prompts": {"lr": 10}, "decoder": {"lr": 2}}},
    },
}


def recipe_of(clip_folder, steps, **changes):
    train = {**CHANGES["train"], "steps": steps, **changes.pop("train", {})}
    return runs.recipe_of(clip_folder, **{**CHANGES, **changes, "train": train})


def test_unseen_classes_take_no_part(clip_folder):
    task = flat_task(clip_folder)
    assert task.vocabulary.names == ("cat", "dog") and task.text.shape == (2, 16)
    assert "sky" not in task.vocabulary.words and "kitten" not in task.vocabulary.words
    batch = task.batch(0)
    assert batch.images.shape == (2, 3, 16, 16) and batch.labels.shape == (2, 16, 16)
    assert set(batch.labels.unique().tolist()) == {0, 1, 255}
    for label in batch.labels:
        assert (label[1:11, :12] == 255).sum() == 10 * 6
    losses = task.losses(batch)
    losses["loss"].backward()
    trained = {name for name, p in task.model.named_parameters() if p.grad is not None}
    assert trained and not any(name.startswith("clip.") for name in trained)


def test_batches_are_pure_and_cover_every_sample_each_epoch(clip_folder):
    task = flat_task(clip_folder, seed=3)
    names = [name for index in range(5) for name in task.batch(index).names]
    assert sorted(names[:5]) == sorted(names[5:]) == [f"flat-{i}" for i in range(5)]
    assert names[:5] != names[5:]
    again = flat_task(clip_folder, seed=3).batch(4)
    assert torch.equal(again.images, task.batch(4).images) and again.names == task.batch(4).names
    other = [name for index in range(5) for name in flat_task(clip_folder, seed=4).batch(index).names]
    assert other != names


@pytest.mark.parametrize(("samples", "pictures"), [(1, 0), (0, 1), (0, 0)])
def test_a_snapshot_measures_and_shows_what_it_is_asked_for(clip_folder, samples, pictures):
    task = flat_task(clip_folder, validation=Flat(), num_samples=samples, num_pictures=pictures)
    values, shown = task.evaluate(1)
    assert set(values) <= set(task.measures())
    assert (bool(values), len(task.measures()) > 0, len(shown)) == (bool(samples), bool(samples), pictures)


def test_label_stride(clip_folder):
    task, full = flat_task(clip_folder, label_stride=2), flat_task(clip_folder)
    small, whole = task.batch(0).labels, full.batch(0).labels
    assert small.shape == (2, 8, 8) and torch.equal(small, whole[:, 1::2, 1::2])


def test_a_vocabulary_without_flags_is_fully_supervised():
    assert training_vocabulary(Vocabulary.parse("cat; dog, puppy")).words == ("cat", "dog")
    with pytest.raises(LexisegError, match="no seen class"):
        training_vocabulary(Vocabulary.parse("cat; dog").with_seen([]))


def test_a_model_of_other_classes_is_refused(clip_folder):
    task = flat_task(clip_folder)
    model = ZegCLIP.build(load_clip(clip_folder), {"decoder_heads": 2}, seen_names=("cat",))
    with pytest.raises(ValueError, match="seen classes"):
        SegmentationTask(model, task.dataset, task.pipeline, batch_size=1)


def test_one_class_without_anything_else_comes_with_a_note(clip_folder):
    class Filled(Flat):
        vocabulary = Vocabulary.parse(["cat"])
        void = False

        def __getitem__(self, index):
            label = torch.zeros(12, 12, dtype=torch.long)
            label[0] = 255 if self.void else 0
            return replace(super().__getitem__(index), label=label)

    model = ZegCLIP.build(load_clip(clip_folder), {"decoder_heads": 2}, seen_names=("cat",))
    pipeline = flat_task(clip_folder).pipeline
    with pytest.warns(LexisegWarning, match="Every pixel of the training data is 'cat'"):
        SegmentationTask(model, Filled(), pipeline, batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Filled.void = True
        SegmentationTask(model, Filled(), pipeline, batch_size=1)


SCRIPT = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[3]))
from lexiseg.training.trainer import Trainer
from lexiseg.recipes import load_recipe
from lexiseg.training.run import train
step = Trainer.run_step
def slow(*arguments):
    time.sleep(0.1)
    return step(*arguments)
Trainer.run_step = slow
train(load_recipe(sys.argv[1]), sys.argv[2], device="cpu", tensorboard=False, progress=False)
"""


def test_kill_nine_and_resume_is_bit_for_bit(tmp_path, clip_folder):
    recipe = recipe_of(clip_folder, steps=20)
    whole = quietly(recipe, tmp_path / "whole")
    text, broken = tmp_path / "recipe.yaml", tmp_path / "broken"
    text.write_text(as_yaml(recipe))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(text), str(broken), str(torch.get_num_threads())]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    deadline = time.monotonic() + 500
    while len(find_checkpoints(broken / "checkpoints")) < 1 and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    last = find_checkpoints(broken / "checkpoints")[-1].name
    assert last != "step-00000020" and not (broken / "model").exists()
    resumed = quietly(recipe, broken, resume=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert same(before, after) and len(before) > 10
    losses = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "whole", broken)]
    assert len(losses[0]) == len(losses[1]) == 20


def test_exports_a_model_that_loads_and_knows_its_classes(tmp_path, clip_folder):
    recipe = recipe_of(clip_folder, steps=2, train={"snapshot_every": 2})
    folder = quietly(recipe, tmp_path)
    model = load_model(folder)
    data = recipe.data.open("val")
    assert model.seen_names == tuple(entry.name for entry in data.vocabulary.classes if entry.seen)
    assert model.metadata["steps"] == 2 and model.metadata["batch_size"] == 4
    assert (tmp_path / "samples" / "step-00000002-validation.png").stat().st_size > 1000
    assert '"val/hiou"' in (tmp_path / "metrics.jsonl").read_text() and recipe.data.title == "picture-world"
    assert "prompts:" in (tmp_path / "recipe.yaml").read_text()


def test_trains_from_a_folder_with_the_papers_pipeline(tmp_path, clip_folder):
    root = write_voc(tmp_path / "voc", num_train=3, num_val=1, size=40)
    recipe = recipe_of(clip_folder, steps=1, data={"source": "own", "root": str(root), "crop": 32})
    folder = quietly(recipe, tmp_path / "run")
    assert load_model(folder).seen_names and recipe.data.title == "voc"
    batch = build_task(recipe).batch(0)
    assert batch.images.shape == (2, 3, 32, 32) and batch.labels.shape == (2, 32, 32)
    assert len(recipe.data.open("val")) == 1


def test_resume_with_another_recipe_names_the_difference(tmp_path, clip_folder):
    recipe = recipe_of(clip_folder, steps=1)
    quietly(recipe, tmp_path)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"length": 11})})
    with pytest.raises(LexisegError, match=r"'data\.length' was 6 and is now 11"):
        quietly(other, tmp_path, resume=True)


def test_initial_weights_depend_on_the_seed_only(clip_folder):
    recipe = recipe_of(clip_folder, steps=1)
    first = build_task(recipe).model.state_dict()
    torch.rand(7)
    np.random.rand(3)
    assert same(build_task(recipe).model.state_dict(), first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"system": "zegclop", "clip": "clip-emoji"}}, "zegclop"),
        ({"model": {"system": "zegclip", "clip": "clip-emoji", "options": {"num_promts": 2}}}, "num_promts"),
        ({"train": {"multipliers": {"promts": {"lr": 10}}}}, "'promts'"),
    ],
)
def test_mistakes_are_named(tmp_path, clip_folder, changes, words):
    with pytest.raises(LexisegError, match=words):
        quietly(recipe_of(clip_folder, steps=1, **changes), tmp_path)
