"""Runs that were stopped, moved, lengthened, judged on the way or tampered with; and models from all their folders."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import lexiseg
from lexiseg.analysis.figures import curves_figure
from lexiseg.cli import main
from lexiseg.clip.model import save_clip
from lexiseg.data.base import Sample
from lexiseg.data.picture_world import write_voc
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.losses.masks import exclusive_losses, mask_losses
from lexiseg.recipes import load_recipe
from lexiseg.training.run import build_task
from lexiseg.training.segmentation import SegmentationTask, class_weights, training_vocabulary
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model
from lexiseg.weights.runs import find_checkpoints
from tests.towers import small_clip
from tests.training import runs
from tests.training.runs import quietly, same


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_clip(small_clip(), folder / "clip")
    write_voc(folder / "data", num_train=6, num_val=2, size=32)
    return folder


def recipe_of(place: Path, root: Path | str | None = None, **changes: Any) -> Any:
    data = {"source": "own", "root": str(root or place / "data"), "augment": "light", "crop": 32}
    return runs.recipe_of(place / "clip", data=data, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run that was stopped half way."""
    quietly(recipe_of(place), place / "run", stop_after=2)
    return place / "run"


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return quietly(recipe_of(place), place / "whole")


def test_a_run_goes_on_where_its_data_are_named_otherwise(
    place: Path, run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(place / "data", moved)
    shutil.copytree(place / "clip", tmp_path / "clip")
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(
        tmp_path, "elsewhere", model={"system": "zegclip", "clip": "clip", "options": runs.OPTIONS["zegclip"]}
    )
    assert same(weights(quietly(recipe, Path("run"), resume=True)), weights(whole))
    first = next((moved / "JPEGImages").iterdir()).stem
    (moved / "ImageSets/Segmentation/train.txt").write_text(f"{first}\n", encoding="utf-8")
    with pytest.raises(LexisegError, match=r"'pictures' was 6 .* and is now 1 "):
        quietly(recipe, Path("run"), resume=True)
    renamed = (moved / "classes.txt").read_text(encoding="utf-8").replace("grass", "lawn")
    (moved / "classes.txt").write_text(renamed, encoding="utf-8")
    with pytest.raises(LexisegError, match=r"'classes' was (\d+) \(\w+\) and is now \1 \(\w+\);"):
        quietly(recipe, Path("run"), resume=True)


def test_a_finished_run_is_made_longer(place: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parent, tmp_path / "run")
    longer = recipe_of(place, train={"steps": 6})
    with pytest.warns(LexisegWarning, match=r"had 4 steps and now has 6.*learning rate at step 4 is"):
        quietly(longer, tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert load_recipe(tmp_path / "run/recipe.yaml").train.steps == 6
    with pytest.raises(LexisegError, match="'steps' was 6 and is now 4"):
        quietly(recipe_of(place), tmp_path / "run", resume=True)
    assert load_recipe(tmp_path / "run/recipe.yaml").train.steps == 6  # what was refused leaves no trace


def test_whatever_train_wrote_is_a_model(run: Path, whole: Path, tmp_path: Path) -> None:
    found = find_checkpoints(whole.parent / "checkpoints")
    assert same(weights(whole.parent), weights(whole)) and same(weights(found[-1]), weights(whole))
    assert not same(weights(found[0]), weights(whole)) and same(weights(found[0]), weights(run))
    assert load_model(found[0]).metadata["steps"] == 2
    shutil.copytree(whole.parent, tmp_path / "killed", ignore=shutil.ignore_patterns("model"))
    assert same(weights(tmp_path / "killed"), weights(whole))
    assert lexiseg.load(tmp_path / "killed").model.system == "zegclip"
    shutil.copytree(found[-1], tmp_path / "alone")
    with pytest.raises(LexisegError, match="the rest of the model should be in"):
        load_model(tmp_path / "alone")


def test_the_best_is_kept_and_patience_ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = (10, 30, 20, 30, 40, 0)
    monkeypatch.setattr(SegmentationTask, "evaluate", lambda task, step: ({"val/hiou": values[step - 1]}, {}))
    judged = {"steps": 6, "snapshot_every": 1, "checkpoint_every": 1, "keep_best": "val/hiou", "patience": 2}
    recipe = recipe_of(place, train=judged, evaluation={"pictures": 0, "num_samples": 1})
    quietly(recipe, tmp_path / "run")
    assert "val/hiou has not exceeded its 30 of step 2 for 2 evaluations." in caplog.text  # step 4 has 30, too
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps) == 4  # two evaluations without more than the 30 of step 2
    assert load_model(tmp_path / "run/best").metadata["steps"] == 2
    assert load_model(tmp_path / "run/model").metadata["steps"] == 4
    # As often as it is resumed: the log says that patience ran out. More patience goes on, to the 40 of step 5.
    quietly(recipe, tmp_path / "run", resume=True)
    assert load_model(tmp_path / "run").metadata["steps"] == 4
    quietly(
        recipe_of(place, train={**judged, "patience": 3}, evaluation={"pictures": 0, "num_samples": 1}),
        tmp_path / "run",
        resume=True,
    )
    assert load_model(tmp_path / "run/best").metadata["steps"] == 5
    with pytest.raises(LexisegError, match="is 'val/iou', but what is measured is val/pacc, "):
        quietly(recipe_of(place, train={**judged, "keep_best": "val/iou"}, evaluation={"pictures": 0}), tmp_path / "b")
    assert not (tmp_path / "b/metrics.jsonl").exists()  # at once, not at the first evaluation
    monkeypatch.setattr(SegmentationTask, "evaluate", lambda task, step: ({"val/pacc": 1.0}, {}))
    with pytest.raises(LexisegError, match="at step 1 do not show; raise evaluation"):
        quietly(recipe, tmp_path / "c")
    with pytest.raises(LexisegError, match="set 'snapshot_every'"):
        recipe_of(place, train={"keep_best": "val/hiou"})


def test_patience_counts_no_stop_half_way(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {2: 30, 3: 10, 4: 40, 6: 0}
    monkeypatch.setattr(SegmentationTask, "evaluate", lambda task, step: ({"val/hiou": values[step]}, {}))
    judged = {"steps": 6, "snapshot_every": 2, "checkpoint_every": 1, "keep_best": "val/hiou", "patience": 1}
    recipe = recipe_of(place, train=judged, evaluation={"pictures": 0, "num_samples": 1})
    quietly(recipe, tmp_path / "run", stop_after=3)
    quietly(recipe, tmp_path / "run", resume=True)
    assert load_model(tmp_path / "run/model").metadata["steps"] == 6
    assert load_model(tmp_path / "run/best").metadata["steps"] == 4


def test_a_diverged_training_names_the_rate_at_a_snapshot_too(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, train={"lr": 1e30, "snapshot_every": 1}, evaluation={"pictures": 0, "num_samples": 1})
    with pytest.raises(LexisegError, match=r"after step 1 hold NaN .*; there is no checkpoint.*; lower the learning"):
        quietly(recipe, tmp_path / "run")


def test_training_on_nothing_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(LexisegError, match="Every learning rate is 0"):
        quietly(recipe_of(place, train={"multipliers": {"": {"lr": 0}}}), tmp_path / "run")
    shutil.copytree(place / "data", tmp_path / "void")
    for path in (tmp_path / "void/SegmentationClass").iterdir():
        with Image.open(path) as label:
            size = label.size
        Image.new("L", size, 255).save(path)
    with pytest.raises(LexisegError, match="no pixel of a trained class"):
        quietly(recipe_of(place, tmp_path / "void"), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tampered_run_gives_one_sentence(place: Path, run: Path, tmp_path: Path) -> None:
    """No other weights than were saved, ever; and no traceback."""
    rng, recipe = random.Random(3), recipe_of(place)
    for turn in range(24):
        copy = tmp_path / str(turn)
        shutil.copytree(run, copy)
        victims = [path for path in sorted((copy / "checkpoints").rglob("step-*/*")) if path.is_file()]
        victim = victims[turn % len(victims)]
        content = bytearray(victim.read_bytes())
        kind = turn // len(victims) % 4
        if kind == 0:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content = content[: rng.randrange(len(content))]
        elif kind == 2:
            start = rng.randrange(len(content))
            content[start : start + 8] = rng.randbytes(8)
        victim.write_bytes(content)
        if kind == 3:
            victim.unlink()
            if victim.name == "state.json":
                continue  # no checkpoint any more
        with pytest.raises(LexisegError, match="damaged") as caught:
            quietly(recipe, copy, resume=True)
        assert "\n" not in str(caught.value)
    (tmp_path / "0/metrics.jsonl").write_bytes(b'\xff\n{"step": "x"}\n[[[[\n')
    shutil.rmtree(tmp_path / "0/checkpoints")
    shutil.copytree(run / "checkpoints", tmp_path / "0/checkpoints")
    quietly(recipe, tmp_path / "0", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg])  # as schedulers do, with all its workers
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_says_how_to_go_on(place: Path, tmp_path: Path, number: int, code: int, send: Any) -> None:
    path = tmp_path / "long.yaml"
    steps = {"steps": 100_000, "checkpoint_every": 2, "log_every": 1, "workers": 1}
    path.write_text(yaml.safe_dump(recipe_of(place, train=steps).model_dump(mode="json")))
    command = [sys.executable, "-m", "lexiseg", "train", str(path), "-o", str(tmp_path / "run"), "--no-tensorboard"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stderr=said, stdout=subprocess.DEVNULL, env=alone, preexec_fn=os.setpgrp)
        until = time.monotonic() + 300
        while not find_checkpoints(tmp_path / "run/checkpoints") and time.monotonic() < until:
            time.sleep(0.2)
        send(process.pid, number)
        assert process.wait(60) == code, (tmp_path / "said").read_text()
    last = (tmp_path / "said").read_text().strip().splitlines()[-1]
    assert last.startswith("Stopped after step ") and "--resume continues" in last and "step-0000" in last


def test_class_weights(place: Path, tmp_path: Path) -> None:
    plain = build_task(recipe_of(place))
    names = plain.vocabulary.names
    doubled = build_task(recipe_of(place, train={"class_weights": dict.fromkeys(names, 2.0)}))
    by_frequency = build_task(recipe_of(place, train={"class_weights": "frequency"})).model.class_weights
    batch = plain.batch(0)
    plain.model.eval(), doubled.model.eval()  # no dropout
    torch.testing.assert_close(doubled.losses(batch)["loss"], 2 * plain.losses(batch)["loss"])
    counts = torch.zeros(256)
    for index in range(len(plain.dataset)):
        counts += torch.bincount(plain.dataset[index].label.flatten(), minlength=256)
    rarest = min(
        (float(counts[i]), n) for i, n in enumerate(plain.dataset.vocabulary.names) if counts[i] and n in names
    )
    assert float(by_frequency[names.index(rarest[1])]) == float(by_frequency.max()) > 1 > float(by_frequency.min())
    with pytest.raises(LexisegError, match="'nothing', which is no class"):
        build_task(recipe_of(place, train={"class_weights": {"nothing": 2.0}}))


def test_frequency_knows_nothing_of_unseen_classes() -> None:
    """Self-training has the text of all classes, and the labels on disk may show where unseen ones are."""
    trained = training_vocabulary(runs.Flat.vocabulary, setting="transductive")
    cat, sky, dog = class_weights("frequency", runs.Flat(), trained).tolist()
    assert trained.names == ("cat", "sky", "dog") and sky == 1
    assert cat + dog == pytest.approx(2) and dog / cat == pytest.approx((60 / 12) ** 0.5)


class Rare(runs.Flat):
    """One class has one pixel, and 39 others 10,000 each."""

    names = tuple(f"word {index}" for index in range(40))
    vocabulary = Vocabulary.parse(names).with_seen(names)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        label = torch.tensor([*torch.arange(39).repeat(10_000), 39])[None]
        return Sample(torch.zeros(3, *label.shape, dtype=torch.uint8), label, "rare")


def test_the_factor_of_a_rare_class_has_a_limit() -> None:
    """39 classes are a hundredth as rare as the last one, so the mean is (39 + 100) / 40 of theirs."""
    weights = class_weights("frequency", Rare(), training_vocabulary(Rare.vocabulary, setting="inductive"))
    assert weights[39] == 10 and weights[:39].tolist() == pytest.approx([40 / 139] * 39)


@pytest.mark.parametrize("exclusive", [False, True])
def test_class_weights_in_the_losses(exclusive: bool) -> None:
    """The loss is the weighted sum of those of single classes, and the gradient is its."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float32, requires_grad=True)
    labels = torch.randint(0, 3, (2, 8, 8), generator=generator)
    weights = torch.tensor([0.5, 1.0, 3.0])

    def loss(values: torch.Tensor, weights: torch.Tensor = weights) -> torch.Tensor:
        if exclusive:
            return exclusive_losses(values, labels, dice_weight=1.0, weights=weights).total
        return mask_losses(values, labels, weights=weights).total

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    step = torch.randn(logits.shape, generator=generator) * 1e-2
    with torch.no_grad():
        change = loss(logits + step) - loss(logits - step)
    torch.testing.assert_close(change, 2 * (gradient * step).sum(), rtol=2e-2, atol=1e-4)
    single = torch.stack([loss(logits, one) for one in torch.eye(3)])
    torch.testing.assert_close(loss(logits), (weights * single).sum())


def test_curves_of_runs(tmp_path: Path) -> None:
    for name, values in {"one": (10, 20), "two": (15, 12)}.items():
        lines = [json.dumps({"step": 2 * i, "val/hiou": value, "loss": 1.0}) for i, value in enumerate(values)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "va']), encoding="utf-8")
    figure = curves_figure([tmp_path / "one", tmp_path / "two"], ["hiou", "miou"])
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    assert drawn == {"one": ([0, 2], [10, 20]), "two": ([0, 2], [15, 12])}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]  # one, of all panels
    assert main(["draw", "curves", str(tmp_path / "one"), "--metrics", "hiou", "-o", str(tmp_path / "c.png")]) == 0
    assert Image.open(tmp_path / "c.png").width > 100
    for wrong, words in (([tmp_path / "none"], "has no training log"), ([], "No run was given")):
        with pytest.raises(LexisegError, match=words):
            curves_figure(wrong)
    with pytest.raises(LexisegError, match="No metric was given"):
        curves_figure([tmp_path / "one"], [])
    with pytest.raises(LexisegError, match="measured none of miou_seen"):
        curves_figure([tmp_path / "one"], ["miou_seen"])
