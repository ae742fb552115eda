"""The training loop: optimizer, schedule, precision, accumulation, log and checkpoints, on accelerate.

On a CPU a run that was killed and resumed ends with the same bits as one that was not: batches are numbered and pure
functions of their number, the rate is a function of the step, and everything else is in the checkpoint.

Several processes share each batch, so a recipe's numbers mean the same whatever their number. The first one writes.
"""

import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from lexiseg import processes
from lexiseg.errors import LexisegError, warn
from lexiseg.files import make_folder, write_text
from lexiseg.journal import changed, flat
from lexiseg.recipes import TrainSettings
from lexiseg.recipes.schema import Multiplier
from lexiseg.regions.anchors import QueryAnchors
from lexiseg.renames import renamed_key
from lexiseg.scores.base import NotFiniteError
from lexiseg.training.checkpoint import Best, RunLog, capture_rng, load_checkpoint, restore_rng, save_checkpoint
from lexiseg.training.engine import Engine, Task, prefetch, watched_workers
from lexiseg.weights.runs import BASE, find_checkpoints, read_state
from lexiseg.words import counted

_log = logging.getLogger("lexiseg")


def seed_everything(seed: int) -> None:
    """Seed the torch, numpy and Python generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


RESUMABLE = {
    *("workers", "sharding", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("snapshot_every", "keep_best", "patience"),
}
"""Settings that may differ between the first part of a run and its continuation: they do not touch the weights."""


def identity_of(settings: TrainSettings) -> dict[str, Any]:
    """The settings that must be the same when a run is resumed, as JSON values.

    Keys with their default are left out, so that a run begun before there were such keys can be resumed.
    """
    values = settings.model_dump(mode="json", exclude=RESUMABLE, exclude_defaults=True)
    return {**values, "steps": settings.steps}


def rule_for(name: str, keys: Iterable[str]) -> str:
    """The rule for the parameter ``name``: the longest key it contains, else the alphabetically first, else ""."""
    return next((key for key in sorted(sorted(keys), key=len, reverse=True) if key in name), "")


# What `no_decay` names. Batch and instance norms are both of the third kind; an anchor decoder's own parameters are its
# learned queries.
_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "norm": (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm),
    "embedding": (nn.Embedding, QueryAnchors),
}


def group_parameters(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Sort the parameters that need a gradient into the optimizer's groups by the rules of ``settings``.

    In the order in which the model first needs them; those of one rule with and without decay are apart. Beside what
    torch reads, a group has the ``key`` of its rule ("" for the parameters no rule names), the ``names`` of its
    parameters, and ``initial_lr``, its peak learning rate.

    Raises LexisegError if there is nothing to train, or a rule names no parameter.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    layers = tuple(layer for kind in settings.no_decay for layer in _LAYERS[kind])
    undecayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, layers)
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key, spared = rule_for(name, settings.multipliers), id(parameter) in undecayed
        rule = settings.multipliers.get(key, Multiplier())
        decay = 0.0 if spared else settings.weight_decay * rule.decay
        fresh = {"params": [], "names": [], "key": key, "initial_lr": settings.lr * rule.lr, "weight_decay": decay}
        group = groups.setdefault((key, spared), fresh)
        group["names"].append(name)
        group["params"].append(parameter)
    if settings.steps:
        _check(list(groups.values()), [name for name, _ in model.named_parameters()], settings)
    return list(groups.values())


def _check(groups: list[dict[str, Any]], names: list[str], settings: TrainSettings) -> None:
    if not groups:
        raise LexisegError("The model has no trainable parameters; choose options that train a part of it.")
    if not any(group["initial_lr"] for group in groups):
        raise LexisegError(
            "Every learning rate is 0, so nothing would be trained; set a multiplier above 0, or train.steps to 0."
        )
    for key in settings.multipliers:
        # Variants of a recipe train other parts and keep its rules, so a rule may name what is frozen.
        if not any(key in name for name in names):
            example = groups[0]["names"][0]
            raise LexisegError(
                f"The multiplier '{key}' matches no parameter; use a part of a name such as '{example}'."
            )


def build_optimizer(groups: Iterable[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of ``settings`` for these groups; the loop sets their rates."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)


def learning_rate(step: int, base_lr: float, settings: TrainSettings) -> float:
    """The rate of a group with peak rate ``base_lr`` for the update made at 0-based ``step``.

    A pure function of the step, so that a resumed run needs no state of a scheduler. With ``p = step / steps``, at most
    1, and ``m = min_lr``: "poly" is ``(base_lr - m) * (1 - p) ** power + m``, as ZegCLIP and Cascade-CLIP train (the
    authors' configuration, Sec. 4.2); "cosine" is half a cosine from ``base_lr`` down to ``m``, as ZSSeg, FreeSeg and
    DeOP learn their prompts. During warm-up this is multiplied by ``warmup_ratio``, either constant or rising linearly
    from it to 1. A group's multiplier belongs in ``base_lr``: the floor ``min_lr`` is absolute.
    """
    if base_lr == 0.0:
        return 0.0
    rate, progress = base_lr, min(1.0, step / settings.steps)
    if settings.schedule != "constant":
        half = 0.5 * (1.0 + math.cos(math.pi * progress))
        fraction = half if settings.schedule == "cosine" else (1.0 - progress) ** settings.power
        rate = (base_lr - settings.min_lr) * fraction + settings.min_lr
    if step >= settings.warmup_steps:
        return rate
    ratio = settings.warmup_ratio
    linear = 1.0 - (1.0 - step / settings.warmup_steps) * (1.0 - ratio)
    return rate * (ratio if settings.warmup == "constant" else linear)


@dataclass(eq=False, repr=False)
class Trainer:
    """Trains a task.

    Raises LexisegError if a multiplier's key is contained in no trainable parameter's name, or nothing is trainable.
    """

    task: Task  # model, data and loss
    settings: TrainSettings  # the run's numbers
    # folder of the run: ``metrics.jsonl``, ``tensorboard/``, ``samples/``, ``checkpoints/``, ``best/`` with
    # ``keep_best``, and, at the end, ``model/``
    run_dir: Path
    _: KW_ONLY
    # JSON values beside the settings that must be the same when a run is resumed, such as its data
    identity: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""  # text of ``recipe.yaml``, written when the run begins or goes on; "" writes none
    device: str | None = None  # "cpu" to stay off an accelerator; None takes what there is
    tensorboard: bool = True  # whether to write TensorBoard event files
    progress: bool = True  # whether to show a bar

    def __post_init__(self) -> None:
        self.checkpoint_dir = self.run_dir / "checkpoints"
        self._engine = Engine(self.task, self.settings, self.device)
        groups = group_parameters(self.task.model, self.settings)
        self._check_best()
        self.optimizer = build_optimizer(groups, self.settings)

    def run(self, *, resume: bool = False, stop_after: int | None = None) -> Path:
        """Train to the end, or to ``stop_after`` steps in all, and return the folder the task exported its model to.

        Args:
            resume: continue from the newest checkpoint in ``run_dir``; without one, start. More steps than the run
                began with are allowed, and what that does to the schedule is said.
            stop_after: stop there and export; the schedule stays that of the whole run, which can be resumed.

        Raises LexisegError if ``run_dir`` holds checkpoints and ``resume`` is not asked for; the checkpoint does not
        fit; or the loss or a gradient is not finite (step and samples are named, nothing is saved of it); or
        ``stop_after`` lies behind its checkpoint.
        """
        settings, task = self.settings, self.task
        end = settings.steps if stop_after is None else stop_after
        found = find_checkpoints(self.checkpoint_dir)
        name = processes.gather(found[-1].name if found else None)[0]  # what the first process sees
        newest = None if name is None else self.checkpoint_dir / name
        with processes.together():
            first = self._start(resume, newest)
            if first > end:
                raise LexisegError(
                    f"'{self.run_dir}' is at step {first} already, past {end}; choose another output folder."
                )
        if newest is None and task.loadable:
            with processes.together():
                self._engine.export(self.checkpoint_dir / BASE)
        task.model.train()
        main = processes.is_main()
        log = RunLog(
            self.run_dir, end, first_step=first, tensorboard=self.tensorboard, progress=self.progress, enabled=main
        )
        with log, processes.watching(), watched_workers():
            try:
                done = self._loop(first, end, log)
            except KeyboardInterrupt as stop:
                kept = self._kept("the newest checkpoint is '{}'")
                go_on = "and the same command with --resume continues"
                stop.args = (f"Stopped after step {log.step} of {end}; {kept}, {go_on}.",)
                raise
        folder = self.run_dir / "model"
        task.reached(done)
        with processes.together():
            self._engine.export(folder)
        return folder

    def _loop(self, first: int, end: int, log: RunLog) -> int:
        """The steps ``first`` to ``end``; how many are done, fewer where patience ran out."""
        settings, task = self.settings, self.task
        best = Best(settings.keep_best, settings.patience, log)
        if processes.gather(best.exhausted)[0]:  # the first process has the log
            return first
        indices = range(first * settings.accumulate, end * settings.accumulate)  # the batches of these steps
        part = partial(task.batch, rank=processes.rank(), processes=processes.count())
        batches = iter(prefetch(part, indices, workers=settings.workers))
        sums: dict[str, float] = defaultdict(float)
        since, logged, noted = time.perf_counter(), first, False
        for step in range(first, end):
            for name, value in self.run_step(step, batches).items():
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
                if record["grad_norm"] == 0 and not noted and processes.is_main():
                    noted = True  # once is enough
                    warn(
                        f"The gradients of the last {counted(count, 'step')}, up to step {done}, are exactly 0, so "
                        "nothing is learned; if this goes on, choose another train.seed or initialisation."
                    )
            # Not where a run is stopped half way, or patience and the best model would depend on the stop.
            if settings.snapshot_every and (done % settings.snapshot_every == 0 or done == settings.steps):
                with processes.together():
                    if processes.is_main() and not self._engine.sharded:
                        self._look(done, log, best)
                stop = processes.gather(best.exhausted)[0]
            else:
                stop = False
            if done % settings.checkpoint_every == 0 or last or stop:
                rng = processes.gather(capture_rng())
                with processes.together():
                    save_checkpoint(
                        self.checkpoint_dir,
                        step=done,
                        model=task.model,
                        optimizer=self.optimizer,
                        rng=rng,
                        settings=self._identity(),
                        keep=settings.keep_checkpoints,
                    )
            if stop:
                if processes.is_main():
                    _log.warning("Stopped at step %d: %s", done, best)
                return done
        return end

    def _check_best(self) -> None:
        if (best := self.settings.keep_best) is not None:
            if self._engine.sharded:
                raise LexisegError("A sharded model is not evaluated while it trains; set train.keep_best to null.")
            if best not in (known := self.task.measures()):
                measured = ", ".join(known) or "nothing"
                raise LexisegError(
                    f"'train.keep_best' is '{best}', but what is measured is {measured}; name one of them."
                )

    def _identity(self) -> dict[str, Any]:
        return flat({**self.identity, **identity_of(self.settings), "processes": processes.count()})

    def _start(self, resume: bool, newest: Path | None) -> int:
        make_folder(self.run_dir)
        if newest is not None and not resume:
            raise LexisegError(
                f"'{self.run_dir}' already holds a run; continue it with --resume or choose another output folder."
            )
        rank, seed = processes.rank(), self.settings.seed
        if self._engine.sharded and self.settings.snapshot_every and processes.is_main():
            _log.warning("The model is sharded, so no sample pictures are made during training.")
        if newest is None:
            seed_everything(seed + rank)
            self._write_recipe()
            return 0
        if not newest.is_dir():
            raise LexisegError(
                f"Process {rank} does not find the checkpoint '{newest}' that process 0 wrote; put the output folder "
                "on a file system that all machines share."
            )
        before = {renamed_key(key, quiet=True): value for key, value in read_state(newest)["settings"].items()}
        now = self._identity()
        was, count = before.pop("processes", 1), now.pop("processes")
        if "classes" not in before:  # a run begun before there was this key: "pictures" tells of them too
            now.pop("classes", None)
        longer = isinstance(before.get("steps"), int) and before["steps"] < now["steps"]
        if difference := changed(before, {**now, "steps": before["steps"]} if longer else now):
            raise LexisegError(
                f"Cannot resume '{self.run_dir}': {difference}; use the settings that started the run or choose "
                "another output folder."
            )
        step = load_checkpoint(newest, model=self.task.model, optimizer=self.optimizer, rank=rank)
        if longer and processes.is_main():
            rate = learning_rate(step, self.settings.lr, self.settings)
            old = learning_rate(step, self.settings.lr, self.settings.model_copy(update={"steps": before["steps"]}))
            warn(
                f"The run had {before['steps']} steps and now has {now['steps']}: from here its schedule is that "
                f"of the longer run, so the learning rate at step {step} is {rate:.3g} in place of {old:.3g}."
            )
        if was != count and processes.is_main():
            _log.warning(
                "The run was started with %s processes and continues with %s, so the result may differ in rounding.",
                was,
                count,
            )
        self._write_recipe()
        if rank >= was:  # a process that was not there before has no random state to take up
            seed_everything(1_000_003 * (seed + step) + rank)
        return step

    def _write_recipe(self) -> None:
        if self.recipe and processes.is_main():
            write_text(self.run_dir / "recipe.yaml", self.recipe)

    def run_step(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        """Train on the next batch of every accumulation; what is to be logged of it."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, group["initial_lr"], settings)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        names: list[str] = []
        bad: list[str] = []
        waited = 0.0
        for part in range(settings.accumulate):
            since = time.perf_counter()
            with processes.together():
                batch = next(batches)
            waited += time.perf_counter() - since
            names.extend(self.task.sample_names(batch))
            with self._engine.exchanging(part == settings.accumulate - 1):
                losses = self._engine.losses(send_to_device(batch, self._engine.device))
                for name, value in losses.items():
                    sums[name] += float(value.detach()) / settings.accumulate
                if not math.isfinite(float(losses["loss"].detach())):
                    bad.extend(self.task.sample_names(batch))
                # Not accelerator.backward, which divides by the accumulation steps of accelerate's configuration.
                (losses["loss"] / settings.accumulate).backward()
        record = processes.mean({**sums, "time/data_seconds": waited})
        self._require_finite("loss", record["loss"], step, bad)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        record["grad_norm"] = self._engine.gradient_norm(parameters, settings.clip_norm)
        self._require_finite("gradient", record["grad_norm"], step, names)
        self.optimizer.step()
        with torch.no_grad():
            self.task.after_step(step)
        record["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        return record

    def _require_finite(self, what: str, value: float, step: int, names: list[str]) -> None:
        """Stop in all processes, for all have the same ``value``; ``names`` are the samples each has."""
        if math.isfinite(value):
            return
        samples = ", ".join(name for part in processes.gather(names) for name in part) or "unnamed"
        raise processes.SharedError(
            f"The {what} is {value} at step {step} (samples: {samples}); {self._kept()}; lower the learning rate or "
            "look at these samples."
        )

    def _kept(self, said: str = "the last checkpoint, '{}', is untouched") -> str:
        found = find_checkpoints(self.checkpoint_dir)
        return said.format(found[-1]) if found else "there is no checkpoint yet"

    def _look(self, done: int, log: RunLog, best: Best) -> None:
        """Sample pictures and numbers; the run's random state and mode are as before afterwards."""
        state = capture_rng()
        self.task.model.eval()
        try:
            with torch.no_grad():
                values, pictures = self.task.evaluate(done)
            log.pictures(done, pictures)
            if values:
                log.write(done, values)
            if best.improved_by(done, values):
                self.task.reached(done)
                self._engine.export(self.run_dir / "best")
        except NotFiniteError as error:
            raise LexisegError(
                f"The scores after step {done} hold NaN or infinite values; {self._kept()}; lower the learning rate."
            ) from error
        finally:
            restore_rng(state)
            self.task.model.train()
