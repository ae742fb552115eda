"""The training-free methods: what they are worth on the picture world, and what they cost over the bare tower.

    python -m benchmarks.training_free --world picture-world --limit 20  # docs/results/training-free.json and .md
    python -m benchmarks.training_free --cost --threads 2      # ViT-B/16 at 512 x 512, random weights

Nothing is trained. On the picture world all methods run whole pictures at the same size, because the authors' windows
are those of towers trained at 224; ResCLIP mixes in the blocks of the same relative depth. ProxyCLIP is left out there:
no second encoder knows drawn pictures. Times are processor times, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import machine
from lexiseg.clip.load import load_clip, random_clip
from lexiseg.clip.proxy import Proxy
from lexiseg.data.base import seen_ids, unseen_ids
from lexiseg.data.picture_world import PictureWorld, find_world
from lexiseg.evaluation.metrics import Confusion
from lexiseg.files import write_json, write_text
from lexiseg.models.dense_clip import DenseCLIP
from lexiseg.refine import Refinement, refine
from lexiseg.segmenter import Segmenter
from lexiseg.weights import load_model

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
CLIPS = {"picture-world": "clip-emoji", "picture-world-2": "clip-world2"}  # world: the CLIP that is judged on it
METHODS = ("clip", "maskclip", "sclip", "clearclip", "naclip", "resclip", "gem")
# What the last block's shortcut and MLP are worth to this tower: the methods that leave them out with them, and others
# without.
BLOCKS = {
    "maskclip, attention alone": ("maskclip", False),
    "sclip, attention alone": ("sclip", False),
    "clearclip, whole block": ("clearclip", True),
    "naclip, whole block": ("naclip", True),
    "resclip, whole block": ("resclip", True),
}
KINDS = ("none", "edges", "pamr", "regions")
BORDER = 3  # pixels beside a border of the labels that count as boundary
GOALS = {"maskclip": 1.10, "sclip": 1.10, "clearclip": 1.10, "naclip": 1.10, "resclip": 2.2, "proxyclip": 1.10}


def border_of(label: Tensor) -> Tensor:
    """Pixels (H, W) within `BORDER` of another label."""
    values = label[None, None].float()
    side = 2 * BORDER + 1
    largest = F.max_pool2d(values, side, stride=1, padding=BORDER)
    smallest = -F.max_pool2d(-values, side, stride=1, padding=BORDER)
    return (largest != smallest)[0, 0]


def world(name: str, limit: int) -> dict[str, Any]:
    """Every method with every refinement on a world's val scenes."""
    dataset = PictureWorld("val", world=find_world(name), length=limit)
    clip = load_clip(CLIPS[name])
    last = len(clip.patch_tower.blocks) - 1
    middle = tuple(range(max(round(5 / 11 * last), 0), max(round(8 / 11 * last), 1)))
    proposals = load_model("deop-emoji").generator
    refinements = {kind: Refinement(kind, regions=proposals) for kind in KINDS}  # type: ignore[arg-type]
    seen, unseen = seen_ids(dataset.vocabulary), unseen_ids(dataset.vocabulary)
    rows = []
    for row_name in (*METHODS, *BLOCKS):
        method, whole = BLOCKS.get(row_name, (row_name, None))
        used = KINDS if whole is None else KINDS[:1]
        options: dict[str, Any] = {"method": method, "window_size": None, "window_stride": 0, "short_side": None}
        options |= {"middle_blocks": middle} if method == "resclip" else {}
        options |= {"depth": min(7, last)} if method == "gem" else {}
        options |= {} if whole is None else {"whole_block": whole}
        segmenter = Segmenter(DenseCLIP.build(clip, options), disk_cache=False)
        counts = {kind: Confusion(len(dataset.vocabulary)) for kind in KINDS}
        right = {kind: torch.zeros(2, 2) for kind in KINDS}
        spent = dict.fromkeys(("scores", *KINDS), 0.0)
        for index in range(len(dataset)):
            sample = dataset[index]
            start = time.process_time()
            scores = segmenter.scores(sample.image, dataset.vocabulary)
            spent["scores"] += time.process_time() - start
            border = border_of(sample.label)
            for kind in used:
                start = time.process_time()
                labels, _ = refine(scores, sample.image, refinements[kind])
                spent[kind] += time.process_time() - start
                counts[kind].update(labels.numpy(), sample.label.numpy())
                for place, pixels in enumerate((border, ~border)):
                    hits = (labels == sample.label) & pixels
                    right[kind][place] += torch.tensor([float(hits.sum()), float(pixels.sum())])
        for kind in used:
            found = counts[kind].compute(seen, unseen).summary()
            boundary, interior = (100 * right[kind][:, 0] / right[kind][:, 1]).tolist()
            rows.append(
                {
                    "method": row_name,
                    "refine": kind,
                    **{key: found[key] for key in ("miou_seen", "miou_unseen", "hiou")},
                    "boundary": boundary,
                    "interior": interior,
                    "ms": 1000 * (spent["scores"] + spent[kind]) / len(dataset),
                }
            )
        print(row_name, {row["refine"]: round(row["hiou"], 1) for row in rows[-len(used) :]}, flush=True)
    return {
        "scenes": len(dataset),
        "clip": CLIPS[name],
        "middle_blocks": middle,
        "rows": rows,
        "machine": machine("cpu"),
    }


@torch.no_grad()
def cost(repeats: int) -> dict[str, Any]:
    """Time of encoding and scoring a picture of 512 x 512 by ViT-B/16 over the bare tower's; medians, alternating."""
    import timm

    torch.manual_seed(0)
    clip = random_clip("ViT-B-16/openai")
    proxy = Proxy(
        timm.create_model("vit_base_patch16_224.dino", num_classes=0, dynamic_img_size=True), "bicubic-offset"
    )
    images = torch.randn(1, 3, 512, 512)
    picture = torch.randint(0, 255, (3, 512, 512), dtype=torch.uint8)
    whole: dict[str, Any] = {"window_size": None, "window_stride": 0}
    models = {
        name: DenseCLIP.build(clip, {"method": name, **whole}, proxy=proxy if name == "proxyclip" else None).eval()
        for name in ("maskclip", "sclip", "clearclip", "naclip", "resclip", "proxyclip")
    }
    found: dict[str, Any] = {}
    for classes in (21, 171):
        text = F.normalize(torch.randn(classes, clip.embed_dim), dim=-1)
        scores = models["naclip"](images, text)
        runs: dict[str, Any] = {
            "tower": partial(bare, clip, images),
            "proxy": partial(proxy.features, images),
            **{name: partial(model, images, text) for name, model in models.items()},
            "labels": partial(scores.label_map, (512, 512)),
            **{kind: partial(refine, scores, picture, Refinement(kind)) for kind in ("edges", "pamr")},
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + (repeats > 1)):
            for name, run in runs.items():
                start = time.process_time()
                run()
                if turn or repeats == 1:  # the first of several turns warms up
                    times[name].append(time.process_time() - start)
        medians = {name: float(torch.tensor(values).median()) for name, values in times.items()}
        ratios = {name: value / medians["tower"] for name, value in medians.items()}
        ratios["proxyclip"] = medians["proxyclip"] / (medians["tower"] + medians["proxy"])
        for kind in ("edges", "pamr"):  # beyond the labels without it
            ratios[kind] = (medians[kind] - medians["labels"]) / medians["tower"]
        found[str(classes)] = {"seconds": medians, "ratios": ratios}
        print(classes, {name: round(value, 3) for name, value in ratios.items()}, flush=True)
    return {"repeats": repeats, "threads": torch.get_num_threads(), "classes": found, "goals": GOALS}


def bare(clip: Any, images: Tensor) -> Tensor:
    """The tower as CLIP runs it, every token projected."""
    tower = clip.patch_tower
    return tower.project(tower.run(tower.embed(images)[0])[0])


def collapse(rows: list[dict[str, Any]]) -> list[str]:
    """Why ClearCLIP, NACLIP and ResCLIP do badly here."""
    hiou = {row["method"]: f"{row['hiou']:.1f}" for row in rows if row["refine"] == "none"}
    if not set(BLOCKS) <= set(hiou):
        return []
    return [
        "ClearCLIP, NACLIP and ResCLIP project the last block's attention output alone, without the residual "
        "connection and the MLP, which improves OpenAI's CLIP. In this tiny CLIP a patch's information is in the "
        "residual stream (on a val scene the tokens that enter the last block have a mean length of 33.2, its "
        "attention's output of 7.2), so they fall to hIoU "
        f"{hiou['clearclip']}, {hiou['naclip']} and {hiou['resclip']}; with the whole block they have "
        f"{hiou['clearclip, whole block']}, {hiou['naclip, whole block']} and {hiou['resclip, whole block']}, and "
        f"without it MaskCLIP falls from {hiou['maskclip']} to {hiou['maskclip, attention alone']} and SCLIP from "
        f"{hiou['sclip']} to {hiou['sclip, attention alone']}. It says nothing about photographs.",
    ]


def place(found: dict[str, Any]) -> str:
    """The machine in a sentence."""
    return (
        f"{found['processor']}, torch {found['torch']}, Python {found['python']}; load average when the run ended: "
        f"{found['load']}."
    )


def page(result: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# Training-free on the picture world", ""]
    lines += ["Made by `python -m benchmarks.training_free`; do not edit by hand. Nothing is trained here.", ""]
    for name, found in result.get("worlds", {}).items():
        lines += [
            f"## {name}",
            "",
            f"{found['scenes']} val scenes, the packaged `{found['clip']}`, whole pictures at twice the tower's size, "
            f"ResCLIP with the blocks {list(found['middle_blocks'])}; scenes and towers are fixed, so there is no "
            f"seed. *Boundary* and *interior* are the accuracy of pixels within {BORDER} of a border of the labels "
            "and of the others; ms is a picture's processor time, refinement included, with one thread. `regions` "
            f"votes inside the proposals of `deop-emoji`. {place(found['machine'])}",
            "",
            "| method | refine | seen | unseen | hIoU | boundary | interior | ms |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            numbers = [row[key] for key in ("miou_seen", "miou_unseen", "hiou", "boundary", "interior")]
            cells = " | ".join(f"{number:.1f}" for number in numbers)
            lines.append(f"| {row['method']} | {row['refine']} | {cells} | {row['ms']:.0f} |")
        lines += ["", *(collapse(found["rows"]) if name == "picture-world" else ()), ""]
    if "cost" in result:
        found = result["cost"]
        turns = "one turn" if found["repeats"] == 1 else f"medians of {found['repeats']} alternating turns"
        lines += [
            "## Cost",
            "",
            f"ViT-B/16 with random weights, one picture of 512 x 512, {found['threads']} threads, {turns}, processor "
            "time. Methods: encoding and scoring, divided by the tower alone (ProxyCLIP: by both towers, with DINO "
            "ViT-B/16 as the proxy). Refinements: the time they add to the labels', divided by the tower's. "
            f"{place(result['machine_cost'])}",
            "",
            "| | goal | 21 classes | 171 classes |",
            "|---|---|---|---|",
        ]
        names = [*GOALS, "edges", "pamr"]
        for name in names:
            goal = found["goals"].get(name, 0.15 if name == "edges" else None)
            cells = [f"{found['classes'][count]['ratios'][name]:.2f}" for count in ("21", "171")]
            lines.append(f"| {name} | {'-' if goal is None else f'{goal:.2f}'} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and write both pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", choices=CLIPS, help="judge on this world")
    parser.add_argument("--cost", action="store_true", help="measure the cost")
    parser.add_argument("--limit", type=int, default=200, help="val scenes")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the cost")
    parser.add_argument("--threads", type=int, default=2, help="threads of the cost")
    options = parser.parse_args()
    path = RESULTS / "training-free.json"
    result = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if options.world:
        result.setdefault("worlds", {})[options.world] = world(options.world, options.limit)
    if options.cost:
        torch.set_num_threads(options.threads)
        result |= {"cost": cost(options.repeats), "machine_cost": machine("cpu")}
    write_json(path, result)
    write_text(path.with_suffix(".md"), page(result))


if __name__ == "__main__":
    main()
