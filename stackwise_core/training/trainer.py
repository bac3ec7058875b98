"""Growing a rack in memory, stage by stage, with the same functions as the flow."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_type
from stackwise_core.config.functions import shown
from stackwise_core.config.rules import rule_faults
from stackwise_core.config.schema import GROWTH, Precision, ProgressiveConfig
from stackwise_core.config.sizes import vocab_size_of
from stackwise_core.config.stacks import progressive_adapter
from stackwise_core.config.unused import notes
from stackwise_core.errors import ConfigError, Fault, StageInterruptedError
from stackwise_core.model.adapters import adapter_names
from stackwise_core.model.precision import count_parameters
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.snapshot import Interrupted, Snapshot
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import RepeatedLoader, first_rows, stage_batches, stage_masks
from stackwise_core.objectives.dataloader import ProgressiveDataLoader, RowSource, check_loader, unwrapped
from stackwise_core.objectives.losses import Batch, loss_normaliser
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.resolve import resolve_loss, resolve_mask, resolve_statistics_rows, resolve_views
from stackwise_core.stages.stages import AdapterName, StackSpec, StageSpec, resolve_joint, resolve_stage
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.hardware import use_hardware
from stackwise_core.training.progress import Progress
from stackwise_core.training.settings import digest_of, stage_settings
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import (
    Hooks,
    Record,
    StageInputs,
    Trained,
    TrainingState,
    end_stage,
    fits,
    train_stage,
)

_log = logging.getLogger("stackwise")


@dataclass
class StageResult:
    """The result of one stage."""

    index: int
    mode: Literal["append", "prepend", "joint"] = "append"
    precision: Precision | None = None
    """Of the stack that the stage added; None for joint training."""
    time_step: int | None = None
    """Of that stack, where depth is time."""
    mask_ratio: float | None = None
    """None where inputs are not masked, or not all at one ratio."""
    records: list[Record] = field(default_factory=list)
    """What every step measured: step, loss, learning_rate, gradient_norm."""
    validation_loss: float | None = None
    """Mean over the loss positions of the validation batches [nats]; None without such batches."""
    seconds: float = 0.0
    """Of the training steps of this call."""
    parameters: dict[str, int] = field(default_factory=dict)
    """`trained` by the stage, and the `total` of the rack."""
    cache_bytes: int = 0
    """Of the activations that the stage kept in RAM."""

    @property
    def loss(self) -> float:
        """Training loss of the last step [nats]."""
        return self.records[-1]["loss"]

    @property
    def losses(self) -> list[float]:
        """Training loss of every step [nats]."""
        return [record["loss"] for record in self.records]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.records)


@dataclass
class _Call:
    """The arguments that all stages of one call share."""

    builder: ProgressiveRackBuilder
    dataloader: Iterable[Any]
    hooks: Hooks
    state: TrainingState | None
    validation: Iterable[Any] | None
    cache: Mapping[int, RowSource] = field(default_factory=dict)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_type("rack_builder", self.builder, ProgressiveRackBuilder, "a ProgressiveRackBuilder is expected")
        check_loader("dataloader", self.dataloader)
        check_type("hooks", self.hooks, Hooks, "a Hooks or None is expected")
        folder = self.hooks.checkpoint_folder
        check_type("hooks.checkpoint_folder", folder, (str, Path, NoneType), "the path of a folder is expected")
        check_type("state", self.state, (TrainingState, NoneType), "a TrainingState or None is expected")
        if self.validation is not None:
            check_loader("validation", self.validation)
        check_type("cache", self.cache, Mapping, "a mapping {boundary: object with rows()} is expected")
        for boundary, rows in self.cache.items():
            check_type(f"cache[{boundary!r}]", rows, RowSource, "an object with rows(sequence_ids, view) is expected")

    def take_state(self, spec: StageSpec, settings: dict[str, Any]) -> TrainingState | None:
        """Return where a stage goes on: the state of the call, of the builder, or of the folder; used up by this."""
        given, stopped = self.state, self.builder.interrupted
        self.state = self.builder.interrupted = None
        if given is not None:
            return given
        if stopped is not None and stopped.settings == digest_of(settings):
            _log.info("stage %d goes on after step %d, where it was stopped", spec.index, stopped.step)
            return TrainingState(stopped.step, stopped.tensors, stopped.records)
        if stopped is not None:
            _log.info("stage %d starts anew: its settings are not those that it was stopped with", spec.index)
        found = self.progress.state_of(settings) if self.progress else None
        if found is not None:
            _log.info("stage %d goes on after step %d, from its checkpoint", spec.index, found.step)
        return found

    def hooks_of(self, settings: dict[str, Any]) -> Hooks:
        """Return the hooks of a stage, with the folder's."""
        hooks, progress = self.hooks, self.progress
        if progress is None:
            return hooks

        def on_checkpoint(state: TrainingState) -> None:
            hooks.on_checkpoint(state)
            progress.keep_state(settings, state)

        return replace(hooks, on_checkpoint=on_checkpoint, go_on="the same call goes on there, also in another process")


class ProgressiveTrainer:
    """Grows a rack in memory, with the same functions as the flow."""

    def __init__(self, config: StackWiseConfig | None = None, *, hooks: Hooks | None = None) -> None:
        """Take a configuration, which is validated at every call since it may be edited, and the default hooks."""
        config = StackWiseConfig() if config is None else config
        check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected; from_yaml(path) reads a file")
        check_type("hooks", hooks, (Hooks, NoneType), "a Hooks or None is expected")
        self.config = config
        self.hooks = hooks or Hooks()
        self.history: list[StageResult] = []
        """The results of all stages that this trainer has trained."""
        self._cached: dict[str, Any] = {}

    def cache_info(self) -> dict[str, Any]:
        """Return boundary, rows, bytes, limit [bytes] and whether full, of the last activations kept in RAM, or {}."""
        return dict(self._cached)

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
            StageInterruptedError: `hooks.should_stop()`. The same call goes on there with the same bits: on this
                builder by itself, on another by `state=`, and in another process by `hooks.checkpoint_folder`.
        """
        call = _Call(rack_builder, dataloader, hooks or self.hooks, state, validation, cache or {})
        growth = self.config.training.progressive
        target = growth.target_stacks if target_stacks is None else target_stacks
        first = self._begin(call, target)
        results = self._grow(call, first, target) if growth.enabled else []
        if self.config.training.joint_steps and growth.enabled:
            results += self._anneal(call, target)
        if not growth.enabled and first < target:
            results = [self._train_jointly(call, 0, target)]
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
        if not rack_builder.n_stacks:
            allowed = "the rack has no stack yet; give a number, or append one"
            raise ConfigError([Fault("target_stacks", "None", allowed)])
        self._begin(call, rack_builder.n_stacks)
        return [self._train_jointly(call, 0, rack_builder.n_stacks)]

    def _begin(self, call: _Call, target: Any) -> int:
        """Reject before the first step what would fail after the last, and have the configuration rule the rack.

        Returns the first growth stage of the call.
        """
        builder = call.builder
        self.config.validate(corpus=False)
        if (count := self.config.hardware.processes) > 1:
            allowed = "this trains in the process that calls it; `stackwise train` starts several, else set it to 1"
            raise ConfigError([Fault("hardware.processes", str(count), allowed)])
        self._check_target(builder, target)
        builder.check_additions(self.config, target)
        built = builder.as_built(self.config)
        built.training.progressive.target_stacks = max(target, builder.n_stacks)
        if faults := rule_faults(built, corpus=False):
            raise ConfigError(faults)
        if (mask := resolve_mask(built, 0)) is not None and mask.mask_token >= vocab_size_of(built):
            allowed = f"mlm puts token {mask.mask_token} for [MASK]; the rack needs a row for it"
            raise ConfigError([Fault("model.vocab_size", str(vocab_size_of(built)), allowed)])
        for line in [*notes(built), *_ruled_out(builder.config, self.config)]:
            _log.info(line)
        builder.undo_interrupted()
        builder.adopt(self.config)
        first = builder.n_trained
        if call.hooks.checkpoint_folder is None:
            return first
        call.progress = Progress.open(call.hooks.checkpoint_folder, builder)
        self._check_target(builder, target)
        return call.progress.first_ahead(first)

    def _check_target(self, builder: ProgressiveRackBuilder, target: Any) -> None:
        growth = self.config.training.progressive
        limit = growth.max_stacks
        if type(target) is not int or not 1 <= target <= limit:
            allowed = f"a number of stacks from 1 to {limit}: {GROWTH}.max_stacks is {limit}"
            raise ConfigError([Fault("target_stacks", repr(target), allowed)])
        if builder.n_stacks > limit:
            allowed = f"the rack has {builder.n_stacks} stacks already"
            raise ConfigError([Fault(f"{GROWTH}.max_stacks", str(limit), allowed)])
        joint = self.config.training.joint_steps > 0 or not growth.enabled
        if joint and target < builder.n_stacks:
            allowed = f"the rack has {builder.n_stacks} stacks already, and joint training takes all of them"
            raise ConfigError([Fault("target_stacks", str(target), allowed)])

    def _grow(self, call: _Call, first: int, target: int) -> list[StageResult]:
        """Train the stacks that are not trained yet, and add and train those that are missing."""
        builder, results = call.builder, list[StageResult]()
        for index in range(first, target):
            if not (is_over := builder.is_trained(index)):
                builder.undo_anneal()
            if is_new := index == builder.n_stacks:
                builder.add_stack(self.config)
            config = builder.as_built(self.config)
            spec = resolve_stage(config, index)
            settings = stage_settings(config, spec)
            if is_over:
                results += self._replayed(call, settings)
                continue
            if not is_new:
                builder.renew(config, spec)
            results.append(self._train(call, config, spec, settings))
        return results

    def _anneal(self, call: _Call, n_stacks: int) -> list[StageResult]:
        """Train the rack jointly, unless it is as these settings annealed it."""
        config, spec, settings = self._joint(call.builder, n_stacks, n_stacks)
        digest = digest_of(settings, config.training.custom_loss)
        if done := self._replayed(call, settings):
            return done
        if call.builder.is_annealed(digest):
            return []
        call.builder.undo_anneal()
        return [self._train(call, config, spec, settings, anneal=digest)]

    def _train_jointly(self, call: _Call, index: int, n_stacks: int) -> StageResult:
        builder = call.builder
        while builder.n_stacks < n_stacks:
            builder.add_stack(self.config)
        config = builder.as_built(self.config)
        for stack in range(builder.n_trained, n_stacks):
            builder.renew(config, resolve_stage(config, stack))
        config, spec, settings = self._joint(builder, index, n_stacks)
        for done in self._replayed(call, settings):
            return done
        return self._train(call, config, spec, settings)

    def _replayed(self, call: _Call, settings: dict[str, Any]) -> list[StageResult]:
        """Return the result of a stage that was over before this process began, if the call has a folder."""
        found = call.progress and call.progress.replayed(settings)
        if not found:
            return []
        self.history.append(StageResult(**found))
        return self.history[-1:]

    def _joint(
        self, builder: ProgressiveRackBuilder, index: int, n_stacks: int
    ) -> tuple[StackWiseConfig, StageSpec, dict[str, Any]]:
        """Return joint training of all stacks and its settings.

        A quantised stack that was never trained trains whole, as a first does.
        """
        config = builder.as_built(self.config)
        config.training.progressive.target_stacks = n_stacks
        spec = resolve_joint(config, index, n_stacks)
        anatomy, settings = spec.anatomy, stage_settings(config, spec)
        pairs = zip(anatomy.order, anatomy.trains, strict=True)
        trains = tuple(what if builder.is_trained(stack) else "everything" for stack, what in pairs)
        spec = spec.model_copy(update={"anatomy": anatomy.model_copy(update={"trains": trains})})
        for stack in spec.stacks:
            if spec.anatomy.trains_of(stack.index) == "adapters" and not _adapters(builder, stack):
                allowed = f"stack {stack.index} is quantised and has no adapter: nothing of it could train"
                raise ConfigError([Fault("precision", repr(stack.precision), allowed)])
        return config, spec, settings

    def _train(
        self,
        call: _Call,
        config: StackWiseConfig,
        spec: StageSpec,
        settings: dict[str, Any],
        anneal: str | None = None,
    ) -> StageResult:
        """Train one stage of a call and evaluate it; the call's state is used up by its first stage.

        `anneal` is the digest of a joint anneal. After an error the rack is what it was before the stage, and after a
        stop what it was then: the next call goes back, and on from the state.
        """
        builder, state = call.builder, call.take_state(spec, settings)
        spec = _as_adapted(builder, config, spec)
        _log.info("stage %d (%s) begins: %d steps", spec.index, spec.name, spec.optim.steps)
        builder.build_rack().to("cpu")  # where the copy is kept
        builder.prepare_stage(spec, config.run.seed)
        before = Snapshot.of(builder.build_rack(), spec.anatomy, builder.channels)
        try:
            inputs = stage_inputs(builder, config, spec, call.dataloader, call.cache.get(spec.anatomy.boundary), state)
            parameters = {"trained": count_parameters(inputs.model)["trainable_parameters"]}
            trained = train_stage(inputs, call.hooks_of(settings))
            builder.channels.update(end_stage(inputs.model, inputs.first_batches))
        except StageInterruptedError as stopped:
            kept: TrainingState = stopped.state.copy()
            digest, now = digest_of(settings), builder.digests()
            builder.interrupted = Interrupted(digest, kept.step, kept.tensors, kept.records, before, now)
            raise
        except BaseException:
            before.restore(builder.build_rack(), builder.channels)
            builder.build_rack().to("cpu")
            raise
        builder.finish_stage(spec.anatomy)
        if anneal is not None:
            builder.keep_annealed(anneal, before)
        result = _result(config, spec, trained, {**parameters, "total": builder.get_rack_info()["parameters"]})
        self._record(result, config, spec, inputs.batches)
        try:
            if call.validation is not None:
                result.validation_loss = _validation_loss(builder, config, spec, call.validation)
        finally:
            builder.build_rack().to("cpu")  # frees the device of what the next stage does not need
            if call.progress:
                call.progress.finish(builder, settings, asdict(result))
        _log.info("stage %d (%s) ends: %s", spec.index, spec.name, _summary(result))
        return result

    def _record(self, result: StageResult, config: StackWiseConfig, spec: StageSpec, batches: Iterable[Batch]) -> None:
        """Add a result to the history, with what its stage kept in RAM."""
        self.history.append(result)
        if isinstance(batches, ProgressiveDataLoader) and batches.cached_rows + batches.cache_full:
            result.cache_bytes = batches.cache_bytes
            self._cached = {
                "boundary": spec.anatomy.boundary,
                "rows": batches.cached_rows,
                "bytes": batches.cache_bytes,
                "limit": int(config.cache.max_gb * 2**30),
                "full": batches.cache_full,
            }


def _ruled_out(own: StackWiseConfig, ruling: StackWiseConfig) -> Iterator[str]:
    """Yield one line about what the builder's configuration sets and the trainer's, which rules, says otherwise."""
    sections = [
        (own.run, ruling.run, ["seed"]),
        (own.model, ruling.model, ["blocks_per_stack"]),
        (own.training, ruling.training, ["new_stack_init"]),
        (own.training.progressive, ruling.training.progressive, list(ProgressiveConfig.model_fields)),
    ]
    differ = [
        f"{key} {shown(getattr(theirs, key))}, not {shown(getattr(mine, key))}"
        for mine, theirs, keys in sections
        for key in keys
        if key in mine.model_fields_set and getattr(mine, key) != getattr(theirs, key)
    ]
    if differ:
        yield f"the trainer's configuration rules, not the builder's: {', '.join(differ)}"


def _adapters(builder: ProgressiveRackBuilder, stack: StackSpec) -> list[AdapterName]:
    """Return the adapters that a stack has, or will be given: a 'stack' adapter is added at creation only."""
    return [*adapter_names(builder.stack(stack.index)), *(name for name in stack.adapters if name == "progressive")]


def _as_adapted(builder: ProgressiveRackBuilder, config: StackWiseConfig, spec: StageSpec) -> StageSpec:
    """Return a stage of this rack, whose stacks may have been created under another configuration.

    A stack of the trunk that is to train adapters and has none gets a progressive one, and adapters that the
    configuration does not know of train at its rate too.
    """
    training, stacks, progressive = config.training, list(spec.stacks), progressive_adapter(config)
    for index in spec.anatomy.trained:
        if spec.anatomy.trains_of(index) == "adapters" and not _adapters(builder, stacks[index]):
            given = {**stacks[index].adapters, "progressive": progressive}
            stacks[index] = stacks[index].model_copy(update={"adapters": given})
            _log.info("stack %d has no adapter to train: it gets a progressive one", index)
    optim = spec.optim
    if not optim.adapter_learning_rate and any(_adapters(builder, stacks[index]) for index in spec.anatomy.trained):
        rate = training.adapter_learning_rate * optim.learning_rate / training.learning_rate
        optim = optim.model_copy(update={"adapter_learning_rate": rate})
    return spec.model_copy(update={"stacks": tuple(stacks), "optim": optim})


def _result(config: StackWiseConfig, spec: StageSpec, trained: Trained, parameters: dict[str, int]) -> StageResult:
    masks = set(stage_masks(config, spec).values())
    mask = masks.pop() if len(masks) == 1 else None
    return StageResult(
        index=spec.index,
        mode=spec.mode,
        precision=None if spec.mode == "joint" else spec.new.precision,
        time_step=spec.time_step,
        mask_ratio=None if mask is None or mask.time else mask.ratio,
        records=trained.records,
        seconds=trained.seconds,
        parameters=parameters,
    )


def _summary(result: StageResult) -> str:
    held_out = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
    trained, total = result.parameters["trained"], result.parameters["total"]
    return f"loss {result.loss:.4f}{held_out}, {trained:,} of {total:,} parameters trained, {result.seconds:.1f} s"


def stage_inputs(
    builder: ProgressiveRackBuilder,
    config: StackWiseConfig,
    spec: StageSpec,
    dataloader: Iterable[Any],
    store: RowSource | None = None,
    state: TrainingState | None = None,
) -> StageInputs:
    """Return the inputs of a stage that the builder has prepared, in memory, as the flow opens them from artifacts.

    `store` gives the rows of the boundary; without it the trunk computes them. `state` is a checkpoint of this stage.
    """
    anatomy, device, rack = spec.anatomy, use_hardware(config.hardware), builder.build_rack()
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
    loader = unwrapped(dataloader, stage_masks(config, spec), config.training.progressive.training_objective)
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
