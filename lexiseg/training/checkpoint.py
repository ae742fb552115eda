"""What a training writes into its folder: checkpoints, without pickles, and the log with its sample pictures.

A checkpoint is a folder with the trainable tensors and buffers of the model, the optimizer's state, the random state of
every process and the step. Tensors are safetensors, the rest is JSON with the checksums of all of it, so that a run
never continues with weights other than those saved. It is written under a temporary name and renamed when it is
complete: a run killed at any moment leaves only whole checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from lexiseg import processes
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder, read_lines, write_text, writing
from lexiseg.progress import progress_bar
from lexiseg.weights.runs import STEP, TENSORS, damaged, find_checkpoints, read_state, read_tensors, seal
from lexiseg.words import counted

_TEMPORARY = ".tmp-"
_log = logging.getLogger("lexiseg")


def capture_rng() -> dict[str, Tensor]:
    """The states of torch's generators, on the CPU and on every CUDA device; nothing else draws from a global one."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), **{f"cuda.{index}": state for index, state in enumerate(devices)}}


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Put back what :func:`capture_rng` returned."""
    torch.set_rng_state(states["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)


def model_state(model: nn.Module, *, full: bool = False) -> dict[str, Tensor]:
    """The tensors a training changes: parameters that need a gradient, and the persistent buffers.

    With ``full`` they are whole and on the CPU, in the first process alone; every process must ask then.
    """
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or, where each process keeps a part of it, all of it; every process must ask then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, current: Tensor) -> Tensor:
    """``value`` where ``current`` is: on its device, and the same part of it."""
    value = value.to(current.device)
    if not isinstance(current, DTensor):
        return value
    # Every process has read the whole tensor, so each takes its own part and nothing is sent.
    return distribute_tensor(value, current.device_mesh, current.placements, src_data_rank=None)


def put(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy what `model_state` gave into ``model``, which has the same names and shapes."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Clones: safetensors refuses tensors that share memory, which views into one buffer do.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    root: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: Sequence[Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of ``step`` into ``root`` and remove all but the newest ``keep``.

    The files are the same whether the model lies in one process or in parts in several. Every process must call this;
    the first one writes. ``rng`` are the processes' :func:`capture_rng` in the order of their ranks, ``settings`` JSON
    values that a continuation is compared with. A folder that cannot be written is a `LexisegError`.
    """
    tensors, options = model_state(model, full=True), StateDictOptions(full_state_dict=True, cpu_offload=True)
    states: Any = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    moments = {f"{name}/{key}": value for name, values in states.items() for key, value in values.items()}
    folder = root / f"{STEP}{step:08d}"
    if not processes.is_main():
        return
    make_folder(root)
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = root / f"{_TEMPORARY}{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        _save_tensors(temporary / TENSORS, tensors)
        _save_tensors(temporary / "optimizer.safetensors", moments)
        for rank, states in enumerate(rng):
            _save_tensors(temporary / f"rng-{rank}.safetensors", states)
        seal(temporary, {"step": step, "settings": dict(settings)})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _sync(root)
    except (OSError, SafetensorError) as error:  # a full disk is the latter
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise LexisegError(
            f"Cannot write the checkpoint '{folder}' ({reason}); free some space or choose another "
            "output folder, then resume."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in find_checkpoints(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0) -> int:
    """Put a checkpoint's tensors into ``model`` and ``optimizer`` and set the random generators, those of ``rank``.

    Returns the number of optimizer steps done. Raises LexisegError if a file is damaged, or the tensors do not fit the
    model.
    """
    state = read_state(folder)
    saved = read_tensors(folder / TENSORS)
    current = model_state(model)
    for name in current.keys() | saved.keys():
        if name not in current or name not in saved or current[name].shape != saved[name].shape:
            raise LexisegError(
                f"The checkpoint '{folder}' does not fit this model: '{name}' differs; resume with the recipe that "
                "started the run, or choose another output folder."
            )
    put(saved, model)
    parameters = dict(model.named_parameters())
    for key, value in read_tensors(folder / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("/")
        if name not in parameters:
            raise damaged(folder / "optimizer.safetensors")
        # Not by torch's set_optimizer_state_dict: what no gradient has reached yet, and so has no state, would get one
        # at step 1 there, and the run would not go on bit for bit. AdamW counts steps on the CPU, wherever moments are.
        optimizer.state[parameters[name]][kind] = value if kind == "step" else _like(value, parameters[name])
    generators = folder / f"rng-{rank}.safetensors"
    try:
        if generators.is_file():  # there may be more processes now
            restore_rng(read_tensors(generators))
        return int(state["step"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(folder / "state.json") from error


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning("TensorBoard is not installed, so only metrics.jsonl is written; `pip install tensorboard`.")
        return None
    try:
        return SummaryWriter(str(folder), purge_step=first_step)
    except UnicodeEncodeError:
        _log.warning("TensorBoard cannot write where a folder's name is not UTF-8, so only metrics.jsonl is written.")
        return None


@dataclass(eq=False, repr=False)
class RunLog:
    """Writes what happens in a run; use it as a context manager.

    Raises LexisegError if the log of an earlier part cannot be read, or none can be written.
    """

    folder: Path  # of the run
    total_steps: int  # length of the bar
    _: KW_ONLY
    first_step: int = 0  # steps already done; later lines of an older log are removed
    tensorboard: bool = True  # whether to write TensorBoard event files
    progress: bool = True  # whether to show a bar (a plain line now and then where the output is no terminal)
    enabled: bool = True  # False makes every method do nothing, for the processes that are not the main one
    step: int = field(init=False)  # steps done
    # the lines so far; none where it is not enabled
    records: list[dict[str, Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        first_step, shown = self.first_step, self.progress and self.enabled
        self.step = first_step
        self._file: TextIO | None = None
        self._board = None
        if self.enabled:
            path = self.folder / "metrics.jsonl"
            try:
                # A line that was cut short by a kill, and what came after the step, go.
                earlier = list(read_lines(path)) if first_step and path.exists() else []
                self.records = [
                    line for line in earlier if isinstance(at := line.get("step"), int) and at <= first_step
                ]
                write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise LexisegError(
                    f"The run's log '{path}' cannot be read or written ({error.strerror}); remove it, or choose "
                    "another output folder."
                ) from error
            self._board = _tensorboard(self.folder / "tensorboard", first_step) if self.tensorboard else None
        self._console = Console(stderr=True, quiet=not shown)
        text, spent = TextColumn("{task.fields[text]}"), TimeElapsedColumn()
        self._bar = progress_bar(text, spent, show=shown, console=self._console)
        self._bar_id = self._bar.add_task("training", total=self.total_steps, completed=first_step, text="")

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def advance(self) -> None:
        """Move the bar by one step."""
        self.step += 1
        self._bar.advance(self._bar_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line to the log: the number of steps done and the values."""
        if self._file is None:
            return
        self.records.append({"step": step, **values})
        what = f"write the run's log '{self.folder / 'metrics.jsonl'}'"
        with writing(what, full="free disk space, then continue with --resume"):
            self._file.write(json.dumps(self.records[-1]) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.startswith("time/"))
        self._bar.update(self._bar_id, text=text)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self.total_steps}  {text}", highlight=False, soft_wrap=True)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Save sample pictures as ``samples/step-NNNNNNNN-NAME.png``."""
        if not pictures or not self.enabled:
            return
        folder = make_folder(self.folder / "samples")
        for name, picture in pictures.items():
            with atomic_write(folder / f"step-{step:08d}-{name}.png") as temporary:
                picture.save(temporary)


@dataclass(eq=False)
class Best:
    """The largest value of ``metric`` in the log so far, and how long ago that was; a metric of None follows none.

    ``patience`` evaluations in a row without a larger value are enough; None waits forever.
    """

    metric: str | None
    patience: int | None
    log: RunLog

    @property
    def exhausted(self) -> bool:
        """Whether patience ran out."""
        if self.patience is None or self.metric is None:
            return False
        values = [value for _, value in self._values()]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience

    def improved_by(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether ``step`` has the largest value so far; a `LexisegError` if its pictures do not show the metric."""
        if self.metric is None:
            return False
        if self.metric not in values:
            raise LexisegError(
                f"'train.keep_best' is '{self.metric}', which the pictures evaluated at step {step} do not show; raise "
                "evaluation.num_samples, or name another metric and go on with --resume."
            )
        return all(value < values[self.metric] for before, value in self._values() if before < step)

    def __str__(self) -> str:
        step, value = max(self._values(), key=lambda pair: (pair[1], -pair[0]))
        since = counted(self.patience or 0, "evaluation")
        return f"{self.metric} has not exceeded its {value:g} of step {step} for {since}."

    def _values(self) -> list[tuple[int, float]]:
        found = [(record["step"], record.get(self.metric)) for record in self.log.records if self.metric in record]
        return [(step, float(value)) for step, value in found if isinstance(value, int | float)]
