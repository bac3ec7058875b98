"""The workers that fill a store, as Prefect tasks on the configured task runner."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor
from importlib import import_module
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.run import fill as filling
from flows.run.fill import ShardFuture, Submit, begin_worker
from flows.run.stage import Stage
from storage.activations.writer import ShardRange, StoreWriter


@task(name="fill", cache_policy=NO_CACHE, persist_result=False)
def fill_shard(stage: Stage, writer: StoreWriter, shard: ShardRange) -> dict[str, Any]:
    """Compute one shard of a store and write it."""
    return filling.fill_shard(stage, writer, shard)


@contextlib.contextmanager
def prefect_workers(stage: Stage) -> Generator[Submit]:
    """Start the configured task runner; every shard is one task run.

    Shards are submitted one by one, because `map` submits all of them at once and a stop could not cancel them.
    """
    cache = stage.config.cache
    runner, died = _RUNNERS[cache.task_runner](cache.fill_workers)

    def submit(writer: StoreWriter, shard: ShardRange) -> ShardFuture:
        named = fill_shard.with_options(task_run_name=f"fill {shard.group} shard {shard.index} of {stage.what}")
        return runner.submit(named, {"stage": stage, "writer": writer, "shard": shard})

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with runner:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaces it by one that ends this process at once
            yield submit
    except died as error:
        raise BrokenExecutor(str(error)) from error


_Died = tuple[type[BaseException], ...]
"""What a task runner raises when a worker is killed."""


def _threads(n_workers: int) -> tuple[TaskRunner[Any], _Died]:
    return ThreadPoolTaskRunner(n_workers), ()


def _processes(n_workers: int) -> tuple[TaskRunner[Any], _Died]:
    return ProcessPoolTaskRunner(n_workers, initializer=begin_worker), ()


def _dask(n_workers: int) -> tuple[TaskRunner[Any], _Died]:
    """Use the cluster that Dask's own configuration names (DASK_SCHEDULER_ADDRESS), or start one here."""
    from dask import config
    from distributed import KilledWorker
    from prefect_dask.task_runners import DaskTaskRunner

    address = config.get("scheduler-address", None)
    here = {"n_workers": n_workers, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    runner = DaskTaskRunner(address=address) if address else DaskTaskRunner(cluster_kwargs=here)
    return runner, (KilledWorker,)


def _ray(n_workers: int) -> tuple[TaskRunner[Any], _Died]:
    """Use the cluster that RAY_ADDRESS names, which `ray.init` reads, or start one here."""
    errors = import_module("ray.exceptions")
    died = errors.NodeDiedError, errors.OutOfMemoryError, errors.WorkerCrashedError
    here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": n_workers, "include_dashboard": False}
    return import_module("prefect_ray").RayTaskRunner(init_kwargs=here), died


_RUNNERS: dict[str, Callable[[int], tuple[TaskRunner[Any], _Died]]] = {
    "threads": _threads,
    "processes": _processes,
    "dask": _dask,
    "ray": _ray,
}
