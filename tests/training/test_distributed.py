"""Training and evaluation in two processes: the same numbers as in one, one voice, and an end when one fails."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

import lexiseg
from lexiseg import processes
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import build_clip, save_clip
from lexiseg.data.picture_world import PictureWorld
from lexiseg.data.transforms import light_pipeline
from lexiseg.errors import LexisegError
from lexiseg.evaluation.run import run_evaluation
from lexiseg.losses.mask_aware import distillation_loss, mask_aware_loss
from lexiseg.losses.masks import exclusive_losses, mask_losses
from lexiseg.losses.proposals import MaskTargets, ProposalWeights, level_losses
from lexiseg.losses.regions import region_map_losses
from lexiseg.losses.ssim import ssim_loss
from lexiseg.models import ZegCLIP
from lexiseg.models.maft import region_embeddings
from lexiseg.recipes import TrainSettings
from lexiseg.segmenter import Segmenter
from lexiseg.training.checkpoint import find_checkpoints, whole
from lexiseg.training.engine import Task, part_of, shard
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.training.trainer import Trainer, seed_everything
from tests.launching import Launch, in_processes, launch
from tests.towers import small_clip
from tests.training.runs import same

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
OPTIONS = {"num_prompts": 2, "decoder_layers": 2, "decoder_heads": 2, "dropout": 0.0, "prompt_dropout": 0.0}
SETTINGS = {
    "steps": 3, "batch_size": 3, "accumulate": 2, "lr": 1e-3, "warmup_steps": 1, "seed": 5, "workers": 0,
    "log_every": 1, "checkpoint_every": 2, "snapshot_every": 3,
}  # fmt: skip
# How far losses may be apart, as a share of them. bfloat16 has 8 bits, and parts of a batch are rounded on their own.
ROUNDING = {"fp32": 1e-6, "bf16": 5e-4}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    clip = build_clip({"model_cfg": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}})
    return save_clip(clip, tmp_path_factory.mktemp("clip"))


def records(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def losses(folder):
    return [record["loss"] for record in records(folder)]


def close_losses(a, b, relative=1e-6):
    """Within 1e-5, or a millionth of them where they are so large that float32 has nothing finer."""
    np.testing.assert_allclose(losses(a), losses(b), atol=1e-5, rtol=relative)


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# What runs in forked processes.


def small_task(clip_folder, batch_size=3, backbone="prompt"):
    seed_everything(0)
    data = PictureWorld("train", size=32, length=8)
    seen = tuple(name for name, entry in zip(data.vocabulary.names, data.vocabulary.classes, strict=True) if entry.seen)
    model = ZegCLIP.build(load_clip(clip_folder), {**OPTIONS, "backbone": backbone}, seen_names=seen)
    model.set_trainable()
    pipeline = light_pipeline(model.mean, model.std, crop=32)
    return SegmentationTask(
        model, data, pipeline, batch_size=batch_size, validation=PictureWorld("val", size=32, length=2), num_samples=2
    )


def train_small(clip_folder, folder, backbone="prompt", stop_after=None, resume=False, **changes):
    settings = TrainSettings(**{**SETTINGS, **changes})
    task = small_task(clip_folder, settings.batch_size, backbone)
    trainer = Trainer(task, settings, folder, device="cpu", tensorboard=False, progress=False)
    trainer.run(stop_after=stop_after, resume=resume)
    return [parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
            for parameter in task.model.parameters()]  # fmt: skip


def evaluate_small(clip_folder, length, batch_size=2, **options):
    processes.init("cpu")
    segmenter = Segmenter(small_task(clip_folder).model, disk_cache=False)
    data = PictureWorld("val", size=32, length=length)
    return run_evaluation(
        segmenter, data, name="world", split="val", batch_size=batch_size, progress=False, shared=True, **options
    )


def numbers(report):
    counts = report.confusion
    return (report.summary(), counts.intersection.tolist(), counts.predicted.tolist(), counts.labelled.tolist())


def both(clip_folder, folder):
    """One fork for the cheap checks: training, two evaluations, and every loss on an uneven share."""
    train_small(clip_folder, folder)
    seed = torch.initial_seed()
    reports = [evaluate_small(clip_folder, length) for length in (5, 1)]
    shown = [[example.name for example in report.examples] for report in reports]
    return [numbers(report) for report in reports], shown, every_loss(part_of(3, processes.rank(), 2)), seed


def every_loss(places):
    """Each loss of some pictures of a batch of three, averaged over the processes, and its gradients by picture."""
    generator = torch.Generator().manual_seed(1)
    part = slice(places.start, places.stop)

    def draw(*shape):
        return torch.randn(3, *shape, generator=generator)[part].requires_grad_()

    labels = torch.randint(0, 5, (3, 8, 8), generator=generator)
    labels[labels == 4] = 255
    labels[2] = 255
    labels[2, :2] = 1
    labels = labels[part]
    masks, probabilities, regions = draw(4, 4, 4), draw(6, 5), draw(6, 4, 4)
    rows = torch.rand(3, 2, 6, generator=generator)
    rows = [rows[0], rows[1, :1], rows[2, :0]][part]  # pictures with two, one and no class
    scores, truth = torch.cat(rows).requires_grad_(), torch.full((sum(map(len, rows)), 6), 0.3)
    student = draw(4)
    targets = []
    for image in labels:
        classes = image.unique()
        classes = classes[classes != 255]
        targets.append(MaskTargets(classes, (image[None] == classes[:, None, None]).float()))
    matched = level_losses(regions, probabilities, targets, ProposalWeights())
    found = {
        "focal and dice": (mask_losses(masks, labels).total, masks),
        "ssim": (ssim_loss(masks, labels), masks),
        "exclusive": (exclusive_losses(masks, labels, dice_weight=1.0).total, masks),
        "region map": (region_map_losses(probabilities.softmax(2), regions, labels).total, regions),
        "matched": (torch.stack(list(matched.values())).sum(), regions),
        "mask-aware": (mask_aware_loss(scores, truth), scores),
        "mask-aware kl": (mask_aware_loss(scores, truth, "kl"), scores),
        "distillation": (distillation_loss(student, torch.zeros_like(student)), student),
    }
    count = processes.count()
    gradients = {
        name: torch.autograd.grad(loss, source, retain_graph=True)[0] / count for name, (loss, source) in found.items()
    }
    return processes.mean({name: float(loss.detach()) for name, (loss, _) in found.items()}), gradients


def test_two_processes_are_as_one(clip_folder, tmp_path):
    """Batches of 3 over 2 processes (so that shares differ), 5 pictures and 1; the report, the losses, the weights."""
    two, other = in_processes(tmp_path, both, clip_folder, tmp_path / "two")
    train_small(clip_folder, tmp_path / "one")
    one = [evaluate_small(clip_folder, length) for length in (5, 1)]
    assert two[0] == other[0] == [numbers(report) for report in one]
    assert two[1] == [[example.name for example in report.examples] for report in one]
    assert (two[3], other[3]) == (SETTINGS["seed"], SETTINGS["seed"] + 1)  # or both would drop out the same

    close_losses(tmp_path / "two", tmp_path / "one")
    assert [record["step"] for record in records(tmp_path / "two")] == [1, 2, 3]
    assert len(list((tmp_path / "two" / "samples").iterdir())) == 1
    states = [load_file(find_checkpoints(tmp_path / name / "checkpoints")[-1] / "model.safetensors") for name in
              ("two", "one")]  # fmt: skip
    close(*states, atol=1e-4, rtol=1e-3)

    whole, whole_gradients = every_loss(range(3))
    for name, value in whole.items():
        assert two[2][0][name] == pytest.approx(value, rel=1e-5), name
        parts = torch.cat([two[2][1][name], other[2][1][name]])
        torch.testing.assert_close(parts, whole_gradients[name], atol=1e-6, rtol=1e-4, msg=name)


class Linear(Task):
    """Fails in one process only: a picture that cannot be read, a wrong label, or a loss that is no number."""

    def __init__(self, mistake=None):
        seed_everything(1)
        self.model, self.mistake = nn.Linear(2, 1), mistake

    def batch(self, index, rank=0, processes=1):
        if self.mistake == "data" and index == 3 and rank == 1:
            raise LexisegError("The picture 'x.jpg' is broken.")
        size = len(part_of(4, rank, processes))
        x = torch.full((size, 2), float("nan") if self.mistake == "nan" and index == 3 and rank == 1 else 1.0)
        return {"x": x, "names": [f"picture-{rank}"], "index": index}

    def sample_names(self, batch):
        return batch["names"]

    def losses(self, batch):
        if self.mistake == "labels" and batch["index"] == 3 and processes.rank() == 1:
            raise LexisegError("A label is 300.")
        return {"loss": self.model(batch["x"]).square().mean()}

    def measures(self):
        return ("val/score",)

    def evaluate(self, step):
        return {"val/score": -step}, {}

    def export(self, folder):
        folder.mkdir(exist_ok=True)


def train_linear(folder, mistake=None, resume=False, **changes):
    changes = {"steps": 8, "batch_size": 4, "accumulate": 1, "snapshot_every": 0, **changes}
    settings = TrainSettings(**{**SETTINGS, **changes})
    Trainer(Linear(mistake), settings, folder, device="cpu", tensorboard=False, progress=False).run(resume=resume)


@pytest.mark.parametrize(("mistake", "words"), [("data", "'x.jpg' is broken"), ("nan", r"step 3 \(samples: picture-1")])
def test_a_mistake_in_one_process_ends_both(tmp_path, mistake, words):
    errors = in_processes(tmp_path, train_linear, tmp_path / "run", mistake)
    assert {type(error) for error in errors} == {processes.SharedError}
    assert str(errors[0]) == str(errors[1])
    with pytest.raises(LexisegError, match=words):
        raise errors[0]
    assert [path.name for path in find_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


def test_a_mistake_within_a_step_ends_both(tmp_path):
    """There the others are waiting for a gradient; they notice that nobody is left to send it."""
    errors = in_processes(tmp_path, train_linear, tmp_path / "run", "labels")
    assert [type(error) for error in errors] == [processes.PeerError, LexisegError]
    assert "Another process" in str(errors[0]) and "300" in str(errors[1])


def test_both_processes_know_that_patience_ran_out(tmp_path):
    """When it is resumed as well, where the first process alone has the log."""
    judged = {"snapshot_every": 1, "keep_best": "val/score", "patience": 2}
    for resume in (False, True):
        found = in_processes(tmp_path, train_linear, tmp_path / "run", resume=resume, timeout=100, **judged)
        assert found == [None, None]
    assert max(record["step"] for record in records(tmp_path / "run")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_training_is_as_plain_training(clip_folder, tmp_path, precision):
    """FSDP: each process keeps half of the tower; a checkpoint goes on in one process, plain; the model loads."""
    changes = {"steps": 4, "clip_norm": 0.5, "precision": precision}
    halves = in_processes(
        tmp_path, train_small, clip_folder, tmp_path / "two", "finetune", 2, sharding="fsdp", **changes
    )
    sizes = train_small(clip_folder, tmp_path / "one", "finetune", **changes)
    for first, second, size in zip(*halves, sizes, strict=True):
        assert first + second == size or first == second == size == 1  # a single number cannot be divided
    assert sum(halves[0]) < 0.6 * sum(sizes)
    model = lexiseg.load(tmp_path / "two" / "model", device="cpu")
    assert model.predict(np.zeros((32, 32, 3), np.uint8), ["cat", "dog"]).label_map.shape == (32, 32)
    train_small(clip_folder, tmp_path / "two", "finetune", resume=True, **changes)
    close_losses(tmp_path / "two", tmp_path / "one", ROUNDING[precision])


class Twice(nn.Module):
    """Runs blocks of a tower several times a step, as mask attention does."""

    def __init__(self):
        super().__init__()
        self.visual = small_clip().visual

    def forward(self):
        generator = torch.Generator().manual_seed(3)
        images, masks = torch.randn(2, 3, 32, 32, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
        values = [region_embeddings(self.visual, images, masks, start_block=block) for block in (1, 2)]
        return values[0].square().mean() + values[1].pow(3).mean()


def gradients_of_shards():
    processes.init("cpu")
    module = shard(Twice(), torch.device("cpu"))
    module().backward()
    return {name: whole(value.grad) for name, value in module.named_parameters() if value.grad is not None}


@pytest.mark.slow
def test_sharded_blocks_may_run_more_than_once(tmp_path):
    plain = Twice()
    plain().backward()
    expected = {name: value.grad for name, value in plain.named_parameters() if value.grad is not None}
    for found in in_processes(tmp_path, gradients_of_shards):
        close(found, expected, atol=1e-6, rtol=1e-4)


# What runs under torch's launcher, as a user would start it.

RECIPE = """
kind: segmentation
model:
  system: zegclip
  clip: "{clip}"
  options: {{num_prompts: 2, decoder_layers: 2, decoder_heads: 2, dropout: {dropout}, prompt_dropout: 0.0}}
data: {{source: picture-world, size: 32, length: 10, val_size: 32, val_length: 2}}
evaluation: {{pictures: 1, num_samples: 2}}
train:
  steps: {steps}
  batch_size: 4
  accumulate: 2
  lr: 1.0e-3
  warmup_steps: 2
  workers: 1
  log_every: 1
  checkpoint_every: 4
  seed: 5
  precision: {precision}
"""


def recipe_file(folder, clip_folder, steps=8, precision="fp32", dropout=0.0):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(clip=clip_folder, steps=steps, precision=precision, dropout=dropout))
    return path


def state_of(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def train_words(recipe, run_dir, *more):
    return ["train", recipe, "-o", run_dir, "--device", "cpu", "--no-tensorboard", *more]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_command_in_two_processes(clip_folder, tmp_path, precision):
    recipe = recipe_file(tmp_path, clip_folder, precision=precision)
    said = launch(tmp_path, train_words(recipe, tmp_path / "two"))
    assert said.count("wrote ") == 2 and said.count("step 8/8") == 1
    launch(tmp_path, train_words(recipe, tmp_path / "one"), count=1)
    close_losses(tmp_path / "two", tmp_path / "one", ROUNDING[precision])
    if precision == "fp32":
        close(state_of(tmp_path / "two"), state_of(tmp_path / "one"), atol=3e-4, rtol=1e-3)


@pytest.mark.slow
def test_kill_one_process_and_resume(clip_folder, tmp_path):
    """Dropout is on, so that each process's random state matters."""
    recipe = recipe_file(tmp_path, clip_folder, steps=40, dropout=0.2)
    launch(tmp_path, train_words(recipe, tmp_path / "whole"))
    broken = Launch(tmp_path, train_words(recipe, tmp_path / "broken"))
    broken.until(lambda: find_checkpoints(tmp_path / "broken" / "checkpoints"))
    os.kill(broken.workers()[1], signal.SIGKILL)
    assert broken.wait(120) != 0
    assert not (tmp_path / "broken" / "model").exists()
    launch(tmp_path, train_words(recipe, tmp_path / "broken", "--resume"))
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "broken"))
    assert [record["step"] for record in records(tmp_path / "broken")] == list(range(1, 41))


@pytest.mark.slow
def test_resume_with_another_number_of_processes(clip_folder, tmp_path):
    recipe = recipe_file(tmp_path, clip_folder)
    launch(tmp_path, train_words(recipe, tmp_path / "whole"), count=1)
    launch(tmp_path, train_words(recipe, tmp_path / "mixed", "--stop-after", "4"))
    said = launch(tmp_path, train_words(recipe, tmp_path / "mixed", "--stop-after", "6", "--resume"), count=1)
    assert "was started with 2 processes and continues with 1" in said
    launch(tmp_path, train_words(recipe, tmp_path / "mixed", "--resume"), count=3)
    close_losses(tmp_path / "mixed", tmp_path / "whole")


@pytest.mark.slow
def test_mistakes_are_said_once(clip_folder, tmp_path):
    recipe = recipe_file(tmp_path, clip_folder)
    text = recipe.read_text()
    recipe.write_text(text.replace("batch_size: 4", "batch_size: 1"))
    said = launch(tmp_path, train_words(recipe, tmp_path / "run"), expect=1)
    assert said.count("cannot be divided among 2 processes") == 1
    recipe.write_text(text.replace("num_prompts", "num_prompt"))
    said = launch(tmp_path, train_words(recipe, tmp_path / "run"), expect=1)
    assert said.count("'num_prompt'") == 1
    recipe.write_text(text.replace("lr: 1.0e-3", "lr: 1.0e+30").replace("warmup_steps: 2", "warmup_steps: 0"))
    said = launch(tmp_path, train_words(recipe, tmp_path / "run"), expect=1)
    assert said.count("lower the learning rate") == 1
    assert not (tmp_path / "run" / "model").exists()
