"""Growing a rack in memory, stage by stage, with the same functions as the flow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_type
from stackwise_core.config.rules import growth_faults, time_faults
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import RepeatedLoader, first_rows, stage_batches, stage_masks
from stackwise_core.objectives.dataloader import RowSource, check_loader, unwrapped
from stackwise_core.objectives.losses import Batch, loss_normaliser
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.resolve import resolve_loss, resolve_mask, resolve_statistics_rows, resolve_views
from stackwise_core.stages.stages import StageSpec, resolve_joint, resolve_stage
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.hardware import use_hardware
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import Hooks, Record, StageInputs, TrainingState, end_stage, fits, train_stage


@dataclass
class StageResult:
    """The result of one stage."""

    index: int
    records: list[Record] = field(default_factory=list)
    validation_loss: float | None = None
    """Mean over the loss positions of the validation batches [nats]; None without such batches."""

    @property
    def loss(self) -> float:
        """Training loss of the last step [nats]."""
        return self.records[-1]["loss"]


@dataclass
class _Call:
    """The arguments that all stages of one call share."""

    builder: ProgressiveRackBuilder
    dataloader: Iterable[Any]
    hooks: Hooks
    state: TrainingState | None
    validation: Iterable[Any] | None
    cache: Mapping[int, RowSource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_type("rack_builder", self.builder, ProgressiveRackBuilder, "a ProgressiveRackBuilder is expected")
        check_loader("dataloader", self.dataloader)
        check_type("hooks", self.hooks, Hooks, "a Hooks or None is expected")
        check_type("state", self.state, (TrainingState, NoneType), "a TrainingState or None is expected")
        if self.validation is not None:
            check_loader("validation", self.validation)
        check_type("cache", self.cache, Mapping, "a mapping {boundary: object with rows()} is expected")
        for boundary, rows in self.cache.items():
            check_type(f"cache[{boundary!r}]", rows, RowSource, "an object with rows(sequence_ids, view) is expected")


class ProgressiveTrainer:
    """Grows a rack in memory, with the same functions as the flow."""

    def __init__(self, config: StackWiseConfig | None = None, *, hooks: Hooks | None = None) -> None:
        """Take a configuration, which is validated at every call since it may be edited, and the default hooks."""
        config = StackWiseConfig() if config is None else config
        check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected; from_yaml(path) reads a file")
        check_type("hooks", hooks, (Hooks, NoneType), "a Hooks or None is expected")
        self.config = config
        self.hooks = hooks or Hooks()

    def train_progressively(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        target_stacks: int | None = None,
        *,
        cache: Mapping[int, RowSource] | None = None,
        hooks: Hooks | None = None,
        state: TrainingState | None = None,
        validation: Iterable[Any] | None = None,
    ) -> list[StageResult]:
        """Add stacks until there are `target_stacks`, training each; untrained ones train first.

        Args:
            rack_builder: the rack so far.
            dataloader: any iterable of token batches, iterated as often as the steps need.
            target_stacks: None takes the configuration's.
            cache: boundary k -> the activations after the first k stacks, made from the same trunk.
            hooks: progress, checkpoints and stop requests; None takes the trainer's.
            state: a checkpoint of the first stage that trains, to resume from with the same bits; the loader must
                yield the same batches again.
            validation: held-out token batches; every stage is evaluated on them when it has ended.

        Returns:
            One result per stage that was trained here; the last is the joint anneal, if there is one.

        Raises:
            StageInterruptedError: `hooks.should_stop()`; its `state` is what to resume from.
        """
        call = _Call(rack_builder, dataloader, hooks or self.hooks, state, validation, cache or {})
        self._validate()
        growth = self.config.training.progressive
        target = growth.target_stacks if target_stacks is None else target_stacks
        self._check(rack_builder, target)
        if not growth.enabled:
            return [self._train_jointly(call, 0, target)]
        results: list[StageResult] = []
        for index in range(rack_builder.n_trained, target):
            if index == rack_builder.n_stacks:
                rack_builder.add_stack()
            config = rack_builder.as_built(self.config)
            results.append(_train(call, config, resolve_stage(config, index)))
        if self.config.training.joint_steps:
            results.append(self._train_jointly(call, target, target))
        if call.state is not None:
            raise ConfigError([Fault("state", "a checkpoint", "no stage is left to train: leave it out")])
        return results

    def train_rack(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        target_stacks: int | None = None,
        *,
        hooks: Hooks | None = None,
        state: TrainingState | None = None,
        validation: Iterable[Any] | None = None,
    ) -> list[StageResult]:
        """Grow to `target_stacks` as `train_progressively` does; without it, train all stacks of the rack together."""
        if target_stacks is not None:
            return self.train_progressively(
                rack_builder, dataloader, target_stacks, hooks=hooks, state=state, validation=validation
            )
        call = _Call(rack_builder, dataloader, hooks or self.hooks, state, validation)
        self._validate()
        if not rack_builder.n_stacks:
            allowed = "the rack has no stack yet; give a number, or append one"
            raise ConfigError([Fault("target_stacks", "None", allowed)])
        return [self._train_jointly(call, 0, rack_builder.n_stacks)]

    def _validate(self) -> None:
        self.config.validate(corpus=False)
        if (count := self.config.hardware.processes) > 1:
            allowed = "this trains in the process that calls it; `stackwise train` starts several, else set it to 1"
            raise ConfigError([Fault("hardware.processes", str(count), allowed)])

    def _check(self, builder: ProgressiveRackBuilder, target: int) -> None:
        """Reject before the first step what would fail after the last."""
        growth = self.config.training.progressive
        limit = builder.config.training.progressive.max_stacks
        if type(target) is not int or not 1 <= target <= limit:
            allowed = f"a number of stacks from 1 to {limit}: the builder's max_stacks is {limit}"
            raise ConfigError([Fault("target_stacks", repr(target), allowed)])
        joint = self.config.training.joint_steps > 0 or not growth.enabled
        if joint and target < builder.n_stacks:
            allowed = f"the rack has {builder.n_stacks} stacks already, and joint training takes all of them"
            raise ConfigError([Fault("target_stacks", str(target), allowed)])
        built = builder.as_built(self.config)
        built.training.progressive.target_stacks = max(target, builder.n_stacks)
        if faults := [*growth_faults(built), *time_faults(built)]:
            raise ConfigError(faults)
        mask, shape = resolve_mask(built, 0), builder.build_rack().shape
        if mask is not None and mask.mask_token >= shape.vocab_size:
            allowed = f"mlm puts token {mask.mask_token} for [MASK]; the rack needs a row for it"
            raise ConfigError([Fault("model.vocab_size", str(shape.vocab_size), allowed)])
        if growth.training_objective == "clm" and not shape.causal:
            allowed = "the builder's rack is bidirectional: every position would see its own target"
            raise ConfigError([Fault("training.progressive.training_objective", "'clm'", allowed)])

    def _train_jointly(self, call: _Call, index: int, n_stacks: int) -> StageResult:
        while call.builder.n_stacks < n_stacks:
            call.builder.add_stack()
        config = call.builder.as_built(self.config)
        config.training.progressive.target_stacks = n_stacks
        spec = resolve_joint(config, index, n_stacks)
        for stack in spec.stacks:
            if spec.anatomy.trains_of(stack.index) == "adapters" and not stack.adapters:
                allowed = f"stack {stack.index} is quantised and has no adapter: nothing of it could train"
                raise ConfigError([Fault("precision", repr(stack.precision), allowed)])
        return _train(call, config, spec)


def _train(call: _Call, config: StackWiseConfig, spec: StageSpec) -> StageResult:
    """Train one stage of a call and evaluate it; the call's state is used up by its first stage."""
    builder, state, call.state = call.builder, call.state, None
    inputs = stage_inputs(builder, config, spec, call.dataloader, call.cache.get(spec.anatomy.boundary), state)
    trained = train_stage(inputs, call.hooks)
    builder.channels.update(end_stage(inputs.model, inputs.first_batches))
    builder.finish_stage(spec.anatomy)
    result = StageResult(spec.index, trained.records)
    if call.validation is not None:
        result.validation_loss = _validation_loss(builder, config, spec, call.validation)
    builder.build_rack().to("cpu")  # frees the device of what the next stage does not need
    return result


def stage_inputs(
    builder: ProgressiveRackBuilder,
    config: StackWiseConfig,
    spec: StageSpec,
    dataloader: Iterable[Any],
    store: RowSource | None = None,
    state: TrainingState | None = None,
) -> StageInputs:
    """Return the inputs of a stage in memory, as the flow opens them from artifacts.

    `store` gives the rows of the boundary; without it the trunk computes them. `state` is a checkpoint of this stage.
    """
    anatomy, device, rack = spec.anatomy, use_hardware(config.hardware), builder.build_rack()
    builder.prepare_stage(spec)
    stacks = {stack.creation_index: stack for stack in builder.stacks}
    model = StageModel.assemble(config, anatomy, stacks, rack.head, rack.embedding, device)
    if state is not None and not fits(model, state):
        allowed = f"stage {spec.index} trains other tensors: give a checkpoint of this stage, or None"
        raise ConfigError([Fault("state", f"a checkpoint at step {state.step}", allowed)])
    boundary = store if anatomy.boundary else None
    if anatomy.boundary and store is None:
        below = [stacks[index].to(device) for index in anatomy.below]
        stream = Stream(config.cache.dtype, builder.channels)
        boundary = LiveTrunk(rack.embedding.to(device), below, stream)
    first_step, n_rows, views = state.step if state else 0, resolve_statistics_rows(config), resolve_views(config)
    loader = unwrapped(dataloader, stage_masks(config, spec))
    raw = RepeatedLoader(loader, views, first_step, n_rows)
    record = config.training.progressive.cache_activations

    def first_batches() -> Iterator[Batch]:
        base = raw.kept or RepeatedLoader(loader, views)  # a state of the last step leaves nothing to read
        yield from first_rows(stage_batches(config, spec, base, boundary), n_rows)

    batches = stage_batches(config, spec, raw, boundary, first_step=first_step, record=record)
    return StageInputs(spec, model, batches, state, first_batches() if n_rows else ())


def _validation_loss(
    builder: ProgressiveRackBuilder, config: StackWiseConfig, spec: StageSpec, validation: Iterable[Any]
) -> float:
    """Return the mean loss of a stage over held-out batches, on the stream that the stage trained on [nats]."""
    rack, device = builder.build_rack(), use_hardware(config.hardware)
    mask, objective = resolve_mask(config, spec.anatomy.newest), config.training.progressive.training_objective
    total, normaliser = 0.0, 0
    for raw in unwrapped(validation, stage_masks(config, spec)):
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
