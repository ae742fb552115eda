"""Peak memory and time of turning factorised scores into a label map, against the number of classes.

Each row is measured in a process of its own: the grid of logits is made, then ``label_map`` runs once, cold. "memory"
is the peak beyond what the process held with the grid, the label map itself included; "dense" is what the full array
of scores would take. "smooth" grids look like a model's (neighbouring patches agree); "noise" grids are independent
random numbers, the hardest input for the search; "zeros" are all tied. "regions" are 100 masks at a quarter of the
picture's side (`RegionScores`).

    python -m benchmarks.decode
    python -m benchmarks.decode --classes 171 100000 --size 512x512 --kind smooth noise --json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.measure import parser, report, set_up
from lexiseg.scores import GridScores, RegionScores, Scores

CLASSES = (20, 171, 847, 10_000, 100_000)
SIZES = ("512x512", "2048x1536")
KINDS = ("smooth", "noise", "zeros", "regions")
PATCH = 16
REGIONS = 100
MEBI = 1 << 20


def make_scores(kind: str, num_classes: int, width: int, height: int, device: str) -> Scores:
    """Return random scores of one picture: a grid of 32 x 32 patches, or regions."""
    if kind == "regions":
        masks = torch.rand(1, REGIONS, height // 4, width // 4, device=device)
        return RegionScores(torch.randn(1, REGIONS, num_classes, device=device).softmax(2), masks)
    # The same at every size: a grid for 100,000 classes that grew with the picture would itself take gigabytes.
    side = 512 // PATCH
    grid = torch.zeros(1, num_classes, side, side, device=device)
    for start in range(0, num_classes, 1000):
        part = grid[:, start : start + 1000]
        if kind == "smooth":
            coarse = 3 * torch.randn(1, part.shape[1], side // 4, side // 4, device=device)
            part += F.interpolate(coarse, size=(side, side), mode="bicubic")
            part += 0.2 * torch.randn_like(part)
        elif kind == "noise":
            part += torch.randn_like(part)
    return GridScores(grid)


def measure_row(kind: str, num_classes: int, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in this process."""
    set_up(options)
    width, height = (int(side) for side in size.split("x"))
    on_gpu = options.device.startswith("cuda")
    # Loads the libraries' code, which is not counted.
    make_scores(kind, 2, 64, 64, options.device).label_map((64, 64))
    scores = make_scores(kind, num_classes, width, height, options.device)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else _peak()
    wall, cpu = time.perf_counter(), time.process_time()
    scores.label_map((height, width))
    if on_gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = torch.cuda.max_memory_allocated() if on_gpu else _peak()
    return {
        "classes": num_classes,
        "size": size,
        "scores": kind,
        "memory (MiB)": round((after - before) / MEBI),
        "dense (MiB)": round(4 * num_classes * width * height / MEBI),
        "seconds": wall,
        "cpu seconds": cpu,
    }


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(repeats=1)
    arguments.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes")
    arguments.add_argument("--size", nargs="+", default=SIZES, help="sizes of the label map, width x height")
    arguments.add_argument("--kind", nargs="+", default=KINDS[:1], choices=KINDS, help="what the scores look like")
    arguments.add_argument("--row", action="store_true", help="measure the first row only, in this process, as JSON")
    options = arguments.parse_args()
    if options.row:
        print(json.dumps(measure_row(options.kind[0], options.classes[0], options.size[0], options)))
        return
    rows = []
    for size in options.size:
        for kind in options.kind:
            for num_classes in options.classes:
                command = [sys.executable, "-m", "benchmarks.decode", "--row", "--classes", str(num_classes)]
                command += ["--size", size, "--kind", kind, "--device", options.device]
                command += ["--threads", str(options.threads), "--seed", str(options.seed)]
                runs = [
                    json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                    for _ in range(options.repeats)
                ]
                rows.append(min(runs, key=lambda run: run["cpu seconds"]))
    report(
        "Decoding scores to a label map", rows, options, grid="32 x 32 patches; regions: 100 masks, a quarter the side"
    )


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
