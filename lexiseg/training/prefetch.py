"""Batches by number, prepared in background processes, always in order."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lexiseg.errors import LexisegError

_log = logging.getLogger("lexiseg")


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
    """Yield ``make(index)`` for every index, in order.

    Args:
        make: a pure function of the index.
        indices: which batches.
        workers: number of processes that work ahead; 0 works in this process, when the batch is asked for. Where
            the system cannot fork, 0 is used.

    Raises:
        LexisegError: as raised by ``make``, wherever it ran; or a process was killed.
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
