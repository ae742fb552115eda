"""What the training loop needs to know of the thing it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from lexiseg.training.settings import ParameterGroup, TrainSettings, group_parameters


class Task(ABC):
    """A model, its data and its loss.

    Attributes:
        model: the module that is trained; its parameters that need a gradient are optimised and checkpointed.
    """

    model: nn.Module

    @abstractmethod
    def batch(self, index: int) -> Any:
        """Batch number ``index`` on the CPU.

        It must be a pure function of the task's seed and ``index`` and must not touch global random state or the
        model: it runs in background processes, and a resumed run continues by calling it with the next index. With
        accumulation or several processes there are several batches a step.

        Returns:
            Tensors in dicts, lists or tuples, or an object with a method ``to(device)``.
        """

    @abstractmethod
    def losses(self, batch: Any) -> Mapping[str, Tensor]:
        """Scalar losses of a batch on the model's device; ``"loss"`` is the one that is minimised."""

    def sample_names(self, batch: Any) -> Sequence[str]:
        """Names of the batch's samples, for the message that stops a run whose loss is not finite."""
        return ()

    def parameter_groups(self, settings: TrainSettings) -> list[ParameterGroup]:
        """The trainable parameters in groups of equal learning rate and decay."""
        return group_parameters(self.model.named_parameters(), settings)

    def after_step(self, step: int) -> None:  # noqa: B027 - most tasks have nothing to do here
        """Called without gradients after each optimizer step, for example to clamp a temperature."""

    def snapshot(self, step: int) -> Mapping[str, Image.Image]:
        """Sample pictures by name, made with the model in evaluation mode; random state is restored afterwards."""
        return {}

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Numbers to log beside the losses whenever sample pictures are due."""
        return {}

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the finished model into ``folder``."""
