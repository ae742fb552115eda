"""What any system can have at test time, on the runs of the papers' claims, each with and without smoothing.

    python -m benchmarks.extras --runs runs/claims --split test --scenes 500 --seeds 0 1

Edge-aware smoothing, a second look at the picture half a patch away, and a second opinion by the frozen CLIP: NACLIP's,
or that of the values alone, which is MaskCLIP.
`python -m benchmarks.claims --collect` writes what was found: docs/results/extras.json, and a part of docs/claims.md.
Nothing is trained: every system whose run is finished is judged again with each extra. The smoothing's settings are the
package's defaults, chosen on val scenes of another world; the means have no setting.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lexiseg
from benchmarks.claims import EXTRAS, Study, compare, labels_of
from benchmarks.measure import alternate, machine, summary
from lexiseg.files import make_folder, write_json

COMPARED = (
    ("edges", "none"),
    ("shift", "none"),
    ("shift+edges", "edges"),
    ("frozen", "none"),
    ("frozen+edges", "edges"),
    ("frozen", "frozen alone"),
    ("frozen+edges", "frozen alone+edges"),
    ("frozen", "frozen values"),
)
"""Extras, and against which: what is compared has the same smoothing."""
COMMAND = "python -m benchmarks.extras --runs runs/claims --split SPLIT --scenes SCENES"  # as each row says
REFERENCE = "one-stage:zegclip"
"""What times are compared with; its run must be finished."""
ONE_STAGE = ("zegclip", "finetune", "cascade", "spt-seg", "zegclip-self-training", "cascade-self-training")
DECOUPLED = ("zsseg", "zsseg-maft", "freeseg", "freeseg-maft", "zegformer", "zegformer-maft", "pooled-gps", "deop")
SYSTEMS = (*(f"one-stage:{name}" for name in ONE_STAGE), *(f"decoupled:{name}" for name in DECOUPLED))


def finished(study: Study, seeds: Sequence[int]) -> dict[str, list[int]]:
    """The systems of which there are runs, and the seeds of these; a training counts and nothing is begun."""
    found: dict[str, list[int]] = {}
    for system in SYSTEMS:
        for seed in seeds:
            folder = study.runs / f"{system.replace(':', '-')}-{seed}"
            if (folder / "model" / "config.json").is_file():
                found.setdefault(system, []).append(seed)
    return found


def times(study: Study, system: str, seed: int, repeats: int) -> dict[str, float]:
    """The processor time of a prediction with each extra over that of `REFERENCE` without any."""
    segmenter, reference = (
        lexiseg.load(str(study.trained(name, seed) / "model"), device="cpu") for name in (system, REFERENCE)
    )
    dataset = study.dataset()
    picture = dataset[0].image
    with torch.inference_mode():
        candidates = {extra: partial(labels_of, segmenter, picture, dataset.vocabulary, extra) for extra in EXTRAS}
        candidates[REFERENCE] = partial(labels_of, reference, picture, dataset.vocabulary)
        rows = summary(alternate(candidates, repeats, "cpu"), REFERENCE)
    return {row["what"]: round(row["cpu ratio"], 2) for row in rows}


def rows_of(study: Study, system: str, seeds: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each of `COMPARED`: the metrics of both sides, and the difference of hIoU."""
    judged = {extra: [study.counts(system, seed, extra=extra) for seed in seeds] for extra in EXTRAS}
    ratios = times(study, system, seeds[0], repeats)
    shared = {"world": study.world, "split": study.split, "clip": study.clip, "seeds": len(seeds)}
    rows = []
    for extra, against in COMPARED:
        found = compare(list(zip(judged[extra], judged[against], strict=True)), "hiou")
        row = {"system": system, "extra": extra, "against": against, **found, "time": ratios[extra]}
        rows.append({**row, **shared, "scenes": len(judged[extra][0].classes)})
    return rows


def main() -> None:
    """Judge the finished runs with each extra."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help="which; all that are finished by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the runs")
    parser.add_argument("--world", default="picture-world-2", help="the data set")
    parser.add_argument("--clip", default="clip-world2", help="the towers of the runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--scenes", type=int, help="judge so many, not all")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each time")
    said = parser.parse_args()
    torch.set_num_threads(1)
    kept = make_folder(said.runs) / "extras.json"
    results = json.loads(kept.read_text("utf-8")) if kept.is_file() else {"rows": []}
    study = Study(said.runs, said.world, said.clip, scenes=said.scenes, split=said.split)
    for system, seeds in finished(study, said.seeds).items():
        if not said.systems or system in said.systems:
            rows = rows_of(study, system, seeds, said.repeats)
            others = [row for row in results["rows"] if (row["system"], row["split"]) != (system, said.split)]
            results = {"command": COMMAND, "machine": machine("cpu"), "rows": others + rows}
            write_json(kept, results)
            print(*(json.dumps(row) for row in rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
