"""An exported model against the model: the graph's own run, a whole prediction, and the start of a command.

"torch" and "exported" are the image tower and head on one window, from normalised pixels to the grid of scores;
"predict" is a whole prediction from a picture in memory with text embeddings cached. The start is measured in a process
of its own: processor seconds of ``lexiseg predict`` from its first instruction to its end, and of the graphs in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import VIT_B_16, alternate, parser, report, set_up, summary

_PREDICT = """
import sys, time
from lexiseg.export import runtime
spent, opened = [], runtime.open_graph
def open_graph(*given):
    run = opened(*given)
    def timed(*inputs):
        start = time.process_time()
        found = run(*inputs)
        spent.append(time.process_time() - start)
        return found
    return timed
runtime.open_graph = open_graph
from lexiseg.cli import main
code = main(sys.argv[1:])
assert code == 0 and "torch" not in sys.modules
print("seconds", time.process_time(), sum(spent))
"""


def start_up(folder: Path, picture: np.ndarray, classes: list[str]) -> tuple[float, float]:
    """Processor seconds of a whole ``lexiseg predict``, and of the graphs' runs in it."""
    with TemporaryDirectory() as place:
        Image.fromarray(picture).save(Path(place) / "picture.png")
        words = ["predict", "picture.png", "; ".join(classes), "--model", str(folder), "--save", "labels"]
        done = subprocess.run(
            [sys.executable, "-c", _PREDICT, *words], cwd=place, capture_output=True, text=True, check=True
        )
    _, total, graphs = done.stdout.split()[-3:]
    return float(total), float(graphs)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--side", type=int, default=512, help="side of the picture in pixels")
    arguments.add_argument("--classes", type=int, default=171, help="classes (COCO-Stuff has 171)")
    arguments.add_argument("--precision", default="fp32", help="of the exported model: fp32, fp16 or int8")
    arguments.add_argument("--format", default="onnx", help="of the exported model: onnx, openvino or torch")
    arguments.add_argument("--folder", type=Path, help="keep the exported model here, or take the one that is there")
    options = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    set_up(options)
    from lexiseg.clip.model import build_clip
    from lexiseg.export.exporting import export
    from lexiseg.export.runtime import ExportedPredictor
    from lexiseg.models import SYSTEMS
    from lexiseg.segmenter import Segmenter

    side = options.side
    policy = {"window_size": side, "window_stride": side * 426 // 512, "short_side": side}
    model = SYSTEMS["zegclip"].build(build_clip({"model_cfg": VIT_B_16}), {"num_prompts": 100, **policy}).eval()
    segmenter = Segmenter(model, disk_cache=False)
    picture = np.random.default_rng(options.seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    classes = [f"class {index}" for index in range(options.classes)]
    with TemporaryDirectory() as place:
        folder = options.folder or Path(place) / "model"
        seconds = time.process_time()
        if not folder.is_dir():
            export(segmenter, folder, kind=options.format, precision=options.precision)
        seconds = time.process_time() - seconds
        exported = ExportedPredictor(folder)
        equal = np.mean(
            np.asarray(segmenter.predict(picture, classes).label_map) == exported.predict(picture, classes).label_map
        )
        text = torch.from_numpy(exported.model.text(classes, exported.model.default_templates))
        images = torch.randn(1, 3, side, side)

        @torch.inference_mode()
        def run_torch() -> None:
            model(images, text)

        candidates = {
            "torch": run_torch,
            "exported": lambda: exported.model.grids(images.numpy(), text.numpy()),
            "torch, predict": lambda: segmenter.predict(picture, classes),
            "exported, predict": lambda: exported.predict(picture, classes),
        }
        rows = summary(alternate(candidates, options.repeats, options.device), "torch")
        total, graphs = start_up(folder, picture, classes[:3])
    report(
        "An exported ZegCLIP against the model",
        rows,
        options,
        model=f"zegclip, ViT-B/16, 100 prompts a block, random weights; {options.format}, {options.precision}",
        classes=options.classes,
        picture=f"{side} x {side}",
        equal_labels=f"{100 * equal:.3f} %",
        start=f"{total:.2f} processor seconds for lexiseg predict, 3 classes; {total - graphs:.2f} beyond the graphs",
        export=f"{seconds:.1f} processor seconds",
    )


if __name__ == "__main__":
    main()
