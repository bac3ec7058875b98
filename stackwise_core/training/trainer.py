"""Growing a rack in memory, stage by stage, with the same functions as the flow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from types import NoneType
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_type
from stackwise_core.config.functions import shown
from stackwise_core.config.rules import rule_faults
from stackwise_core.config.schema import GROWTH, ProgressiveConfig
from stackwise_core.config.sizes import vocab_size_of
from stackwise_core.config.unused import is_used, notes
from stackwise_core.errors import ConfigError, Fault, StageInterruptedError
from stackwise_core.model.precision import count_parameters
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.snapshot import Interrupted, Snapshot
from stackwise_core.notebook import bar
from stackwise_core.objectives.dataloader import ProgressiveDataLoader, RowSource
from stackwise_core.objectives.losses import Batch
from stackwise_core.stages.remedies import explained
from stackwise_core.stages.resolve import resolve_mask
from stackwise_core.stages.stages import StageSpec, ends_at_peak, resolve_joint, resolve_stage
from stackwise_core.training.call import Call
from stackwise_core.training.cooldown import cool_down
from stackwise_core.training.hardware import compiler_fault, torch_restored, use_hardware
from stackwise_core.training.in_memory import (
    adapters_of,
    as_adapted,
    memory_setting,
    stage_inputs,
    validation_loss_of,
)
from stackwise_core.training.progress import Progress
from stackwise_core.training.results import Results, StageResult, result_of
from stackwise_core.training.settings import digest_of, stage_settings
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import Hooks, Record, TrainingState, end_stage, moments_of, train_stage

_log = logging.getLogger("stackwise")
_AS_BEFORE = "The rack is as it was before the stage; checkpoints in Hooks.checkpoint_folder stand"


class ProgressiveTrainer:
    """Grows a rack in memory, with the same functions as the flow."""

    def __init__(self, config: StackWiseConfig | None = None, *, hooks: Hooks | None = None) -> None:
        """The configuration is validated at every call, since it may be edited; a call may have hooks of its own."""
        config = StackWiseConfig() if config is None else config
        check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected; from_yaml(path) reads a file")
        check_type("hooks", hooks, (Hooks, NoneType), "a Hooks or None is expected")
        self.config = config
        self.hooks = hooks or Hooks()
        self.history = Results()
        """The results of all stages that this trainer has trained."""
        self._cached: dict[str, Any] = {}

    def cache_info(self) -> dict[str, Any]:
        """Return boundary, rows, bytes, limit [bytes] and whether full, of the last activations kept in RAM, or {}."""
        return dict(self._cached)

    @torch_restored()
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
    ) -> Results:
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
        call = Call(rack_builder, dataloader, hooks or self.hooks, state, validation, cache or {})
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
        return Results(results)

    @torch_restored()
    def train_rack(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        target_stacks: int | None = None,
        *,
        hooks: Hooks | None = None,
        state: TrainingState | None = None,
        validation: Iterable[Any] | None = None,
    ) -> Results:
        """Grow to `target_stacks` as `train_progressively` does; without it, train all stacks of the rack together."""
        if target_stacks is not None:
            return self.train_progressively(
                rack_builder, dataloader, target_stacks, hooks=hooks, state=state, validation=validation
            )
        call = Call(rack_builder, dataloader, hooks or self.hooks, state, validation)
        if not rack_builder.n_stacks:
            allowed = "the rack has no stack yet; give a number, or append one"
            raise ConfigError([Fault("target_stacks", "None", allowed)])
        self._begin(call, rack_builder.n_stacks)
        return Results([self._train_jointly(call, 0, rack_builder.n_stacks)])

    def _begin(self, call: Call, target: Any) -> int:
        """Reject before the first step what would fail after the last, and have the configuration rule the rack.

        Returns the first growth stage of the call.
        """
        builder = call.builder
        self.config.validate(corpus=False)
        if (count := self.config.hardware.ranks) > 1:
            allowed = "this trains in the process that calls it; `stackwise train` starts several, else set it to 1"
            raise ConfigError([Fault("hardware.processes", str(count), allowed)])
        if call.validation is None:
            self._check_judged()
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
        hardware = self.config.hardware
        if hardware.compile and (fault := compiler_fault(use_hardware(hardware))):
            _log.warning(fault)
        builder.undo_interrupted()
        builder.adopt(self.config)
        first = builder.n_trained
        if call.hooks.checkpoint_folder is None:
            return first
        call.progress = Progress.open(call.hooks.checkpoint_folder, builder)
        self._check_target(builder, target)
        return call.progress.first_ahead(first)

    def _check_judged(self) -> None:
        """Reject what validation decides, since there are no batches for it."""
        validation, allowed = self.config.validation, "give `validation`, the batches on which that is judged"
        decides = {"cooldown_steps": 0, "patience": 0, "keep": "last"}
        for key, off in decides.items():
            if (value := getattr(validation, key)) != off and is_used(self.config, f"validation.{key}"):
                raise ConfigError([Fault(f"validation.{key}", shown(value), f"{allowed}, or use {off}")])

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

    def _grow(self, call: Call, first: int, target: int) -> list[StageResult]:
        """Train the stacks that are not trained yet, and add and train those that are missing."""
        builder, results = call.builder, list[StageResult]()
        for index in range(first, target):
            if not (is_over := builder.is_trained(index)):
                builder.undo_anneal()
            if is_new := index == builder.n_stacks:
                builder.add_stack(self.config)
            config = builder.as_built(self.config)
            growth = config.training.progressive  # where the run ends, one clock decays
            growth.target_stacks = max(growth.target_stacks, target)
            spec = resolve_stage(config, index)
            settings = stage_settings(config, spec)
            if is_over:
                results += self._replayed(call, settings)
                continue
            if not is_new:
                builder.renew(config, spec)
            results.append(self._train(call, config, spec, settings))
        return results

    def _anneal(self, call: Call, n_stacks: int) -> list[StageResult]:
        """Train the rack jointly, unless it is as these settings annealed it."""
        config, spec, settings = self._joint(call.builder, n_stacks, n_stacks)
        digest = digest_of(settings, config.training.custom_loss)
        if done := self._replayed(call, settings):
            return done
        if call.builder.is_annealed(digest):
            return []
        call.builder.undo_anneal()
        return [self._train(call, config, spec, settings, anneal=digest)]

    def _train_jointly(self, call: Call, index: int, n_stacks: int) -> StageResult:
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

    def _replayed(self, call: Call, settings: dict[str, Any]) -> list[StageResult]:
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
        grows = config.training.progressive.enabled
        if index == 0 and grows and config.training.optimizer_state == "keep":  # training of a rack that has grown
            spec = spec.model_copy(update={"state": "kept"})
        anatomy, settings = spec.anatomy, stage_settings(config, spec)
        pairs = zip(anatomy.order, anatomy.trains, strict=True)
        trains = tuple(what if builder.is_trained(stack) else "everything" for stack, what in pairs)
        spec = spec.model_copy(update={"anatomy": anatomy.model_copy(update={"trains": trains})})
        for stack in spec.stacks:
            if spec.anatomy.trains_of(stack.index) == "adapters" and not adapters_of(builder, stack):
                allowed = f"stack {stack.index} is quantised and has no adapter: nothing of it could train"
                raise ConfigError([Fault("precision", repr(stack.precision), allowed)])
        return config, spec, settings

    def _train(
        self,
        call: Call,
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
        spec = as_adapted(builder, config, spec)
        _log.info("stage %d (%s) begins: %d steps", spec.index, spec.name, spec.optim.steps)
        builder.build_rack().to("cpu")  # where the copy is kept
        builder.prepare_stage(spec, config.run.seed)
        before = Snapshot.of(builder.build_rack(), spec.anatomy, builder.channels)
        hooks, ended, cooled_loss = call.hooks_of(settings), list[TrainingState](), None
        keeps, cools = config.training.optimizer_state == "keep" and anneal is None, ends_at_peak(config, spec)
        if keeps or cools:
            hooks = _keeping(hooks, ended, with_weights=cools)
        if config.validation.every and call.validation is not None:
            hooks = _validating(hooks, partial(validation_loss_of, builder, config, spec, call.validation), config)
        hooks = _with_bar(hooks, spec)
        try:
            inputs = stage_inputs(builder, config, spec, call.dataloader, call.cache.get(spec.anatomy.boundary), state)
            parameters = {"trained": count_parameters(inputs.model)["trainable_parameters"]}
            with explained(partial(memory_setting, inputs, config), lambda: None, _AS_BEFORE):
                trained = train_stage(inputs, hooks)
                if cools:
                    cooled_loss = cool_down(call, config, spec, hooks, ended[0])
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
        if anneal is None:
            builder.moments = moments_of(ended[0]) if keeps else {}
        else:  # growth goes on from the rack before it, and from the state before it
            builder.keep_annealed(anneal, before)
        result = result_of(config, spec, trained, {**parameters, "total": builder.get_rack_info()["parameters"]})
        result.cooled_loss = cooled_loss
        for line in trained.told:
            _log.info("stage %d %s", spec.index, line)
        self._record(result, config, spec, inputs.batches)
        try:
            if call.validation is not None:
                result.validation_loss = validation_loss_of(builder, config, spec, call.validation)
        finally:
            builder.build_rack().to("cpu")  # frees the device of what the next stage does not need
            if call.progress:
                call.progress.finish(builder, settings, asdict(result))
        _log.info("stage %d (%s) ends: %s", spec.index, spec.name, result.summary())
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


def _validating(hooks: Hooks, loss: Callable[[], float], config: StackWiseConfig) -> Hooks:
    """Return hooks that also measure the validation loss inside a stage."""

    def measured(model: StageModel) -> float:  # whose modules are the builder's
        return loss()

    return replace(hooks, validate=measured, validate_every=config.validation.every)


def _with_bar(hooks: Hooks, spec: StageSpec) -> Hooks:
    """Return hooks that also show the steps of a stage as a bar, in a notebook."""
    if (show := bar(f"stage {spec.index} ({spec.name})", spec.optim.steps)) is None:
        return hooks

    def on_step(record: Record) -> None:
        show(int(record["step"]) + 1, f"loss {record['loss']:.4f}")
        hooks.on_step(record)

    return replace(hooks, on_step=on_step)


def _keeping(hooks: Hooks, ended: list[TrainingState], *, with_weights: bool) -> Hooks:
    """Return hooks that also keep the state after the last step, or only that of its optimizer."""
    on_end = hooks.on_end

    def keep(state: TrainingState) -> None:
        if on_end is not None:
            on_end(state)
        kept = {name: value for name, value in state.tensors.items() if with_weights or name.startswith("optimizer.")}
        ended.append(replace(state, tensors=kept).copy())

    return replace(hooks, on_end=keep)


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
