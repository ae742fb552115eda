"""A bounded queue in front of the models: requests that come together and ask the same share forward passes."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lexiseg.devices import use_threads
from lexiseg.errors import LexisegWarning

if TYPE_CHECKING:
    from lexiseg.scores.base import Scores
    from lexiseg.segmentation import Segmentation
    from lexiseg.segmenter import Segmenter

# Requests that arrive within this time of each other can share a pass.
_GATHER_SECONDS = 0.005


class BusyError(Exception):
    """The queue is full, or the service is stopping."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("busy")
        self.retry_after = retry_after  # whole seconds after which there may be room, as far as can be told


@dataclass(frozen=True)
class Answer:
    """The result of a picture."""

    result: Segmentation
    scores: Scores | None  # where they were asked for
    notes: tuple[str, ...]  # what is probably not meant


@dataclass
class Job:
    """A picture to segment."""

    picture: bytes  # of its file
    key: Hashable  # jobs of one key may run in one call
    segmenter: Segmenter  # that runs it
    arguments: dict[str, Any]  # of `Segmenter.predict`, the picture apart
    scores: bool = False  # whether scores are asked for as well; such a job runs alone
    left: bool = False  # nobody waits for it; where that is so of all jobs of a call, the call ends early
    # of the answer; cancelling it takes a waiting job out of the queue
    future: Future[Answer] = field(default_factory=Future)


@dataclass(eq=False)
class Queue:
    """One worker thread that takes jobs in their order."""

    size: int  # jobs that wait at most
    batch: int  # jobs that run together at most
    seconds_a_job: float = 1.0  # as far as can be told
    waiting: deque[Job] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.threads = torch.get_num_threads()
        self._worker = ThreadPoolExecutor(1, "lexiseg-queue")

    def submit(self, jobs: list[Job]) -> None:
        """Put jobs into the queue, all or none. Raises BusyError if there is no room for them."""
        with self._lock:
            self.waiting = deque(job for job in self.waiting if not job.future.cancelled())
            busy = BusyError(max(1, round(len(self.waiting) * self.seconds_a_job)))
            # A batch that is larger than the queue would never fit, so an empty queue takes any.
            if self.waiting and len(self.waiting) + len(jobs) > self.size:
                raise busy
            try:
                self._worker.submit(self._work)
            except RuntimeError as error:  # it was closed
                raise busy from error
            self.waiting.extend(jobs)

    def close(self) -> None:
        """Take no more jobs, and return when those that wait are done."""
        self._worker.shutdown()

    def _take(self) -> list[Job]:
        with self._lock:
            taken: list[Job] = []
            kept: deque[Job] = deque()
            for job in self.waiting:
                alike = not taken or (job.key == taken[0].key and not job.scores and not taken[0].scores)
                if alike and len(taken) < self.batch:
                    if job.future.set_running_or_notify_cancel():
                        taken.append(job)
                else:
                    kept.append(job)
            self.waiting = kept
        return taken

    def _work(self) -> None:
        """Do all jobs that wait."""
        time.sleep(_GATHER_SECONDS)
        while jobs := self._take():
            start = time.monotonic()
            use_threads(self.threads)  # each time: others set theirs, and some libraries share one number
            self._run(jobs)
            self.seconds_a_job += 0.2 * ((time.monotonic() - start) / len(jobs) - self.seconds_a_job)
            time.sleep(_GATHER_SECONDS)

    def _run(self, jobs: list[Job]) -> None:
        try:
            for job, answer in zip(jobs, _answers(jobs), strict=True):
                job.future.set_result(answer)
        except Exception as error:
            if len(jobs) > 1:
                # One of them is wrong; alone each gets its own answer.
                for job in jobs:
                    self._run([job])
            else:
                jobs[0].future.set_exception(error)


def _answers(jobs: list[Job]) -> list[Answer]:
    first = jobs[0]
    first.segmenter.interrupted = lambda: all(job.left for job in jobs)
    notes: list[str] = []
    own = threading.get_ident()
    with warnings.catch_warnings():
        warnings.simplefilter("always", LexisegWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            # Python shows warnings for a whole process; those of other threads are of other clients.
            if threading.get_ident() != own or not issubclass(category, LexisegWarning):
                others(message, category, *rest, **more)
            elif str(message) not in notes:
                notes.append(str(message))

        warnings.showwarning = show
        pictures: Any = [job.picture for job in jobs]
        results = first.segmenter.predict(pictures, **first.arguments)
        scores = first.segmenter.scores(first.picture, **first.arguments) if first.scores else None
    return [Answer(result, scores, tuple(notes)) for result in results]
