"""The task that is trained, and the engine that runs it: in one process, or several with a copy or a shard each.

Copies exchange gradients (`DistributedDataParallel`, through accelerate). Shards are torch's `fully_shard` (FSDP2):
every weight, its gradient and its optimizer state are spread over the processes, and a transformer block of CLIP is
whole only while it runs. accelerate's own FSDP is not used: it leaves processes on CPUs alone, and it would wrap blocks
whose weights we use outside of their own forward.
"""

import copy
import logging
import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from open_clip.transformer import ResidualAttentionBlock
from PIL import Image
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils.data import DataLoader, Dataset

from lexiseg import processes
from lexiseg.clip.tower import run_plain
from lexiseg.errors import LexisegError
from lexiseg.recipes import TrainSettings
from lexiseg.training.checkpoint import model_state, put, whole

_log = logging.getLogger("lexiseg")


def part_of(batch_size: int, rank: int, processes: int) -> range:
    """The places in a batch that process ``rank`` of ``processes`` takes; their numbers differ by at most one."""
    return range(batch_size * rank // processes, batch_size * (rank + 1) // processes)


@lru_cache(maxsize=4)
def shuffled(length: int, *seed: int) -> np.ndarray:
    """The numbers below ``length`` in the order that ``seed`` decides."""
    return np.random.default_rng(seed).permutation(length)


class Task(ABC):
    """A model, its data and its loss."""

    model: nn.Module  # what is trained: its parameters that need a gradient are optimised and checkpointed
    # whether `lexiseg.load` reads what `export` writes, so that its checkpoints can be loaded as well
    loadable: ClassVar[bool] = False
    # whether processes can share a batch: not where the loss compares its samples with each other
    divisible: ClassVar[bool] = True

    @abstractmethod
    def batch(self, index: int, rank: int = 0, processes: int = 1) -> Any:
        """Batch number ``index`` on the CPU, or what process ``rank`` of ``processes`` takes of it, see `part_of`.

        It must be a pure function of the task's seed and ``index`` and must not touch global random state or the
        model: it runs in background processes, and a resumed run continues by calling it with the next index. With
        accumulation there are several batches per step.

        Returns tensors in dicts, lists or tuples, or an object with a method ``to(device)``.
        """

    @abstractmethod
    def losses(self, batch: Any) -> Mapping[str, Tensor]:
        """Scalar losses of a batch on the model's device; ``"loss"`` is the one that is minimised.

        Of a part, they must be such that their mean over the processes is the loss of the batch; see
        :mod:`lexiseg.losses.reduction`.
        """

    def sample_names(self, batch: Any) -> Sequence[str]:
        """Names of the batch's samples, for the message that stops a run whose loss is not finite."""
        return ()

    def after_step(self, step: int) -> None:  # noqa: B027 - most tasks have nothing to do here
        """Called without gradients after each optimizer step, for example to clamp a temperature."""

    def measures(self) -> Sequence[str]:
        """Names of the numbers that `evaluate` may give, one of which a run can keep its best model by."""
        return ()

    def evaluate(self, step: int) -> tuple[Mapping[str, float], Mapping[str, Image.Image]]:
        """Numbers to log beside the losses, and sample pictures by name, whenever a snapshot is due.

        The model is in evaluation mode; random state is restored afterwards.
        """
        return {}, {}

    def reached(self, step: int) -> None:  # noqa: B027 - most models carry no number of steps
        """Called before `export` with the number of steps that are done."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the finished model into ``folder``."""


class _Batches(Dataset[Any]):
    """What ``make`` gives, or the user's mistake it found: raised, it would arrive with a traceback as its message."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> Any:
        try:
            return self._make(index)
        except LexisegError as error:
            return error


def _deaf(worker: int) -> None:
    """Let the main process alone be stopped, as Ctrl-C and schedulers tell all; it ends the workers and reports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))  # for then the main process may be waiting for their end
    # The thread that hands out batches tells by it that the main process left in the middle; errors go another way.
    sys.excepthook = lambda *_: None


def prefetch(make: Callable[[int], Any], indices: Sequence[int], *, workers: int) -> Iterator[Any]:
    """Yield ``make(index)`` for every index, in order; ``make`` is a pure function of the index.

    ``workers`` processes work ahead; 0, and a system that cannot fork, works in this process when the batch is asked
    for. Errors are those of ``make``, wherever it ran, and a `LexisegError` if a process was killed.
    """
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        _log.warning("This system cannot fork, so batches are prepared without background processes.")
        workers = 0
    loader = DataLoader(
        _Batches(make),
        sampler=indices,
        batch_size=None,
        num_workers=workers,
        collate_fn=lambda batch: batch,
        worker_init_fn=_deaf,
        multiprocessing_context="fork" if workers else None,
        # Its own generator: the loader's default would draw from the global one and so change the dropout.
        generator=torch.Generator(),
    )
    with watched_workers():
        for batch in loader:
            if isinstance(batch, LexisegError):
                raise batch
            yield batch


@contextmanager
def watched_workers() -> Iterator[None]:
    """Around all that is done while workers prepare batches: torch says there, wherever it is, that one was killed.

    Raises LexisegError if one was.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise LexisegError(
            "A background process that prepares batches was killed, probably for lack of memory; resume with fewer "
            "workers or smaller batches."
        ) from error


class _Losses(nn.Module):
    """The task's loss as a module, so that its forward can be wrapped in autocast and gradient exchange."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._losses = task.losses

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return dict(self._losses(batch))


def _accelerator(settings: TrainSettings, device: str | None) -> Accelerator:
    processes.init(device)
    if AcceleratorState._shared_state:
        # Accelerate keeps one global state a process and refuses a second run with another precision or device; the
        # processes, once met, stay together.
        AcceleratorState._reset_state(reset_partial_state=not AcceleratorState().use_distributed)
    return Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        cpu=device == "cpu",
        # Decoder layers whose masks are not used get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


class Engine:
    """Runs a task's loss and gradient on the processes there are, and moves its model there.

    Attributes:
        accelerator: of accelerate; ``device`` "cpu" stays off an accelerator, None takes what there is.
        device: where the model is trained.
        sharded: whether each process keeps only a shard of the model.

    Raises LexisegError if the batch has fewer samples than there are processes or cannot be divided, or accelerate is
    told to shard as well.
    """

    def __init__(self, task: Task, settings: TrainSettings, device: str | None) -> None:
        self.task = task
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise LexisegError(
                "accelerate is configured to shard the model (use_fsdp), which lexiseg does itself; set train.sharding "
                "to fsdp in the recipe and leave FSDP out of accelerate's configuration."
            )
        self.accelerator = _accelerator(settings, device)
        self.device: torch.device = self.accelerator.device
        count = processes.count()
        if count > 1 and not task.divisible:
            raise LexisegError(
                f"This training ({type(task).__name__}) compares the samples of a batch with each other, so it runs in "
                "one process; start it without a launcher."
            )
        if settings.batch_size < count:
            raise LexisegError(
                f"A batch of {settings.batch_size} cannot be divided among {count} processes; set train.batch_size, "
                f"which is the batch of all processes together, to at least {count}, or start fewer processes."
            )
        self.sharded = settings.sharding == "fsdp" and count > 1
        self._plain: nn.Module | None = None
        self._module: Any = _Losses(task)
        if self.sharded:
            if processes.is_main():
                self._plain = copy.deepcopy(task.model)  # to write the finished model with
            self._module = shard(self._module, self.device)
        else:
            self._module = self.accelerator.prepare(self._module)

    def losses(self, batch: Any) -> Mapping[str, Tensor]:
        """The losses of this process's part of a batch; the mean over the processes is that of the batch."""
        if not self.sharded:
            return self._module(batch)
        with self.accelerator.autocast():
            return {name: value.float() for name, value in self._module(batch).items()}

    def exchanging(self, now: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: whether the processes exchange gradients, or gather them for a later pass."""
        if self.sharded:
            self._module.set_requires_gradient_sync(now)
            return nullcontext()
        return nullcontext() if now else self.accelerator.no_sync(self._module)

    def gradient_norm(self, parameters: Sequence[nn.Parameter], largest: float | None) -> float:
        """The norm of all gradients together; where it exceeds ``largest`` they are scaled down to it."""
        if largest is None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(parameters, largest)
        return float(whole(norm))

    def export(self, folder: Path) -> None:
        """Let the task write its model; to be called in every process, the first one writes."""
        task = self.task
        if not self.sharded:
            if processes.is_main():
                task.model.eval()
                task.export(folder)
            return
        state = model_state(task.model, full=True)
        if self._plain is None:
            return
        put(state, self._plain)
        trained, task.model = task.model, self._plain.eval()
        try:
            task.export(folder)
        finally:
            task.model = trained


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Spread a module's weights over the processes, in units of CLIP's transformer blocks and one for the rest.

    The module, equal in all processes but for its values, of which the first process's count, is changed in place. It
    must run by its own forward, and a block may run several times in it. A `LexisegError` says that torch is too old,
    or a parameter that trains is a single number.
    """
    if TorchVersion(torch.__version__) < "2.7":  # compared as versions, not as text
        raise LexisegError(f"train.sharding needs torch 2.7 or newer, and this is {torch.__version__}; install it.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = module.to(device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            value = tensor.contiguous()
            torch.distributed.broadcast(value, 0)  # everybody starts from the first process's weights
            tensor.copy_(value)
    # A single number, such as CLIP's temperature, cannot be divided; each process keeps it, so it must not train.
    single = {name: value for name, value in module.named_parameters() if not value.ndim}
    for name, value in single.items():
        if value.requires_grad:
            raise LexisegError(f"'{name}' is a single number, which train.sharding cannot shard; set it to none.")
    mesh, whole_ones = init_device_mesh(device.type, (processes.count(),)), set(single.values())
    for block in [part for part in module.modules() if isinstance(part, ResidualAttentionBlock)]:
        block.forward = MethodType(run_plain, block)  # so that `run_block` calls the module, whose hooks gather weights
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=whole_ones)
    return module
