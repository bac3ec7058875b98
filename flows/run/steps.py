"""The steps of a stage before and after training, without Prefect: compute, seal, return a reference."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

from flows.run.events import Message, RowsCached, emit, stop_requested
from flows.run.fill import Workers, plain_workers, write_by_workers
from flows.run.inputs import boundary_above, initial_digest, rows_to_store
from flows.run.stage import Made, Stage, make
from stackwise_core.stages.identity import Ref
from stackwise_core.training.evaluate import stored_error
from storage.activations.fill import fill_store, write_shards
from storage.activations.reader import StoreReader
from storage.files import write_text

_ERROR_ROWS = 64
"""Rows over which the error of the stored type is measured."""


def build_stack(stage: Stage) -> Ref | None:
    """Describe the new stack: operator, source, seed, digest of its initial tensors. Returns None for the anneal."""
    recipe = stage.plan.build
    if recipe is None:
        return None

    def work(folder: Path) -> Made:
        description = {**recipe.dump(), "initial_tensors": initial_digest(stage)}
        write_text(folder / "build.json", json.dumps(description, indent=1))
        return Made({"operator": recipe.operator, "blocks": recipe.n_blocks})

    return make(stage, "build", stage.stacks_below[-1:], work)


def configure_trunk(stage: Stage) -> Ref | None:
    """Describe the trunk: stacks in order, precision, adapters, what trains.

    The artifact holds only what its recipe decides, because stages of other modes share it. Returns None for an
    adopted stack.
    """
    spec, recipe = stage.plan.spec, stage.plan.trunk
    if recipe is None:
        return None
    trains = recipe.trains or ("nothing",) * len(spec.trunk)

    def work(folder: Path) -> Made:
        entries = [
            {
                "stack": stack,
                "state": state,
                "precision": spec.stacks[stack].precision,
                "adapters": [
                    name
                    for name in spec.stacks[stack].adapters
                    if recipe.progressive or name in stage.below[stack].spec.new.adapters
                ],
                "trains": part,
            }
            for stack, state, part in zip(spec.trunk, recipe.stacks, trains, strict=True)
        ]
        write_text(folder / "trunk.json", json.dumps({"strategy": recipe.strategy, "stacks": entries}, indent=1))
        return Made({"strategy": recipe.strategy, "stacks": len(entries)})

    return make(stage, "trunk", stage.stacks_below, work)


def cache_activations(stage: Stage, stack: Ref, workers: Workers = plain_workers) -> Ref | None:
    """Write the boundary that the next stage reads; returns None if it is not read, or must not be cached.

    It is computed from the boundary below if that is stored, otherwise from tokens. `workers` starts the workers that
    fill the store if `cache.fill_workers` is above 1.
    """
    recipe = stage.plan.activations
    if recipe is None:
        if stage.plan.validation and stage.index + 1 < len(stage.run_plan.stages):  # the last one never has a cache
            emit(Message(f"stage {stage.index} caches nothing: {stage.plan.no_cache_reason}"))
        return None

    def work(folder: Path) -> Made:
        rows = rows_to_store(stage)
        filled = _Filled(stage.index, rows.spec("train").stored_row_bytes)
        with boundary_above(stage, rows) as (source, origin):
            parallel = stage.config.cache.fill_workers > 1
            alone = partial(write_shards, rows, source, pinned=stage.device.type == "cuda", on_rows=filled.computed)
            write = partial(write_by_workers, stage, workers) if parallel else alone
            counts, checksums = fill_store(write, folder, rows, filled.stored, stop_requested)
            with StoreReader(folder, checksums) as stored:
                error = stored_error(stored, source, rows.sample(_ERROR_ROWS))
        return Made({**origin, "boundary": recipe.boundary, **counts, "error": error}, checksums)

    return make(stage, "cache", [stage.run_plan.data_ref, *stage.stacks_below, stack], work)


class _Filled:
    """Says how much of a store is on the disk, and between two shards how much of it is computed."""

    def __init__(self, stage: int, row_bytes: int) -> None:
        self._stage, self._row_bytes, self._last = stage, row_bytes, 0.0
        self._computed, self._on_disk = 0, (0, 0)

    def stored(self, n_bytes: int, of_bytes: int) -> None:
        self._on_disk, self._computed = (n_bytes, of_bytes), max(self._computed, n_bytes)
        self._last = time.monotonic()
        emit(RowsCached(self._stage, n_bytes, of_bytes))

    def computed(self, n_rows: int) -> None:
        self._computed += n_rows * self._row_bytes
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_EVENTS:
            self._last = time.monotonic()
            emit(RowsCached(self._stage, *self._on_disk, self._computed))


_SECONDS_BETWEEN_EVENTS = 0.5
