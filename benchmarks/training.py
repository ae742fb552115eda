"""A training step of ZegCLIP against a bare forward and backward pass: what the loop around them costs.

Both run the same model on the same pictures and labels, in turn. "forward + backward" is the model's losses and their
gradients, nothing else. "training step" is everything ``lexiseg train`` does for a step: the batch from the queue, the
losses, the gradients and their norm, the optimizer, the schedule, the log. Rendering or reading pictures is not in
it: it runs in background processes, and belongs to the data, not to the loop.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import VIT_B_16, Timing, parser, report, set_up, summary
from lexiseg.clip.model import build_clip
from lexiseg.models.zegclip import ZegCLIP, ZegCLIPOptions
from lexiseg.recipes import TrainSettings
from lexiseg.training.engine import Task
from lexiseg.training.trainer import Trainer

BARE, STEP = "forward + backward", "training step"
WARMUP = 1


class TimedTask(Task):
    """A fixed batch, and a bare pass after each training step of the loop."""

    def __init__(self, model: ZegCLIP, images: Tensor, labels: Tensor, text: Tensor) -> None:
        self.model = model
        self._batch = {"images": images, "labels": labels}
        self._text = text
        self._since = self._now()
        self.timings: dict[str, list[Timing]] = {BARE: [], STEP: []}

    def batch(self, index: int, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
        return self._batch

    def losses(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.model.losses(batch["images"], batch["labels"], self._text.to(batch["images"].device))

    def after_step(self, step: int) -> None:
        taken = self._elapsed(self._since)
        self.model.zero_grad(set_to_none=True)
        batch = {name: value.to(self.model.device) for name, value in self._batch.items()}
        since = self._now()
        with torch.enable_grad():
            self.losses(batch)["loss"].backward()
        if step >= WARMUP:
            self.timings[STEP].append(taken)
            self.timings[BARE].append(self._elapsed(since))
        self._since = self._now()

    def export(self, folder: Path) -> None:
        """Nothing is kept."""

    def _now(self) -> Timing:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return Timing(time.perf_counter(), time.process_time())

    def _elapsed(self, since: Timing) -> Timing:
        now = self._now()
        return Timing(now.wall - since.wall, now.cpu - since.cpu)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--side", type=int, default=512, help="side of the pictures in pixels")
    arguments.add_argument("--batch-size", type=int, default=1, help="pictures a step")
    arguments.add_argument("--classes", type=int, default=156, help="seen classes (COCO-Stuff has 156)")
    arguments.add_argument("--prompts", type=int, default=100, help="prompts a block")
    options = arguments.parse_args()
    set_up(options)
    model = ZegCLIP(build_clip({"model_cfg": VIT_B_16}), ZegCLIPOptions(num_prompts=options.prompts)).train()
    shape = (options.batch_size, options.side, options.side)
    images = torch.randn(shape[0], 3, *shape[1:])
    labels = torch.randint(0, options.classes, (shape[0], 4, 4)).repeat_interleave(options.side // 4, 1)
    labels = labels.repeat_interleave(options.side // 4, 2)
    text = torch.nn.functional.normalize(torch.randn(options.classes, model.clip.embed_dim), dim=-1)
    task = TimedTask(model, images, labels, text)
    settings = TrainSettings(
        steps=WARMUP + options.repeats,
        batch_size=options.batch_size,
        lr=2e-4,
        workers=0,
        log_every=1,
        # The end writes one checkpoint, after the last measurement.
        checkpoint_every=WARMUP + options.repeats,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        device = "cpu" if options.device == "cpu" else None
        Trainer(task, settings, Path(folder), device=device, tensorboard=False, progress=False).run()
    report(
        "A training step against a bare forward and backward pass",
        summary(task.timings, BARE),
        options,
        model=f"ZegCLIP, ViT-B/16, {options.prompts} prompts a block, {options.classes} classes",
        batch=f"{options.batch_size} x {options.side} x {options.side}",
    )


if __name__ == "__main__":
    main()
