"""The five steps of a stage: open references, call the core, seal, return a reference.

Plain functions, without Prefect: `tasks.py` turns them into tasks, tests and benchmarks call them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flows.boundaries import boundary_above, boundary_below, compare_store, rows_to_store, store_below
from flows.progress import Message, RowsCached, StepTaken, stop_requested, tell
from flows.stage import Facts, Made, Stage, make
from stackwise_core.costs import rack_parameters, stack_parameters, trainable_parameters
from stackwise_core.dataloader import PackedBatches, ProgressiveDataLoader
from stackwise_core.errors import ConfigError, Fault, StackWiseError
from stackwise_core.evaluate import judge_depth
from stackwise_core.identity import Ref
from stackwise_core.model import Stack
from stackwise_core.rack_builder import grow_stack, new_rack
from stackwise_core.resolve import resolve_order
from stackwise_core.trainer import Hooks, StageModel, TrainingState, train_stack
from stackwise_core.trunk import STREAM_DTYPES, LiveTrunk, RowSource
from storage.activations.fill import fill_store
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
    inputs += [build, trunk, *store_below(stage)]

    def work(folder: Path) -> Made:
        model = _model_to_train(stage, build)
        optim = stage.plan.spec.optim
        state = load_state(folder)
        if state is not None:
            tell(Message(f"stage {stage.index} goes on from its checkpoint at step {state.step}"))
        first_step = state.step if state else 0
        began = time.monotonic()
        with boundary_below(stage) as boundary:
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
        with boundary_above(stage) as (source, origin):
            counts, checksums = fill_store(folder, rows_to_store(stage), source, _on_cached(stage), stop_requested)
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
    if not losses["loss_positions"]:
        allowed = f"it masks none of the {len(rows)} validation sequences' positions: there is no loss to measure"
        raise ConfigError([Fault("training.mask_ratio", str(stage.config.training.mask_ratio), allowed)])
    return {"validation_sequences": len(rows), **losses}


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
