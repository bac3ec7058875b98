"""What a stage trains: the live part of the rack, built from artifacts, and the batches it sees."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from flows.run.events import StepTaken, emit, stop_requested
from flows.run.stage import Facts, Stage, fingerprint_of
from stackwise_core.model.blocks import Stack
from stackwise_core.model.growth_operators import give_adapters, new_rack, new_stack, prepare_to_train
from stackwise_core.model.rack_builder import count_parameters
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.objectives.batches import JointDataLoader, PackedBatches, ProgressiveDataLoader, RowSource
from stackwise_core.objectives.losses import Batch
from stackwise_core.objectives.prefetch import prefetched
from stackwise_core.stages.costs import rack_parameters, stack_parameters
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.resolve import resolve_loss, resolve_order
from stackwise_core.training.channel_statistics import first_rows, output_statistics
from stackwise_core.training.ranks import ALONE, Ranks
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import Hooks, TrainingState
from stackwise_core.training.trunk import LiveTrunk
from storage.activations.reader import StoreReader
from storage.activations.reused import ReusedRows
from storage.checkpoints import (
    load_embedding,
    load_head,
    load_stack,
    save_state,
    tensor_digest,
)
from storage.errors import ArtifactCorruptError

_BATCHES_AHEAD = 2


def _new_stacks(stage: Stage) -> list[Stack]:
    """Return what is new in this stage, as it is before training: one stack, all of joint training, or none."""
    recipe, spec = stage.plan.build, stage.plan.spec
    if recipe is None:
        return []
    if spec.mode == "joint":
        return [new_stack(recipe.shape, stack, "random", recipe.seed, None) for stack in spec.stacks]
    source = None if spec.source is None else load_stack(stage.artifacts, stage.below, spec.source)
    return [new_stack(recipe.shape, spec.new, spec.operator, recipe.seed, source)]


def digest_of_new(stage: Stage) -> str:
    """Return the hash of the initial tensors of what is new."""
    return _digest_of(_new_stacks(stage))


def _digest_of(stacks: list[Stack]) -> str:
    return tensor_digest(stacks[0] if len(stacks) == 1 else nn.ModuleList(stacks))


def model_to_train(stage: Stage, build: Ref | None) -> StageModel:
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


def hooks_of(stage: Stage, folder: Path, ranks: Ranks) -> Hooks:
    """Return what training tells and asks: steps to whoever listens, checkpoints to the work folder.

    Of several processes the first one tells and writes; its last checkpoint is the result.
    """
    optim = stage.plan.spec.optim
    n_tokens = optim.batch_size * stage.config.data.seq_len

    def on_step(record: dict[str, float]) -> None:
        emit(StepTaken(stage.index, int(record["step"]) + 1, optim.steps, record["loss"], n_tokens))

    def on_checkpoint(state: TrainingState) -> None:
        state.fingerprint = fingerprint_of(stage)
        save_state(folder, state)

    every, last = stage.config.training.checkpoint_every, ranks.count > 1
    if ranks.rank:
        return Hooks(checkpoint_every=every, checkpoint_last=last, should_stop=stop_requested)
    return Hooks(on_step, on_checkpoint, every, last, stop_requested)


def batches_of(
    stage: Stage, boundary: RowSource | LiveTrunk | None, first_step: int, ranks: Ranks = ALONE
) -> Iterable[Batch]:
    """Return the stage's batches from a step on, or one process's share of them."""
    train_sequences, _ = stage.sequences
    spec, recipe = stage.plan.spec, stage.plan.stack
    order = resolve_order(stage.config, len(train_sequences))
    packed = PackedBatches(train_sequences, order, first_step, spec.optim.steps, ranks.rank, ranks.count)
    if recipe.joint_times and recipe.mask:
        steps, ratios = zip(*recipe.joint_times, strict=True)
        masks = [recipe.mask.at_ratio(ratio) for ratio in ratios]
        return JointDataLoader(packed, masks, steps, recipe.order_seed, recipe.views, first_step)
    cached = isinstance(boundary, StoreReader)
    if cached:
        boundary = ReusedRows(boundary, _BATCHES_AHEAD + 1, pinned=stage.device.type == "cuda")
    loader = ProgressiveDataLoader(
        base_dataloader=packed,
        masking_strategy=recipe.mask,
        stack_idx=spec.anatomy.newest,
        trunk_activations=boundary,
        time_step=spec.time_step,
        objective=stage.config.training.progressive.training_objective,
    )
    # A live trunk computes on the device that trains: ahead of time it would only be in the way.
    return prefetched(loader, _BATCHES_AHEAD) if cached else loader


def channels_of_output(
    stage: Stage, model: StageModel, boundary: RowSource | LiveTrunk | None
) -> dict[int, ChannelStatistics]:
    """Return the statistics of what the live stacks, trained and settled, make of the stage's first rows."""
    batches = first_rows(batches_of(stage, boundary, 0), stage.plan.stack.statistics_rows)
    return output_statistics(model.live_stacks(), map(model.entering, batches))


def parameter_facts(stage: Stage, model: StageModel) -> Facts:
    """Return the parameters of the new stack, of what trains and of the whole rack."""
    spec, shape = stage.plan.spec, stage.plan.shape
    return {
        "stack_parameters": stack_parameters(shape, spec.n_blocks),
        "trainable_parameters": count_parameters(model)["trainable_parameters"],
        "rack_parameters": rack_parameters(shape, spec),
    }
