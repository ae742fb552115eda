"""The shards of a folder on the machines of a Ray cluster, through Ray Data.

Pictures are read and results written by the workers, so the folders must be on a file system that all machines see
under the same path; only paths and figures travel. A worker is a stateful actor: it loads the model and embeds the
words once. Where one is killed, Ray starts another and gives it the shard again, which goes on with what the record
lacks.
"""

import json
import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import lexiseg
from lexiseg.errors import LexisegError, need
from lexiseg.labelling.pictures import Entry, Labeller, Picture, Record, Wanted, read_entry
from lexiseg.words import first_line

_OBJECT_STORE = 100 * 2**20


@dataclass(frozen=True)
class Job:
    """What a worker has to know."""

    output: str  # the folder of the results, absolute; its record has been begun
    wanted: Wanted  # what to make of every picture
    model: str  # as `lexiseg.load` takes it; a folder by its absolute path
    device: str = "auto"  # likewise; "auto" takes the GPU that Ray gives a worker, where there is one
    loading: Mapping[str, Any] = field(default_factory=dict)  # its other arguments


class Worker:
    """A Ray Data actor: a batch is one shard, and what comes back is its entries.

    A mistake of the user's comes back as a row as well: an exception would arrive wrapped in Ray's own tracebacks.
    """

    def __init__(self, job: Job) -> None:
        self._record = Record(job.output)
        self._labeller: Labeller | None = None
        self._fatal = ""
        if self._record.settings is None:
            self._fatal = (
                f"The machine '{platform.node()}' does not see the folder '{job.output}'; put pictures and results on "
                "a file system that all machines of the cluster share."
            )
            return
        try:
            segmenter = lexiseg.load(job.model, device=job.device, **job.loading)
            self._labeller = Labeller(segmenter, job.wanted, job.output)
        except LexisegError as error:
            self._fatal = f"The machine '{platform.node()}' cannot start: {error}"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Do the one shard of ``batch``."""
        (number,), (pictures,) = batch["shard"], batch["pictures"]
        entries: list[dict[str, Any]] = []
        problem = self._fatal
        if self._labeller is not None:
            todo = [Picture(**fields) for fields in json.loads(str(pictures))]
            try:
                entries = [asdict(entry) for entry in self._labeller.label_shard(self._record, int(number), todo)]
            except LexisegError as error:
                problem = str(error)
        return {"entries": [json.dumps(entries)], "fatal": [problem]}


def label_on_ray(
    job: Job, shards: Mapping[int, Sequence[Picture]], *, workers: int | None = None, address: str | None = None
) -> Iterator[Entry]:
    """Label shards on a Ray cluster, in whatever order they are finished.

    ``job``: what to do; the record in its output folder has been begun. ``shards``: pictures by the number of their
    shard. ``workers``: how many actors at most, each with a model of its own. None takes one a GPU, or one a CPU where
    the cluster has no GPU or ``job.device`` is "cpu". ``address``: of the cluster; "auto" is one that this machine is
    part of, "local" starts one here for as long as this takes. None takes $RAY_ADDRESS, else "local": another user's
    cluster on this machine may be as short-lived. Returns an iterator of what became of each picture. Raises
    LexisegError if Ray is not installed, the cluster cannot be reached or has nothing to give, or the workers cannot do
    their work. What was done is recorded.
    """
    ray = _import_ray()
    if not shards:
        return
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, workers)
    try:
        yield from _run(ray, job, shards, workers)
    except ray.exceptions.RayTaskError:
        raise  # a defect; its traceback is needed
    except ray.exceptions.RayError as error:
        raise LexisegError(
            f"The cluster's workers failed ({first_line(error)}); finished work is recorded, so fix the cause and "
            "continue with --resume."
        ) from error
    finally:
        if started:
            ray.shutdown()


def _run(ray: Any, job: Job, shards: Mapping[int, Sequence[Picture]], workers: int | None) -> Iterator[Entry]:
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    on_gpu = gpus > 0 and job.device != "cpu"
    free = gpus if on_gpu else cpus
    if not free:
        raise LexisegError("The Ray cluster has no free CPU; add machines to it with `ray start --address=...`.")
    if job.device.startswith("cuda") and not on_gpu:
        raise LexisegError("The Ray cluster has no GPU; add machines that have one, or use --device cpu.")
    most = max(1, min(workers or free, len(shards)))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    rows = [
        {"shard": number, "pictures": json.dumps([asdict(picture) for picture in pictures])}
        for number, pictures in shards.items()
    ]
    # A block a shard: what a killed worker loses is one shard.
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    # Ray Data starts workers that die again, and gives them their shard again, without end; that a picture which kills
    # them does not do so for ever is the record's doing.
    made = data.map_batches(
        Worker,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="numpy",
        num_cpus=None if on_gpu else 1,
        num_gpus=1 if on_gpu else None,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=max(1, min(most, free)), max_tasks_in_flight_per_actor=2
        ),
    )
    for row in made.iter_rows():
        for content in json.loads(row["entries"]):
            yield read_entry(content)
        if row["fatal"]:
            raise LexisegError(row["fatal"])


def _import_ray() -> Any:
    # Ray reports its use over the network unless it is told not to; nothing here goes to a network by itself.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for part in ("ray.data", "ray.exceptions"):
        need(part, "--cluster ray needs Ray Data", "ray")
    return need("ray", "--cluster ray needs Ray Data", "ray")


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        check_reachable(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_cluster(address) from error
        return
    cpus = max(workers or 0, os.cpu_count() or 1)
    # Ray makes workers yield to everything else; here they are the work, at this command's own priority.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Only paths and figures go through the object store, so it can be small.
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
    except Exception as error:  # Ray raises this very class where its processes are not up in time
        raise LexisegError(
            f"Ray did not start on this machine ({first_line(error)}); try again when it has less to do, or leave out "
            "--cluster."
        ) from error


def check_reachable(address: str, patience: float = 10.0) -> None:
    """Look whether somebody listens at HOST:PORT; Ray itself would try for many minutes.

    Raises LexisegError if nobody does.
    """
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return  # auto, or a form that only Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=patience).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> LexisegError:
    return LexisegError(
        f"There is no Ray cluster at '{address}'; check the address, or use --address local to start one here."
    )


def model_argument(model: str) -> str:
    """``model`` as it means the same in a worker's working directory: a folder's absolute path, or the name."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model
