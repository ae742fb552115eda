"""Sharing the decode of one picture among threads.

The decode is many small steps, between which a processor's cores wait for each other; rows of a picture do not depend
on each other, so each core takes rows of its own and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_LEAST_WORK = 1 << 23
"""Scores below which a thread costs more than it saves."""


def shares(rows: Tensor, device: torch.device, work: int) -> list[Tensor]:
    """Cut ranges (2, n) into one piece a thread, or one piece where threads do not pay.

    Args:
        rows: what is shared out.
        device: where the scores are; an accelerator is not helped.
        work: number of scores behind all the ranges.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or work < _LEAST_WORK:
        return [rows]
    return [piece for piece in rows.tensor_split(threads, 1) if piece.shape[1]]


def run_all(jobs: Sequence[Callable[[], None]]) -> None:
    """Run the jobs, each in a thread of its own if there are several; an error of a job is raised here."""
    if len(jobs) == 1:
        return jobs[0]()
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def run(job: Callable[[], None]) -> None:
        # Gradient modes belong to a thread, so those of the caller are taken along.
        with torch.inference_mode(inference), torch.no_grad():
            job()

    try:
        # One torch thread in each: it is set for the thread that asks.
        with ThreadPoolExecutor(len(jobs), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, jobs))
    finally:
        torch.set_num_threads(threads)
