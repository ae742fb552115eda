"""The record of a run: ``metrics.jsonl``, TensorBoard, sample pictures and a progress bar."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from PIL import Image
from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn

from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder, read_lines, write_text
from lexiseg.progress import progress_bar

_log = logging.getLogger("lexiseg")


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning("TensorBoard is not installed, so only metrics.jsonl is written; `pip install tensorboard`.")
        return None
    return SummaryWriter(str(folder), purge_step=first_step)


class RunLog:
    """Writes what happens in a run; use it as a context manager.

    Args:
        folder: the run's folder.
        total_steps: length of the bar.
        first_step: steps already done; later lines of an older log are removed.
        tensorboard: whether to write TensorBoard event files.
        progress: whether to show a bar (a plain line now and then where the output is no terminal).
        enabled: False makes every method do nothing, for the processes that are not the main one.

    Attributes:
        records: the lines so far; none where it is not enabled.
        step: steps done.

    Raises:
        LexisegError: the log of an earlier part cannot be read, or none can be written.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        first_step: int = 0,
        tensorboard: bool = True,
        progress: bool = True,
        enabled: bool = True,
    ) -> None:
        self._folder = folder
        self._total_steps = total_steps
        self._enabled = enabled
        self._file: TextIO | None = None
        self.records: list[dict[str, Any]] = []
        self.step = first_step
        self._board = None
        if enabled:
            path = folder / "metrics.jsonl"
            try:
                # A line that was cut short by a kill, and what came after the step, go.
                earlier = read_lines(path) if first_step and path.exists() else []
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
            self._board = _tensorboard(folder / "tensorboard", first_step) if tensorboard else None
        self._console = Console(stderr=True, quiet=not (progress and enabled))
        text, spent = TextColumn("{task.fields[text]}"), TimeElapsedColumn()
        self._bar = progress_bar(text, spent, show=progress and enabled, console=self._console)
        self._bar_id = self._bar.add_task("training", total=total_steps, completed=first_step, text="")

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        try:
            self._file.write(json.dumps(self.records[-1]) + "\n")
            self._file.flush()
        except OSError as error:
            raise LexisegError(
                f"Cannot write the run's log '{self._folder / 'metrics.jsonl'}' ({error.strerror}); free some space, "
                "then go on with --resume."
            ) from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.startswith("time/"))
        self._bar.update(self._bar_id, text=text)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._total_steps}  {text}", highlight=False, soft_wrap=True)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Save sample pictures as ``samples/step-NNNNNNNN-NAME.png``."""
        if not pictures or not self._enabled:
            return
        folder = make_folder(self._folder / "samples")
        for name, picture in pictures.items():
            with atomic_write(folder / f"step-{step:08d}-{name}.png") as temporary:
                picture.save(temporary)


class Best:
    """The largest value of ``metric`` in the log so far, and how long ago that was; a metric of None follows none.

    ``patience`` evaluations in a row without a larger value are enough; None waits for ever.
    """

    def __init__(self, metric: str | None, patience: int | None, log: RunLog) -> None:
        self.metric, self.patience, self._log = metric, patience, log

    @property
    def exhausted(self) -> bool:
        """Whether patience ran out."""
        if self.patience is None or self.metric is None:
            return False
        values = [value for _, value in self._values()]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience

    def improved_by(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether ``step`` has the largest value so far; a `LexisegError` if the metric is not measured."""
        if self.metric is None:
            return False
        if self.metric not in values:
            known = ", ".join(values) or "nothing"
            raise LexisegError(
                f"'train.keep_best' is '{self.metric}', but what is measured is {known}; name one of it."
            )
        return all(value < values[self.metric] for before, value in self._values() if before < step)

    def __str__(self) -> str:
        step, value = max(self._values(), key=lambda pair: (pair[1], -pair[0]))
        return f"{self.metric} has been below its {value:g} of step {step} for {self.patience} evaluations."

    def _values(self) -> list[tuple[int, float]]:
        found = [(record["step"], record.get(self.metric)) for record in self._log.records if self.metric in record]
        return [(step, float(value)) for step, value in found if isinstance(value, int | float)]
