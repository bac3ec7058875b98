"""What a stage reads where the rack is in memory, as the flow opens it from artifacts; and its validation loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.stacks import progressive_adapter
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import adapter_names
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import RepeatedLoader, first_rows, stage_batches, stage_masks
from stackwise_core.objectives.dataloader import RowSource, unwrapped
from stackwise_core.objectives.losses import Batch, loss_normaliser
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.memory import Setting
from stackwise_core.stages.resolve import (
    resolve_loss,
    resolve_mask,
    resolve_shape,
    resolve_statistics_rows,
    resolve_views,
)
from stackwise_core.stages.stages import AdapterName, StackSpec, StageSpec
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.hardware import use_hardware
from stackwise_core.training.kept_state import kept_moments
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import StageInputs, TrainingState, fits

_log = logging.getLogger("stackwise")


def adapters_of(builder: ProgressiveRackBuilder, stack: StackSpec) -> list[AdapterName]:
    """Return the adapters that a stack has, or will be given: a 'stack' adapter is added at creation only."""
    return [*adapter_names(builder.stack(stack.index)), *(name for name in stack.adapters if name == "progressive")]


def as_adapted(builder: ProgressiveRackBuilder, config: StackWiseConfig, spec: StageSpec) -> StageSpec:
    """Return a stage of this rack, whose stacks may have been created under another configuration.

    A stack of the trunk that is to train adapters and has none gets a progressive one, and adapters that the
    configuration does not know of train at its rate too.
    """
    training, stacks, progressive = config.training, list(spec.stacks), progressive_adapter(config)
    for index in spec.anatomy.trained:
        if spec.anatomy.trains_of(index) == "adapters" and not adapters_of(builder, stacks[index]):
            given = {**stacks[index].adapters, "progressive": progressive}
            stacks[index] = stacks[index].model_copy(update={"adapters": given})
            _log.info("stack %d has no adapter to train: it gets a progressive one", index)
    optim = spec.optim
    if not optim.adapter_learning_rate and any(adapters_of(builder, stacks[index]) for index in spec.anatomy.trained):
        rate = training.adapter_learning_rate * optim.learning_rate / training.learning_rate
        optim = optim.model_copy(update={"adapter_learning_rate": rate})
    return spec.model_copy(update={"stacks": tuple(stacks), "optim": optim})


def stage_inputs(
    builder: ProgressiveRackBuilder,
    config: StackWiseConfig,
    spec: StageSpec,
    dataloader: Iterable[Any],
    store: RowSource | None = None,
    state: TrainingState | None = None,
    *,
    record: bool = True,
) -> StageInputs:
    """Return the inputs of a stage that the builder has prepared, in memory, as the flow opens them from artifacts.

    `store` gives the rows of the boundary; without it the trunk computes them, and if they are to be cached they are
    recorded, unless `record` is false. `state` is a checkpoint of this stage.
    """
    anatomy, device, rack = spec.anatomy, use_hardware(config.hardware), builder.build_rack()
    stacks = {stack.creation_index: stack for stack in builder.stacks}
    model = StageModel.assemble(config, anatomy, stacks, rack.head, rack.embedding, device)
    if state is not None and not fits(model, state):
        allowed = f"stage {spec.index} trains other tensors: give a checkpoint of this stage, or None"
        raise ConfigError([Fault("state", f"a checkpoint at step {state.step}", allowed)])
    boundary, trunk = store if anatomy.boundary else None, []
    if anatomy.boundary and store is None:
        below = [stacks[index].to(device) for index in anatomy.below]
        stream = Stream(config.cache.dtype, builder.channels)
        boundary = LiveTrunk(rack.embedding.to(device), below, stream)
        trunk = boundary.modules
    n_rows, views, first_step = resolve_statistics_rows(config), resolve_views(config), state.step if state else 0
    loader = unwrapped(dataloader, stage_masks(config, spec), config.training.progressive.training_objective)
    raw = RepeatedLoader(loader, views, spec.order_step, first_step, n_rows)
    record = record and config.training.progressive.cache_activations

    def first_batches() -> Iterator[Batch]:
        base = raw.kept or RepeatedLoader(
            loader, views, spec.order_step
        )  # a state of the last step leaves nothing to read
        yield from first_rows(stage_batches(config, spec, base, boundary), n_rows)

    batches = stage_batches(config, spec, raw, boundary, first_step=first_step, record=record)
    moments = kept_moments(model, spec, builder.moments)
    return StageInputs(spec, model, batches, state, first_batches() if n_rows else (), moments, trunk)


def memory_setting(inputs: StageInputs, config: StackWiseConfig) -> Setting:
    """Return what the memory of a stage in memory depends on."""
    spec, device = inputs.spec, inputs.model.head.projection.weight.device
    mask = resolve_mask(config, spec.anatomy.newest)
    ratio = mask.mean_ratio if mask else None
    how: dict[str, Any] = {"cached": not inputs.trunk, "cuda": device.type == "cuda"}
    return Setting.of(config, resolve_shape(config), spec, loss_fraction=ratio, **how)


def validation_loss_of(
    builder: ProgressiveRackBuilder, config: StackWiseConfig, spec: StageSpec, validation: Iterable[Any]
) -> float:
    """Return the mean loss of a stage over held-out batches, on the stream that the stage trained on [nats]."""
    rack, device = builder.build_rack(), use_hardware(config.hardware)
    mask, objective = resolve_mask(config, spec.anatomy.newest), config.training.progressive.training_objective
    total, normaliser = 0.0, 0
    for raw in unwrapped(validation, stage_masks(config, spec), objective):
        batch = validation_batch(raw, mask, objective)
        (found,) = judge_rack(
            rack.embedding.to(device),
            (builder.stack(index).to(device) for index in spec.anatomy.order),
            rack.head,
            [batch],
            stream=Stream(config.cache.dtype, builder.channels),
            boundary=spec.anatomy.boundary,
            loss_function=resolve_loss(config),
        )
        total += found["validation_loss"] * loss_normaliser(batch)
        normaliser += loss_normaliser(batch)
    if not normaliser:
        raise ConfigError([Fault("validation", "batches without a loss position", "give more or longer sequences")])
    return total / normaliser
