"""The papers' claims on the picture world: pairs of systems trained with the same seeds and judged on the same scenes.

    python -m benchmarks.claims --list
    python -m benchmarks.claims --reproduce nga                     # one claim in minutes, at a small size
    python -m benchmarks.claims --runs runs/claims --seeds 0 1 2 3 4  # all, for days on two cores; may be stopped
    python -m benchmarks.claims --runs runs/claims --collect        # docs/results/claims.json and docs/claims.md

Claims are data (``claims.yaml``), systems are variants of two recipes. A run is trained once, whatever number of claims
it takes part in, and what others start from (shapes, proposals, half of a training) is shared. Of every judged scene
the counts of each class are kept, so that an interval can be taken over seeds and scenes at once: both are drawn anew,
in pairs, 2,000 times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml

import lexiseg
from benchmarks.decoupled_world import judged_on
from benchmarks.training_free import BORDER, border_of
from lexiseg.analysis.curves import curves_figure
from lexiseg.data.base import seen_ids, unseen_ids
from lexiseg.data.picture_world import PictureWorld, find_world
from lexiseg.errors import LexisegError
from lexiseg.evaluation.metrics import Confusion, harmonic_mean
from lexiseg.evaluation.proposal_report import evaluate_proposals
from lexiseg.evaluation.run import spread
from lexiseg.files import atomic_write, make_folder, write_json, write_text
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.region_base import RegionModel
from lexiseg.proposals.given import GroundTruth
from lexiseg.recipes import SegmentationRecipe, load_recipe
from lexiseg.segmenter import Segmenter
from lexiseg.training.init import is_recipe
from lexiseg.training.run import train

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
DRAWS = 2000
SMALL: dict[str, Any] = {"scale": 0.05, "scenes": 20, "seeds": [0], "curves": False}
METRICS = {"miou": "mIoU", "miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU"}
PLACES = ("boundary_seen", "boundary_unseen", "interior_seen", "interior_unseen", "unseen_to_seen")
CURVES = ("zegclip", "finetune", "no-descriptor", "exclusive", "cascade", "spt-seg")
HEAD = """\
# The papers' claims

Made by `benchmarks/claims.py`; do not edit by hand. Each row trains two systems with the same seeds, on the recipes
`one-stage-picture-world` and `decoupled-picture-world`, which start and train as the papers do, and judges them on the
same scenes of a drawn world: it says whether a phenomenon shows here, and nothing about photographs. The interval is of
95 %, from 2,000 draws of seeds and scenes in pairs. A claim about something that is trained needs two seeds and the
recipes' full steps to be decided; one that trains nothing has no seeds, and its interval is of the scenes alone. Rows
are in `results/claims.json`, those of the proposals in `results/proposals.json`.

```bash
python -m benchmarks.claims --list
make reproduce CLAIM=nga                          # one claim at a small size, in minutes: does it run, not does it hold
python -m benchmarks.claims nga --runs runs/claims --split test   # in full, five seeds; may be stopped
```

The CLIP is `clip-world2`, which learnt whole pictures and captions alone and has poor patches
([its gates](results/gates.json)), so that all values are low. "Scenes" of a row are spread evenly over its split.
"""


@dataclass(frozen=True)
class Claim:
    """What a paper says, as a comparison that can be made here; see ``claims.yaml``."""

    claim: str
    paper: str
    says: str
    system: str = ""
    baseline: str = ""
    metric: str = ""
    masks: str = "proposals"
    unseen_here: str = ""


def claims() -> list[Claim]:
    """All of them, in the order in which they are to be decided."""
    return [Claim(**entry) for entry in yaml.safe_load((HERE / "claims.yaml").read_text("utf-8"))["claims"]]


@dataclass(frozen=True)
class Study:
    """Where runs are, and what all of them share."""

    runs: Path
    world: str = "picture-world"  # the data set
    clip: str = "clip-emoji"  # the towers
    scale: float = 1.0  # factor on the steps of every training
    scenes: int | None = None  # how many of the split's are judged
    split: str = "val"
    curves: bool = True  # measure while training, too

    def recipe(self, system: str, seed: int) -> SegmentationRecipe:
        """The recipe of a system in this study, or any other recipe by its name."""
        family, _, variant = system.partition(":")
        name = f"{family}-picture-world:{variant}" if family in ("one-stage", "decoupled") else system
        recipe = load_recipe(name, {"model.clip": self.clip}, seed=seed)
        if not isinstance(recipe, SegmentationRecipe):
            raise LexisegError(f"The recipe '{name}' trains no segmentation system.")
        if recipe.data.source == "picture-world":
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": self.world})})
        keys = ("steps", "warmup_steps", "snapshot_every")
        numbers = {key: self._scaled(getattr(recipe.train, key)) for key in keys}
        if not self.curves:
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
        if (folder / "model" / "config.json").is_file():
            return folder
        # Proposals are trained once, for all seeds; a self-training starts from its own seed's half-trained model.
        shared = 0 if recipe.model.system in ("zsseg", "zegformer", "freeseg", "deop") else seed
        starts = {}
        for key in ("initial", "proposals_from", "teacher"):
            name = getattr(recipe, key)
            if key == "initial" and recipe.initial_steps is not None:
                half = self.recipe(self._short(name), seed)
                starts[key] = str(train(half, Path(f"{folder}-initial"), resume=True, until=recipe.initial_steps))
            elif is_recipe(name):
                starts[key] = str(self.trained(self._short(name), shared) / "model")
        train(recipe.model_copy(update=starts), folder, resume=True, tensorboard=False)
        return folder

    @staticmethod
    def _short(recipe: str) -> str:
        """A system's name of its recipe's."""
        return recipe.replace("-picture-world:", ":")

    def counts(self, system: str, seed: int, masks: str) -> Counts:
        """What a system makes of every scene, counted once and kept in its run's folder."""
        folder = self.trained(system, seed, masks)
        number = "all" if self.scenes is None else self.scenes
        path = folder / f"counts-{self.split}-{number}{'' if masks == 'proposals' else '-labels'}.npz"
        if not path.is_file():
            segmenter = lexiseg.load(str(folder / "model"), device="cpu")
            found = judge(segmenter, self.dataset, self.scenes, masks)
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **cast(Any, found))
        with np.load(path) as file:
            return Counts(file["classes"], file["places"], self.seen, self.unseen)

    @cached_property
    def dataset(self) -> PictureWorld:
        """The scenes that are judged."""
        return PictureWorld(cast(Any, self.split), world=find_world(self.world), size=256)

    @property
    def seen(self) -> list[int]:
        """Ids of the seen classes."""
        return seen_ids(self.dataset.vocabulary)

    @property
    def unseen(self) -> list[int]:
        """Ids of the unseen classes."""
        return unseen_ids(self.dataset.vocabulary)


@torch.inference_mode()
def judge(segmenter: Segmenter, dataset: PictureWorld, scenes: int | None, masks: str) -> dict[str, np.ndarray]:
    """Counts of every scene: ``classes`` (scenes, 4, C), see `Confusion`, and ``places`` (scenes, 4, 2).

    Places are the first four of `PLACES`; of each its right pixels and all of them are counted.
    """
    model, vocabulary = segmenter.model, dataset.vocabulary
    if masks == "labels" and isinstance(model, DecoupledModel):
        model.generator = GroundTruth()
        if isinstance(model, RegionModel):
            model.judge_with(ensemble={"rule": "region"})
    seen = torch.tensor(seen_ids(vocabulary))
    classes, places = [], []
    with judged_on(segmenter, dataset) as judged:
        for index in spread(len(dataset), scenes):
            sample = judged[index]
            labels = segmenter.predict(sample.image, vocabulary).label_map.long()
            counted = Confusion(len(vocabulary), seen=seen.tolist())
            counted.update(labels.numpy(), sample.label.numpy())
            rows = (counted.intersection, counted.predicted, counted.labelled, counted.as_seen)
            classes.append(np.stack(rows).astype(np.int32))
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
        sums = np.tensordot(weights, self.classes, axes=1).astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = sums[:, 0] / (sums[:, 1] + sums[:, 2] - sums[:, 0])
            confused = sums[:, 3, self.unseen].sum(1) / sums[:, 2, self.unseen].sum(1)
            places = np.tensordot(weights, self.places, axes=1).astype(float)
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


def row_of(claim: Claim, study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    """Train and judge what a claim compares; its row."""
    trains = [study.recipe(system, 0).train.steps > 0 for system in (claim.system, claim.baseline)]
    pairs = []
    for seed in seeds if any(trains) else [0]:
        sides = zip((claim.system, claim.baseline), trains, strict=True)
        pairs.append(tuple(study.counts(system, seed if varies else 0, claim.masks) for system, varies in sides))
    found = compare(cast(Any, pairs), claim.metric)
    decided = not any(trains) or (len(pairs) > 1 and study.scale >= 1)
    verdict = "holds" if found["low"] > 0 else "does not hold" if found["high"] < 0 else "undecided"
    shared = {"world": study.world, "clip": study.clip, "split": study.split, "scenes": len(pairs[0][0].classes)}
    steps = study.recipe(claim.system, 0).train.steps
    return {
        **stated(claim),
        **found,
        "seeds": len(pairs),
        "verdict": verdict if decided else "undecided",
        **shared,
        "steps": steps,
    }


def stated(claim: Claim) -> dict[str, Any]:
    """What a row says before anything is measured."""
    empty = {"difference": None, "low": None, "high": None, "seeds": 0, "verdict": "undecided"}
    said = {key: getattr(claim, key) for key in ("claim", "paper", "system", "baseline", "metric", "masks")}
    return {**said, **empty}


def recalls(study: Study) -> list[dict[str, Any]]:
    """Recall of the generators that were trained, on the scenes of both worlds."""
    found = []
    for system in ("shapes:mask2former", "shapes:maskformer", "decoupled:proposals"):
        folder = study.runs / f"{system.replace(':', '-')}-0"
        if (folder / "model" / "config.json").is_file():
            segmenter = lexiseg.load(str(folder / "model"), device="cpu")
            steps = segmenter.model.metadata.get("steps")
            for world in ("picture-world", "picture-world-2"):
                scenes = replace(study, world=world).dataset
                report = evaluate_proposals(segmenter, scenes, limit=study.scenes).to_dict()
                found.append({"proposals": system, "world": world, "steps": steps, **report})
    return found


def collect(runs: Path) -> dict[str, Any]:
    """The rows of all claims: those that were measured, and the others as undecided."""
    path = runs / "claims.json"
    measured = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    rows = [{**stated(claim), **measured.get(claim.claim, {})} for claim in claims()]
    recall = runs / "recall.json"
    return {"rows": rows, "proposals": json.loads(recall.read_text("utf-8")) if recall.is_file() else []}


def table(titles: str, rows: list[list[str]]) -> list[str]:
    """A table's lines, with titles as ``one | two``."""
    cells = [titles, "|".join("---" for _ in titles.split("|")), *(" | ".join(row) for row in rows)]
    return ["", *(f"| {line} |" for line in cells)]


def page(results: dict[str, Any]) -> str:
    """The page of the claims."""
    lines, said = HEAD.splitlines(), {claim.claim: claim for claim in claims()}
    measured = [row for row in results["rows"] if row["seeds"]]
    for verdict in ("holds", "does not hold", "undecided"):
        rows = []
        for row in (row for row in measured if row["verdict"] == verdict):
            claim, metric = said[row["claim"]], row["metric"]
            sides = [f"{row['values'][side][metric]:.1f}" for side in ("system", "baseline")]
            interval = f"{row['difference']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})"
            place = f"{row['world']}, {row['split']}, {row['scenes']}"
            rows.append([f"`{claim.claim}`: {claim.says}", claim.paper, METRICS[metric], *sides, interval])
            rows[-1] += [str(row["seeds"]), place, str(row["steps"])]
        if rows:
            titles = "claim | paper | metric | system | baseline | difference (95 %) | seeds | scenes | steps"
            lines += ["", f"## {verdict.capitalize()}", *table(titles, rows)]
    if measured:
        titles = "claim | boundary, seen | boundary, unseen | interior, seen | interior, unseen | unseen taken for seen"
        rows = [
            [f"`{row['claim']}`"]
            + [" / ".join(f"{row['values'][side][name]:.1f}" for side in row["values"]) for name in PLACES]
            for row in measured
        ]
        lines += [
            "",
            "## Interior and boundary",
            "",
            f"Accuracy of pixels within {BORDER} of a border of the labels and",
        ]
        lines += [
            "of the others, and unseen pixels taken for a seen class, in percent: system / baseline.",
            *table(titles, rows),
        ]
    if results["proposals"]:
        titles = "proposals | steps | world, val | recall at 0.5: seen | unseen | at 0.3: seen | unseen"
        rows = [
            [f"`{row['proposals']}`", str(row["steps"]), row["world"]]
            + [f"{100 * row['recall'][at][kind]:.1f}" for at in ("0.5", "0.3") for kind in ("seen", "unseen")]
            for row in results["proposals"]
        ]
        lines += ["", "## Proposals", *table(titles, rows)]
    if (DOCS / "images" / "claims-curves.png").is_file():
        lines += ["", "## While training", "", "![Metrics over the steps of the trainings](images/claims-curves.png)"]
    left = [claim for claim, row in zip(claims(), results["rows"], strict=True) if not row["seeds"]]
    lines += ["", "## Not measured", ""]
    lines += [f"- `{claim.claim}`: {claim.says} ({claim.paper})." for claim in left if not claim.unseen_here]
    lines += ["", "## Cannot be seen here", ""]
    lines += [f"- {claim.says} ({claim.paper}), because {claim.unseen_here}." for claim in left if claim.unseen_here]
    return "\n".join(lines) + "\n"


def write(runs: Path) -> None:
    """Write what was measured as pages: the rows, the page, and the curves of the runs with the first seed."""
    results = collect(runs)
    print("wrote", write_json(DOCS / "results" / "claims.json", results["rows"]))
    print("wrote", write_json(DOCS / "results" / "proposals.json", results["proposals"]))
    print("wrote", write_text(DOCS / "claims.md", page(results)))
    logs = [folder for name in CURVES if (folder := runs / f"one-stage-{name}-0" / "model").is_dir()]
    if logs:
        figure = curves_figure([folder.parent for folder in logs])
        figure.savefig(DOCS / "images" / "claims-curves.png", dpi=80)


def keep(row: dict[str, Any], runs: Path) -> None:
    """Put a row into the study's file."""
    path = runs / "claims.json"
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
    for claim in known.values():
        if (not said.claims or claim.claim in said.claims) and not claim.unseen_here:
            row = row_of(claim, study, said.seeds)
            keep(row, runs)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
