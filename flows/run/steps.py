"""The steps of a stage, without Prefect: open what they read, compute, seal, return a reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from flows.run.events import GO_ON, Message, RowsCached, StepTaken, emit, stop_requested
from flows.run.fill import Workers, plain_workers, write_by_workers
from flows.run.inputs import (
    boundary_above,
    initial_digest,
    open_stage,
    rows_from_tokens,
    rows_to_store,
    state_below,
    store_below,
    stream_of,
)
from flows.run.ranks import train_by_ranks
from flows.run.stage import Facts, Made, Stage, fingerprint_of, make, seal
from stackwise_core.errors import SavedRackError, StackWiseError
from stackwise_core.model.blocks import Stack
from stackwise_core.model.precision import count_parameters
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.adopt import adopted_recipes, rack_files
from stackwise_core.stages.costs import rack_parameters, stack_parameters
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import cooldown_flops
from stackwise_core.stages.resolve import resolve_loss
from stackwise_core.stages.saved_rack import SavedRack
from stackwise_core.training.evaluate import differing_rows, judge_rack, stored_error
from stackwise_core.training.stage_model import ALONE, Ranks, StageModel
from stackwise_core.training.training import Hooks, TrainingState, end_stage, moments_of, train_stage
from storage.activations.fill import fill_store, write_shards
from storage.activations.reader import StoreReader
from storage.artifacts import SCRATCH, State
from storage.checkpoints import (
    METRICS,
    load_embedding,
    load_head,
    load_stack,
    load_state,
    save_channels,
    save_moments,
    save_state,
    save_trained,
)
from storage.errors import ArtifactCorruptError
from storage.files import checksum_file, write_bytes, write_text
from storage.stores import open_store

_ERROR_ROWS = 64
"""Rows over which the error of the stored type is measured."""


class CacheMismatchError(StackWiseError):
    """Cached rows differ from what the live rack computes; the store was quarantined."""


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


def train(stage: Stage, build: Ref | None, trunk: Ref | None) -> Ref:
    """Train the live stacks on their boundary, cached or live, from the last checkpoint if there is one.

    An adopted stack is taken from its rack instead. Where a later stage may go on from the optimizer's state, it is
    sealed too, before the stack; if only the state is missing, the stage is trained again for it.
    """
    if trunk is None:
        return _adopt(stage)
    below = [*stage.stacks_below, *([build] if build else []), trunk, *store_below(stage), *state_below(stage)]
    inputs = [stage.run_plan.data_ref, *below]
    state = stage.plan.ref("optimizer") if stage.plan.optimizer else None

    def work(folder: Path) -> Made:
        made, moments = _train(stage, build, folder, folder)
        if state is not None:
            with stage.artifacts.lock(state.name):
                save_moments(stage.artifacts.work(state), moments)
                seal(stage, state, inputs, Made({"tensors": len(moments)}))
        return made

    def again(folder: Path) -> Made:
        reader = f"stage {stage.index + 1} goes on from the state of its optimizer, which was not kept"
        emit(Message(f"stage {stage.index} is trained again: {reader}"))
        weights = folder / SCRATCH / "weights"
        weights.mkdir(parents=True, exist_ok=True)
        _, moments = _train(stage, build, folder, weights)
        _check_same(stage, stack, weights)
        save_moments(folder, moments)
        return Made({"tensors": len(moments)})

    stack = make(stage, "train", inputs, work)
    if state is not None and state.kind in stage.needed and stage.artifacts.state(state) is not State.SEALED:
        make(stage, "train", inputs, again, state.kind)
    return stack


def _train(stage: Stage, build: Ref | None, folder: Path, weights: Path) -> tuple[Made, dict[str, Tensor]]:
    """Train a stage in a work folder, write what it trained to `weights`, and return its optimizer's state if kept."""
    spec, shape, moments = stage.plan.spec, stage.plan.shape, dict[str, Tensor]()
    added = spec.stacks if spec.mode == "joint" else (spec.new,)
    hooks = hooks_of(stage, folder)

    def keep(state: TrainingState) -> None:
        if stage.plan.optimizer:
            moments.update(moments_of(state))
        if cools:
            state.fingerprint = fingerprint_of(stage)
            save_state(stage.artifacts.work(stage.plan.ref("cooldown")), state)

    cools = "cooldown" in stage.needed
    hooks = replace(hooks, on_end=keep if stage.plan.optimizer or cools else None)
    by_ranks = train_by_ranks(stage, build, folder) if stage.config.hardware.processes > 1 else None
    with open_stage(stage, build, folder) as opened:
        # After ranks have trained, the checkpoint is that of the last step, and this only restores it.
        trained = train_stage(opened, hooks)
        trainable = count_parameters(opened.model)["trainable_parameters"]
        channels = end_stage(opened.model, opened.first_batches)
    save_trained(weights, spec, opened.model, trained.records)
    if channels:
        save_channels(weights, channels)
    attempt = by_ranks or trained
    n_tokens = (spec.optim.steps - attempt.first_step) * spec.optim.batch_size * stage.config.data.seq_len
    facts = {
        "stack_parameters": sum(stack_parameters(shape, stack) for stack in added),
        "trainable_parameters": trainable,
        "rack_parameters": rack_parameters(shape, spec),
        "frozen_unchanged": attempt.frozen,
        "steps": spec.optim.steps,
        "first_step": attempt.first_step,
        "train_loss": trained.records[-1]["loss"],
        "tokens_per_second": round(n_tokens / attempt.seconds),
    }
    return Made(facts, records=(METRICS,)), moments


def _check_same(stage: Stage, stack: Ref, weights: Path) -> None:
    """Raise ArtifactCorruptError unless a stage that was trained again has the weights that it was sealed with."""
    sealed = stage.artifacts.manifest(stack)
    for name, entry in sealed.files.items():
        if entry.content and checksum_file(weights / name, "sha256") != entry.checksum:
            raise ArtifactCorruptError(
                stage.artifacts.where(stack),
                f"has other weights in {name} than training it again gives, so no optimizer state fits it (was it made "
                "by another machine, device, number of threads or version of torch?)",
                f"Redo it and what follows: run the same command with --from-stack {stage.index}",
            )


def cool_down(stage: Stage, build: Ref | None, stack: Ref) -> Ref | None:
    """Train a copy of a stage on while its rate decays, measure its losses, and throw its weights away.

    It goes on from the last step's checkpoint, with the moments of its optimizer; where that is gone, since the stage
    was trained earlier, from the first step. Returns None for a stage that has no cool-down.
    """
    recipe = stage.plan.cooldown
    if recipe is None:
        return None
    cooling = stage.model_copy(update={"cooling": True})
    inputs = [stage.run_plan.data_ref, *stage.stacks_below, *([build] if build else []), stack]

    def work(folder: Path) -> Made:
        if load_state(folder) is None:
            emit(Message(f"stage {stage.index} trains again before its cool-down: its last checkpoint is not there"))
        if stage.config.hardware.processes > 1:
            train_by_ranks(cooling, build, folder)
        with open_stage(cooling, build, folder) as opened:
            trained = train_stage(opened, hooks_of(cooling, folder))
            end_stage(opened.model)
            losses = _losses(cooling, recipe.sequences, recipe.grid, opened.model)
        flops = cooldown_flops(stage.plan, stage.config.data.seq_len)
        facts = {**losses, "steps": recipe.steps, "train_loss": trained.records[-1]["loss"], "flops": flops}
        write_text(folder / "report.json", json.dumps(facts, indent=1))
        return Made(facts)

    return make(cooling, "cool", inputs, work)


def _adopt(stage: Stage) -> Ref:
    """Copy the files of an adopted stack; raises SavedRackError if they are not those that were planned."""
    spec, shape = stage.plan.spec, stage.plan.shape

    def work(folder: Path) -> Made:
        saved = SavedRack.at(stage.config.model.from_)
        if adopted_recipes(saved) != stage.adopted:
            raise SavedRackError(saved.folder, "the rack changed while the run was starting", "Start again")
        for path, name in rack_files(saved, stage.index).items():
            write_bytes(folder / name, saved.read(path))
        facts = {
            "adopted": True,
            "stack_parameters": stack_parameters(shape, spec.new),
            "rack_parameters": rack_parameters(shape, spec),
        }
        return Made(facts)

    return make(stage, "train", [], work)


def hooks_of(stage: Stage, folder: Path, ranks: Ranks = ALONE) -> Hooks:
    """Return hooks that report steps as events and write checkpoints to the work folder.

    Only the first rank reports and writes; its checkpoint of the last step is the result.
    """
    optim = stage.plan.spec.optim
    n_tokens = optim.batch_size * stage.config.data.seq_len

    def on_step(record: dict[str, float]) -> None:
        emit(StepTaken(stage.index, int(record["step"]) + 1, optim.steps, record["loss"], n_tokens))

    def on_checkpoint(state: TrainingState) -> None:
        state.fingerprint = fingerprint_of(stage)
        save_state(folder, state)

    hooks = Hooks(on_step, on_checkpoint) if ranks.rank == 0 else Hooks()
    return replace(
        hooks,
        checkpoint_every=stage.config.training.checkpoint_every,
        checkpoint_last=ranks.count > 1,
        should_stop=stop_requested,
        go_on=GO_ON,
    )


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

    def on_progress(n_bytes: int, of_bytes: int) -> None:
        emit(RowsCached(stage.index, n_bytes, of_bytes))

    def work(folder: Path) -> Made:
        rows = rows_to_store(stage)
        with boundary_above(stage, rows) as (source, origin):
            parallel = stage.config.cache.fill_workers > 1
            write = partial(write_by_workers, stage, workers) if parallel else partial(write_shards, rows, source)
            counts, checksums = fill_store(write, folder, rows, on_progress, stop_requested)
            with StoreReader(folder, checksums) as stored:
                error = stored_error(stored, source, rows.sample(_ERROR_ROWS))
        return Made({**origin, "boundary": recipe.boundary, **counts, "error": error}, checksums)

    return make(stage, "cache", [stage.run_plan.data_ref, *stage.stacks_below, stack], work)


def validate(stage: Stage, stack: Ref, activations: Ref | None) -> Ref:
    """Measure the losses of the rack so far, and compare cached rows with what tokens give.

    Raises `CacheMismatchError` if they differ: the store is in quarantine, and the next run remakes it.
    """

    def work(folder: Path) -> Made:
        compared = _check_store(stage, activations) if activations else {"cache": "none"}
        recipe = stage.plan.validation
        assert recipe
        facts: Facts = {**_losses(stage, recipe.sequences, recipe.grid), **compared}
        write_text(folder / "report.json", json.dumps(facts, indent=1))
        return Made(facts)

    inputs = [stage.run_plan.data_ref, *stage.stacks_below, stack, *([activations] if activations else [])]
    return make(stage, "validate", inputs, work)


def compare_store(stage: Stage, ref: Ref) -> tuple[int, list[tuple[int, int]]]:
    """Recompute sampled rows of a store from tokens, through the whole rack.

    Returns the number of rows that were compared, and the (sequence id, view) pairs that differ.
    """
    rows = rows_to_store(stage)
    assert stage.plan.validation
    sample = rows.sample(stage.plan.validation.sampled_rows)
    exact = stage.device.type == "cpu"  # CUDA kernels may sum in another order
    with open_store(stage.artifacts, ref) as reader:
        return len(sample), differing_rows(reader, rows_from_tokens(stage), sample, rows.dtype, exact=exact)


def _check_store(stage: Stage, ref: Ref) -> Facts:
    """Compare sampled rows; a store that differs goes into quarantine."""
    checked, differing = compare_store(stage, ref)
    if differing:
        reason = f"{len(differing)} of {checked} sampled rows differ from what tokens give: {differing[:5]}"
        folder = stage.artifacts.quarantine(ref, reason)
        raise CacheMismatchError(
            f"stage {stage.index}: {reason} (sequence id, view). The store is in {folder} for inspection; "
            "run the same command again to remake it"
        )
    return {"cache": "equals live", "cache_rows_checked": checked}


def _losses(stage: Stage, n_rows: int, grid: Sequence[float], trained: StageModel | None = None) -> Facts:
    """Return the validation losses of the rack up to this stage, with the rounded and the exact stream.

    What `trained` has is taken from there, and all else from the artifacts.
    """
    _, sequences = stage.sequences
    plans, anatomy = stage.so_far, stage.plan.spec.anatomy
    objective = stage.config.training.progressive.training_objective
    rows = np.arange(min(len(sequences), n_rows))
    live = {stack.creation_index: stack for stack in trained.live_stacks()} if trained else dict[int, Stack]()
    embedding = trained.embedding if trained else None
    mask = stage.plan.mask
    # The stage's own corruption, then those at which all stages are compared.
    masks = [mask, *(mask.at_ratio(ratio) for ratio in grid)] if mask else [None]
    own, *others = judge_rack(
        embedding or load_embedding(stage.artifacts, plans).to(stage.device),
        # Loaded one by one, so that memory does not grow with the rack.
        (live.get(index) or load_stack(stage.artifacts, plans, index).to(stage.device) for index in anatomy.order),
        trained.head if trained else load_head(stage.artifacts, plans).to(stage.device),
        [validation_batch(sequences.fields(rows), mask, objective) for mask in masks],
        stream=stream_of(stage, plans, anatomy.below),
        boundary=anatomy.boundary,
        loss_function=resolve_loss(stage.config),
    )
    assert own["loss_positions"]  # check_validation rejects a run that would have none
    by_ratio = {
        str(round(mask.mean_ratio, 4)): loss["validation_loss_exact"]
        for mask, loss in zip(masks[1:], others, strict=True)
        if mask and loss["loss_positions"]
    }
    return {"validation_sequences": len(rows), **own, **({"by_mask_ratio": by_ratio} if by_ratio else {})}
