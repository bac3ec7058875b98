"""Where the rows of a boundary come from: a store, the live trunk, the boundary below, or tokens.

Whichever it is, on a CPU they are the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import numpy as np

from flows.stage import Stage
from stackwise_core.evaluate import differing_rows
from stackwise_core.identity import Ref
from stackwise_core.resolve import resolve_order
from stackwise_core.trunk import STREAM_DTYPES, LiveTrunk, RowsFromBoundary, RowsFromTokens, RowSource
from storage.activations.fill import StoreRows
from storage.activations.reader import StoreReader
from storage.checkpoints import load_embedding, load_stack
from storage.demand import advance_source


def store_below(stage: Stage) -> list[Ref]:
    """Return the store this stage trains on, if it trains on one."""
    return [stage.trunk[-1].ref("activations")] if stage.trunk and stage.trunk[-1].activations else []


@contextlib.contextmanager
def _open_store(stage: Stage, ref: Ref) -> Generator[StoreReader]:
    manifest = stage.artifacts.manifest(ref)
    with StoreReader(stage.artifacts.folder(ref), manifest.checksums()) as reader:
        yield reader


@contextlib.contextmanager
def boundary_below(stage: Stage) -> Generator[RowSource | LiveTrunk | None]:
    """Give what the new stack stands on: nothing, a store, or the live trunk; their rows are the same bytes."""
    if stage.index == 0:
        yield None
    elif store := store_below(stage):
        with _open_store(stage, store[0]) as reader:
            yield reader
    else:
        yield _live_trunk(stage, stage.index)


@contextlib.contextmanager
def boundary_above(stage: Stage) -> Generator[tuple[RowSource, str]]:
    """Give the boundary on top of this stage's stack, and say how it is made."""
    below = advance_source(stage.plan, stage.run_plan, stage.artifacts)
    if below is None:
        yield rows_from_tokens(stage), "tokens"
        return
    stack = load_stack(stage.artifacts, stage.plan).to(stage.device)
    dtype = STREAM_DTYPES[stage.config.cache.dtype]
    with _open_store(stage, below) as reader:
        yield RowsFromBoundary(reader, stack, dtype, stage.device), f"boundary {stage.index}"


def rows_from_tokens(stage: Stage) -> RowsFromTokens:
    """Return the boundary on top of this stage's stack as tokens give it, through the whole rack."""
    assert stage.plan.activations is not None
    return RowsFromTokens(*stage.sequences, stage.plan.activations.mask, _live_trunk(stage, stage.index + 1))


def _live_trunk(stage: Stage, n_stacks: int) -> LiveTrunk:
    plans = stage.run_plan.stages[:n_stacks]
    embedding = load_embedding(stage.artifacts, plans[0]).to(stage.device)
    stacks = [load_stack(stage.artifacts, plan).to(stage.device) for plan in plans]
    return LiveTrunk(embedding, stacks, STREAM_DTYPES[stage.config.cache.dtype])


def rows_to_store(stage: Stage) -> StoreRows:
    """Return which rows the next stage visits, and what describes the store."""
    recipe = stage.plan.activations
    assert recipe is not None
    train_sequences, validation_sequences = stage.sequences
    rows, views = resolve_order(stage.config, len(train_sequences)).visited(recipe.steps)
    validation_ids = validation_sequences.sequence_ids[: recipe.validation_sequences]
    return StoreRows(
        sequence_ids=train_sequences.sequence_ids[rows],
        views=views,
        validation_ids=np.asarray(validation_ids),
        seq_len=stage.config.data.seq_len,
        d_model=stage.plan.build.shape.d_model,
        dtype=recipe.dtype,
        attributes={"id": stage.plan.ref("activations").sha256, "recipe": recipe.dump()},
    )


def compare_store(stage: Stage, ref: Ref) -> tuple[int, list[tuple[int, int]]]:
    """Derive sampled rows of a store again from tokens, through the whole rack.

    Returns:
        How many rows were compared, and the (sequence id, view) pairs that differ.
    """
    sample = rows_to_store(stage).sample(stage.plan.validation.sampled_rows)
    with _open_store(stage, ref) as reader:
        # A CPU gives the same bits; CUDA kernels may sum in another order.
        return differing_rows(reader, rows_from_tokens(stage), sample, exact=stage.device.type == "cpu")
