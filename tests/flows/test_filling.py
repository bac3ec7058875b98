"""A store filled by several workers has the bytes that one process writes, whoever they are and however they end.

By plain calls, and at the end by the task runners of Prefect, on the one server of the session.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows.run import fill as filling
from flows.run.events import RowsCached, subscribed
from flows.run.fill import WorkerDiedError, _submit_all
from flows.run.run import grow
from stackwise_core.errors import ConfigError, StageInterruptedError
from storage.activations.fill import StoreRows
from storage.activations.format import Group, GroupSpec
from storage.activations.writer import ShardRange
from support.disk import ROOT
from support.runs import Recorder, digests, folder_of, grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "small_shards")

G = "training.progressive."
TWO = {f"{G}target_stacks": 2}
BY_TWO = {"cache.fill_workers": 2}
PROCESSES = {**BY_TWO, "cache.task_runner": "processes"}


@pytest.fixture(scope="module")
def small_shards() -> Iterator[None]:
    """Two rows to a shard, where a real store would put all of these in one; workers learn it from the writer."""
    spec = StoreRows.spec

    def small(self: StoreRows, group: Group) -> GroupSpec:
        whole = spec(self, group)
        return dataclasses.replace(whole, chunk_bytes=whole.row_bytes, shard_bytes=2 * whole.row_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreRows, "spec", small)
        yield


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory, quick_disk: None, small_shards: None) -> Callable[..., Path]:
    """Give the artifacts of a run whose stores one process filled."""

    @functools.cache
    def of(changes: tuple[tuple[str, Any], ...]) -> Path:
        folder = tmp_path_factory.mktemp("serial")
        grown(tiny(folder, dict(changes)), folder / "a")
        return folder / "a"

    return lambda changes: of(tuple(changes.items()))


def origins(root: Path) -> list[str]:
    """From what each store was filled, by stage."""
    stores = [(name, m["facts"]["from"]) for name, m in manifests(root).items() if name.startswith("activations")]
    return [origin for _, origin in sorted(stores)]


def cached(recorder: Recorder) -> list[RowsCached]:
    return [event for event in recorder.events if isinstance(event, RowsCached)]


# ---------------------------------------------------------------- the same bytes

TIME_AS_DEPTH = {
    f"{G}training_objective": "mlm",
    f"{G}time_interpretation": "depth",
    "training.mask_ratio_max": 0.5,
    "cache.views": 2,
}


@pytest.mark.parametrize(
    ("changes", "filled_from"),
    [
        ({"cache.keep": "all", "cache.dtype": "int8"}, ["tokens", "boundary 1"]),
        *(
            pytest.param({"cache.keep": "all", **changes}, filled_from, marks=pytest.mark.slow)
            for changes, filled_from in (
                ({}, ["tokens", "boundary 1"]),
                (TIME_AS_DEPTH, ["tokens", "tokens"]),
                ({"cache.dtype": "int8", **TIME_AS_DEPTH}, ["tokens", "tokens"]),
            )
        ),
    ],
)
def test_threads_write_what_one_process_writes(
    changes: dict[str, Any], filled_from: list[str], serial: Callable[..., Path], tmp_path: Path
) -> None:
    recorder = grown(tiny(tmp_path, {**changes, **BY_TWO}), tmp_path / "a")
    assert digests(tmp_path / "a") == digests(serial(changes))
    assert origins(tmp_path / "a") == filled_from
    told = [event for event in cached(recorder) if event.stage == 0]
    n_shards = len(list(folder_of(tmp_path / "a", "activations", 0).glob("store.zarr/**/activations/c.*")))
    assert n_shards > 6
    assert len(told) == 1 + n_shards  # after every shard, and before the first
    assert [event.n_bytes for event in told] == sorted({event.n_bytes for event in told})
    assert told[-1].n_bytes == told[-1].of_bytes


def test_a_killed_process_is_one_message_and_the_next_run_goes_on(
    serial: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "a"
    monkeypatch.setenv("STACKWISE_FAILPOINT", "fill:4:KILL")
    with pytest.raises(WorkerDiedError, match=r"^activations-0-\w+: a process that filled it was killed.* to go on$"):
        grow(tiny(tmp_path, {**TWO, **PROCESSES}), str(root))
    monkeypatch.delenv("STACKWISE_FAILPOINT")
    recorder = grown(tiny(tmp_path, {**TWO, **BY_TWO}), root)  # by threads: who goes on makes no difference
    assert recorder.made[0] == "cache 0"
    first, *after = cached(recorder)
    assert first.n_bytes > 0  # the shards that were written count
    assert len(after) < 9  # and are not computed again
    assert digests(root) == digests(serial(TWO))


def test_workers_that_a_signal_to_all_reached_first_are_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, sent = threading.Lock(), list[bool]()

    def dying(stage: Any, writer: Any, shard: ShardRange) -> Any:
        with once:
            if not sent:  # a second one would end this process
                sent.append(True)
                os.kill(os.getpid(), signal.SIGTERM)
        raise BrokenExecutor("a process in the pool was terminated abruptly")

    monkeypatch.setattr(filling, "fill_shard", dying)
    with pytest.raises(StageInterruptedError, match="stopped on request while caching; run the same command"):
        grow(tiny(tmp_path, {**TWO, **BY_TWO}), str(tmp_path / "a"))


@pytest.mark.slow
def test_no_process_outlives_the_run_that_started_it(tmp_path: Path) -> None:
    """It would write into the folder of the next attempt. They hold our pipes: until all are gone, this waits."""
    code = (
        "import json, sys; sys.path.insert(0, 'tests');"
        "from pathlib import Path; from flows.run.run import grow; from support.runs import tiny;"
        "p = Path(sys.argv[1]); grow(tiny(p, json.loads(sys.argv[2])), str(p / 'a'))"
    )
    environment = {**os.environ, "STACKWISE_FAILPOINT": "cache:1:KILL"}
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps({**TWO, **PROCESSES})]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_request_to_stop_hands_nothing_more_out(
    serial: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[ShardRange] = []
    fill_shard = filling.fill_shard

    def counting(stage: Any, writer: Any, shard: ShardRange) -> Any:
        handed.append(shard)
        return fill_shard(stage, writer, shard)

    def stop(event: Any) -> None:
        if isinstance(event, RowsCached) and event.n_bytes and not stopped:
            stopped.append(event)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped: list[Any] = []
    monkeypatch.setattr(filling, "fill_shard", counting)
    config = tiny(tmp_path, {**TWO, **BY_TWO})
    with subscribed(stop), pytest.raises(StageInterruptedError, match="B cached; run the same command to go on"):
        grow(config, str(tmp_path / "a"))
    assert len(handed) == 3  # the one that was told, and the two others that were in hand
    before = list(handed)
    grow(config, str(tmp_path / "a"))
    again = handed[3:]
    assert not set(before) & set(again)  # none is computed twice
    assert digests(tmp_path / "a") == digests(serial(TWO))


def test_a_worker_s_error_reaches_the_caller_when_all_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is let go then: nobody may still write."""
    begun, ended, error_is_known = list[int](), list[int](), threading.Event()
    fill_shard = filling.fill_shard

    def failing(stage: Any, writer: Any, shard: ShardRange) -> Any:
        if shard.index == 1:
            raise ZeroDivisionError(shard.group)
        begun.append(shard.index)
        assert error_is_known.wait(240)
        fill_shard(stage, writer, shard)
        ended.append(shard.index)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *args: Any, **how: Any) -> None:
            error_is_known.set()
            super().shutdown(*args, **how)

    monkeypatch.setattr(filling, "fill_shard", failing)
    monkeypatch.setattr(filling, "ThreadPoolExecutor", Pool)
    with pytest.raises(ZeroDivisionError, match="train"):
        grow(tiny(tmp_path, {**TWO, **BY_TWO}), str(tmp_path / "a"))
    assert begun
    assert sorted(begun) == sorted(ended)
    (work,) = (tmp_path / "a/work").glob("activations-0-*")
    assert {int(path.stem[-5:]) for path in work.rglob("train-*.json")} == set(ended)


# ---------------------------------------------------------------- handing out


def test_one_more_shard_than_workers_is_handed_out_and_any_may_come_back_first() -> None:
    in_hand: dict[int, Future[None]] = {}

    def submit(shard: ShardRange) -> Future[None]:
        future = in_hand[shard.index] = Future[None]()
        if len(in_hand) == 3:  # two at work and one that waits
            in_hand.pop(max(in_hand)).set_result(None)  # the last that was handed out comes back first
        return future

    came: list[int] = []
    for shard in _submit_all(submit, (ShardRange("train", n, n, 1) for n in range(6)), 2):
        came.append(shard.index)
        if shard.index in (5, 0):  # all were handed out: what is left comes back one by one
            in_hand.pop(min(in_hand)).set_result(None)
    assert came == [2, 3, 4, 5, 0, 1]


def test_a_stage_leaves_what_it_derived_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to other processes with every shard: the corpus and the plan are theirs to open."""
    sent: list[bytes] = []
    fill_shard = filling.fill_shard

    def pickling(stage: Any, writer: Any, shard: ShardRange) -> Any:
        assert {"sequences", "run_plan", "artifacts"} <= set(stage.__dict__)
        sent.append(pickle.dumps((stage, writer, shard)))
        return fill_shard(*pickle.loads(sent[-1]))

    monkeypatch.setattr(filling, "fill_shard", pickling)
    grow(tiny(tmp_path, {**TWO, **BY_TWO}), str(tmp_path / "a"))
    stage = pickle.loads(sent[0])[0]
    assert set(stage.__dict__) == set(type(stage).model_fields)
    assert max(map(len, sent)) < 10_000


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_runner_that_is_not_there_is_told_before_anything_is_made(
    runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, {**BY_TWO, "cache.task_runner": runner})
    found: list[Any] = [None]
    find = importlib.util.find_spec
    ours = f"prefect_{runner}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: found[-1] if name == ours else find(name, *a))
    with pytest.raises(ConfigError) as error:
        grow(config, str(tmp_path / "a"))
    assert str(error.value) == (
        f"cache.task_runner: got '{runner}'; prefect-{runner} is not installed: pip install 'stackwise[{runner}]'"
    )
    assert not (tmp_path / "a").exists()
    found.append(importlib.util)  # anything but None
    with pytest.raises(ConfigError, match=rf"got '{runner}'; without Prefect's flow, threads or processes"):
        grow(config, str(tmp_path / "a"))
    assert [name for name in manifests(tmp_path / "a") if not name.startswith("data-")] == []


# ---------------------------------------------------------------- through Prefect


@pytest.mark.flow
@pytest.mark.parametrize(
    "runner", ["threads", *(pytest.param(runner, marks=pytest.mark.slow) for runner in ("processes", "dask", "ray"))]
)
def test_a_task_runner_of_prefect_fills_the_same_store(
    runner: str, serial: Callable[..., Path], tmp_path: Path, prefect_api: str
) -> None:
    from support.flow_runs import run_flow

    if runner in ("dask", "ray"):
        pytest.importorskip(f"prefect_{runner}")
    chosen = {} if runner == "threads" else {"cache.task_runner": runner}
    recorder = Recorder()
    with subscribed(recorder):
        run = run_flow(tiny(tmp_path, {**TWO, **BY_TWO, **chosen, "run.name": runner}), tmp_path / "a")
    assert run.state.is_completed(), run.state
    n_shards = len(cached(recorder)) - 1
    assert n_shards == 12
    tasks = {name: state for name, state in run.tasks(10 + n_shards).items() if name.startswith("fill ")}
    parts = [("train", n) for n in range(8)] + [("validation", n) for n in range(4)]
    names = [f"fill {group} shard {n} of stack 0" for group, n in parts]
    assert tasks == dict.fromkeys(names, "Completed")
    assert digests(tmp_path / "a") == digests(serial(TWO))


@pytest.mark.flow
@pytest.mark.slow
def test_a_killed_process_of_prefect_is_the_same_message(
    serial: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_api: str
) -> None:
    from support.flow_runs import run_flow

    config = tiny(tmp_path, {**TWO, **PROCESSES, "run.name": "killed"})
    monkeypatch.setenv("STACKWISE_FAILPOINT", "fill:4:KILL")
    with pytest.raises(WorkerDiedError, match="a process that filled it was killed"):
        run_flow(config, tmp_path / "a").state.result()
    monkeypatch.delenv("STACKWISE_FAILPOINT")
    recorder = Recorder()
    with subscribed(recorder):
        assert run_flow(config, tmp_path / "a").state.is_completed()
    assert cached(recorder)[0].n_bytes > 0
    assert digests(tmp_path / "a") == digests(serial(TWO))
