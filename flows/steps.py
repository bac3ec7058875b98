"""The five steps of a stage: open references, call the core, seal, return a reference.

Plain functions, without Prefect: `tasks.py` turns them into tasks, tests and benchmarks call them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from torch import nn

from flows.boundaries import boundary_above, boundary_below, compare_store, rows_to_store, store_below
from flows.progress import Message, RowsCached, StepTaken, stop_requested, tell
from flows.stage import Facts, Made, Stage, make
from stackwise_core.costs import rack_parameters, stack_parameters
from stackwise_core.dataloader import JointDataLoader, PackedBatches, ProgressiveDataLoader, validation_batch
from stackwise_core.errors import ConfigError, Fault, StackWiseError
from stackwise_core.evaluate import judge_rack
from stackwise_core.identity import Ref, stack_state
from stackwise_core.masking import MaskSpec
from stackwise_core.model import Stack
from stackwise_core.objectives import Batch
from stackwise_core.rack_builder import (
    count_parameters,
    give_adapters,
    new_rack,
    new_stack,
    prepare_to_train,
    settle,
)
from stackwise_core.resolve import resolve_loss, resolve_order
from stackwise_core.stage_model import StageModel
from stackwise_core.training import Hooks, TrainingState, fits, train_stack
from stackwise_core.trunk import STREAM_DTYPES, LiveTrunk, RowSource
from storage.activations.fill import fill_store
from storage.checkpoints import (
    METRICS,
    frozen_digests,
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


class FrozenChangedError(StackWiseError):
    """A weight that does not train was changed by training."""


class CacheMismatchError(StackWiseError):
    """Cached rows are not what the live rack computes; the store was quarantined."""


def build_stack(stage: Stage) -> Ref | None:
    """Describe the new stack: operator, source, seed, and the digest of its initial tensors; the anneal adds none."""
    recipe = stage.plan.build
    if recipe is None:
        return None

    def work(folder: Path) -> Made:
        description = {**recipe.dump(), "initial_tensors": _digest_of_new(stage)}
        write_text(folder / "build.json", json.dumps(description, indent=1))
        return Made({"operator": recipe.operator, "blocks": recipe.n_blocks})

    return make(stage, "build", [below.ref("stack") for below in stage.below[-1:]], work)


def configure_trunk(stage: Stage) -> Ref:
    """Describe the rack as this stage finds it: stacks in order, precision, adapters, strategy."""
    spec = stage.plan.spec

    def work(folder: Path) -> Made:
        entries = [
            {
                "stack": stack,
                "state": stack_state(stage.below, stack),
                "precision": spec.stacks[stack].precision,
                "adapters": {name: adapter.model_dump() for name, adapter in spec.stacks[stack].adapters.items()},
                "trains": spec.anatomy.trains_of(stack),
            }
            for stack in spec.trunk
        ]
        description = {
            "strategy": stage.plan.trunk.strategy,
            "stacks": entries,
            "embedding_trains": spec.anatomy.embedding_trains,
            "head_trains": spec.anatomy.head_trains,
            "boundary": spec.anatomy.boundary,
        }
        write_text(folder / "trunk.json", json.dumps(description, indent=1))
        return Made({"strategy": stage.plan.trunk.strategy, "stacks": len(entries)})

    return make(stage, "trunk", [below.ref("stack") for below in stage.below], work)


def train(stage: Stage, build: Ref | None, trunk: Ref) -> Ref:
    """Train the live part of the rack on its boundary, cached or live, from the last checkpoint if there is one."""
    inputs = [stage.run_plan.data_ref, *(below.ref("stack") for below in stage.below)]
    inputs += [*([build] if build else []), trunk, *store_below(stage)]

    def work(folder: Path) -> Made:
        model = _model_to_train(stage, build)
        spec = stage.plan.spec
        state = load_state(folder)
        if state is not None and not fits(model, state):
            tell(Message(f"stage {stage.index} starts anew: its checkpoint is of another version of StackWise"))
            state = None
        if state is not None:
            tell(Message(f"stage {stage.index} goes on from its checkpoint at step {state.step}"))
        first_step = state.step if state else 0
        counts = _parameter_facts(stage, model)
        frozen = frozen_digests(model)
        began = time.monotonic()
        with boundary_below(stage) as boundary:
            batches = _batches(stage, boundary, first_step)
            records = train_stack(model, batches, spec.optim, state=state, hooks=_hooks(stage, folder))
        seconds = time.monotonic() - began
        if frozen_digests(model) != frozen:
            raise FrozenChangedError(f"stage {stage.index}: training changed frozen weights; nothing was sealed")
        for stack in spec.anatomy.trained:
            settle(model.stack(stack))
        save_trained(folder, spec, model, records)
        n_tokens = (spec.optim.steps - first_step) * spec.optim.batch_size * stage.config.data.seq_len
        facts = {
            **counts,
            "frozen_unchanged": sorted(frozen),
            "steps": spec.optim.steps,
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
    stacks = [*(below.ref("stack") for below in stage.below), stack]
    recipe = stage.plan.activations

    def work(folder: Path) -> Made:
        with boundary_above(stage) as (source, origin):
            counts, checksums = fill_store(folder, rows_to_store(stage), source, _on_cached(stage), stop_requested)
        return Made({"from": origin, "boundary": recipe.boundary, **counts}, checksums)

    return make(stage, "cache", [stage.run_plan.data_ref, *stacks], work)


def validate(stage: Stage, stack: Ref, activations: Ref | None) -> Ref:
    """Measure the losses of the rack so far, and compare cached rows with what tokens give.

    Raises:
        CacheMismatchError: they differ; the store is in quarantine/ and will be remade.
    """
    inputs = [stage.run_plan.data_ref, *(below.ref("stack") for below in stage.below), stack]
    inputs += [activations] if activations else []

    def work(folder: Path) -> Made:
        compared = _compare_cache(stage, activations) if activations else {"cache": "none"}
        facts: Facts = {**_judge(stage), **compared}
        write_text(folder / "report.json", json.dumps(facts, indent=1))
        return Made(facts)

    return make(stage, "validate", inputs, work)


# ---------------------------------------------------------------- training


def _new_stacks(stage: Stage) -> list[Stack]:
    """Return what is new in this stage, as it is before training: one stack, all of joint training, or none."""
    recipe, spec = stage.plan.build, stage.plan.spec
    if recipe is None:
        return []
    if spec.mode == "joint":
        return [new_stack(recipe.shape, stack, "random", recipe.seed, None) for stack in spec.stacks]
    source = None if spec.source is None else load_stack(stage.artifacts, stage.below, spec.source)
    return [new_stack(recipe.shape, spec.new, spec.operator, recipe.seed, source)]


def _digest_of_new(stage: Stage) -> str:
    return _digest_of(_new_stacks(stage))


def _digest_of(stacks: list[Stack]) -> str:
    return tensor_digest(stacks[0] if len(stacks) == 1 else nn.ModuleList(stacks))


def _model_to_train(stage: Stage, build: Ref | None) -> StageModel:
    """Return the live part of the rack on the device, ready to train.

    Raises:
        ArtifactCorruptError: the initial tensors are not those that the build described.
    """
    spec, shape = stage.plan.spec, stage.plan.shape
    new = _new_stacks(stage)
    if build is not None:
        described = stage.artifacts.checked(build) / "build.json"
        if _digest_of(new) != json.loads(described.read_text())["initial_tensors"]:
            remedy = (
                f"Was it made by another version of torch? Remove {described.parent} and run the same command again"
            )
            raise ArtifactCorruptError(described, "describes other initial tensors than this stage starts from", remedy)
    stacks = {stack.creation_index: stack for stack in new}
    for index in spec.anatomy.live:
        if index not in stacks:
            stacks[index] = load_stack(stage.artifacts, stage.below, index)
            give_adapters(stacks[index], spec.stacks[index], stage.config.run.seed)
        prepare_to_train(stacks[index], spec.anatomy.trains_of(index))
    if stage.below:
        head = load_head(stage.artifacts, stage.below)
        embedding = None if spec.anatomy.boundary else load_embedding(stage.artifacts, stage.below)
    else:
        rack = new_rack(shape, stage.config.run.seed)
        head, embedding = rack.head, rack.embedding
    model = StageModel(
        spec.anatomy,
        [stacks[index] for index in spec.anatomy.live],
        head,
        embedding,
        loss_function=resolve_loss(stage.config),
        checkpointing=stage.config.training.activation_checkpointing,
    )
    if stage.config.hardware.compile:
        for stack in model.live_stacks():
            stack.compile()
    return model.to(stage.device)


def _hooks(stage: Stage, folder: Path) -> Hooks:
    optim = stage.plan.spec.optim
    n_tokens = optim.batch_size * stage.config.data.seq_len

    def on_step(record: dict[str, float]) -> None:
        tell(StepTaken(stage.index, int(record["step"]) + 1, optim.steps, record["loss"], n_tokens))

    def on_checkpoint(state: TrainingState) -> None:
        save_state(folder, state)

    return Hooks(on_step, on_checkpoint, stage.config.training.checkpoint_every, stop_requested)


def _batches(stage: Stage, boundary: RowSource | LiveTrunk | None, first_step: int) -> Iterable[Batch]:
    train_sequences, _ = stage.sequences
    spec, recipe = stage.plan.spec, stage.plan.stack
    order = resolve_order(stage.config, len(train_sequences))
    packed = PackedBatches(train_sequences, order, first_step, spec.optim.steps)
    if recipe.joint_times and recipe.mask:
        steps, ratios = zip(*recipe.joint_times, strict=True)
        masks = [recipe.mask.at_ratio(ratio) for ratio in ratios]
        return JointDataLoader(packed, masks, steps, recipe.order_seed, recipe.views, first_step)
    return ProgressiveDataLoader(
        base_dataloader=packed,
        masking_strategy=recipe.mask,
        stack_idx=spec.anatomy.newest,
        trunk_activations=boundary,
        time_step=spec.time_step,
        objective=stage.config.training.progressive.training_objective,
    )


def _parameter_facts(stage: Stage, model: StageModel) -> Facts:
    spec, shape = stage.plan.spec, stage.plan.shape
    return {
        "stack_parameters": stack_parameters(shape, spec.n_blocks),
        "trainable_parameters": count_parameters(model)["trainable_parameters"],
        "rack_parameters": rack_parameters(shape, spec),
    }


def _on_cached(stage: Stage) -> Callable[[int, int], None]:
    def on_cached(n_bytes: int, of_bytes: int) -> None:
        tell(RowsCached(stage.index, n_bytes, of_bytes))

    return on_cached


# ---------------------------------------------------------------- validation


def _judge(stage: Stage) -> Facts:
    """Return the validation losses of the rack up to this stage, with the rounded and the exact stream."""
    _, validation_sequences = stage.sequences
    plans, anatomy = stage.so_far, stage.plan.spec.anatomy
    objective = stage.config.training.progressive.training_objective
    rows = np.arange(min(len(validation_sequences), stage.plan.validation.sequences))
    losses = judge_rack(
        load_embedding(stage.artifacts, plans).to(stage.device),
        # One stack is in memory at a time, however deep the rack is.
        (load_stack(stage.artifacts, plans, index).to(stage.device) for index in anatomy.order),
        load_head(stage.artifacts, plans).to(stage.device),
        [validation_batch(validation_sequences, rows, mask, objective) for mask in _masks_to_judge(stage)],
        stream_dtype=STREAM_DTYPES[stage.config.cache.dtype],
        boundary=anatomy.boundary,
        loss_function=resolve_loss(stage.config),
    )
    own, *grid = losses
    if not own["loss_positions"]:
        received = f"{len(rows)} validation sequences"
        raise ConfigError([Fault("validation.max_sequences", received, "none has a loss position; give more, or mask more")])
    ratios = stage.plan.validation.grid
    by_ratio = {str(ratio): loss["validation_loss_exact"] for ratio, loss in zip(ratios, grid, strict=True)}
    return {"validation_sequences": len(rows), **own, **({"by_mask_ratio": by_ratio} if ratios else {})}


def _masks_to_judge(stage: Stage) -> list[MaskSpec | None]:
    """Return the stage's own corruption, then those at which all stages are compared."""
    own = stage.plan.stack.mask
    return [own, *(own.at_ratio(ratio) for ratio in stage.plan.validation.grid)] if own else [own]


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
