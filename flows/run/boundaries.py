"""Where the rows of a boundary come from: a store, the live trunk, the boundary below, or tokens.

Whichever it is, on a CPU they are the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import numpy as np
from torch import Tensor

from flows.run.stage import Stage
from stackwise_core.config.schema import QUANTISED_STREAMS
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import RowSource
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import StagePlan
from stackwise_core.stages.resolve import resolve_order, resolve_stream_dtype
from stackwise_core.stages.stages import Anatomy
from stackwise_core.training.evaluate import differing_rows
from stackwise_core.training.trunk import LiveTrunk, RowsFromBoundary, RowsFromTokens
from storage.activations.fill import StoreRows
from storage.checkpoints import load_channels, load_embedding, load_stack
from storage.demand import advance_source
from storage.stores import open_store


def store_below(stage: Stage) -> list[Ref]:
    """Return the store this stage trains on, if it trains on one."""
    return [stage.below[-1].ref("activations")] if stage.below and stage.below[-1].activations else []


@contextlib.contextmanager
def boundary_below(stage: Stage) -> Generator[RowSource | LiveTrunk | None]:
    """Give what the live stacks stand on: nothing, a store, or the live trunk; their rows are the same bytes."""
    anatomy = stage.plan.spec.anatomy
    if anatomy.boundary == 0:
        yield None
    elif store := store_below(stage):
        with open_store(stage.artifacts, store[0]) as reader:
            yield reader
    else:
        yield _live_trunk(stage, stage.below, anatomy.below)


@contextlib.contextmanager
def boundary_above(stage: Stage) -> Generator[tuple[RowSource, str]]:
    """Give what the next stage stands on as its last stack computes it, before it is cast, and say from what."""
    below = advance_source(stage.plan, stage.run_plan, stage.artifacts)
    if below is None:
        yield _from_tokens(stage, _trunk_above(stage).output), "tokens"
        return
    added = _reader_of(stage).below[-1]
    stack = load_stack(stage.artifacts, stage.so_far, added).to(stage.device)
    with open_store(stage.artifacts, below) as reader:
        yield RowsFromBoundary(reader, stack, stage.device), f"boundary {len(_reader_of(stage).below) - 1}"


def rows_from_tokens(stage: Stage) -> RowsFromTokens:
    """Return the boundary that the next stage stands on as tokens give it, in the form a store holds it."""
    return _from_tokens(stage, _trunk_above(stage))


def _from_tokens(stage: Stage, trunk: Callable[[Tensor, Tensor | None], Tensor]) -> RowsFromTokens:
    """Return what tokens give of the boundary that the next stage stands on, through the whole trunk."""
    assert stage.plan.activations is not None
    train, validation = stage.sequences
    order = resolve_order(stage.config, len(train))
    return RowsFromTokens(train, validation, stage.plan.activations.mask, trunk, order)


def _trunk_above(stage: Stage) -> LiveTrunk:
    """Return the trunk of the next stage."""
    return _live_trunk(stage, stage.so_far, _reader_of(stage).below)


def _reader_of(stage: Stage) -> Anatomy:
    """Return the anatomy of the next stage, which reads the store of this one."""
    return stage.run_plan.stages[stage.index + 1].spec.anatomy


def _live_trunk(stage: Stage, plans: tuple[StagePlan, ...], below: tuple[int, ...]) -> LiveTrunk:
    """Return some stacks as the last of some stages left them."""
    embedding = load_embedding(stage.artifacts, plans).to(stage.device)
    stacks = [load_stack(stage.artifacts, plans, stack).to(stage.device) for stack in below]
    return LiveTrunk(embedding, stacks, stream_of(stage, plans, below))


def stream_of(stage: Stage, plans: tuple[StagePlan, ...], stacks: tuple[int, ...]) -> Stream:
    """Return how the stream is held above some stacks as the last of some stages left them."""
    dtype = resolve_stream_dtype(stage.config)
    known = stacks if dtype in QUANTISED_STREAMS else ()
    return Stream(dtype, {stack: load_channels(stage.artifacts, plans, stack) for stack in known})


def rows_to_store(stage: Stage) -> StoreRows:
    """Return which rows the next stage visits, and what describes the store."""
    recipe = stage.plan.activations
    assert recipe is not None
    train_sequences, validation_sequences = stage.sequences
    rows, views = resolve_order(stage.config, len(train_sequences)).visited(recipe.steps)
    validation_ids = validation_sequences.sequence_ids[: recipe.validation_sequences]
    top = _reader_of(stage).below[-1]
    return StoreRows(
        sequence_ids=train_sequences.sequence_ids[rows],
        views=views,
        validation_ids=np.asarray(validation_ids),
        seq_len=stage.config.data.seq_len,
        d_model=stage.plan.shape.d_model,
        dtype=recipe.dtype,
        attributes={"id": stage.plan.ref("activations").sha256, "recipe": recipe.dump()},
        channels=stream_of(stage, stage.so_far, (top,)).channels_of(top),
    )


def compare_store(stage: Stage, ref: Ref) -> tuple[int, list[tuple[int, int]]]:
    """Derive sampled rows of a store again from tokens, through the whole rack.

    Returns:
        How many rows were compared, and the (sequence id, view) pairs that differ.
    """
    rows = rows_to_store(stage)
    sample = rows.sample(stage.plan.validation.sampled_rows)
    with open_store(stage.artifacts, ref) as reader:
        # A CPU gives the same bits; CUDA kernels may sum in another order.
        return differing_rows(reader, rows_from_tokens(stage), sample, rows.dtype, exact=stage.device.type == "cpu")
