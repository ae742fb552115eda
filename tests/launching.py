"""Runs things in several processes: forked ones, which start at once, and real ones under torch's launcher."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_processes(
    folder: Path, work: Callable[..., Any], *args: Any, count: int = 2, timeout: float = 300, **options: Any
) -> list[Any]:
    """What ``work(*args, **options)`` returns, or raises, in each of ``count`` forked gloo processes."""
    context = multiprocessing.get_context("fork")
    port, answers = free_port(), [folder / f"answer-{rank}.pickle" for rank in range(count)]
    work = partial(work, *args, **options)
    children = [context.Process(target=_child, args=(rank, count, port, answers[rank], work)) for rank in range(count)]
    for child in children:
        child.start()
    end = time.monotonic() + timeout
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    hanging = [child for child in children if child.is_alive()]
    for child in hanging:
        child.kill()
        child.join()
    assert not hanging, f"{len(hanging)} of {count} processes were still waiting after {timeout} s"
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in answers]


def _child(rank: int, count: int, port: int, answer: Path, work: Callable[[], Any]) -> None:
    from accelerate.state import AcceleratorState

    os.environ.update(launch_environment(rank, count, port))
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        result = work()
    except Exception as error:
        traceback.print_exc()
        result = error
    answer.write_bytes(pickle.dumps(result))
    os._exit(0)


def launch_environment(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


class Launch:
    """``lexiseg WORDS`` under ``torch.distributed.run`` with ``count`` processes, or under another ``launcher``."""

    def __init__(
        self, folder: Path, words: Sequence[str | Path], count: int = 2, launcher: Sequence[str] | None = None
    ) -> None:
        self.out, self.err = folder / "launch.out", folder / "launch.err"
        if launcher is None:
            port = str(free_port())
            launcher = [
                "torch.distributed.run", "--nproc_per_node", str(count),
                "--master_addr", "127.0.0.1", "--master_port", port, "-m",
            ] if count > 1 else []  # fmt: skip
        command = [sys.executable, "-m", *launcher, "lexiseg"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*command, *map(str, words)], stdout=out, stderr=err, env=environment, start_new_session=True
            )

    def wait(self, timeout: float = 600) -> int:
        """The launcher's exit code; it and its workers are killed when they take longer."""
        try:
            return self.process.wait(timeout)
        finally:
            self.stop()

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def workers(self) -> list[int]:
        """Process ids of the workers, by rank (the launcher's own where there is no launcher)."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(map(int, children)) or [self.process.pid]

    def until(self, condition: Callable[[], Any], timeout: float = 600) -> None:
        """Wait for something to be there while the launch runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)


def launch(folder: Path, words: Sequence[str | Path], count: int = 2, expect: int = 0) -> str:
    """What ``lexiseg WORDS`` prints on stdout and stderr together, with ``count`` processes."""
    run = Launch(folder, words, count)
    code = run.wait()
    text = run.out.read_text() + run.err.read_text()
    assert code == expect, text
    return text
