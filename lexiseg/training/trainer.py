"""The training loop: AdamW, schedule, precision, accumulation, log and checkpoints, on accelerate.

On a CPU a run that was killed and resumed ends with the same bits as one that was not: batches are numbered and pure
functions of their number, the rate is a function of the step, and everything else is in the checkpoint.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object, send_to_device
from torch import Tensor, nn

from lexiseg.errors import LexisegError
from lexiseg.files import make_folder, write_json
from lexiseg.training.checkpoint import capture_rng, find_checkpoints, load_checkpoint, read_state, restore_rng
from lexiseg.training.checkpoint import save_checkpoint as write_checkpoint
from lexiseg.training.prefetch import prefetch
from lexiseg.training.runlog import RunLog
from lexiseg.training.schedule import constant_warmup, poly_warmup
from lexiseg.training.settings import RESUMABLE, TrainSettings
from lexiseg.training.task import Task


class _Losses(nn.Module):
    """The task's loss as a module, so that accelerate can wrap its forward in autocast and gradient exchange."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._losses = task.losses

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return dict(self._losses(batch))


def seed_everything(seed: int) -> None:
    """Seed the torch, numpy and Python generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def learning_rate(step: int, base_lr: float, settings: TrainSettings) -> float:
    """The rate of a group with peak rate ``base_lr`` for the update made at 0-based ``step``."""
    if base_lr == 0.0:
        return 0.0
    if settings.schedule == "constant":
        return constant_warmup(step, base_lr, warmup_steps=settings.warmup_steps, warmup_ratio=settings.warmup_ratio)
    return poly_warmup(
        step,
        settings.steps,
        base_lr,
        warmup_steps=settings.warmup_steps,
        power=settings.power,
        min_lr=settings.min_lr,
        warmup_ratio=settings.warmup_ratio,
    )


def _accelerator(settings: TrainSettings, device: str | None) -> Accelerator:
    if AcceleratorState._shared_state and not AcceleratorState().use_distributed:
        # Accelerate keeps one global state a process and refuses a second run with another precision or device.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        cpu=device == "cpu",
        # Decoder layers whose masks are not used get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


class Trainer:
    """Trains a task.

    Args:
        task: model, data and loss.
        settings: the run's numbers.
        run_dir: folder of the run: ``metrics.jsonl``, ``tensorboard/``, ``samples/``, ``checkpoints/`` and, at the
            end, ``model/``.
        identity: JSON values beside the settings that must be the same when a run is resumed, such as its data.
        device: "cpu" to stay off an accelerator; None takes what there is.
        tensorboard: whether to write TensorBoard event files.
        progress: whether to show a bar.

    Raises:
        LexisegError: a multiplier's key is contained in no trainable parameter's name, or nothing is trainable.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        run_dir: str | Path,
        *,
        identity: Mapping[str, Any] | None = None,
        device: str | None = None,
        tensorboard: bool = True,
        progress: bool = True,
    ) -> None:
        self.task = task
        self.settings = settings
        self.run_dir = Path(run_dir)
        self.checkpoint_dir = self.run_dir / "checkpoints"
        self._given_identity = dict(identity or {})
        self._tensorboard = tensorboard
        self._progress = progress
        self._accelerator = _accelerator(settings, device)
        self._module = self._accelerator.prepare(_Losses(task))
        self._groups = task.parameter_groups(settings)
        self._check_groups()
        self.optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "weight_decay": group.weight_decay} for group in self._groups],
            lr=settings.lr,
            betas=settings.betas,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        device: torch.device = self._accelerator.device
        return device

    def run(self, *, resume: bool = False, until: int | None = None) -> Path:
        """Train to the end, or to some step before it.

        Args:
            resume: continue from the newest checkpoint in ``run_dir``; without one, start.
            until: stop after this many steps in all and export what is there; the schedule stays that of the whole run,
                which can be resumed. None trains to the end.

        Returns:
            The folder the task exported its model to.

        Raises:
            LexisegError: ``run_dir`` holds checkpoints and ``resume`` is not asked for; the checkpoint does not fit;
                or the loss or a gradient is not finite (the message names step and samples, nothing is saved of it);
                or ``until`` lies behind the run or behind its checkpoint.
        """
        settings, task, main = self.settings, self.task, self._accelerator.is_main_process
        end = settings.steps if until is None else until
        if not 1 <= end <= settings.steps:
            raise LexisegError(
                f"The run has {settings.steps} steps, so it cannot stop after {end}; choose one of them."
            )
        first = self._start(resume)
        if first > end:
            raise LexisegError(
                f"'{self.run_dir}' is at step {first} already, past {end}; choose another output folder."
            )
        indices = self._batch_indices(first, end)
        batches = iter(prefetch(task.batch, indices, workers=settings.workers))
        task.model.train()
        log = RunLog(
            self.run_dir,
            end,
            first_step=first,
            tensorboard=self._tensorboard,
            progress=self._progress,
            enabled=main,
        )
        sums: dict[str, float] = defaultdict(float)
        since, logged = time.perf_counter(), first
        with log:
            for step in range(first, end):
                for name, value in self._step(step, batches).items():
                    sums[name] += value
                done = step + 1
                last = done == end
                log.advance()
                if done % settings.log_every == 0 or last:
                    count, now = done - logged, time.perf_counter()
                    record = {name: value / count for name, value in sums.items()}
                    record["time/step_seconds"] = (now - since) / count
                    sums.clear()
                    since, logged = now, done
                    log.write(done, record)
                if settings.snapshot_every and (done % settings.snapshot_every == 0 or last) and main:
                    self._look(done, log)
                if done % settings.checkpoint_every == 0 or last:
                    self.save_checkpoint(done)
        folder = self.run_dir / "model"
        if main:
            task.model.eval()
            task.export(folder)
        self._accelerator.wait_for_everyone()
        return folder

    def save_checkpoint(self, step: int) -> None:
        """Write the checkpoint of ``step`` finished steps and remove old ones."""
        rng = gather_object([capture_rng()])
        if self._accelerator.is_main_process:
            write_checkpoint(
                self.checkpoint_dir,
                step=step,
                model=self.task.model,
                optimizer=self.optimizer,
                rng=rng,
                settings=self._identity(),
                keep=self.settings.keep_checkpoints,
            )
        self._accelerator.wait_for_everyone()

    def _check_groups(self) -> None:
        if not self._groups:
            raise LexisegError("The model has no trainable parameters, so there is nothing to train.")
        names = [name for group in self._groups for name in group.names]
        for key in self.settings.multipliers:
            if not any(key in name for name in names):
                raise LexisegError(
                    f"The multiplier '{key}' matches no trainable parameter; use a part of a name such as '{names[0]}'."
                )

    def _identity(self) -> dict[str, Any]:
        values = self.settings.model_dump(mode="json", exclude=set(RESUMABLE))
        # Through JSON, because that is what the checkpoint's values have been through.
        everything = {**self._given_identity, **values, "processes": self._accelerator.num_processes}
        return _flat(json.loads(json.dumps(everything)))

    def _start(self, resume: bool) -> int:
        make_folder(self.run_dir)
        found = find_checkpoints(self.checkpoint_dir)
        if found and not resume:
            raise LexisegError(
                f"'{self.run_dir}' already holds a run; continue it with --resume or choose another output folder."
            )
        if not found:
            seed_everything(self.settings.seed + self._accelerator.process_index)
            if self._accelerator.is_main_process:
                write_json(self.run_dir / "settings.json", self.settings.model_dump(mode="json"))
            return 0
        before, now = read_state(found[-1])["settings"], self._identity()
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise LexisegError(
                    f"Cannot resume '{self.run_dir}': '{key}' was {before.get(key)} and is now {now.get(key)}; use "
                    "the settings that started the run or choose another output folder."
                )
        return load_checkpoint(
            found[-1],
            model=self.task.model,
            optimizer=self.optimizer,
            rank=self._accelerator.process_index,
        )

    def _batch_indices(self, first: int, end: int) -> range:
        """Numbers of this process's batches of the steps ``first`` to ``end``; the processes take turns."""
        processes, accumulate = self._accelerator.num_processes, self.settings.accumulate
        per_step = accumulate * processes
        return range(first * per_step + self._accelerator.process_index, end * per_step, processes)

    def _step(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        settings = self.settings
        for group, options in zip(self._groups, self.optimizer.param_groups, strict=True):
            options["lr"] = learning_rate(step, group.lr, settings)
        self.optimizer.zero_grad(set_to_none=True)
        record: dict[str, float] = defaultdict(float)
        names: list[str] = []
        waited = 0.0
        for part in range(settings.accumulate):
            since = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - since
            names.extend(self.task.sample_names(batch))
            batch = send_to_device(batch, self.device)
            is_last = part == settings.accumulate - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._module):
                losses: Mapping[str, Tensor] = self._module(batch)
                loss = losses["loss"] / settings.accumulate
                for name, value in losses.items():
                    record[name] += float(value.detach()) / settings.accumulate
                self._require_finite("loss", record["loss"], step, names)
                self._accelerator.backward(loss)
        parameters = [parameter for group in self._groups for parameter in group.parameters]
        if settings.clip_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        record["grad_norm"] = float(norm)
        self._require_finite("gradient", record["grad_norm"], step, names)
        self.optimizer.step()
        with torch.no_grad():
            self.task.after_step(step)
        record["lr"] = max(options["lr"] for options in self.optimizer.param_groups)
        record["time/data_seconds"] = waited
        return record

    def _require_finite(self, what: str, value: float, step: int, names: list[str]) -> None:
        if math.isfinite(value):
            return
        found = find_checkpoints(self.checkpoint_dir)
        kept = f"the last checkpoint, '{found[-1]}', is untouched" if found else "there is no checkpoint yet"
        samples = ", ".join(names) or "unnamed"
        raise LexisegError(
            f"The {what} is {value} at step {step} (samples: {samples}); {kept}; lower the learning rate or look at "
            "these samples."
        )

    def _look(self, done: int, log: RunLog) -> None:
        """Sample pictures and numbers; the run's random state and mode are as before afterwards."""
        state = capture_rng()
        self.task.model.eval()
        try:
            with torch.no_grad():
                log.pictures(done, self.task.snapshot(done))
                values = dict(self.task.evaluate(done))
            if values:
                log.write(done, values)
        finally:
            restore_rng(*state)
            self.task.model.train()
