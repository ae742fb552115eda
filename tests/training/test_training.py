"""Training a segmentation system: what it sees, exact continuation after kill -9, and what it exports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lexiseg.clip.load import load_clip
from lexiseg.clip.model import build_clip, save_clip
from lexiseg.data.base import Sample
from lexiseg.data.picture_world import write_voc
from lexiseg.data.transforms import light_pipeline
from lexiseg.errors import LexisegError
from lexiseg.models import ZegCLIP
from lexiseg.recipes import parse_recipe
from lexiseg.training.checkpoint import find_checkpoints
from lexiseg.training.run import build_task, train
from lexiseg.training.segmentation import SegmentationTask, training_vocabulary
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
RECIPE = """
kind: segmentation
model: {{system: zegclip, clip: "{clip}", options: {{num_prompts: 2, decoder_layers: 2, decoder_heads: 2}}}}
data: {{source: picture-world, size: 32, length: 10, val_size: 32, val_length: 2}}
evaluation: {{pictures: 1, scored: 2}}
train:
  steps: {steps}
  batch_size: 2
  accumulate: 2
  lr: 1.0e-3
  warmup_steps: 2
  multipliers: {{prompts: {{lr: 10}}, decoder: {{lr: 2}}}}
  clip_norm: 10
  workers: 1
  log_every: 1
  checkpoint_every: 4
  seed: 5
"""


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    clip = build_clip({"model_cfg": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}})
    return save_clip(clip, tmp_path_factory.mktemp("clip"))


class Flat:
    """Pictures whose left half is class 0 and right half class 2 (unseen), with a border that is ignored."""

    vocabulary = Vocabulary.parse(["cat, kitten", "dog", "sky"]).with_seen(["cat", "dog"])

    def __len__(self):
        return 5

    def __getitem__(self, index):
        label = torch.zeros(16, 16, dtype=torch.long)
        label[:, 8:] = 2
        label[0] = 255
        label[-1] = 1
        return Sample(torch.full((3, 16, 16), index * 10, dtype=torch.uint8), label, f"flat-{index}")


def flat_task(clip_folder, **options):
    model = ZegCLIP.build(load_clip(clip_folder), {"decoder_heads": 2}, seen_names=("cat", "dog"))
    pipeline = light_pipeline((0.0,) * 3, (1.0,) * 3, crop=16)
    return SegmentationTask(model, Flat(), pipeline, batch_size=2, **options)


def test_unseen_classes_take_no_part(clip_folder):
    task = flat_task(clip_folder)
    assert task.vocabulary.names == ("cat", "dog") and task.text.shape == (2, 32)
    assert "sky" not in task.vocabulary.words and "kitten" not in task.vocabulary.words
    batch = task.batch(0)
    assert batch.images.shape == (2, 3, 16, 16) and batch.labels.shape == (2, 16, 16)
    assert set(batch.labels.unique().tolist()) == {0, 1, 255}
    for label in batch.labels:
        assert (label[1:-1] == 255).sum() == 14 * 8
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


def test_label_stride(clip_folder):
    task, full = flat_task(clip_folder, label_stride=2), flat_task(clip_folder)
    small, whole = task.batch(0).labels, full.batch(0).labels
    assert small.shape == (2, 8, 8) and torch.equal(small, whole[:, 1::2, 1::2])


def test_a_vocabulary_without_flags_is_fully_supervised():
    assert training_vocabulary(Vocabulary.parse("cat; dog, puppy")).words == ("cat", "dog")
    with pytest.raises(LexisegError, match="no seen class"):
        training_vocabulary(Vocabulary.parse("cat; dog").with_seen([]))


def test_a_model_of_other_classes_is_refused(clip_folder):
    model = ZegCLIP.build(load_clip(clip_folder), {"decoder_heads": 2}, seen_names=("cat",))
    with pytest.raises(ValueError, match="seen classes"):
        SegmentationTask(model, Flat(), light_pipeline((0.0,) * 3, (1.0,) * 3, crop=16), batch_size=1)


def recipe_of(clip_folder, steps=12):
    return parse_recipe(RECIPE.format(clip=clip_folder, steps=steps), "test.yaml")


def quietly(recipe, folder, **options):
    return train(recipe, folder, device="cpu", tensorboard=False, progress=False, **options)


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
    text.write_text(RECIPE.format(clip=clip_folder, steps=20))
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
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "whole", broken)]
    assert len(losses[0]) == len(losses[1]) == 20


def test_exports_a_model_that_loads_and_knows_its_classes(tmp_path, clip_folder):
    recipe = recipe_of(clip_folder, steps=2)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"snapshot_every": 2})})
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
    text = RECIPE.format(clip=clip_folder, steps=1)
    start, end = text.index("data:"), text.index("evaluation:")
    text = f"{text[:start]}data: {{source: own, root: '{root}', crop: 32}}\n{text[end:]}"
    recipe = parse_recipe(text, "x.yaml")
    folder = quietly(recipe, tmp_path / "run")
    assert load_model(folder).seen_names and recipe.data.title == "voc"
    batch = build_task(recipe).batch(0)
    assert batch.images.shape == (2, 3, 32, 32) and batch.labels.shape == (2, 32, 32)
    assert len(recipe.data.open("val")) == 1


def test_resume_with_another_recipe_names_the_difference(tmp_path, clip_folder):
    recipe = recipe_of(clip_folder, steps=1)
    quietly(recipe, tmp_path)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"length": 11})})
    with pytest.raises(LexisegError, match=r"'data\.length' was 10 and is now 11"):
        quietly(other, tmp_path, resume=True)


def test_initial_weights_depend_on_the_seed_only(clip_folder):
    recipe = recipe_of(clip_folder)
    first = build_task(recipe).model.state_dict()
    torch.rand(7)
    np.random.rand(3)
    again = build_task(recipe).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("system: zegclip", "system: zegclop", "zegclop"),
        ("num_prompts: 2", "num_promts: 2", "num_promts"),
        ("prompts: {lr", "promts: {lr", "'promts'"),
    ],
)
def test_mistakes_are_named(tmp_path, clip_folder, before, after, words):
    text = RECIPE.format(clip=clip_folder, steps=1)
    assert before in text
    with pytest.raises(LexisegError, match=words):
        quietly(parse_recipe(text.replace(before, after), "x.yaml"), tmp_path)
