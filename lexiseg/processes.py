"""The processes of a run that a launcher started (torchrun, accelerate, SLURM): how they start, synchronise and end.

Without a launcher there is one process, and everything here does nothing. The processes must reach the same barriers in
the same order, or they wait for each other forever; so what can fail in one of them alone runs inside `together`, and
what waits for the others runs inside `watching`.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from lexiseg.errors import LexisegError
from lexiseg.words import first_line

T = TypeVar("T")


class SharedError(LexisegError):
    """An error that every process raises in the same place, whichever found it; the first process reports it."""


class PeerError(LexisegError):
    """Another process ended, so that this one cannot go on."""


def launched() -> bool:
    """Whether a launcher started several processes."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1")) > 1
    except ValueError:
        return False


def init(device: str | None = None, *, patience: timedelta = timedelta(minutes=30)) -> None:
    """Join the other processes; without a launcher, or a second time, this does nothing.

    ``device``: "cpu" to stay off accelerators; None or "auto" takes one accelerator per process where there are any.
    ``patience``: how long a process waits for the others at a barrier. Raises LexisegError if the processes do
    not find each other.
    """
    if not launched() or _initialised():
        return
    if device not in (None, "auto", "cpu"):
        raise LexisegError(
            f"Each of the {os.environ['WORLD_SIZE']} processes uses its own accelerator; --device can only be "
            f"auto or cpu with a launcher, not '{device}'."
        )
    import torch

    try:  # without accelerators accelerate connects nobody unless it is told to use the CPU
        _state(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise LexisegError(
            f"The {os.environ['WORLD_SIZE']} processes could not connect ({first_line(error)}); check the "
            "launcher's address, port and number of machines."
        ) from error


def destroy() -> None:
    """Leave the other processes at the end of the work."""
    if _initialised():
        with suppress(RuntimeError):
            _state().destroy_process_group()


def count() -> int:
    """Number of processes."""
    return _state().num_processes if _initialised() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return _state().process_index if _initialised() else 0


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def is_first_of_launch() -> bool:
    """The same, told from the environment alone, for the time before `init` and after a failure."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def device_name(device: str) -> str:
    """The device of this process: its own accelerator where a launcher started several and ``device`` is "auto"."""
    return str(_state().device) if device == "auto" and _initialised() else device


def gather(value: T) -> list[T]:
    """What each process gives, in the order of the ranks; every process gets the list."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    with watching():
        found: list[T] = gather_object([value])
    return found


def mean(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over the processes of each of ``values``, whose keys are the same everywhere."""
    if count() == 1:
        return dict(values)
    import torch

    with watching():
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=_state().device)
        torch.distributed.all_reduce(total)
    return dict(zip(values, (total / count()).tolist(), strict=True))


def barrier() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        with watching():
            _state().wait_for_everyone()


@contextmanager
def together() -> Iterator[None]:
    """Run the body in every process and wait for the others; a `LexisegError` in one of them is raised in all.

    The body must contain no barrier, unless inside another `together`. Raises SharedError with the message of
    the first process that failed, PeerError if another process ended.
    """
    if count() == 1:
        yield
        return
    said: str | None = None
    try:
        yield
    except PeerError:
        raise
    except LexisegError as error:
        said = str(error)
    if mean({"failed": float(said is not None)})["failed"]:  # sentences are gathered only where there are any
        raise SharedError(next(sentence for sentence in gather(said) if sentence is not None))


@contextmanager
def watching() -> Iterator[None]:
    """Turn what the communication library raises when another process has ended into a sentence.

    Raises PeerError; see above.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if count() == 1 or not any(word in text for word in ("gloo", "NCCL", "onnection", "Socket")):
            raise
        raise PeerError(
            "Another process of this run ended or did not answer, so this one stops too; see its message above, "
            "and continue with --resume."
        ) from error


def _state(**settings: Any) -> Any:
    from accelerate import PartialState

    return PartialState(**settings)


def _initialised() -> bool:
    # Whoever has not imported torch has no processes to meet, and `lexiseg --help` must not import it.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
