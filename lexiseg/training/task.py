"""What the training loop needs to know of the thing it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from lexiseg.errors import LexisegError
from lexiseg.recipes import TrainSettings
from lexiseg.training.settings import ParameterGroup, group_parameters


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
        """What process ``rank`` of ``processes`` takes of batch ``index``; under the conditions of `batch`.

        The parts of all processes together are the batch, see `part_of`; there are at least as many samples as
        processes.

        Raises:
            LexisegError: the loss compares the samples of a batch with each other, so it cannot be divided.
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
