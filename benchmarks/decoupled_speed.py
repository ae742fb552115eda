"""Where a decoupled system's prediction spends its time, before and after what was made faster, in one run.

ViT-B/16 with random weights, a picture of 512 x 512, 171 classes, text cached, processor time. The candidates are
measured in turn: "before" runs crops 32 at a time, "after" as `lexiseg.regions.crops` does it now, and "bf16" is that
with ``dtype="bf16"``, which ``dtype="auto"`` takes on a processor that has instructions for it. Labels of "after" are
compared with those of "before".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.measure import VIT_B_16, alternate, parser, report, set_up, summary
from lexiseg.clip.model import build_clip
from lexiseg.models import SYSTEMS
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.regions import crops
from lexiseg.segmenter import Segmenter

STAGES = ("propose", "patches", "pool", "encode_regions", "score")


@contextmanager
def crops_at_once(count: int) -> Iterator[None]:
    """Run crops so many at a time."""
    before, crops._CPU_CHUNK = crops._CPU_CHUNK, count
    try:
        yield
    finally:
        crops._CPU_CHUNK = before


def stages_of(segmenter: Segmenter, predict: Callable[[], Any]) -> dict[str, float]:
    """Processor seconds of the parts of one prediction; a part includes those it calls."""
    seconds: dict[str, float] = {}

    def timed(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def run(*arguments: Any, **more: Any) -> Any:
            start = time.process_time()
            try:
                return call(*arguments, **more)
            finally:
                seconds[name.strip("_")] = seconds.get(name.strip("_"), 0.0) + time.process_time() - start

        setattr(owner, name, run)

    owners = [(segmenter.model, name) for name in STAGES if hasattr(segmenter.model, name)] + [(segmenter, "_labels")]
    for owner, name in owners:
        timed(owner, name)
    predict()
    for owner, name in owners:
        delattr(owner, name)
    return {name: round(value, 3) for name, value in seconds.items()}


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--system", choices=("deop", "zegformer", "zsseg", "freeseg"), default="deop")
    arguments.add_argument("--side", type=int, default=512, help="side of the picture in pixels")
    arguments.add_argument("--classes", type=int, default=171, help="classes (COCO-Stuff has 171)")
    arguments.add_argument("--queries", type=int, default=100, help="proposals")
    arguments.set_defaults(threads=1, repeats=3)
    options = arguments.parse_args()
    set_up(options)
    clip = build_clip({"model_cfg": VIT_B_16})
    usual = SYSTEMS[options.system].options_class().model_dump()["proposals"]
    given: dict[str, Any] = {"short_side": options.side, "proposals": {**usual, "num_queries": options.queries}}
    if options.system == "zegformer":  # its 32 sentences a class cost minutes, and are not what is measured
        given["region_templates"] = ("a photo of a {}.",)
    model = SYSTEMS[options.system].build(clip, given).eval()
    assert isinstance(model, DecoupledModel)
    segmenters = {
        name: Segmenter(model, device=options.device, disk_cache=False, dtype=dtype)
        for name, dtype in (("float32", None), ("bf16", "bf16"))
    }
    picture = np.random.default_rng(options.seed).integers(0, 256, (options.side, options.side, 3), dtype=np.uint8)
    classes = [f"class {index}" for index in range(options.classes)]
    segmenters["bf16"].embedder = segmenters["float32"].embedder
    model.embed_text(
        segmenters["float32"].embedder, segmenters["float32"].vocabulary(classes)
    )  # remembered from now on
    labels: dict[str, torch.Tensor] = {}

    def predict(name: str, dtype: str, at_once: int) -> None:
        with crops_at_once(at_once):
            labels[name] = segmenters[dtype].predict(picture, classes).label_map

    now = crops._CPU_CHUNK
    candidates = {
        "before": lambda: predict("before", "float32", 32),
        "after": lambda: predict("after", "float32", now),
        "after, bf16": lambda: predict("after, bf16", "bf16", now),
    }
    rows = summary(alternate(candidates, options.repeats, options.device, warmup=0), "before")
    changed = {name: float((labels[name] != labels["before"]).float().mean()) for name in labels}
    for row in rows:
        row["times as fast"] = 1 / row.pop("cpu ratio")
        row["labels changed %"] = 100 * changed[row["what"]]
        del row["ratio"], row["fastest"]
    report(
        f"{options.system}, before and after", rows, options, classes=options.classes,
        model=f"{options.system}, ViT-B/16, {options.queries} proposals, random weights",
        stages=stages_of(segmenters["float32"], candidates["after"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
