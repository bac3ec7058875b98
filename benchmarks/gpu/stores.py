"""The cache on a card: feeding a stage, equal rows, flat memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.gpu.record import Run
from benchmarks.gpu.stages import SHAPE_8B, Later, later, settings
from benchmarks.harness import Measure, ratios
from stackwise_core.data.sequences import FIRST_VALIDATION_ID, PackedSequences
from stackwise_core.model.growth_operators import grow_stack, new_rack
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import prefetched
from stackwise_core.objectives.dataloader import RowSource
from stackwise_core.objectives.losses import Batch
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.training.boundary import InputsFromTokens, LiveTrunk, RowsFromTokens
from stackwise_core.training.evaluate import differing_rows
from storage.activations.fill import StoreRows, fill_store, write_shards
from storage.activations.reader import ReusedRows, StoreReader, rows_for
from storage.files import Files

_AHEAD = 2


class _Given:
    """Rows of one tensor [N, T, D]."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def rows(self, sequence_ids: np.ndarray, view: int) -> Tensor:
        return self.values[torch.from_numpy(sequence_ids % FIRST_VALIDATION_ID)]


def _fill(folder: Path, source: RowSource, n_rows: int, seq_len: int, d_model: int) -> Files:
    """Fill a store of training rows in bf16, and one validation row."""
    ids = np.arange(n_rows, dtype=np.int64)
    rows = StoreRows(ids, np.zeros_like(ids), FIRST_VALIDATION_ID + ids[:1], seq_len, d_model, "bfloat16", {})
    write = functools.partial(write_shards, rows, source)
    return fill_store(write, folder, rows, lambda done, total: None, lambda: False)[1]


# ---------------------------------------------------------------- F: feeding


def feeding(run: Run) -> Iterator[Measure]:
    """Rows from the disk and from memory to the device, and steps that are fed by them."""
    stage, n_rows = later(run, SHAPE_8B, {}), run.size(256, 8)
    batch_size, seq_len, d_model = stage.batch["trunk_activations"].shape
    values = torch.empty((n_rows, seq_len, d_model), dtype=torch.bfloat16, pin_memory=run.device.type == "cuda")
    values.copy_(stage.batch["trunk_activations"][:1].expand_as(values))
    files = _fill(run.scratch / "store", _Given(values), n_rows, seq_len, d_model)
    _forget(run.scratch / "store", files)
    ids, case = np.arange(n_rows, dtype=np.int64), f"{n_rows} rows of {values[0].nbytes / 1e6:.3g} MB"
    batches = np.split(ids, n_rows // batch_size)

    with StoreReader(run.scratch / "store", files) as reader:
        on_host, cached = ReusedRows(reader, 1), rows_for(run.device, reader, _AHEAD + 1)
        for name, at_least in (("first read from the disk", None), ("again", 8.0)):
            seconds = run.seconds(lambda: [on_host.rows(some, 0) for some in batches], rounds=1, warmup=0)
            rates = [values.nbytes / s / 1e9 for s in seconds]
            yield Measure(case, f"store to host, {name}", "GB/s", rates, at_least=at_least)
        seconds = run.seconds(lambda: [cached.rows(some, 0) for some in batches], rounds=2, warmup=0)
        yield Measure(case, "store to device", "GB/s", [values.nbytes / s / 1e9 for s in seconds])

        def fed_by(rows_of: Callable[[np.ndarray], Tensor]) -> Generator[Batch]:
            return ({**stage.batch, "trunk_activations": rows_of(some)} for some in itertools.cycle(batches))

        there = stage.batch["trunk_activations"]
        sources: dict[str, Generator[Batch]] = {
            "the cache": prefetched(fed_by(lambda some: cached.rows(some, 0)), _AHEAD),
            "pinned memory": fed_by(lambda some: values[some[0] : some[0] + batch_size]),
            "the device": fed_by(lambda some: there),
        }
        fed: dict[str, list[float]] = {}
        for name, source in sources.items():
            with contextlib.closing(source):
                fed[name] = run.seconds(functools.partial(_step, stage, source), rounds=12)
            yield Measure(case, f"step fed by {name}", "ms", [s * 1e3 for s in fed[name]])
        for name in list(fed)[1:]:
            goal = 0.99 if name == "pinned memory" else None
            speed = ratios(fed[name], fed["the cache"])
            yield Measure(case, f"speed, the cache / {name}", "x", speed, at_least=goal)


def _step(stage: Later, batches: Iterator[Batch]) -> None:
    stage.batch = next(batches)
    stage.step()


def _forget(folder: Path, files: Iterable[str]) -> None:
    """Have the kernel forget what it holds of some files, which are on the disk."""
    for name in files:
        file = os.open(folder / name, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


# ---------------------------------------------------------------- G: equal rows


def equal_rows(run: Run) -> Iterator[Measure]:
    """Rows of the boundary above two stacks as a cache is filled with them, as a batch has them, and as checked."""
    n_rows = run.size(64, 6)
    for precision in ("full", "bfloat16"):
        changes = {} if run.quick else {"model.d_model": 1024, "model.d_ff": 2816, "model.n_heads": 16}
        shape = resolve_shape(settings(run, SHAPE_8B, {**changes, "model.vocab_size": 264}))
        seq_len = run.size(1024, 8)
        stacks = [grow_stack(shape, 2, index, "random", seed=0) for index in (0, 1)]
        for stack in stacks:
            stack.precision = precision
        trunk = LiveTrunk(new_rack(shape, 0).embedding.to(run.device), [s.to(run.device) for s in stacks], _BF16)
        tokens = np.random.default_rng(0).integers(256, size=(n_rows + 1, seq_len), dtype=np.uint16)
        ids = np.arange(n_rows, dtype=np.int64)
        train = PackedSequences(tokens[:n_rows], ids)
        inputs = InputsFromTokens(train, PackedSequences(tokens[n_rows:], FIRST_VALIDATION_ID + ids[:1]), None)
        checked = RowsFromTokens(inputs, trunk)
        folder = run.scratch / f"rows-{precision}"
        files = _fill(folder, RowsFromTokens(inputs, trunk.output), n_rows, seq_len, shape.d_model)
        with StoreReader(folder, files) as reader:
            sample = [(int(number), 0) for number in ids]
            differing = len(differing_rows(reader, checked, sample, "bfloat16", exact=True))
            yield Measure(precision, "rows that differ, filled and checked", "rows", [differing], at_most=0)
            live = torch.cat([checked.rows(some, 0).cpu() for some in np.split(ids, run.size(8, 2))])
            different = (live != reader.rows(ids, 0)).flatten(1).any(1)
            yield Measure(precision, "rows that differ, filled and live", "rows", [int(different.sum())], at_most=0)


_BF16 = Stream("bfloat16", {})


# ---------------------------------------------------------------- H: flat memory


def flat_memory(run: Run) -> Iterator[Measure]:
    """Peak bytes of growing stacks on a cached trunk: no stage from the second on needs more than another."""
    n_stacks, d_model, seq_len = run.size((12, 1024, 1024), (3, 16, 16))
    changes = {"hardware.device": str(run.device), "data.seq_len": seq_len, "model.n_heads": run.size(16, 2)}
    peaks = [peak for peak, _ in memory.peaks(changes, n_stacks, d_model)]
    case = f"{n_stacks} stacks, width {d_model}"
    yield Measure(case, "peak of a stage, the first left out", "MB", [peak / 1e6 for peak in peaks[1:]])
    yield Measure(case, "largest / smallest", "x", [max(peaks[1:]) / min(peaks[1:])], at_most=memory.FLAT)
