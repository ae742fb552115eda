"""What the training loop needs to know of the thing it trains, and its batches, prepared ahead in order."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lexiseg.errors import LexisegError
from lexiseg.recipes import TrainSettings
from lexiseg.training.optim import ParameterGroup, group_parameters

_log = logging.getLogger("lexiseg")


def part_of(batch_size: int, rank: int, processes: int) -> range:
    """The places in a batch that process ``rank`` of ``processes`` takes; their numbers differ by one at most."""
    return range(batch_size * rank // processes, batch_size * (rank + 1) // processes)


class Task(ABC):
    """A model, its data and its loss.

    Attributes:
        model: the module that is trained; its parameters that need a gradient are optimised and checkpointed.
        loadable: whether `lexiseg.load` reads what `export` writes, so that its checkpoints can be loaded as well.
    """

    model: nn.Module
    loadable: ClassVar[bool] = False

    @abstractmethod
    def batch(self, index: int) -> Any:
        """Batch number ``index`` on the CPU.

        It must be a pure function of the task's seed and ``index`` and must not touch global random state or the
        model: it runs in background processes, and a resumed run continues by calling it with the next index. With
        accumulation there are several batches a step.

        Returns:
            Tensors in dicts, lists or tuples, or an object with a method ``to(device)``.
        """

    def part(self, index: int, rank: int, processes: int) -> Any:
        """What process ``rank`` of ``processes`` takes of batch ``index``, see `part_of` and `batch`.

        A loss that compares the samples of a batch with each other cannot be divided, which a `LexisegError` says.
        """
        if processes == 1:
            return self.batch(index)
        raise LexisegError(
            f"This training ({type(self).__name__}) compares the samples of a batch with each other, so it runs in one "
            "process; start it without a launcher."
        )

    @abstractmethod
    def losses(self, batch: Any) -> Mapping[str, Tensor]:
        """Scalar losses of a batch on the model's device; ``"loss"`` is the one that is minimised.

        Of a part, they must be such that their mean over the processes is the loss of the batch; see
        :mod:`lexiseg.losses.reduction`.
        """

    def sample_names(self, batch: Any) -> Sequence[str]:
        """Names of the batch's samples, for the message that stops a run whose loss is not finite."""
        return ()

    def parameter_groups(self, settings: TrainSettings) -> list[ParameterGroup]:
        """The trainable parameters in groups of equal learning rate and decay."""
        return group_parameters(self.model, settings)

    def after_step(self, step: int) -> None:  # noqa: B027 - most tasks have nothing to do here
        """Called without gradients after each optimizer step, for example to clamp a temperature."""

    def snapshot(self, step: int) -> Mapping[str, Image.Image]:
        """Sample pictures by name, made with the model in evaluation mode; random state is restored afterwards."""
        return {}

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Numbers to log beside the losses whenever sample pictures are due."""
        return {}

    def reached(self, step: int) -> None:  # noqa: B027 - most models carry no number of steps
        """Called before `export` with the number of steps that are done."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the finished model into ``folder``."""


class _Failure:
    """A user's mistake found in a worker; the exception itself would arrive with a traceback as its message."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Batches(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> Any:
        try:
            return self._make(index)
        except LexisegError as error:
            return _Failure(str(error))


def _deaf(worker: int) -> None:
    """Let the main process alone be stopped by Ctrl-C; it ends the workers, and says what was done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_is(batch: Any) -> Any:
    return batch


def prefetch(make: Callable[[int], Any], indices: Sequence[int], *, workers: int) -> Iterator[Any]:
    """Yield ``make(index)`` for every index, in order; ``make`` is a pure function of the index.

    ``workers`` processes work ahead; 0, and a system that cannot fork, works in this process when the batch is asked
    for. Errors are those of ``make``, wherever it ran, and a `LexisegError` if a process was killed.
    """
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        _log.warning("This system cannot fork, so batches are prepared without background processes.")
        workers = 0
    if not workers:
        for index in indices:
            yield make(index)
        return
    loader = DataLoader(
        _Batches(make),
        sampler=indices,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2,
        collate_fn=_as_is,
        worker_init_fn=_deaf,
        multiprocessing_context="fork",
        # Its own generator: the loader's default would draw from the global one and so change the dropout.
        generator=torch.Generator(),
    )
    try:
        for batch in loader:
            if isinstance(batch, _Failure):
                raise LexisegError(batch.message)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
            raise
        raise LexisegError(
            "A background process that prepares batches was killed, most likely for want of memory; resume with fewer "
            "workers or smaller batches."
        ) from error
