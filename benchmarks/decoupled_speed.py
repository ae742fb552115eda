"""How fast decoupled systems predict, against the authors' way of computing, and where the time goes.

ViT-B/16 with random weights, a picture of 512 x 512, 171 classes, their text cached, processor time. For each system
the candidates are measured in turn: "authors" runs the same model as the released code does, by torch's own layers as
they are, all crops in batches of 32, every class at every pixel and then the best one; "lexiseg" is a prediction, and
"bf16" that with ``dtype="bf16"``, but on processors without instructions for it. Pixels whose label differs from the
authors' way are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import VIT_B_16, alternate, parser, report, set_up, summary
from lexiseg import matmul
from lexiseg.clip.model import build_clip
from lexiseg.devices import pick_dtype
from lexiseg.models import SYSTEMS
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.pictures import Picture
from lexiseg.predictor import Words
from lexiseg.regions import crops
from lexiseg.scores import RegionScores
from lexiseg.segmentation import Segmentation
from lexiseg.segmenter import Segmenter
from lexiseg.windows import WindowPolicy

DECOUPLED = ("deop", "zegformer", "zsseg", "freeseg")
STAGES = ("propose", "patches", "heatmaps", "encode_regions", "score")


@contextmanager
def authors_way(segmenter: Segmenter) -> Iterator[None]:
    """Compute as the released code does."""
    before = crops.CPU_CHUNK, matmul.enabled
    crops.CPU_CHUNK, matmul.enabled = 32, False
    segmenter.labels_of = dense_labels  # type: ignore[method-assign]
    try:
        yield
    finally:
        crops.CPU_CHUNK, matmul.enabled = before
        del segmenter.labels_of


def dense_labels(picture: Picture, words: Words, policy: WindowPolicy) -> tuple[Tensor, Tensor]:
    """MaskFormer's semantic inference as it is written: the best of the map (C, H, W) of all classes."""
    scores, image = picture.joined(policy), picture.image
    assert isinstance(scores, RegionScores)
    masks = F.interpolate(scores.masks, scores.resize_to, mode="bilinear", align_corners=scores.align_corners)
    found = torch.einsum("nc,nhw->chw", scores.class_scores[0], masks[0].sigmoid())
    if scores.offsets is not None:
        found = found - scores.offsets[:, None, None]
    best, labels = found[:, : image.shape[-2], : image.shape[-1]].max(dim=0)
    return labels, best


def winning(segmentation: Segmentation) -> Tensor:
    """The winning score of each pixel."""
    assert segmentation.scores is not None
    return segmentation.scores


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

    owners = [(segmenter.model, name) for name in STAGES if hasattr(segmenter.model, name)] + [(segmenter, "labels_of")]
    for owner, name in owners:
        timed(owner, name)
    predict()
    for owner, name in owners:
        delattr(owner, name)
    return {name: round(value, 3) for name, value in seconds.items()}


def measure(system: str, options: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of one system, and the parts of its prediction."""
    clip = build_clip({"model_cfg": VIT_B_16})
    usual = SYSTEMS[system].options_class().model_dump()["proposals"]
    queries = options.queries if system == "deop" else options.crops
    given = {"short_side": options.side, "proposals": {**usual, "num_queries": queries}}
    model = SYSTEMS[system].build(clip, given).eval()
    assert isinstance(model, DecoupledModel)
    text = F.normalize(torch.randn(options.classes, 1 + (system == "zegformer"), clip.embed_dim), dim=-1).squeeze(1)
    model.embed_text = lambda *_: text  # type: ignore[method-assign]
    segmenters = {
        dtype: Segmenter(model, device=options.device, disk_cache=False, dtype=dtype) for dtype in (None, "bf16")
    }
    coarse = np.random.default_rng(options.seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((options.side, options.side), Image.Resampling.BICUBIC))
    classes = [f"class {index}" for index in range(options.classes)]
    found: dict[str, Segmentation] = {}

    def predict(name: str, dtype: str | None) -> None:
        found[name] = segmenters[dtype].predict(picture, classes)

    def as_authors() -> None:
        with authors_way(segmenters[None]):
            predict("authors", None)

    candidates = {
        "authors": as_authors,
        "lexiseg": lambda: predict("lexiseg", None),
        "bf16": lambda: predict("bf16", "bf16"),
    }
    timings = alternate({name: candidates[name] for name in options.only}, options.repeats, options.device, warmup=0)
    rows = [{"system": f"{system}, {queries} proposals", **row} for row in summary(timings, options.only[0])]
    first = found[options.only[0]]
    for row in rows:
        own = found[row["what"]]
        row["times as fast"] = 1 / row.pop("cpu ratio")
        row["pixels changed"] = int((own.label_map != first.label_map).sum())
        row["score changed by"] = float((winning(own) / winning(first) - 1).abs().max())
        del row["ratio"], row["fastest"], row["seconds"]
    return rows, stages_of(segmenters[None], candidates["lexiseg"])


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--system", nargs="+", choices=DECOUPLED, default=DECOUPLED)
    arguments.add_argument("--side", type=int, default=512, help="side of the picture in pixels")
    arguments.add_argument("--classes", type=int, default=171, help="classes (COCO-Stuff has 171)")
    arguments.add_argument("--queries", type=int, default=100, help="proposals of DeOP")
    arguments.add_argument("--crops", type=int, default=16, help="proposals of the others, each a run of the tower")
    names = ("authors", "lexiseg", "bf16")
    arguments.add_argument("--only", nargs="+", choices=names, help="what to compare, with the first")
    arguments.set_defaults(threads=1, repeats=3)
    options = arguments.parse_args()
    set_up(options)
    # On processors without instructions for it, bf16 takes many minutes.
    slow = options.device == "cpu" and pick_dtype("auto", torch.device("cpu")) != torch.bfloat16
    options.only = options.only or (names[:2] if slow else names)
    found = {system: measure(system, options) for system in options.system}
    report(
        "Decoupled predictions", [row for rows, _ in found.values() for row in rows], options,
        classes=options.classes, model="ViT-B/16, random weights",
        **{f"parts of {system}": parts for system, (_, parts) in found.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
