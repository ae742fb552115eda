"""What runs a task's loss and its gradient: one process, several with a copy each, or several with a part each.

Copies exchange gradients (`DistributedDataParallel`, through accelerate). Parts are torch's `fully_shard` (FSDP2):
every weight, its gradient and its optimizer state are spread over the processes, and a transformer block of CLIP is
whole only while it runs. accelerate's own FSDP is not used: it leaves processes on CPUs alone, and it would wrap blocks
whose weights we use outside of their own forward.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from lexiseg import processes
from lexiseg.clip.blocks import run_as_module
from lexiseg.errors import LexisegError
from lexiseg.recipes import TrainSettings
from lexiseg.training.checkpoint import model_state, put, whole
from lexiseg.training.task import Task

_log = logging.getLogger("lexiseg")


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
        sharded: whether each process keeps a part of the model only.

    Raises:
        LexisegError: the batch has fewer samples than there are processes, or accelerate is told to shard as well.
    """

    def __init__(self, task: Task, settings: TrainSettings, device: str | None) -> None:
        self.task = task
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise LexisegError(
                "accelerate is configured to shard the model (use_fsdp), which lexiseg does itself; set train.sharding "
                "to fsdp in the recipe and leave FSDP out of accelerate's configuration."
            )
        self.accelerator = _accelerator(settings, device)
        count = processes.count()
        if settings.batch_size < count:
            raise LexisegError(
                f"A batch of {settings.batch_size} cannot be shared by {count} processes; set train.batch_size, which "
                f"counts the samples of all processes together, to at least {count}, or start fewer processes."
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

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        device: torch.device = self.accelerator.device
        return device

    def losses(self, batch: Any) -> Mapping[str, Tensor]:
        """The losses of this process's part of a batch; the mean over the processes is that of the batch."""
        if not self.sharded:
            losses: Mapping[str, Tensor] = self._module(batch)
            return losses
        with self.accelerator.autocast():
            return {name: value.float() for name, value in self._module(batch).items()}

    def exchanging(self, now: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: whether the processes exchange gradients, or gather them for a later pass."""
        if self.sharded:
            self._module.set_requires_gradient_sync(now)
            return nullcontext()
        context: AbstractContextManager[Any] = nullcontext() if now else self.accelerator.no_sync(self._module)
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to the parameters'."""
        # Not accelerator.backward, which divides by the accumulation steps of accelerate's configuration.
        loss.backward()

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
            raise LexisegError(f"'{name}' is a single number, which train.sharding cannot divide; set it to none.")
    mesh, whole_ones = init_device_mesh(device.type, (processes.count(),)), set(single.values())
    for block in [part for part in module.modules() if isinstance(part, ResidualAttentionBlock)]:
        run_as_module(block)
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=whole_ones)
    return module
