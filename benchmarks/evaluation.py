"""What judging a picture costs beside looking at it: pictures a second and peak memory, against the number of classes.

Each row is measured in a process of its own, which runs ``evaluate`` over pictures that are in memory, with text
embeddings that are given: the model, the decode to labels and the counting, as in any evaluation. The times are
processor seconds a picture; "model" is what neither decode nor counting takes. "peak" is memory beyond what the
process held when it began to evaluate, with everything loaded and one small picture already predicted; "dense" is
what the array of classes x height x width would take that is never built. Sizes are PASCAL VOC's usual one and
ADE20K's with its shorter side at 512.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from benchmarks.measure import VIT_B_16, parser, report, set_up
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import build_clip
from lexiseg.clip.text import TextEmbedder
from lexiseg.data.base import Sample
from lexiseg.evaluation.metrics import Confusion
from lexiseg.evaluation.run import run_evaluation
from lexiseg.label_ids import ignore_index
from lexiseg.models import ZegCLIP, ZegCLIPOptions
from lexiseg.scores import Scores
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary

CLASSES = (20, 171, 847)
SIZES = ("500x375", "683x512")
MEBI = 1 << 20


class Pictures:
    """Random pictures with blocks of random labels.

    Args:
        count: how many.
        size: width and height.
        num_classes: of the labels.
    """

    def __init__(self, count: int, size: tuple[int, int], num_classes: int) -> None:
        self.vocabulary = Vocabulary.parse([f"class {index}" for index in range(num_classes)])
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        width, height = self._size
        rng = np.random.default_rng(index)
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
        blocks = rng.integers(0, len(self.vocabulary), (height // 32 + 1, width // 32 + 1))
        label = np.repeat(np.repeat(blocks, 32, 0), 32, 1)[:height, :width].copy()
        label[:8] = ignore_index(len(self.vocabulary))
        return Sample(image, torch.from_numpy(label), f"picture {index}")


class GivenTexts:
    """Unit vectors in place of a text tower's: random ones, as far apart as those of different words or farther.

    Args:
        dim: their length.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def __call__(self, vocabulary: Vocabulary) -> torch.Tensor:
        texts = torch.randn(len(vocabulary.words), self._dim, generator=torch.Generator().manual_seed(0))
        return texts / texts.norm(dim=1, keepdim=True)


def build(tower: str) -> ZegCLIP:
    """Return ZegCLIP on the paper's tower, or on the small one of the picture world; its weights are random."""
    if tower == "clip-emoji":
        return ZegCLIP(load_clip("clip-emoji"), ZegCLIPOptions())
    options = ZegCLIPOptions(num_prompts=100, window_size=512, window_stride=426, short_side=512)
    return ZegCLIP(build_clip({"model_cfg": VIT_B_16}), options)


def measure_row(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in this process."""
    set_up(options)
    width, height = (int(side) for side in options.size[0].split("x"))
    num_classes = options.classes[0]
    segmenter = Segmenter(build(options.tower).eval(), device=options.device, disk_cache=False)
    segmenter.embedder = cast(TextEmbedder, GivenTexts(segmenter.model.clip.embed_dim))
    spent = {"decode": 0.0, "count": 0.0}
    _timed(Scores, "label_and_score", spent, "decode")
    _timed(Confusion, "update", spent, "count")
    segmenter.predict(np.zeros((32, 32, 3), np.uint8), Vocabulary.parse(["one", "two"]))
    dataset = Pictures(options.pictures, (width, height), num_classes)
    spent.update(dict.fromkeys(spent, 0.0))
    before, since, wall = _peak(), time.process_time(), time.perf_counter()
    result = run_evaluation(segmenter, dataset, name="random", split="val", num_examples=0, progress=False)
    cpu, elapsed = time.process_time() - since, time.perf_counter() - wall
    if result.confusion.labelled.sum() != options.pictures * width * (height - 8):
        raise RuntimeError("pixels were lost")
    count = options.pictures
    return {
        "size": options.size[0],
        "classes": num_classes,
        "model": (cpu - sum(spent.values())) / count,
        "decode": spent["decode"] / count,
        "counting": spent["count"] / count,
        "per s": count / elapsed,
        "peak MiB": round((_peak() - before) / MEBI),
        "dense MiB": round(4 * num_classes * width * height / MEBI),
    }


def _timed(owner: type, name: str, spent: dict[str, float], key: str) -> None:
    real: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        since = time.process_time()
        result = real(*args, **kwargs)
        spent[key] += time.process_time() - since
        return result

    setattr(owner, name, timed)


def main() -> None:
    """Run the benchmark, a process a row."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--classes", type=int, nargs="+", default=list(CLASSES))
    arguments.add_argument("--size", nargs="+", default=list(SIZES), help="WIDTHxHEIGHT")
    arguments.add_argument("--pictures", type=int, default=4, help="pictures of a row")
    arguments.add_argument("--tower", choices=("vit-b-16", "clip-emoji"), default="vit-b-16", help="image tower")
    arguments.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    arguments.set_defaults(repeats=1)
    options = arguments.parse_args()
    if options.row:
        print(json.dumps(measure_row(options)))
        return
    rows = []
    for size in options.size:
        for num_classes in options.classes:
            command = [sys.executable, "-m", "benchmarks.evaluation", "--row", "--size", size]
            command += ["--classes", str(num_classes), "--pictures", str(options.pictures), "--tower", options.tower]
            command += ["--device", options.device, "--threads", str(options.threads), "--seed", str(options.seed)]
            runs = [
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                for _ in range(options.repeats)
            ]
            rows.append(min(runs, key=lambda run: run["model"] + run["decode"]))
    report("Evaluating: seconds a picture", rows, options, model=f"ZegCLIP, {options.tower}, random weights")


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
