"""Filling a store by several workers: each opens what it reads, then computes and writes one shard at a time.

The process that holds the artifact's lock submits the shards and counts those that are written.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import takewhile
from queue import SimpleQueue
from typing import Any, Protocol

from flows.run.children import end_with
from flows.run.devices import RUNNER
from flows.run.events import GO_ON, stop_requested
from flows.run.inputs import boundary_above, rows_to_store
from flows.run.stage import Stage
from stackwise_core.config.unused import is_used
from stackwise_core.errors import ConfigError, Fault, StackWiseError, StageInterruptedError
from stackwise_core.failpoints import failpoint
from stackwise_core.training.hardware import use_hardware
from storage.activations.fill import write_shard
from storage.activations.writer import ShardRange, StoreWriter


class WorkerDiedError(StackWiseError):
    """A process that filled a cache was killed."""


class ShardFuture(Protocol):
    """A submitted shard: what the futures of Python and of Prefect have in common."""

    def result(self) -> Any:
        """Wait for the worker, and raise what it raised."""

    def add_done_callback(self, fn: Callable[[Any], None], /) -> None:
        """Call `fn` with this future when it is done."""


Submit = Callable[[StoreWriter, ShardRange], ShardFuture]
Workers = Callable[[Stage], contextlib.AbstractContextManager[Submit]]
"""Starts the workers of a stage; on exit all of them have ended."""


def fill_shard(stage: Stage, writer: StoreWriter, shard: ShardRange) -> dict[str, Any]:
    """Compute one shard, write it, and return which it was, as JSON."""
    use_hardware(stage.config.hardware)  # with another number of threads than the parent, sums can have other bits
    rows = rows_to_store(stage)
    with boundary_above(stage, rows) as (source, _):
        write_shard(rows, source, writer, shard, pinned=stage.device.type == "cuda")
    failpoint("fill", shard.index)
    return {"group": shard.group, "index": shard.index, "rows": shard.n_rows}


def write_by_workers(
    stage: Stage, workers: Workers, writer: StoreWriter, missing: Sequence[ShardRange], stopping: Callable[[], bool]
) -> Generator[ShardRange]:
    """Fill the store of a stage by workers, as a `WriteShards`; raises `WorkerDiedError` if one is killed."""
    n_workers, wanted = stage.config.cache.fill_workers, takewhile(lambda _: not stopping(), missing)
    try:
        with workers(stage) as submit:
            yield from _submit_all(lambda shard: submit(writer, shard), wanted, n_workers)
    except BrokenExecutor:
        if stop_requested():  # a signal to the whole process group reached the workers first
            raise StageInterruptedError(f"stopped on request while caching; {GO_ON}") from None
        raise WorkerDiedError(
            f"{stage.plan.ref('activations').name}: a process that filled it was killed, perhaps for want of memory "
            f"(cache.fill_workers: {n_workers}). The shards that are written are kept; {GO_ON}"
        ) from None


def _submit_all(
    submit: Callable[[ShardRange], ShardFuture], wanted: Iterator[ShardRange], n_workers: int
) -> Generator[ShardRange]:
    """Keep the workers busy, and yield each shard when it is written, in any order."""
    done: SimpleQueue[tuple[ShardRange, ShardFuture]] = SimpleQueue()

    def start(shard: ShardRange) -> None:
        submit(shard).add_done_callback(lambda future: done.put((shard, future)))

    def written() -> ShardRange:
        shard, future = done.get()
        future.result()  # raises what the worker raised
        return shard

    pending = 0
    for shard in wanted:
        start(shard)
        pending += 1
        if pending > n_workers:  # one more than there are workers, so that the next shard is already waiting
            yield written()
            pending -= 1
    for _ in range(pending):
        yield written()


@contextlib.contextmanager
def plain_workers(stage: Stage) -> Generator[Submit]:
    """Start the workers of a stage in Python's own pools, without Prefect."""
    n_workers = stage.config.cache.fill_workers
    if stage.config.cache.task_runner == "processes":
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(n_workers, spawn, initializer=begin_worker)
    else:
        pool = ThreadPoolExecutor(n_workers, "fill")
    try:
        yield lambda writer, shard: pool.submit(fill_shard, stage, writer, shard)
    finally:
        pool.shutdown(cancel_futures=True)


def check_plain(stage: Stage) -> None:
    """Raise `ConfigError` if the task runner is Dask or Ray, which only Prefect can start."""
    runner = stage.config.cache.task_runner
    if runner not in ("threads", "processes") and is_used(stage.config, RUNNER):
        raise ConfigError([Fault(RUNNER, repr(runner), "without Prefect's flow, threads or processes")])


def begin_worker() -> None:
    """Make this worker end with its parent, which holds the lock, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with(parent.pid)
