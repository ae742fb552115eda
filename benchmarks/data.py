"""The data path alone: seconds of one core that a training sample costs, stage by stage, and what a step costs beside.

A row is a dataset as the readers see it, with its training pipeline: VOC's pictures (500 x 375) and COCO's (640 x
480), JPEGs and label PNGs in the distributions' folders, filled with scenes of the picture world, and the papers'
pipeline at a crop of 512; or the picture world's own generator at 256. "decode" is the picture alone, "read" the sample
with its label, "per s" how many samples a second one core prepares: divide the pictures a second that an accelerator
trains on by it, and that many workers keep it busy. With --step, "step" is one picture's forward and backward pass on
this machine, and "fraction" what the data costs beside it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import VIT_B_16, parser, report, set_up
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import build_clip
from lexiseg.data.base import Sample, SegmentationDataset
from lexiseg.data.picture_world import PictureWorld
from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.dataset import FileDataset
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.transforms import Pipeline, light_pipeline, paper_pipeline
from lexiseg.images import read_image
from lexiseg.models import ZegCLIP, ZegCLIPOptions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP, WORLD = 512, 256


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--samples", type=int, default=24, help="samples of a measurement")
    arguments.add_argument("--step", action="store_true", help="time a training step as well (minutes on a CPU)")
    arguments.set_defaults(threads=1, repeats=3)
    options = arguments.parse_args()
    set_up(options)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        scenes = PictureWorld("val", size=640, length=options.samples)
        _write_voc(root / "voc", scenes)
        _write_coco(root / "coco", scenes)
        papers = paper_pipeline(MEAN, STD, crop=CROP)
        rows = [
            _row("VOC", open_data_set("voc2012", root / "voc", "train"), papers, options),
            _row("COCO-Stuff", open_data_set("coco-stuff-164k", root / "coco", "train"), papers, options),
            _row(
                "picture world",
                PictureWorld("train", size=WORLD, length=options.samples),
                light_pipeline(MEAN, STD, crop=WORLD),
                options,
            ),
        ]
    if options.step:
        steps = [_step(_large(), CROP, 15), _step(_large(), CROP, 156), _step(_small(), WORLD, 40)]
        for row, seconds in zip(rows, steps, strict=True):
            row["step"] = 1000 * seconds
            row["fraction"] = f"{row['sum'] / (1000 * seconds):.1%}"
    report(
        "Preparing training samples: milliseconds of one core a sample",
        rows,
        options,
        samples=options.samples,
        step="ZegCLIP, one picture: ViT-B/16 at 512, 15 and 156 classes; clip-emoji at 256, 40 classes",
    )


def _row(name: str, dataset: SegmentationDataset, pipeline: Pipeline, options: Any) -> dict[str, Any]:
    count = len(dataset)
    samples = [dataset[index] for index in range(count)]
    read = _cost(lambda index: dataset[index], count, options.repeats)
    decode = None
    if isinstance(dataset, FileDataset):
        paths = [item.image for item in dataset.items]
        decode = _cost(lambda index: read_image(paths[index]), count, options.repeats)
    augment = _cost(lambda index: _augment(pipeline, samples[index], index), count, options.repeats)
    return {
        "data": name,
        "decode": "-" if decode is None else 1000 * decode,
        "read": 1000 * read,
        "augment": 1000 * augment,
        "sum": 1000 * (read + augment),
        "per s": round(1 / (read + augment)),
    }


def _augment(pipeline: Pipeline, sample: Sample, index: int) -> None:
    pipeline(sample.image, sample.label, np.random.default_rng([0, index]))


def _cost(run: Callable[[int], Any], count: int, repeats: int) -> float:
    """Processor seconds of one call, the least of several passes over all samples."""
    passes = []
    for _ in range(repeats + 1):  # the first one warms up
        since = time.process_time()
        for index in range(count):
            run(index)
        passes.append((time.process_time() - since) / count)
    return min(passes[1:])


def _large() -> ZegCLIP:
    return ZegCLIP(build_clip({"model_cfg": VIT_B_16}), ZegCLIPOptions(num_prompts=100))


def _small() -> ZegCLIP:
    return ZegCLIP(load_clip("clip-emoji"), ZegCLIPOptions())


def _step(model: ZegCLIP, side: int, classes: int) -> float:
    model.train()
    images = torch.randn(1, 3, side, side)
    labels = torch.randint(0, classes, (1, 4, 4)).repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
    text = torch.nn.functional.normalize(torch.randn(classes, model.clip.embed_dim), dim=-1)
    since = time.process_time()
    model.losses(images, labels, text)["loss"].backward()
    return time.process_time() - since


def _write_voc(root: Path, scenes: PictureWorld) -> None:
    home = root / "VOCdevkit" / "VOC2012"
    names = []
    for index, scene in enumerate(scenes):
        names.append(f"2007_{index:06d}")
        _save(scene, (500, 375), home / "JPEGImages" / names[-1], home / "SegmentationClass" / names[-1], range(1, 21))
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def _write_coco(root: Path, scenes: PictureWorld) -> None:
    values = list(data_set("coco-stuff-164k").id_map)
    for index, scene in enumerate(scenes):
        name = f"{index:012d}"
        for year in ("train2017", "val2017"):
            _save(scene, (640, 480), root / "images" / year / name, root / "stuffthingmaps" / year / name, values)


def _save(scene: Sample, size: tuple[int, int], picture: Path, label: Path, values: Sequence[int]) -> None:
    """The upper part of a scene as a JPEG and a label PNG with ``values`` for the scene's classes."""
    width, height = size
    for path in (picture, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    box = (0, 0, width, height)
    pixels = Image.fromarray(scene.image.permute(1, 2, 0).numpy()).resize((width, width)).crop(box)
    pixels.save(picture.with_suffix(".jpg"), quality=92)
    ids = np.asarray(values)[scene.label.numpy() % len(values)].astype(np.uint8)
    nearest = Image.Resampling.NEAREST
    Image.fromarray(ids).resize((width, width), nearest).crop(box).save(label.with_suffix(".png"))


if __name__ == "__main__":
    main()
