"""The five steps of a stage: open references, call the core, seal, return a reference.

Plain functions, without Prefect: `tasks.py` turns them into tasks, tests and benchmarks call them.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np

from flows.progress import Message, RowsCached, StepTaken, stop_requested, tell
from flows.stage import Facts, Made, Stage, make
from stackwise_core.costs import rack_parameters, stack_parameters, trainable_parameters
from stackwise_core.dataloader import PackedBatches, ProgressiveDataLoader
from stackwise_core.errors import StackWiseError
from stackwise_core.evaluate import differing_rows, judge_depth
from stackwise_core.identity import Ref
from stackwise_core.model import Stack
from stackwise_core.rack_builder import grow_stack, new_rack
from stackwise_core.resolve import resolve_order
from stackwise_core.trainer import Hooks, StageModel, TrainingState, train_stack
from stackwise_core.trunk import STREAM_DTYPES, LiveTrunk, RowsFromBoundary, RowsFromTokens, RowSource
from storage.activations.fill import StoreRows, fill_store
from storage.activations.reader import StoreReader
from storage.checkpoints import (
    METRICS,
    load_embedding,
    load_head,
    load_stack,
    load_state,
    save_state,
    save_trained,
    tensor_digest,
)
from storage.demand import advance_source
from storage.durable import write_text
from storage.errors import ArtifactCorruptError


class CacheMismatchError(StackWiseError):
    """Cached rows are not what the live rack computes; the store was quarantined."""


def build_stack(stage: Stage) -> Ref:
    """Describe the new stack: operator, source, seed, and the digest of its initial tensors."""

    def work(folder: Path) -> Made:
        description = {**stage.plan.build.dump(), "initial_tensors": tensor_digest(_initial_stack(stage))}
        write_text(folder / "build.json", json.dumps(description, indent=1))
        return Made({"operator": stage.plan.build.operator, "blocks": stage.plan.build.n_blocks})

    return make(stage, "build", [below.ref("stack") for below in stage.trunk[-1:]], work)


def configure_trunk(stage: Stage) -> Ref:
    """Describe the rack as this stage finds it: stacks in order, precision, strategy, embedding, head."""
    stacks = [below.ref("stack") for below in stage.trunk]

    def work(folder: Path) -> Made:
        entries = [
            {"stack": ref.sha256, "precision": below.spec.precision, "adapters": []}
            for ref, below in zip(stacks, stage.trunk, strict=True)
        ]
        description = {
            "strategy": stage.plan.trunk.strategy,
            "stacks": entries,
            "embedding": stacks[0].sha256 if stacks else None,
            "head": stacks[-1].sha256 if stacks else None,
        }
        write_text(folder / "trunk.json", json.dumps(description, indent=1))
        return Made({"strategy": stage.plan.trunk.strategy, "stacks": len(stacks)})

    return make(stage, "trunk", stacks, work)


def train(stage: Stage, build: Ref, trunk: Ref) -> Ref:
    """Train the new stack on the trunk's boundary, cached or live, from the last checkpoint if there is one."""
    inputs = [stage.run_plan.data_ref, *(below.ref("stack") for below in stage.trunk)]
    inputs += [build, trunk, *_store_below(stage)]

    def work(folder: Path) -> Made:
        model = _model_to_train(stage, build)
        optim = stage.plan.spec.optim
        state = load_state(folder)
        if state is not None:
            tell(Message(f"stage {stage.index} goes on from its checkpoint at step {state.step}"))
        first_step = state.step if state else 0
        began = time.monotonic()
        with _boundary_below(stage) as boundary:
            batches = _batches(stage, boundary, first_step)
            records = train_stack(model, batches, optim, state=state, hooks=_hooks(stage, folder))
        seconds = time.monotonic() - began
        save_trained(folder, model, records)
        n_tokens = (optim.steps - first_step) * optim.batch_size * stage.config.data.seq_len
        facts = {
            **_parameter_facts(stage),
            "steps": optim.steps,
            "first_step": first_step,
            "train_loss": records[-1]["loss"],
            "tokens_per_second": round(n_tokens / seconds),
        }
        return Made(facts, records=(METRICS,))

    return make(stage, "train", inputs, work)


def cache_activations(stage: Stage, stack: Ref) -> Ref | None:
    """Write the boundary that the next stage reads; None where no stage reads it, or none may.

    The boundary below, if it is there, moves up by one stack; otherwise all is derived from tokens.
    """
    if stage.plan.activations is None:
        return None
    stacks = [*(below.ref("stack") for below in stage.trunk), stack]

    def work(folder: Path) -> Made:
        with _boundary_above(stage) as (source, origin):
            counts, checksums = fill_store(folder, _rows_to_store(stage), source, _on_cached(stage), stop_requested)
        return Made({"from": origin, "boundary": stage.index + 1, **counts}, checksums)

    return make(stage, "cache", [stage.run_plan.data_ref, *stacks], work)


def validate(stage: Stage, stack: Ref, activations: Ref | None) -> Ref:
    """Measure the losses of the rack so far, and compare cached rows with what tokens give.

    Raises:
        CacheMismatchError: they differ; the store is in quarantine/ and will be remade.
    """
    inputs = [stage.run_plan.data_ref, *(below.ref("stack") for below in stage.trunk), stack]
    inputs += [activations] if activations else []

    def work(folder: Path) -> Made:
        compared = _compare_cache(stage, activations) if activations else {"cache": stage.plan.no_cache_reason}
        facts: Facts = {**_judge(stage), **compared}
        write_text(folder / "report.json", json.dumps(facts, indent=1))
        return Made(facts)

    return make(stage, "validate", inputs, work)


# ---------------------------------------------------------------- training


def _initial_stack(stage: Stage) -> Stack:
    """Return the stack as it is before training."""
    recipe = stage.plan.build
    source = load_stack(stage.artifacts, stage.trunk[-1]) if recipe.source else None
    return grow_stack(recipe.shape, recipe.n_blocks, recipe.index, recipe.operator, recipe.seed, source)


def _model_to_train(stage: Stage, build: Ref) -> StageModel:
    """Return new stack, head and, in the first stage, embedding, on the device.

    Raises:
        ArtifactCorruptError: the initial tensors are not those that the build described.
    """
    stack = _initial_stack(stage)
    described = stage.artifacts.checked(build) / "build.json"
    if tensor_digest(stack) != json.loads(described.read_text())["initial_tensors"]:
        remedy = f"Was it made by another version of torch? Remove {described.parent} and run the same command again"
        raise ArtifactCorruptError(described, "describes other initial tensors than this stage starts from", remedy)
    if stage.index == 0:
        rack = new_rack(stage.plan.build.shape, stage.plan.build.seed)
        model = StageModel(stack, rack.head, rack.embedding)
    else:
        model = StageModel(stack, load_head(stage.artifacts, stage.trunk[-1]))
    if stage.config.hardware.compile:
        model.stack.compile()
    return model.to(stage.device)


def _hooks(stage: Stage, folder: Path) -> Hooks:
    optim = stage.plan.spec.optim
    n_tokens = optim.batch_size * stage.config.data.seq_len

    def on_step(record: dict[str, float]) -> None:
        tell(StepTaken(stage.index, int(record["step"]) + 1, optim.steps, record["loss"], n_tokens))

    def on_checkpoint(state: TrainingState) -> None:
        save_state(folder, state)

    return Hooks(on_step, on_checkpoint, stage.config.training.checkpoint_every, stop_requested)


def _batches(stage: Stage, boundary: RowSource | LiveTrunk | None, first_step: int) -> ProgressiveDataLoader:
    train_sequences, _ = stage.sequences
    order = resolve_order(stage.config, len(train_sequences))
    return ProgressiveDataLoader(
        base_dataloader=PackedBatches(train_sequences, order, first_step, stage.plan.spec.optim.steps),
        masking_strategy=stage.plan.stack.mask,
        stack_idx=stage.index,
        trunk_activations=boundary,
    )


def _parameter_facts(stage: Stage) -> Facts:
    shape = stage.plan.build.shape
    blocks = [part.build.n_blocks for part in (*stage.trunk, stage.plan)]
    return {
        "stack_parameters": stack_parameters(shape, blocks[-1]),
        "trainable_parameters": trainable_parameters(shape, blocks[-1], stage.index),
        "rack_parameters": rack_parameters(shape, blocks),
    }


# ---------------------------------------------------------------- boundaries


def _store_below(stage: Stage) -> list[Ref]:
    """Return the store this stage trains on, if it trains on one."""
    return [stage.trunk[-1].ref("activations")] if stage.trunk and stage.trunk[-1].activations else []


@contextlib.contextmanager
def _open_store(stage: Stage, ref: Ref) -> Generator[StoreReader]:
    manifest = stage.artifacts.manifest(ref)
    with StoreReader(stage.artifacts.folder(ref), manifest.checksums()) as reader:
        yield reader


@contextlib.contextmanager
def _boundary_below(stage: Stage) -> Generator[RowSource | LiveTrunk | None]:
    """Give what the new stack stands on: nothing, a store, or the live trunk; their rows are the same bytes."""
    if stage.index == 0:
        yield None
    elif store := _store_below(stage):
        with _open_store(stage, store[0]) as reader:
            yield reader
    else:
        yield _live_trunk(stage, stage.index)


@contextlib.contextmanager
def _boundary_above(stage: Stage) -> Generator[tuple[RowSource, str]]:
    """Give the boundary on top of this stage's stack, and say how it is made."""
    below = advance_source(stage.plan, stage.run_plan, stage.artifacts)
    if below is None:
        yield _rows_from_tokens(stage), "tokens"
        return
    stack = load_stack(stage.artifacts, stage.plan).to(stage.device)
    dtype = STREAM_DTYPES[stage.config.cache.dtype]
    with _open_store(stage, below) as reader:
        yield RowsFromBoundary(reader, stack, dtype, stage.device), f"boundary {stage.index}"


def _rows_from_tokens(stage: Stage) -> RowsFromTokens:
    """Return the boundary on top of this stage's stack as tokens give it, through the whole rack."""
    assert stage.plan.activations is not None
    return RowsFromTokens(*stage.sequences, stage.plan.activations.mask, _live_trunk(stage, stage.index + 1))


def _live_trunk(stage: Stage, n_stacks: int) -> LiveTrunk:
    plans = stage.run_plan.stages[:n_stacks]
    embedding = load_embedding(stage.artifacts, plans[0]).to(stage.device)
    stacks = [load_stack(stage.artifacts, plan).to(stage.device) for plan in plans]
    return LiveTrunk(embedding, stacks, STREAM_DTYPES[stage.config.cache.dtype])


def _rows_to_store(stage: Stage) -> StoreRows:
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


def _on_cached(stage: Stage) -> Callable[[int, int], None]:
    def on_cached(n_bytes: int, of_bytes: int) -> None:
        tell(RowsCached(stage.index, n_bytes, of_bytes))

    return on_cached


# ---------------------------------------------------------------- validation


def _judge(stage: Stage) -> Facts:
    """Return the validation losses of the rack up to this stage, with the rounded and the exact stream."""
    _, validation_sequences = stage.sequences
    plans = (*stage.trunk, stage.plan)
    rows = np.arange(min(len(validation_sequences), stage.plan.validation.sequences))
    tokens, ids = validation_sequences.take(rows)
    mask = stage.plan.stack.mask
    # One stack is in memory at a time, however deep the rack is.
    stacks = (load_stack(stage.artifacts, plan).to(stage.device) for plan in plans)
    losses = judge_depth(
        load_embedding(stage.artifacts, plans[0]).to(stage.device),
        stacks,
        load_head(stage.artifacts, stage.plan).to(stage.device),
        tokens,
        ids,
        mask and mask.for_validation(),
        STREAM_DTYPES[stage.config.cache.dtype],
        depth=len(plans),
    )
    return {"validation_sequences": len(rows), **losses}


def compare_store(stage: Stage, ref: Ref) -> tuple[int, list[tuple[int, int]]]:
    """Derive sampled rows of a store again from tokens, through the whole rack.

    Returns:
        How many rows were compared, and the (sequence id, view) pairs that differ.
    """
    sample = _rows_to_store(stage).sample(stage.plan.validation.sampled_rows)
    with _open_store(stage, ref) as reader:
        # A CPU gives the same bits; CUDA kernels may sum in another order.
        return differing_rows(reader, _rows_from_tokens(stage), sample, exact=stage.device.type == "cpu")


def _compare_cache(stage: Stage, ref: Ref) -> Facts:
    """Compare sampled rows; a store that is wrong is taken out of every reader's reach."""
    checked, differing = compare_store(stage, ref)
    if differing:
        reason = f"{len(differing)} of {checked} sampled rows differ from what tokens give: {differing[:5]}"
        folder = stage.artifacts.quarantine(ref, reason)
        raise CacheMismatchError(
            f"stage {stage.index}: {reason} (sequence id, view). The store is in {folder} for inspection; "
            "run the same command again to remake it"
        )
    return {"cache": "equals live", "cache_rows_checked": checked}
