"""The whole of a one-stage predict against the bare CLIP image tower on as many tokens, with the same prompts.

"predict" begins with a picture in memory and ends with a label map and its scores at the picture's size: resizing,
normalisation, the tower, the decoder over all classes, and the decode to pixels. Its text embeddings come from the
cache. "tower" is the same image tower with the same prompts and nothing else; "tower, prompts as rows" computes the
prompts' own rows as well, as the authors' code does. The goal is at most 1.25 towers for one predict of ZegCLIP, and
1.35 for one of Cascade-CLIP. ``--against`` times other systems in the same run, each its own way over the picture:
CAT-Seg in four windows and the whole, as released.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cost.one_stage import CAT_SEG
from benchmarks.measure import VIT_B_16, alternate, parser, report, set_up, summary
from benchmarks.prompt_rows import prompts_as_rows
from lexiseg.clip.model import build_clip
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.models.zegclip import ZegCLIP
from lexiseg.segmenter import Segmenter

GOALS = {"zegclip": 1.25, "cascade-clip": 1.35, "spt-seg": None}
TOWER = "tower"
OTHERS = ("cascade-clip", "cat-seg", "dense-clip", "spt-seg", "zegclip")


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--side", type=int, default=512, help="side of the picture in pixels")
    arguments.add_argument("--classes", type=int, default=171, help="classes (COCO-Stuff has 171)")
    arguments.add_argument("--prompts", type=int, default=100, help="prompts a block")
    arguments.add_argument("--system", choices=sorted(GOALS), default="zegclip", help="what predicts")
    arguments.add_argument("--against", nargs="*", choices=OTHERS, default=[], help="systems timed in the same run")
    options = arguments.parse_args()
    set_up(options)
    side = options.side
    # One window, as the papers' 512 over a picture of 512.
    policy = {"window_size": side, "window_stride": side * 426 // 512, "short_side": side}
    clip = build_clip({"model_cfg": VIT_B_16})
    settings: dict[str, dict[str, Any]] = {"cat-seg": CAT_SEG, "dense-clip": {"short_side": side}}

    def build(system: str) -> Segmenter:
        given = settings.get(system, {"num_prompts": options.prompts, **policy})
        made = SYSTEMS[system].build(copy.deepcopy(clip), given).eval()
        return Segmenter(made, device=options.device, disk_cache=False)

    segmenter = build(options.system)
    model = segmenter.model
    if not isinstance(model, ZegCLIP):
        raise LexisegError(f"{options.system} is no one-stage system.")
    picture = np.random.default_rng(options.seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    classes = [f"class {index}" for index in range(options.classes)]
    images = torch.randn(1, 3, side, side, device=options.device)

    @torch.inference_mode()
    def tower() -> None:
        model.project_tokens(model.run_tower(images))

    def tower_with_rows() -> None:
        with prompts_as_rows(model):
            tower()

    candidates = {TOWER: tower, "tower, prompts as rows": tower_with_rows}
    candidates["predict"] = partial(segmenter.predict, picture, classes)
    candidates |= {f"predict of {other}": partial(build(other).predict, picture, classes) for other in options.against}
    rows = summary(alternate(candidates, options.repeats, options.device), TOWER)
    ratio = next(row["ratio"] for row in rows if row["what"] == "predict")
    goal = GOALS[options.system]
    verdict = "" if goal is None else f"the goal of {goal} is {'met' if ratio <= goal else 'missed'}"
    report(
        f"The predict of {options.system} against its bare image tower",
        rows,
        options,
        model=f"{options.system}, ViT-B/16, {options.prompts} prompts a block, random weights",
        classes=options.classes,
        picture=f"{side} x {side}",
        verdict=f"{ratio:.3f} towers; {'no goal is set' if goal is None else verdict}",
    )


if __name__ == "__main__":
    main()
