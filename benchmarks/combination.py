"""Search what composes here for a combination that beats every system by itself, on picture-world.

    python -m benchmarks.picture_world --runs runs/picture-world --only zegclip cascade-clip "proposals alone"
    python -m benchmarks.combination --runs runs/picture-world --search               # every row, 100 val scenes
    python -m benchmarks.combination --runs runs/picture-world --split val test --seeds 0 1 2
    python -m benchmarks.combination --runs runs/picture-world --costs                # GMAC and time
    python -m benchmarks.combination --runs runs/picture-world --collect              # the pages

Nothing is trained here: the rows put together what the trained ZegCLIP, Cascade-CLIP, proposals and the frozen CLIP say
of the same picture. Rows were compared, and the settings of the smoothing chosen, on those 100 val scenes with seed 0;
test was not looked at before. What was counted is kept in ``RUNS/combination``, a file for each split and seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.combination_rows import CELLS, COMBINATION, MAIN, NEEDS, OTHERS, Parts, Row, Scene, second_look_of
from benchmarks.cost.counting import count
from benchmarks.measure import alternate, machine, summary
from lexiseg.data.base import seen_ids, unseen_ids
from lexiseg.data.picture_world import PictureWorld
from lexiseg.evaluation.metrics import Confusion
from lexiseg.evaluation.run import spread
from lexiseg.files import make_folder, write_json, write_text
from lexiseg.models import SecondLook, SegmentationModel
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
SIDE = 256
COLUMNS = ("pacc", "miou_seen", "miou_unseen", "hiou")
SEARCH, SCENES = "search", 100


@torch.no_grad()
def judge(
    runs: Path, split: str, seed: int, rows: dict[str, Row], limit: int | None, label: str = ""
) -> dict[str, Any]:
    """Judge rows on one split with the runs of one seed; ``label`` is kept in the place of the split's name."""
    dataset = PictureWorld(cast(Any, split), size=SIDE)
    parts = Parts.load(runs, seed, dataset)
    rows = {name: row for name, row in rows.items() if name not in NEEDS or getattr(parts, NEEDS[name]) is not None}
    counted = {name: Confusion(len(dataset.vocabulary)) for name in rows}
    indices = spread(len(dataset), limit)
    for index in indices:
        sample = dataset[index]
        scene = Scene(parts, sample.image)
        for name, row in rows.items():
            counted[name].update(row(scene).label_map((SIDE, SIDE))[0].numpy(), sample.label.numpy())
    seen, unseen = seen_ids(dataset.vocabulary), unseen_ids(dataset.vocabulary)
    found = {name: confusion.compute(seen, unseen).summary() for name, confusion in counted.items()}
    rows_found = {name: {column: values[column] for column in COLUMNS} for name, values in found.items()}
    return {"split": label or split, "seed": seed, "pictures": len(indices), "rows": rows_found}


@torch.no_grad()
def costs(runs: Path, seed: int, repeats: int) -> dict[str, dict[str, float]]:
    """GMAC of a picture (tower, decoder and smoothing) and the time of a prediction over ZegCLIP's, in one run."""
    dataset = PictureWorld("val", size=SIDE)
    parts = Parts.load(runs, seed, dataset)
    models: dict[str, SegmentationModel] = {
        "zegclip": parts.zegclip,
        "second look alone": second_look_of(parts.zegclip, distances=()),
        "smoothing alone": second_look_of(parts.zegclip, half_patch_shift=False),
        COMBINATION: parts.second,
    }
    for side in (144, 160):
        models[f"zegclip at {side} pixels"] = parts.segmenters[side].model
        models[f"zegclip at {side} pixels"].load_state_dict(parts.zegclip.state_dict())
    if parts.cascade is not None:
        models["cascade-clip"] = parts.cascade
    segmenters = {name: Segmenter(model, disk_cache=False) for name, model in models.items()}
    images, vocabulary = [dataset[index].image for index in spread(len(dataset), 4)], dataset.vocabulary
    candidates = {name: partial(_predict, segmenter, images, vocabulary) for name, segmenter in segmenters.items()}
    times = {row["what"]: row for row in summary(alternate(candidates, repeats, "cpu"), "zegclip")}
    result = {}
    for name, segmenter in segmenters.items():
        pixels = segmenter.pixels(images[0])
        counted = count(partial(segmenter.model, pixels, parts.text), segmenter.model)
        macs = counted.macs
        if isinstance(segmenter.model, SecondLook):
            # Multiply-adds that no matrix product does: nine a pass, a word and a cell.
            cells = pixels.shape[-2] * pixels.shape[-1] * CELLS**2 // segmenter.model.patch_size**2
            macs += 9 * len(segmenter.model.options.smoothing_distances) * len(parts.text) * cells
        result[name] = {"gmac": macs / 1e9, "time": times[name]["cpu ratio"], "cpu_seconds": times[name]["cpu seconds"]}
    return result


def _predict(segmenter: Segmenter, images: list[Tensor], vocabulary: Vocabulary) -> None:
    for image in images:
        segmenter.predict(image, vocabulary)


def collect(runs: Path) -> dict[str, Any]:
    """Everything that was counted and measured."""
    folder = runs / "combination"
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    others = {}
    for name in ("cascade-clip",):
        rows = [json.loads(path.read_text()) for path in sorted(runs.glob(f"{name}-[0-9]/row.json"))]
        others[name] = [{key: row[key] for key in ("seed", "hiou", "test_hiou")} for row in rows]
    return {
        "command": "python -m benchmarks.combination --runs runs/picture-world --collect",
        **json.loads((runs / "combination-costs.json").read_text()),
        "found": found,
        "systems": others,
    }


def cell(results: dict[str, Any], split: str, name: str, column: str) -> str:
    """The mean over the seeds, and their spread."""
    values = [
        part["rows"][name][column] for part in results["found"] if part["split"] == split and name in part["rows"]
    ]
    if not values:
        return "-"
    spread_ = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread_}"


def page(results: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    facts = results["machine"]
    lines = [
        "# The combination: results",
        "",
        "Made by `benchmarks/combination.py`; do not edit by hand. See [the combination](../combination.md).",
        "",
        *(f"- {part['split']}, seed {part['seed']}: {part['pictures']} pictures" for part in results["found"]),
        f"- machine: {facts['processor']}, {facts['threads']} threads, torch {facts['torch']}",
        f"- command: `{results['command']}`",
        "",
        "Time is the processor time of a whole prediction, divided by ZegCLIP's in one run; GMAC counts tower, decoder",
        "and smoothing for one picture. Values are means over seeds with their standard deviation.",
        "",
        "| row | val mIoU(S) | val mIoU(U) | val hIoU | test mIoU(S) | test mIoU(U) | test hIoU | GMAC | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MAIN:
        cells = [cell(results, split, name, column) for split in ("val", "test") for column in COLUMNS[1:]]
        lines.append(f"| {name} | {' | '.join([*cells, *cost_cells(results, name)])} |")
    lines += [
        "",
        "The search:",
        "",
        "| row | pAcc | mIoU(S) | mIoU(U) | hIoU | GMAC | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (*MAIN, *OTHERS):
        cells = [cell(results, SEARCH, name, column) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join([*cells, *cost_cells(results, name)])} |")
    return "\n".join(lines) + "\n"


def cost_cells(results: dict[str, Any], name: str) -> list[str]:
    """GMAC and time of a row; dashes where they were not measured."""
    cost = results["costs"].get(name)
    return ["-", "-"] if cost is None else [f"{cost['gmac']:.3f}", f"{cost['time']:.2f}"]


def main() -> None:
    """Judge splits with one or more seeds, search, or write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/picture-world"), help="folder of the runs")
    parser.add_argument("--split", nargs="*", choices=("val", "test"), default=["val"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of the runs")
    parser.add_argument(
        "--search", action="store_true", help=f"every row, on {SCENES} scenes of val, with the first seed"
    )
    parser.add_argument("--limit", type=int, help="only this many pictures")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each time")
    parser.add_argument("--costs", action="store_true", help="measure GMAC and time")
    parser.add_argument("--collect", action="store_true", help="write the pages")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs, limit = arguments.runs, arguments.limit
    if arguments.collect:
        results = collect(runs)
        print("wrote", write_json(RESULTS / "combination.json", results))
        print("wrote", write_text(RESULTS / "combination.md", page(results)))
        return
    if arguments.costs:
        measured = {"machine": machine("cpu"), "costs": costs(runs, arguments.seeds[0], arguments.repeats)}
        print("wrote", write_json(runs / "combination-costs.json", measured))
        return
    folder = make_folder(runs / "combination")
    if arguments.search:
        found = judge(runs, "val", arguments.seeds[0], {**MAIN, **OTHERS}, limit or SCENES, SEARCH)
        print("wrote", write_json(folder / f"search-{arguments.seeds[0]}.json", found))
        return
    for split in arguments.split:
        for seed in arguments.seeds:
            found = judge(runs, split, seed, MAIN, limit)
            print("wrote", write_json(folder / f"{split}-{seed}.json", found))


if __name__ == "__main__":
    main()
