"""The papers' claims are comparisons that can be made, and their intervals say what they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.claims import EXTRAS, Counts, Study, alone, compare, labels_of, row_of
from benchmarks.claims_page import METRICS, claims, collect, page, stated
from lexiseg.data.picture_world import PictureWorld

ROOT = Path(__file__).parents[2]
MADE = [claim for claim in claims() if not claim.unseen_here]
FIRST = ("zegclip-keeps-unseen", "relationship-descriptor", "non-exclusive-loss", "cascade", "nga", "gps", "anchors")


def counts(right: float, scenes: int = 30, seed: int = 0) -> Counts:
    """Scenes of four classes, two of them seen, of whose 100 pixels each about ``right`` are found."""
    rng = np.random.default_rng(seed)
    found = rng.binomial(100, right, (scenes, 4))
    labelled, missed = np.full((scenes, 4), 100), 100 - found
    classes = np.stack([found, found + np.roll(missed, 1, axis=1), labelled, np.roll(missed, 1, axis=1)], axis=1)
    places = np.stack([found, labelled], axis=-1)
    return Counts(classes, places, [0, 1], [2, 3])


def test_every_claim_compares_two_systems_that_there_are() -> None:
    assert len({claim.claim for claim in claims()}) == len(claims())
    assert {*FIRST, "maft-zsseg", "maft-freeseg", "maft-zegformer"} <= {claim.claim for claim in MADE}
    study = Study(Path("nowhere"), world="picture-world-2", clip="a-clip")
    for claim in MADE:
        system, baseline = (study.recipe(name, 3) for name in (claim.system, claim.baseline))
        assert system != baseline and claim.metric in METRICS and claim.masks in ("proposals", "labels")
        for recipe in (system, baseline):
            assert recipe.data.source == "picture-world-2" and recipe.model.clip == "a-clip" and recipe.train.seed == 3
        if claim.system.startswith("one-stage") and claim.baseline.startswith("one-stage"):
            whole = [recipe.train.steps + (recipe.initial_steps or 0) for recipe in (system, baseline)]
            assert whole[0] == whole[1] and system.train.lr == baseline.train.lr, claim.claim
        assert system.model.options.get("init", "random") == "random"


def test_a_small_study_scales_all_lengths() -> None:
    study = Study(Path("nowhere"), scale=0.1, curves=False)
    recipe = study.recipe("one-stage:zegclip-self-training", 0)
    assert (recipe.train.steps, recipe.initial_steps, recipe.train.snapshot_every) == (150, 150, 0)
    assert study.recipe("decoupled:pooled", 0).train.steps == 0


def test_an_interval_is_of_seeds_and_scenes() -> None:
    better = [(counts(0.8, seed=seed), counts(0.6, seed=seed + 9)) for seed in range(3)]
    found = compare(better, "miou_unseen", draws=200)
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert compare([(b, a) for a, b in better], "miou_unseen", draws=200)["high"] < 0
    same = compare([(better[0][0], better[0][0])], "hiou", draws=50)
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)
    # Seeds that disagree make it wider than scenes alone do.
    mixed = compare([better[0], better[1][::-1]], "miou_unseen", draws=200)
    assert mixed["low"] < 0 < mixed["high"]


def test_the_metrics_are_those_of_the_evaluation() -> None:
    from lexiseg.evaluation.metrics import Confusion

    rng = np.random.default_rng(1)
    scenes, whole = [], Confusion(4, seen=[0, 1])
    for _ in range(3):
        label, guess = rng.integers(0, 4, (2, 50))
        one = Confusion(4, seen=[0, 1])
        for each in (one, whole):
            each.update(guess, label)
        scenes.append(one.counts)
    ours = Counts(np.stack(scenes), np.ones((3, 4, 2), int), [0, 1], [2, 3]).metrics(np.ones((1, 3)))
    theirs = whole.compute([0, 1], [2, 3])
    for name in ("miou", "miou_seen", "miou_unseen", "hiou", "unseen_to_seen"):
        assert ours[name][0] == pytest.approx(100 * getattr(theirs, name))


def test_what_was_not_measured_is_undecided(tmp_path: Path) -> None:
    results = collect(tmp_path)
    assert len(results["rows"]) == len(claims()) and {row["verdict"] for row in results["rows"]} == {"undecided"}
    assert all(row["seeds"] == 0 and row["difference"] is None for row in results["rows"])
    text = page(results)
    assert all(f"`{claim.claim}`" in text for claim in MADE)
    assert all(claim.unseen_here in text for claim in claims() if claim.unseen_here)
    measured = {**stated(MADE[0]), **compare([(counts(0.8), counts(0.6))], MADE[0].metric), "seeds": 2}
    measured |= {"verdict": "holds", "world": "picture-world-2", "split": "val", "scenes": 30, "steps": 10}
    (tmp_path / "claims.json").write_text(json.dumps({MADE[0].claim: measured}))
    extra = {"system": "one-stage:zegclip", "extra": "edges", "split": "val", "time": 1.25, "seeds": 2, "scenes": 30}
    extra |= {"against": "none", "values": measured["values"], "difference": 1.5, "low": 0.5, "high": 2.5}
    extras = {"rows": [extra], "command": "a command", "machine": {"processor": "a processor"}}
    (tmp_path / "extras.json").write_text(json.dumps(extras))
    text = page(collect(tmp_path))
    assert "## Holds" in text and "| +1.5 (+0.5 to +2.5) | 1.25 |" in text


def test_extras_fit_any_system() -> None:
    import lexiseg

    segmenter = lexiseg.load("zegclip-emoji", device="cpu")
    dataset = PictureWorld("val", size=128)
    image, vocabulary = dataset[0].image, dataset.vocabulary
    found = {extra: labels_of(segmenter, image, vocabulary, extra) for extra in EXTRAS}
    assert torch.equal(found["none"], segmenter.predict(image, vocabulary).label_map.long())
    assert torch.equal(found["edges"], segmenter.with_refinement("edges").predict(image, vocabulary).label_map.long())
    for extra in EXTRAS[1:6]:
        assert 0.6 < (found[extra] == found["none"]).float().mean() < 1, extra
    alone = lexiseg.load("naclip/clip-emoji", device="cpu").predict(image, vocabulary).label_map
    assert (found["frozen alone"] == alone).float().mean() > 0.95
    # The border has one look alone.
    assert torch.equal(found["shift"][:3], found["none"][:3]) and not torch.equal(found["shift"], found["shift+edges"])


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path / "run"):
        with pytest.raises(BlockingIOError), alone(tmp_path / "run"):
            pass
        with alone(tmp_path / "another"):
            pass
    with alone(tmp_path / "run"):
        pass
    # A claim of which another process is at a part has no row yet, and its other parts are finished meanwhile.
    study = Study(tmp_path, clip="clip-emoji", world="picture-world-2", scenes=1)
    claim = next(claim for claim in MADE if claim.claim == "gps-untrained-labels")
    with alone(tmp_path / "decoupled-pooled-gps-0-labels"):
        assert row_of(claim, study, [0]) is None
    assert (tmp_path / "decoupled-pooled-0-labels" / "counts-val-1-labels.npz").is_file()
    assert not (tmp_path / "decoupled-pooled-gps-0-labels").exists()
    row = row_of(claim, study, [0])
    assert row is not None and row["scenes"] == 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.claims", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_one_claim_is_reproduced_small(tmp_path: Path) -> None:
    small = ("--reproduce", "--scale", "0.0004", "--scenes", "2", "--runs", str(tmp_path))
    result = run("relationship-descriptor", *small)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["claim"] == "relationship-descriptor" and row["scenes"] == 2 and row["steps"] == 1
    # One seed of something trained decides nothing.
    assert row["seeds"] == 1 and row["verdict"] == "undecided" and row["low"] <= row["high"]
    assert json.loads((tmp_path / "claims.json").read_text())["relationship-descriptor"] == row
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "one-stage-zegclip-0",
        "one-stage-no-descriptor-0",
        "scenes",
    }


def test_what_trains_nothing_is_judged_inside_the_labels_masks_without_proposals(tmp_path: Path) -> None:
    small = ("--scenes", "2", "--runs", str(tmp_path), "--clip", "clip-emoji")
    result = run("gps-untrained-labels", *small)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert (row["seeds"], row["steps"], row["scenes"], row["world"]) == (1, 0, 2, "picture-world-2")
    assert (row["verdict"] == "holds") == (row["low"] > 0) and row["values"]["system"]["interior_seen"] > 20


def test_a_claim_that_there_is_not() -> None:
    result = run("gravity")
    assert result.returncode == 2 and "no comparison for the claim 'gravity'" in result.stderr
