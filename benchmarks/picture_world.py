"""Train and judge systems on picture-world and write the table of results.

    python -m benchmarks.picture_world --runs runs/picture-world          # everything, on two cores for hours
    python -m benchmarks.picture_world --runs runs/picture-world --only zegclip --seeds 0
    python -m benchmarks.picture_world --runs runs/picture-world --collect  # only write the pages again

Each (system, seed) is trained by its recipe into a folder of its own (a finished one is not trained again, a broken-off
one is resumed), evaluated on the 200 val and the 200 test scenes, and timed against the bare CLIP tower on the same
pictures. Settings were chosen on val; test was looked at for the table only. The rows go to
``docs/results/picture-world.json`` and the page ``docs/results/picture-world.md`` is made from them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lexiseg
from benchmarks.decoupled_world import DECOUPLED, Variant, decoupled_segmenter, folder_of, judged_on
from lexiseg.clip.load import load_clip
from lexiseg.data.picture_world import PictureWorld
from lexiseg.evaluation.run import run_evaluation
from lexiseg.files import make_folder, write_json, write_text
from lexiseg.recipes import load_recipe
from lexiseg.segmenter import Segmenter
from lexiseg.training.contrastive import zero_shot_accuracy
from lexiseg.training.run import train

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"

# system -> recipe; None is training-free and loaded by name
SYSTEMS: dict[str, str | Variant | None] = {
    "dense-clip (value path)": None,
    "dense-clip (plain)": None,
    "clip-fixed": "clip-fixed-picture-world",
    "clip-finetune": "clip-finetune-picture-world",
    "clip-fixed with cross entropy": "clip-fixed-picture-world-exclusive",
    "clip-finetune with cross entropy": "clip-finetune-picture-world-exclusive",
    "clip with deep prompts and cross entropy": "zegclip-picture-world-prompts",
    "zegclip without descriptor": "zegclip-picture-world-no-descriptor",
    "zegclip with cross entropy": "zegclip-picture-world-exclusive",
    "zegclip without deep prompts": "zegclip-picture-world-no-prompts",
    "zegclip": "zegclip-picture-world",
    "spt-seg": "spt-seg-picture-world",
    "cascade-clip on frozen clip": "cascade-clip-frozen-picture-world",
    "cascade-clip without nga": "cascade-clip-last-blocks-picture-world",
    "cascade-clip": "cascade-clip-picture-world",
    "cascade-clip on spt-seg": "cascade-clip-spt-picture-world",
    "second-look": "second-look-picture-world",
    "cat-seg": "cat-seg-picture-world",
    "zegclip, self-training": "zegclip-picture-world-transductive",
    "spt-seg, self-training": "spt-seg-picture-world-transductive",
    "cascade-clip, self-training": "cascade-clip-picture-world-transductive",
    **DECOUPLED,
}
COLUMNS = ("pacc", "miou", "miou_seen", "miou_unseen", "hiou")
TRAINING_FREE = {
    "dense-clip (value path)": "dense-clip/clip-emoji",
    "dense-clip (plain)": "clip/clip-emoji",
}


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call over some repeats, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def relative_time(segmenter: Segmenter, dataset: PictureWorld, repeats: int = 15) -> float:
    """Return the time of a prediction over that of the bare image tower on the picture as the model sees it."""
    tower = segmenter.model.clip.image_tower
    side = segmenter.model.window.short_side or dataset.size
    pixels = torch.randn(1, 3, side, side)

    def bare() -> None:
        tokens, grid = tower.embed(pixels)
        tower.project(tower.run(tokens, grid).tokens)

    bare_seconds = median_seconds(bare, repeats)
    with judged_on(segmenter, dataset) as judged:
        picture = judged[0].image
        seconds = median_seconds(lambda: segmenter.predict(picture, dataset.vocabulary).label_map, repeats)
    return seconds / bare_seconds


def build_segmenter(system: str, seed: int, folder: Path) -> Segmenter:
    """Return the segmenter of a system, trained first where that is needed."""
    recipe_name = SYSTEMS[system]
    if isinstance(recipe_name, Variant):
        return decoupled_segmenter(system, seed, folder.parent)
    if recipe_name is None:
        return lexiseg.load(TRAINING_FREE[system], device="cpu")
    if not (folder / "model" / "config.json").is_file():
        train(load_recipe(recipe_name, seed=seed), folder, resume=True)
    return lexiseg.load(str(folder / "model"), device="cpu")


def run_folder(system: str, seed: int, runs: Path) -> Path:
    """Return the folder of a run."""
    return folder_of(system, seed, runs)


def has_seeds(system: str) -> bool:
    """Whether a system's runs with several seeds differ: it has a training of its own."""
    entry = SYSTEMS[system]
    return entry.seeded if isinstance(entry, Variant) else entry is not None


def run_one(system: str, seed: int, runs: Path) -> None:
    """Train and evaluate one system with one seed, and leave ``row.json`` in its folder."""
    folder = make_folder(run_folder(system, seed, runs))
    if (folder / "row.json").is_file():
        return
    segmenter = build_segmenter(system, seed, folder)
    reports = {}
    for split in ("val", "test"):
        with judged_on(segmenter, PictureWorld(split, size=256)) as dataset:
            reports[split] = run_evaluation(segmenter, dataset, name="picture-world", split=split, seed=seed)
    reports["val"].save(folder)
    summary, fresh = reports["val"].summary(), reports["test"].summary()
    row = {
        "system": system,
        "seed": seed,
        "pacc": summary["pacc"],
        "miou": summary["miou"],
        "miou_seen": summary["miou_seen"],
        "miou_unseen": summary["miou_unseen"],
        "hiou": summary["hiou"],
        **{f"test_{name}": fresh[name] for name in COLUMNS},
        "parameters_m": segmenter.model.num_parameters() / 1e6,
        "trainable_m": segmenter.model.num_parameters(trainable=True) / 1e6,
    }
    write_json(folder / "row.json", row)
    print(json.dumps(row))


def machine() -> str:
    """Return one line about where the numbers were measured."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def collect(runs: Path) -> dict[str, Any]:
    """Read the rows of all finished runs, in the order of ``SYSTEMS``, with the tiny CLIP's zero-shot accuracy."""
    order = list(SYSTEMS)
    rows = [json.loads(path.read_text()) for path in sorted(runs.glob("*/row.json"))]
    rows.sort(key=lambda row: (order.index(row["system"]), row["seed"]))
    times: dict[str, float] = {}
    for row in rows:
        system = row["system"]
        if system not in times:
            segmenter = build_segmenter(system, row["seed"], run_folder(system, row["seed"], runs))
            times[system] = relative_time(segmenter, PictureWorld("val", size=256))
        row["relative_time"] = times[system]
    top1, top5 = zero_shot_accuracy(load_clip("clip-emoji"))
    return {
        "machine": machine(),
        "command": "python -m benchmarks.picture_world --runs runs/picture-world",
        "seeds": sorted({row["seed"] for row in rows}),
        "split": "picture-world val, 200 scenes of 256 x 256 pixels; test_*: 200 fresh scenes",
        "zero_shot_top1": 100 * top1,
        "zero_shot_top5": 100 * top5,
        "rows": rows,
    }


def page(results: dict[str, Any]) -> str:
    """Return the results as a Markdown page: a line a run, and the means over seeds."""
    lines = [
        "# picture-world: results",
        "",
        "Made by `benchmarks/picture_world.py`; do not edit by hand. The picture world is a demonstration on drawn",
        "scenes: these numbers compare systems under one small budget and say nothing about photographs.",
        "",
        f"- split: {results['split']}",
        f"- machine: {results['machine']}",
        f"- command: `{results['command']}`",
        "- tiny CLIP, zero-shot over all 84 thing names on single-thing scenes: "
        f"top-1 {results['zero_shot_top1']:.1f} %, top-5 {results['zero_shot_top5']:.1f} %",
        "",
        "Settings were chosen on val; the test scenes were drawn afterwards and used for no choice. All runs share one",
        "CLIP, so the spread is that of the segmentation training alone: see [how to read this](../picture-world.md).",
        "",
        "Time is a prediction's, divided by that of the image tower alone on the same picture, in one run.",
        "",
        "| system | seeds | pAcc | mIoU | mIoU(S) | mIoU(U) | hIoU | test: S | test: U | test: hIoU "
        "| parameters (M) | trainable (M) | time |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for system in SYSTEMS:
        rows = [row for row in results["rows"] if row["system"] == system]
        if not rows:
            continue
        cells = []
        for column in (*COLUMNS, "test_miou_seen", "test_miou_unseen", "test_hiou"):
            values = [row[column] for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        first, ratio = rows[0], rows[0]["relative_time"]
        sizes = f"{first['parameters_m']:.2f} | {first['trainable_m']:.2f}"
        lines.append(f"| {system} | {len(rows)} | {' | '.join(cells)} | {sizes} | {ratio:.2f} |")
    lines += [
        "",
        "Every run:",
        "",
        "| system | seed | pAcc | mIoU | mIoU(S) | mIoU(U) | hIoU | test: pAcc | mIoU | mIoU(S) | mIoU(U) | hIoU |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    every = (*COLUMNS, *(f"test_{name}" for name in COLUMNS))
    for row in results["rows"]:
        lines.append(f"| {row['system']} | {row['seed']} | " + " | ".join(f"{row[name]:.2f}" for name in every) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/picture-world"), help="folder of the runs")
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(SYSTEMS),
        choices=list(SYSTEMS),
        help="systems to run; the pages are left as they are",
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--collect", action="store_true", help="train nothing, only write the pages")
    parser.add_argument("--no-pages", action="store_true", help="only train and evaluate")
    arguments = parser.parse_args()
    if not arguments.collect:
        for seed in arguments.seeds:
            for system in arguments.only:
                if has_seeds(system) or seed == arguments.seeds[0]:
                    run_one(system, seed, arguments.runs)
    if arguments.no_pages or (not arguments.collect and set(arguments.only) != set(SYSTEMS)):
        return  # the pages are those of all systems
    results = collect(arguments.runs)
    make_folder(RESULTS)
    print("wrote", write_json(RESULTS / "picture-world.json", results))
    print("wrote", write_text(RESULTS / "picture-world.md", page(results)))


if __name__ == "__main__":
    main()
