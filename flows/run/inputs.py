"""Opens what a stage reads from artifacts: its model, checkpoint and batches, and the boundaries below and above it.

The rows of a boundary come from a store, the live trunk, the boundary below, or tokens: equal bytes on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from flows.run.events import Message, emit
from flows.run.stage import Facts, Stage, fingerprint_of
from stackwise_core.config.schema import QUANTISED_STREAMS
from stackwise_core.model.blocks import Stack
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.growth_operators import give_adapters, new_rack, new_stack
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import PackedBatches, first_rows, stage_batches
from stackwise_core.objectives.dataloader import RowSource
from stackwise_core.objectives.losses import Batch
from stackwise_core.objectives.trunk_activations import ReadingSource
from stackwise_core.stages.identity import Ref, StackRecipe
from stackwise_core.stages.plan import StagePlan
from stackwise_core.stages.resolve import resolve_order
from stackwise_core.stages.stages import Anatomy
from stackwise_core.strict import parse_object, read_bounded
from stackwise_core.training.boundary import (
    InputsFromTokens,
    LiveTrunk,
    RowsFromBoundary,
    RowsFromEither,
    RowsFromTokens,
)
from stackwise_core.training.kept_state import kept_moments
from stackwise_core.training.stage_model import ALONE, Ranks, StageModel
from stackwise_core.training.training import StageInputs, TrainingState, fits
from stackwise_core.training.watch import Watch
from storage.activations.fill import StoreRows
from storage.activations.reader import StoreReader, rows_for
from storage.checkpoints import load_channels, load_embedding, load_head, load_moments, load_stack, load_state
from storage.demand import advance_source
from storage.errors import AGAIN, ArtifactCorruptError
from storage.stores import open_store

_BATCHES_AHEAD = 2

# ---------------------------------------------------------------- what training reads


@contextlib.contextmanager
def open_stage(stage: Stage, build: Ref | None, folder: Path, ranks: Ranks = ALONE) -> Generator[StageInputs]:
    """Open everything that training a stage reads, or one rank's share of it.

    An earlier attempt's checkpoint is read from the work folder. Raises `ArtifactCorruptError` if the new stacks do
    not start from the initial tensors that the build describes.
    """
    model = open_model(stage, build)
    state = _open_checkpoint(stage, folder, model, ranks)
    moments = _open_moments(stage, model) if state is None else {}
    with _boundary_below(stage) as boundary:
        recipe = stage.plan.stack
        assert isinstance(recipe, StackRecipe)
        first = first_rows(_batches(stage, boundary, 0), recipe.statistics_rows)
        batches = _batches(stage, boundary, state.step if state else 0, ranks)
        trunk = boundary.modules if isinstance(boundary, LiveTrunk) else []
        yield StageInputs(stage.plan.spec, model, batches, state, first, moments, trunk)


def open_model(stage: Stage, build: Ref | None) -> StageModel:
    """Return the stage's model on the device, ready to train; raises what `open_stage` raises."""
    anatomy, config = stage.plan.spec.anatomy, stage.config
    new = _new_stacks(stage)
    if build is not None:
        _check_initial_tensors(stage, build, new)
    stacks = {stack.creation_index: stack for stack in new}
    for index in anatomy.live:
        if index not in stacks:
            stacks[index] = load_stack(stage.artifacts, stage.below, index, stage.device)
            give_adapters(stacks[index], stage.plan.spec.stacks[index], config.run.seed)
    if stage.below:
        head = load_head(stage.artifacts, stage.below, stage.device)
        embedding = None if anatomy.boundary else load_embedding(stage.artifacts, stage.below, stage.device)
    else:
        rack = new_rack(stage.plan.shape, config.run.seed)
        head, embedding = rack.head, rack.embedding
    return StageModel.assemble(config, anatomy, stacks, head, embedding, stage.device)


def initial_digest(stage: Stage) -> str:
    """Return the hash of the tensors that a stage adds to the rack, before training."""
    return _digest(_new_stacks(stage))


def store_below(stage: Stage) -> list[Ref]:
    """Return the store this stage trains on, if there is one."""
    return [stage.below[-1].ref("activations")] if stage.below and stage.below[-1].activations else []


def state_below(stage: Stage) -> list[Ref]:
    """Return the optimizer state this stage goes on from, if it does."""
    return [stage.below[-1].ref("optimizer")] if stage.plan.spec.state != "nothing" else []


def _open_moments(stage: Stage, model: StageModel) -> dict[str, Tensor]:
    """Return what the optimizer begins with; raises ArtifactCorruptError if its artifact holds nothing of that."""
    if not state_below(stage):
        return {}
    found = kept_moments(model, stage.plan.spec, load_moments(stage.artifacts, stage.below[-1]))
    if not found:
        where = stage.artifacts.where(state_below(stage)[0])
        raise ArtifactCorruptError(where, f"holds nothing that stage {stage.index} trains", f"Remove it and {AGAIN}")
    return found


def _new_stacks(stage: Stage) -> list[Stack]:
    """Return what is new in this stage, before training: one stack, all of joint training, or none in the anneal."""
    recipe, spec = stage.plan.build, stage.plan.spec
    if recipe is None:
        return []
    if spec.mode == "joint":
        return [new_stack(recipe.shape, stack, "random", recipe.seed) for stack in spec.stacks]
    sources = [load_stack(stage.artifacts, stage.below, source) for source in spec.sources]
    return [new_stack(recipe.shape, spec.new, spec.operator, recipe.seed, sources, spec.init)]


def _check_initial_tensors(stage: Stage, build: Ref, new: list[Stack]) -> None:
    described = stage.artifacts.checked(build) / "build.json"
    try:
        said = parse_object(read_bounded(described)).get("initial_tensors")
    except ValueError:
        said = None
    if _digest(new) != said:
        remedy = f"Was it made by another version of torch? Remove {described.parent} and run the same command again"
        raise ArtifactCorruptError(described, "describes other initial tensors than this stage starts from", remedy)


def _digest(stacks: list[Stack]) -> str:
    return tensor_digest(stacks[0] if len(stacks) == 1 else nn.ModuleList(stacks))


def _open_checkpoint(stage: Stage, folder: Path, model: StageModel, ranks: Ranks) -> TrainingState | None:
    """Return the checkpoint that a stage resumes from, if any, and report it unless training is over."""
    state = load_state(folder, ranks, lambda why: emit(Message(f"stage {stage.index} starts anew: {why}")))
    if state is None:
        return None
    if not fits(model, state):
        emit(Message(f"stage {stage.index} starts anew: its checkpoint is of another version of StackWise"))
        return None
    watch = Watch(stage.plan.spec.optim, state.records, state.tensors)
    if stage.plan.optimizer and watch.lacks_moments:
        why = "its checkpoint has the best weights without their optimizer's state, from which a stage may go on now"
        emit(Message(f"stage {stage.index} starts anew: {why}"))
        return None
    begins_at = stage.run_plan.stages[stage.index].spec.optim.steps if stage.cooling else 0
    if begins_at < state.step and not watch.is_over:
        emit(Message(f"stage {stage.index} goes on from its checkpoint at step {state.step}"))
        then, now = state.fingerprint, fingerprint_of(stage)
        changed = [
            f"{name} ({then[name]}, now {now.get(name, 'none')})" for name in then if then[name] != now.get(name)
        ]
        if changed:
            made_with = f"the checkpoint was made with another {', '.join(changed)}"
            emit(Message(f"{made_with}: bits may differ from an undisturbed run's"))
    return state


@contextlib.contextmanager
def _boundary_below(stage: Stage) -> Generator[RowSource | LiveTrunk | None]:
    """Open what the live stacks read: nothing, a store, or the live trunk.

    A store has no rows for the steps of a cool-down.
    """
    anatomy = stage.plan.spec.anatomy
    if anatomy.boundary == 0:
        yield None
    elif not stage.cooling and (store := store_below(stage)):
        with open_store(stage.artifacts, store[0]) as reader:
            yield reader
    else:
        yield _live_trunk(stage, stage.below, anatomy.below)


def _batches(
    stage: Stage, boundary: RowSource | LiveTrunk | None, first_step: int, ranks: Ranks = ALONE
) -> Iterable[Batch]:
    train, _ = stage.sequences
    spec, config = stage.plan.spec, stage.config
    order = resolve_order(config, len(train))
    first, last = spec.order_step + first_step, spec.order_step + spec.optim.steps
    packed = PackedBatches(train, order, first, last, ranks.rank, ranks.count)
    if not isinstance(boundary, StoreReader):
        # A live trunk computes on the device that trains: batches made ahead would only compete with training.
        return stage_batches(config, spec, packed, boundary, first_step=first_step)
    rows = rows_for(stage.device, boundary, _BATCHES_AHEAD + 1)
    return stage_batches(config, spec, packed, rows, first_step=first_step, ahead=_BATCHES_AHEAD)


# ---------------------------------------------------------------- what the next stage reads


@contextlib.contextmanager
def boundary_above(stage: Stage, rows: StoreRows) -> Generator[tuple[ReadingSource, Facts]]:
    """Open some rows of the next stage's boundary, before the cast to the stored type, and say where they are from.

    Rows that the store below has are advanced from it; all others are derived from tokens.
    """
    below = advance_source(stage.plan, stage.run_plan, stage.artifacts)
    if below is None:
        yield _from_tokens(stage, _trunk_above(stage).output), {"from": "tokens"}
        return
    stacks = _next_anatomy(stage).below
    stack = load_stack(stage.artifacts, stage.so_far, stacks[-1], stage.device)
    with open_store(stage.artifacts, below) as reader:
        inputs = _inputs(stage) if stage.run_plan.data.separated_by is not None else None
        rows_below = rows_for(stage.device, reader, 2)  # one part is read while one is computed
        advanced, name = RowsFromBoundary(rows_below, stack, stage.device, inputs), f"boundary {len(stacks) - 1}"
        there = [reader.has(rows.sequence_ids[rows.views == view], view) for view in np.unique(rows.views).tolist()]
        if not (n_lacking := len(rows.sequence_ids) - sum(int(which.sum()) for which in there)):
            yield advanced, {"from": name}
            return
        origin = f"{name} and tokens" if n_lacking < len(rows.sequence_ids) else "tokens"
        either = RowsFromEither(advanced, _from_tokens(stage, _trunk_above(stage).output), reader.has)
        yield either, {"from": origin, "rows_from_tokens": n_lacking}


def rows_from_tokens(stage: Stage) -> RowsFromTokens:
    """Return the next stage's boundary, computed from tokens and in the form that a store holds."""
    return _from_tokens(stage, _trunk_above(stage))


def rows_to_store(stage: Stage) -> StoreRows:
    """Return which rows the next stage reads, and the attributes of their store."""
    recipe = stage.plan.activations
    assert recipe is not None
    train, validation = stage.sequences
    rows, views = resolve_order(stage.config, len(train)).visited(recipe.steps, recipe.order_step)
    top = _next_anatomy(stage).below[-1]
    return StoreRows(
        sequence_ids=train.sequence_ids[rows],
        views=views,
        validation_ids=np.asarray(validation.sequence_ids[: recipe.validation_sequences]),
        seq_len=stage.config.data.seq_len,
        d_model=stage.plan.shape.d_model,
        dtype=recipe.dtype,
        attributes={"id": stage.plan.ref("activations").sha256, "recipe": recipe.dump()},
        channels=stream_of(stage, stage.so_far, (top,)).channels_of(top),
    )


def stream_of(stage: Stage, plans: tuple[StagePlan, ...], stacks: tuple[int, ...]) -> Stream:
    """Return how the stream is held above some stacks, as the last of `plans` left them."""
    dtype = stage.config.cache.dtype
    known = stacks if dtype in QUANTISED_STREAMS else ()
    return Stream(dtype, {stack: load_channels(stage.artifacts, plans, stack) for stack in known})


def _from_tokens(stage: Stage, trunk: Callable[..., Tensor]) -> RowsFromTokens:
    return RowsFromTokens(_inputs(stage), trunk)


def _inputs(stage: Stage) -> InputsFromTokens:
    """Return the inputs of the trunk of the next stage."""
    assert stage.plan.activations is not None
    train, validation = stage.sequences
    order = resolve_order(stage.config, len(train))
    return InputsFromTokens(train, validation, stage.plan.activations.mask, order)


def _trunk_above(stage: Stage) -> LiveTrunk:
    return _live_trunk(stage, stage.so_far, _next_anatomy(stage).below)


def _next_anatomy(stage: Stage) -> Anatomy:
    """Return the anatomy of the next stage, which reads the store of this one."""
    return stage.run_plan.stages[stage.index + 1].spec.anatomy


def _live_trunk(stage: Stage, plans: tuple[StagePlan, ...], below: tuple[int, ...]) -> LiveTrunk:
    """Return the stacks below a boundary, as the last of `plans` left them."""
    embedding = load_embedding(stage.artifacts, plans, stage.device)
    stacks = [load_stack(stage.artifacts, plans, stack, stage.device) for stack in below]
    return LiveTrunk(embedding, stacks, stream_of(stage, plans, below))
