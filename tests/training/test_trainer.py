"""The loop: exact resume after a kill, accumulation, groups, logs, and a loss that is not finite."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import resource_sharer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.recipes import TrainSettings
from lexiseg.training.checkpoint import find_checkpoints
from lexiseg.training.engine import Task, prefetch
from lexiseg.training.trainer import Multiplier, Trainer, learning_rate, rule_for, seed_everything
from tests.training.runs import same


class TinyTask(Task):
    """A small net with dropout and batch norm, so that random state and buffers matter."""

    def __init__(self, batch_size=4, poison=None, delay=0.0):
        seed_everything(1)
        self.model = nn.Sequential()
        self.model.add_module("head", nn.Linear(6, 16))
        self.model.add_module("norm", nn.BatchNorm1d(16))
        self.model.add_module("drop", nn.Dropout(0.3))
        self.model.add_module("out", nn.Linear(16, 3))
        self.model.add_module("frozen", nn.Linear(3, 3).requires_grad_(False))
        self.batch_size, self.poison, self.delay = batch_size, poison, delay
        self.snapshots = []

    def batch(self, index, rank=0, processes=1):
        time.sleep(self.delay)
        generator = torch.Generator().manual_seed(100 + index)
        x = torch.randn(self.batch_size, 6, generator=generator)
        if index == self.poison:
            x[0, 0] = float("nan")
        return {"x": x, "y": x[:, :3] ** 2, "names": [f"picture-{index}-{i}" for i in range(self.batch_size)]}

    def sample_names(self, batch):
        return batch["names"]

    def losses(self, batch):
        error = (self.model(batch["x"]) - batch["y"]) ** 2
        return {"loss": error.mean(), "worst": error.max()}

    def evaluate(self, step):
        self.snapshots.append((step, self.model.training))
        torch.rand(7)  # must not disturb the run
        return {"val": 0.5}, {"look": Image.new("RGB", (4, 4))}

    def export(self, folder):
        folder.mkdir(exist_ok=True)
        save_file(
            {name: value.clone() for name, value in self.model.state_dict().items()}, folder / "model.safetensors"
        )


def settings(**changes):
    values = {
        "steps": 12, "batch_size": 4, "lr": 1e-2, "warmup_steps": 3, "seed": 3, "workers": 0,
        "log_every": 2, "checkpoint_every": 4,
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})


def train(folder, resume=False, task=None, **changes):
    task = task or TinyTask()
    trainer = Trainer(task, settings(**changes), folder, device="cpu", tensorboard=False, progress=False)
    return load_file(trainer.run(resume=resume) / "model.safetensors")


class StopError(Exception):
    pass


class StoppingTask(TinyTask):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def after_step(self, step):
        if step == self.at:
            raise StopError


def test_lr_schedule_golden():
    golden = json.loads((Path(__file__).parents[1] / "golden" / "lr_schedule.json").read_text())
    for total, rows in golden["table"].items():
        plan = settings(steps=int(total), warmup_steps=1500)
        for step, high, low in rows:
            for base, expected in ((golden["lr_mult_10_group"], high), (golden["base_lr"], low)):
                assert learning_rate(step, base, plan) == pytest.approx(expected, rel=1e-12)


def test_schedule_edges():
    assert [learning_rate(step, 1.0, settings(steps=10)) for step in (10, 99)] == [1e-6, 1e-6]
    assert learning_rate(5, 0.0, settings(steps=10)) == 0.0  # a rule that keeps a part as it is


def test_longest_rule_wins():
    keys = ["norm", "head", "backbone", "text_encoder"]
    assert rule_for("decode_head.norm1", keys) == "head"
    assert rule_for("backbone.norm", keys) == "backbone"
    assert rule_for("head.norm.text_encoder.weight", keys) == "text_encoder"
    assert rule_for("other", keys) == ""


def test_multipliers_reach_the_optimizer(tmp_path):
    rules = {"norm": Multiplier(decay=0), "head": Multiplier(lr=10)}
    trainer = Trainer(TinyTask(), settings(multipliers=rules), tmp_path, device="cpu", progress=False)
    by_key = {group["key"]: group for group in trainer.optimizer.param_groups}
    assert by_key["norm"]["weight_decay"] == 0 and by_key["norm"]["initial_lr"] == pytest.approx(1e-2)
    assert by_key["head"]["initial_lr"] == pytest.approx(0.1) and by_key["head"]["names"] == [
        "head.weight",
        "head.bias",
    ]
    assert by_key[""]["names"] == ["out.weight", "out.bias"]


def test_gradients_are_clipped_and_of_the_precision_asked_for(tmp_path):
    one = {"steps": 1, "warmup_steps": 0, "lr": 1.0, "optimizer": "sgd", "weight_decay": 0.0}
    start = dict(TinyTask().model.named_parameters())
    ends = [train(tmp_path / str(norm), **one, clip_norm=norm) for norm in (None, 0.01)]
    steps = [torch.cat([(end[name] - start[name]).flatten() for name in start]).norm().item() for end in ends]
    assert steps[0] > 0.02 and steps[1] == pytest.approx(0.01, rel=1e-3)
    assert not same(ends[0], train(tmp_path / "bf16", **one, precision="bf16"))


def test_unmatched_multiplier_is_an_error(tmp_path):
    with pytest.raises(LexisegError, match="'backbon'"):
        Trainer(TinyTask(), settings(multipliers={"backbon": Multiplier(lr=10)}), tmp_path, device="cpu")


def test_a_batch_whose_samples_are_compared_is_not_divided(tmp_path, monkeypatch):
    monkeypatch.setattr("lexiseg.processes.count", lambda: 2)
    task = TinyTask()
    task.divisible = False
    with pytest.raises(LexisegError, match=r"\(TinyTask\) compares the samples of a batch"):
        Trainer(task, settings(), tmp_path, device="cpu", progress=False)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "accumulate": 2, "clip_norm": 0.1}])
def test_resume_is_exact(tmp_path, changes):
    whole = train(tmp_path / "whole", **changes)
    with pytest.raises(StopError):
        train(tmp_path / "broken", task=StoppingTask(6), **changes)
    assert [path.name for path in find_checkpoints(tmp_path / "broken" / "checkpoints")] == ["step-00000004"]
    torch.rand(5)
    assert same(whole, train(tmp_path / "broken", resume=True, **changes))
    assert not same(whole, train(tmp_path / "other", **{**changes, "seed": 4}))


def test_workers_snapshots_and_logging_do_not_change_results(tmp_path):
    whole = train(tmp_path / "a")
    assert same(whole, train(tmp_path / "b", workers=2, snapshot_every=3, log_every=5, checkpoint_every=100))
    assert sorted(path.name for path in (tmp_path / "b" / "samples").iterdir())[0] == "step-00000003-look.png"
    logs = [map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines()) for run in "ab"]
    losses = [[record["loss"] for record in log if "loss" in record] for log in logs]
    resting = TinyTask()
    resting.model.eval()
    assert same(whole, train(tmp_path / "c", task=resting))
    assert 2 * sum(losses[0]) == pytest.approx(5 * losses[1][0] + 5 * losses[1][1] + 2 * losses[1][2])  # each a mean


def test_snapshot_runs_in_evaluation_mode(tmp_path):
    task = TinyTask()
    train(tmp_path, task=task, snapshot_every=5)
    assert task.snapshots == [(5, False), (10, False), (12, False)]


def test_accumulation_equals_a_larger_batch(tmp_path):
    class Whole(TinyTask):
        def __init__(self, parts):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 3))
            self.parts = parts

        def batch(self, index, rank=0, processes=1):
            parts = [TinyTask.batch(self, index * self.parts + part) for part in range(self.parts)]
            return {"x": torch.cat([p["x"] for p in parts]), "y": torch.cat([p["y"] for p in parts]), "names": []}

        def losses(self, batch):
            return {"loss": ((self.model(batch["x"]) - batch["y"]) ** 2).mean()}

    seed_everything(0)
    sgd = {"optimizer": "sgd", "lr": 0.1}  # AdamW would not notice gradients of another size
    small = train(tmp_path / "small", task=Whole(1), accumulate=2, **sgd)
    large = train(tmp_path / "large", task=Whole(2), **sgd)
    for name in small:
        torch.testing.assert_close(small[name], large[name], rtol=1e-4, atol=1e-6)
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("small", "large")]
    for parts, whole in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"]) and parts["grad_norm"] == pytest.approx(whole["grad_norm"])


def test_log_has_every_number_and_resume_drops_the_tail(tmp_path):
    with pytest.raises(StopError):
        train(tmp_path, task=StoppingTask(6), snapshot_every=4)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "loss": 1')
    train(tmp_path, resume=True, snapshot_every=4)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert {"loss", "worst", "lr", "grad_norm", "time/step_seconds", "time/data_seconds"} <= records[0].keys()
    assert [record["step"] for record in records if "val" in record] == [4, 8, 12]


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    Trainer(TinyTask(), settings(), tmp_path, device="cpu", progress=False).run()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_without_tensorboard_a_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Trainer(TinyTask(), settings(steps=1), tmp_path, device="cpu", progress=False).run()
    assert "TensorBoard is not installed" in caplog.text and (tmp_path / "metrics.jsonl").stat().st_size


def test_a_run_in_a_folder_whose_name_is_not_utf8(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    trainer = Trainer(TinyTask(), settings(steps=2), folder, device="cpu", progress=False)
    trainer.run(stop_after=1)
    assert "only metrics.jsonl is written" in caplog.text and (folder / "metrics.jsonl").stat().st_size
    trainer.run(resume=True)


def test_batches_come_in_order_whoever_makes_them():
    for workers in (0, 1, 2):
        assert list(prefetch(lambda index: index**2, range(3, 20, 4), workers=workers)) == [9, 49, 121, 225, 361]
    assert set(prefetch(lambda _: torch.get_num_threads(), range(4), workers=2)) == {1}


def _killed(index):
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


class KillingTask(TinyTask):
    """Its worker is killed while the main process computes, where torch says so at once."""

    def after_step(self, step):
        multiprocessing.active_children()[0].kill()
        time.sleep(60)


def test_a_killed_worker_is_one_sentence(tmp_path):
    with pytest.raises(LexisegError, match="background process"):
        list(prefetch(_killed, range(5), workers=1))
    with pytest.raises(LexisegError, match="background process"):
        train(tmp_path, task=KillingTask(), workers=1)


def _told_to_stop(index):
    os.kill(os.getpid(), signal.SIGTERM)
    return index


def test_workers_leave_stopping_to_the_main_process():
    assert list(prefetch(_told_to_stop, range(3), workers=1)) == [0, 1, 2]


def _left_alone(index: int) -> int:
    """In a worker: the main process takes hold of a batch and ends before it has it."""
    address, _ = vars(resource_sharer.DupFd(0))["_id"]
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(address)
    time.sleep(0.3)
    return index


def test_a_worker_that_is_left_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Its traceback would be the last that is read of a training that was stopped."""
    assert list(prefetch(_left_alone, range(2), workers=1)) == [0, 1]
    assert capfd.readouterr().err == ""


def test_a_users_mistake_in_a_worker_keeps_its_sentence():
    def make(index):
        raise LexisegError(f"The picture {index} is broken.")

    for workers in (0, 1):
        with pytest.raises(LexisegError, match=r"^The picture 7 is broken\.$"):
            list(prefetch(make, [7], workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_nan_stops_with_step_and_names(tmp_path, workers):
    with pytest.raises(LexisegError, match=r"nan at step 9 \(samples: picture-9-0, ") as caught:
        train(tmp_path, task=TinyTask(poison=9), workers=workers)
    assert "step-00000008" in str(caught.value)
    kept = find_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step-00000004", "step-00000008"]
    assert all(torch.isfinite(value).all() for value in load_file(kept[-1] / "model.safetensors").values())


def test_non_finite_gradient_stops(tmp_path):
    class Steep(TinyTask):
        def losses(self, batch):
            return {"loss": (self.model(batch["x"]) * 0).abs().sqrt().mean()}

    with pytest.raises(LexisegError, match="gradient is nan at step 0"):
        train(tmp_path, task=Steep())


def test_a_training_that_learns_nothing_is_noted_once(tmp_path):
    class Flat(TinyTask):
        def losses(self, batch):
            return {"loss": (self.model(batch["x"]) * 0).mean() + 7}

    with pytest.warns(LexisegWarning, match="exactly 0, so nothing is learned") as noted:
        train(tmp_path, task=Flat())
    assert len(noted) == 1


def test_a_second_run_needs_resume(tmp_path):
    train(tmp_path)
    with pytest.raises(LexisegError, match="--resume"):
        train(tmp_path)
    assert (tmp_path / "model" / "model.safetensors").exists()
    train(tmp_path, resume=True)  # finished already: exports again
    with pytest.raises(LexisegError, match=r"'lr' was 0\.01 and is now 0\.02"):
        train(tmp_path, resume=True, lr=0.02)
    with pytest.raises(LexisegError, match=r"'power' was not set and is now 0\.5"):
        train(tmp_path, resume=True, power=0.5)


def test_a_run_begun_before_classes_were_told_apart_goes_on(tmp_path):
    def go_on(stop_after, **identity):
        trainer = Trainer(TinyTask(), settings(), tmp_path, identity=identity, device="cpu", progress=False)
        trainer.run(resume=True, stop_after=stop_after)

    go_on(4, pictures="6")
    go_on(8, pictures="6", classes="3")
    with pytest.raises(LexisegError, match="'classes' was 3 and is now 4"):
        go_on(12, pictures="6", classes="4")


def test_keeps_the_newest_checkpoints(tmp_path):
    train(tmp_path, checkpoint_every=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010", "step-00000012"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "rng-0.safetensors"])
def test_damaged_checkpoint_is_named(tmp_path, name):
    train(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000012" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(LexisegError, match=name):
        train(tmp_path, resume=True)


def test_checkpoint_of_another_model(tmp_path):
    train(tmp_path)
    other = TinyTask()
    other.model.add_module("more", nn.Linear(3, 3))
    with pytest.raises(LexisegError, match="'more"):
        train(tmp_path, resume=True, task=other)
