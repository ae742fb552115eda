"""The papers' claims on the picture world: pairs of systems trained with the same seeds and judged on the same scenes.

    python -m benchmarks.claims --list
    python -m benchmarks.claims --reproduce nga                     # one claim in minutes, at a small size
    python -m benchmarks.claims --runs runs/claims --seeds 0 1 2 3 4  # all, for days on two cores; may be stopped
    python -m benchmarks.claims --runs runs/claims --collect        # docs/results/claims.json and docs/claims.md

Claims are data (``claims.yaml``), systems are variants of a few recipes. A run is trained once, whatever number of
claims it takes part in, and what others start from (shapes, proposals, half of a training) is shared. Of every judged
scene the counts of each class are kept, so that an interval can be taken over seeds and scenes at once: both are drawn
anew, in pairs, 2,000 times.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import lexiseg
from benchmarks.claims_page import CURVES, METRICS, PLACES, Claim, claims, stated, write
from benchmarks.decoupled_world import judged_on
from benchmarks.training_free import border_of
from lexiseg.data.base import seen_ids, unseen_ids
from lexiseg.data.picture_world import PictureWorld, find_world
from lexiseg.errors import LexisegError
from lexiseg.evaluation.metrics import Confusion, harmonic_mean
from lexiseg.evaluation.proposals import evaluate_proposals
from lexiseg.evaluation.run import spread
from lexiseg.files import atomic_write, make_folder, write_json
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.region_base import RegionModel
from lexiseg.proposals.given import GroundTruth
from lexiseg.recipes import SegmentationRecipe, is_recipe, load_recipe
from lexiseg.refine import Refinement, refine
from lexiseg.scores import GridScores, Scores, WindowScores
from lexiseg.segmenter import Segmenter
from lexiseg.training.run import train
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights.runs import find_checkpoints

DRAWS = 2000
EXTRAS = (
    *("none", "edges", "shift", "shift+edges", "frozen", "frozen+edges", "frozen alone", "frozen alone+edges"),
    "frozen values",
)
SMALL: dict[str, Any] = {"scale": 0.05, "scenes": 20, "seeds": [0], "curves": False}


@contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Make ``path`` while no other process does; a `BlockingIOError` says that one of them is at it."""
    with Path(f"{path}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@dataclass(frozen=True)
class Study:
    """Where runs are, and what all of them share."""

    runs: Path
    world: str = "picture-world"  # the data set
    clip: str = "clip-emoji"  # the towers
    scale: float = 1.0  # factor on the steps of every training
    scenes: int | None = None  # how many of the split's are judged
    split: str = "val"
    curves: bool = True  # measure while training, too, the first seed of some

    def recipe(self, system: str, seed: int) -> SegmentationRecipe:
        """The recipe of a system in this study, or any other recipe by its name."""
        family, _, variant = system.partition(":")
        name = f"{family}-picture-world:{variant}" if family in ("one-stage", "decoupled", "training-free") else system
        recipe = load_recipe(name, {"model.clip": self.clip}, seed=seed)
        if not isinstance(recipe, SegmentationRecipe):
            raise LexisegError(f"The recipe '{name}' trains no segmentation system.")
        if recipe.data.source == "picture-world":
            shared = {"source": self.world, "cache_dir": self.runs.resolve() / "scenes"}
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=shared)})
        keys = ("steps", "warmup_steps", "snapshot_every")
        numbers = {key: self._scaled(getattr(recipe.train, key)) for key in keys}
        # Self-training starts from the checkpoint in the middle; scenes that are kept need no process to render them.
        numbers |= {"checkpoint_every": max(1, numbers["steps"] // 2), "workers": 0}
        if not (self.curves and system in CURVES and seed == 0):
            numbers["snapshot_every"] = 0
        update: dict[str, Any] = {"train": recipe.train.model_copy(update=numbers)}
        if recipe.initial_steps is not None:
            update["initial_steps"] = self._scaled(recipe.initial_steps)
        return recipe.model_copy(update=update)

    def _scaled(self, number: int) -> int:
        return max(1, round(number * self.scale)) if number else 0

    def trained(self, system: str, seed: int, masks: str = "proposals") -> Path:
        """The folder of a system's run, trained first, together with what it starts from, if need be.

        What is judged inside the labels' masks and trains nothing needs no trained proposals: it is built without.
        """
        recipe = self.recipe(system, seed)
        folder = self.runs / f"{system.replace(':', '-')}-{seed}"
        if masks == "labels" and not recipe.train.steps:
            options = {**recipe.model.options, "proposals": {"kind": "ground-truth"}}
            if "ensemble" in options:
                options["ensemble"] = {"rule": "region"}
            model = recipe.model.model_copy(update={"options": options})
            start = {"initial": None, "proposals_from": None, "model": model}
            recipe, folder = recipe.model_copy(update=start), Path(f"{folder}-labels")
        finished = folder / "model" / "config.json"
        if finished.is_file():
            return folder
        with alone(folder):
            if not finished.is_file():
                train(recipe.model_copy(update=self._starts(recipe, seed)), folder, resume=True, tensorboard=False)
        return folder

    def _starts(self, recipe: SegmentationRecipe, seed: int) -> dict[str, str]:
        """What a recipe starts from, as folders, trained first.

        Proposals are trained once, for all seeds; a self-training starts from the middle of its own seed's training.
        """
        shared = 0 if recipe.model.system in ("zsseg", "zegformer", "freeseg", "deop") else seed
        starts = {}
        for key in ("initial", "proposals_from", "teacher"):
            if is_recipe(name := getattr(recipe, key)):
                system = name.replace("-picture-world:", ":")
                folder = self.trained(system, shared)
                half = key == "initial" and recipe.initial_steps is not None
                starts[key] = str(find_checkpoints(folder / "checkpoints")[0] if half else folder / "model")
        return starts

    def counts(self, system: str, seed: int, masks: str = "proposals", world: str = "", extra: str = "none") -> Counts:
        """What a system makes of every scene, counted once and kept in its run's folder.

        Args:
            system: see `recipe`.
            seed: of its training.
            masks: "labels" judges a decoupled system with the labels' masks.
            world: the scenes' data set; "" is that of the study.
            extra: one of `EXTRAS`.
        """
        folder = self.trained(system, seed, masks)
        number = "all" if self.scenes is None else self.scenes
        notes = [note for note in (masks, world, extra) if note not in ("proposals", "", "none")]
        path = folder / f"{'-'.join(['counts', self.split, str(number), *notes])}.npz"
        dataset = self.dataset(world)
        if not path.is_file():
            with alone(path):
                segmenter = lexiseg.load(str(folder / "model"), device="cpu")
                found = judge(segmenter, dataset, self.scenes, masks, extra)
                with atomic_write(path) as temporary, temporary.open("wb") as file:
                    np.savez_compressed(file, **cast(Any, found))
        with np.load(path) as file:
            vocabulary = dataset.vocabulary
            return Counts(file["classes"], file["places"], seen_ids(vocabulary), unseen_ids(vocabulary))

    def dataset(self, world: str = "") -> PictureWorld:
        """The scenes that are judged."""
        split, scenes = cast(Any, self.split), self.runs / "scenes"
        return PictureWorld(split, world=find_world(world or self.world), size=256, cache_dir=scenes)


@cache
def frozen(clip: str, method: str) -> Segmenter:
    """The untrained opinion: CLIP's patches against the words, as a training-free method has them."""
    return lexiseg.load(f"{method}/{clip}", device="cpu")


def labels_of(segmenter: Segmenter, image: Tensor, vocabulary: Vocabulary, extra: str = "none") -> Tensor:
    """Labels (H, W) of a square picture, with one of `EXTRAS`, which any system can have at test time.

    "edges" is the package's refinement of that name; "shift" a second look at the picture without a border of half a
    patch, "frozen" one by the `frozen` CLIP: scores are averaged where they overlap, those of "frozen" at each patch.
    The frozen CLIP's method is NACLIP, with "frozen values" MaskCLIP, and "frozen alone" leaves the system out.
    """
    chosen = extra.split("+")
    if chosen == ["none"]:
        return segmenter.predict(image, vocabulary).label_map.long()
    policy, half = segmenter.model.window, segmenter.model.patch_size // 2
    side = policy.short_side or image.shape[-1]
    parts, boxes = [], []
    if "frozen alone" not in chosen:
        parts.append(segmenter.scores(image, vocabulary))
        boxes.append((0, 0, side, side))
    if "shift" in chosen:
        border, inner = round(half * image.shape[-1] / side), side - 2 * half
        cut = image[:, border:-border, border:-border]
        parts.append(segmenter.scores(cut, vocabulary, window=replace(policy, short_side=inner)))
        boxes.append((half, half, inner, inner))
    if chosen[0].startswith("frozen"):
        method = "maskclip" if chosen[0] == "frozen values" else "naclip"
        parts.append(frozen(segmenter.model.clip.name, method).scores(image, vocabulary, window=policy))
        # Patch by patch: over pixels, classes of two models that nearly tie take 30 times as long.
        places = (side // segmenter.model.patch_size,) * 2
        scores: Scores = GridScores(torch.stack([part.dense(places) for part in parts]).mean(0))
    else:
        scores = WindowScores(parts, boxes, (side, side)) if len(parts) > 1 else parts[0]
    return refine(scores, image, Refinement.parse("edges" if "edges" in chosen else "none"))[0]


@torch.inference_mode()
def judge(
    segmenter: Segmenter, dataset: PictureWorld, scenes: int | None, masks: str, extra: str
) -> dict[str, np.ndarray]:
    """Counts of every scene: ``classes`` (scenes, 4, C), see `Confusion`, and ``places`` (scenes, 4, 2).

    Places are the first four of `PLACES`; of each its right pixels and all of them are counted.
    """
    model, vocabulary = segmenter.model, dataset.vocabulary
    if masks == "labels" and isinstance(model, DecoupledModel):
        model.generator = GroundTruth()
        if isinstance(model, RegionModel):
            model.options = model.options.with_values({"ensemble": {"rule": "region"}})
    seen = torch.tensor(seen_ids(vocabulary))
    classes, places = [], []
    with judged_on(segmenter, dataset) as judged:
        for index in spread(len(dataset), scenes):
            sample = judged[index]
            labels = labels_of(segmenter, sample.image, vocabulary, extra)
            counted = Confusion(len(vocabulary), seen=seen.tolist())
            counted.update(labels.numpy(), sample.label.numpy())
            classes.append(counted.counts.astype(np.int32))
            border, known, right = border_of(sample.label), torch.isin(sample.label, seen), labels == sample.label
            parts = [(where & which) for where in (border, ~border) for which in (known, ~known)]
            places.append([[int((part & right).sum()), int(part.sum())] for part in parts])
    return {"classes": np.stack(classes), "places": np.asarray(places, np.int64)}


@dataclass(frozen=True)
class Counts:
    """What `judge` counted, and the metrics of scenes drawn from it."""

    classes: np.ndarray
    places: np.ndarray
    seen: list[int]
    unseen: list[int]

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics in percent of draws (D, scenes) of how often each scene is taken: (D,) each."""
        # As floating point numbers, whose products a library makes.
        weights, counts, places = (values.astype(float) for values in (weights, self.classes, self.places))
        sums = np.tensordot(weights, counts, axes=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = sums[:, 0] / (sums[:, 1] + sums[:, 2] - sums[:, 0])
            confused = sums[:, 3, self.unseen].sum(1) / sums[:, 2, self.unseen].sum(1)
            places = np.tensordot(weights, places, axes=1)
            right = places[..., 0] / places[..., 1]
        found = {
            "miou": np.nanmean(iou, axis=1),
            "miou_seen": np.nanmean(iou[:, self.seen], axis=1),
            "miou_unseen": np.nanmean(iou[:, self.unseen], axis=1),
            **{name: right[:, index] for index, name in enumerate(PLACES[:4])},
            "unseen_to_seen": confused,
        }
        means = zip(found["miou_seen"], found["miou_unseen"], strict=True)
        found["hiou"] = np.array([harmonic_mean(float(seen), float(unseen)) for seen, unseen in means])
        return {name: 100 * values for name, values in found.items()}


def compare(pairs: Sequence[tuple[Counts, Counts]], metric: str, *, draws: int = DRAWS) -> dict[str, Any]:
    """The difference of a metric between systems and baselines, with a 95 % interval.

    Args:
        pairs: system and baseline of each seed.
        metric: see `Counts.metrics`.
        draws: of seeds and scenes, both anew and for both sides alike.
    """
    rng = np.random.default_rng(0)
    scenes = len(pairs[0][0].classes)
    once = np.ones((1, scenes))
    whole = [[side.metrics(once) for side in pair] for pair in pairs]
    weights = rng.multinomial(scenes, np.full(scenes, 1 / scenes), size=draws)
    drawn = np.stack([pair[0].metrics(weights)[metric] - pair[1].metrics(weights)[metric] for pair in pairs])
    chosen = rng.integers(len(pairs), size=(len(pairs), draws))
    means = np.take_along_axis(drawn, chosen, axis=0).mean(axis=0)
    low, high = np.quantile(means, (0.025, 0.975))
    mean = {
        side: {name: float(np.mean([found[place][name][0] for found in whole])) for name in (*METRICS, *PLACES)}
        for place, side in enumerate(("system", "baseline"))
    }
    difference = mean["system"][metric] - mean["baseline"][metric]
    return {
        "difference": round(difference, 2),
        "low": round(float(low), 2),
        "high": round(float(high), 2),
        "values": {side: {name: round(value, 2) for name, value in found.items()} for side, found in mean.items()},
    }


def row_of(claim: Claim, study: Study, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Train and judge what a claim compares; its row, or None while another process is at a part of it."""

    def counts(system: str, seed: int) -> Counts | None:
        try:
            return study.counts(system, seed, claim.masks, claim.world)
        except BlockingIOError:
            return None

    sides = [(system, study.recipe(system, 0).train.steps > 0) for system in (claim.system, claim.baseline)]
    trained = any(trains for _, trains in sides)
    seeds = seeds if trained else [0]
    pairs = [[counts(system, seed if trains else 0) for system, trains in sides] for seed in seeds]
    if any(side is None for pair in pairs for side in pair):
        return None
    found = compare(cast(Any, pairs), claim.metric)
    decided = not trained or (len(pairs) > 1 and study.scale >= 1)
    verdict = "holds" if found["low"] > 0 else "does not hold" if found["high"] < 0 else "undecided"
    recipe, scenes = study.recipe(claim.system, 0), len(cast(Counts, pairs[0][0]).classes)
    return {
        **stated(claim),
        **found,
        "seeds": len(pairs),
        "verdict": verdict if decided else "undecided",
        "world": claim.world or study.world,
        "clip": study.clip,
        "split": study.split,
        "scenes": scenes,
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size,
    }


def measure(wanted: Sequence[Claim], study: Study, seeds: Sequence[int]) -> None:
    """Keep and print the rows of claims; several processes may share a folder of runs, each waits for the others."""
    while wanted:
        left = []
        for claim in wanted:
            row = row_of(claim, study, seeds)
            if row is None:
                left.append(claim)
                continue
            keep(row, study.runs)
            print(json.dumps(row), flush=True)
        if len(left) == len(wanted):
            time.sleep(2)
        wanted = left


def recalls(study: Study) -> list[dict[str, Any]]:
    """Recall of the generators that were trained, on the scenes of both worlds."""
    found = []
    for system in ("shapes:mask2former", "shapes:maskformer", "decoupled:proposals"):
        folder = study.runs / f"{system.replace(':', '-')}-0"
        if (folder / "model" / "config.json").is_file():
            segmenter = lexiseg.load(str(folder / "model"), device="cpu")
            steps = segmenter.model.metadata.get("steps")
            for world in ("picture-world", "picture-world-2"):
                scenes = replace(study, world=world).dataset()
                report = evaluate_proposals(segmenter, scenes, limit=study.scenes).to_dict()
                found.append({"proposals": system, "world": world, "steps": steps, **report})
    return found


def keep(row: dict[str, Any], runs: Path) -> None:
    """Put a row into the study's file."""
    path = runs / "claims.json"
    with alone(path, wait=True):
        rows = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        write_json(path, {**rows, row["claim"]: row})


def main() -> None:
    """Measure claims, or write their page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help="which; all of them by default")
    parser.add_argument("--list", action="store_true", help="list the claims, and stop")
    parser.add_argument("--reproduce", action="store_true", help="at a small size, for minutes instead of hours")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the runs")
    parser.add_argument("--world", default="picture-world-2", help="the data set")
    parser.add_argument("--clip", default="clip-world2", help="the towers, by name or folder")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of every training")
    parser.add_argument("--scenes", type=int, help="judge so many, not all")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="choices are made on val")
    parser.add_argument("--curves", action=argparse.BooleanOptionalAction, default=True, help="measure while training")
    parser.add_argument("--recall", action="store_true", help="measure the proposals that were trained")
    parser.add_argument("--collect", action="store_true", help="train nothing, only write the pages")
    if "--reproduce" in sys.argv:
        parser.set_defaults(**SMALL)
    said = parser.parse_args()
    known = {claim.claim: claim for claim in claims()}
    if said.list:
        print("\n".join(f"{name:28} {claim.says} ({claim.paper})" for name, claim in known.items()))
        return
    for name in said.claims:
        if name not in known or known[name].unseen_here:
            why = known[name].unseen_here if name in known else "`python -m benchmarks.claims --list` names them all"
            parser.error(f"there is no comparison for the claim '{name}': {why}.")
    torch.set_num_threads(1)
    runs = make_folder(said.runs)
    if said.collect:
        write(runs)
        return
    study = Study(runs, said.world, said.clip, said.scale, said.scenes, said.split, said.curves)
    if said.recall:
        print("wrote", write_json(runs / "recall.json", recalls(study)))
        return
    measure([known[name] for name in said.claims or known if not known[name].unseen_here], study, said.seeds)


if __name__ == "__main__":
    main()
