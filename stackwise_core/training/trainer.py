"""Growing a rack in memory, through the same functions the flow uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_type
from stackwise_core.config.rules import growth_faults, time_faults
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import JointDataLoader, ProgressiveDataLoader, RowSource
from stackwise_core.objectives.losses import Batch, input_time_step
from stackwise_core.objectives.raw_batches import check_loader
from stackwise_core.stages.resolve import (
    resolve_loss,
    resolve_mask,
    resolve_statistics_rows,
    resolve_stream_dtype,
    resolve_views,
)
from stackwise_core.stages.stages import Anatomy, StageSpec, resolve_joint, resolve_joint_times, resolve_stage
from stackwise_core.training.channel_statistics import output_statistics, remembering
from stackwise_core.training.hardware import use_hardware
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import Hooks, train_stack
from stackwise_core.training.trunk import LiveTrunk


@dataclass
class StageResult:
    """What one stage did."""

    index: int
    records: list[dict[str, float]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Training loss of the last step [nats]."""
        return self.records[-1]["loss"]


class ProgressiveTrainer:
    """Grows a rack in memory, through the same functions the flow uses."""

    def __init__(self, config: StackWiseConfig | None = None) -> None:
        """Take a configuration; it is validated at every call, since it may be edited in between."""
        config = StackWiseConfig() if config is None else config
        check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected; from_yaml(path) reads a file")
        self.config = config

    def train_progressively(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        target_stacks: int | None = None,
        *,
        cache: Mapping[int, RowSource] | None = None,
        hooks: Hooks | None = None,
    ) -> list[StageResult]:
        """Add stacks until there are `target_stacks`, training each; untrained ones train first.

        Args:
            rack_builder: the rack so far.
            dataloader: any iterable of token batches, iterated as often as the steps need.
            target_stacks: how many stacks to reach; None takes the configuration's.
            cache: boundary k -> the activations after the first k stacks, made from the same trunk.
            hooks: progress and stop requests.

        Returns:
            One result per stage that was trained here; the last is the joint anneal, if there is one.
        """
        _check_arguments(rack_builder, dataloader, cache, hooks)
        self._validate()
        growth = self.config.training.progressive
        target = growth.target_stacks if target_stacks is None else target_stacks
        self._check(rack_builder, target)
        if not growth.enabled:
            return [self._train_jointly(rack_builder, dataloader, 0, target, hooks)]
        results: list[StageResult] = []
        for index in range(rack_builder.n_trained, target):
            if index == rack_builder.n_stacks:
                rack_builder.add_stack()
            config = rack_builder.as_built(self.config)
            spec = resolve_stage(config, index)
            store = (cache or {}).get(spec.anatomy.boundary) if spec.anatomy.boundary else None
            results.append(self._train_stage(config, rack_builder, spec, dataloader, store, hooks))
        if self.config.training.joint_steps:
            results.append(self._train_jointly(rack_builder, dataloader, target, target, hooks))
        return results

    def train_rack(
        self, rack_builder: ProgressiveRackBuilder, dataloader: Iterable[Any], target_stacks: int | None = None
    ) -> list[StageResult]:
        """Grow to `target_stacks`; without it, train the rack as it is, all stacks together.

        Raises:
            ConfigError: the rack is empty, or a quantised stack of it has no adapter to train.
        """
        if target_stacks is not None:
            return self.train_progressively(rack_builder, dataloader, target_stacks)
        _check_arguments(rack_builder, dataloader)
        self._validate()
        if not rack_builder.n_stacks:
            raise ConfigError(
                [Fault("target_stacks", "None", "the rack has no stack yet; give a number, or append one")]
            )
        return [self._train_jointly(rack_builder, dataloader, 0, rack_builder.n_stacks, None)]

    def _validate(self) -> None:
        self.config.validate(corpus=False)
        if (count := self.config.hardware.processes) > 1:
            allowed = "this trains in the process that calls it; `stackwise train` starts several, else set it to 1"
            raise ConfigError([Fault("hardware.processes", str(count), allowed)])

    def _check(self, builder: ProgressiveRackBuilder, target: int) -> None:
        """Refuse before the first step what would go wrong after the last."""
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
        mask, vocab_size = resolve_mask(built, 0), builder.build_rack().shape.vocab_size
        if mask is not None and mask.mask_token >= vocab_size:
            allowed = f"mlm puts token {mask.mask_token} for [MASK]; the rack needs a row for it"
            raise ConfigError([Fault("model.vocab_size", str(vocab_size), allowed)])
        if growth.training_objective == "clm" and not builder.build_rack().shape.causal:
            allowed = "the builder's rack is bidirectional: every position would see its own target"
            raise ConfigError([Fault("training.progressive.training_objective", "'clm'", allowed)])

    def _train_jointly(
        self,
        builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        index: int,
        n_stacks: int,
        hooks: Hooks | None,
    ) -> StageResult:
        while builder.n_stacks < n_stacks:
            builder.add_stack()
        config = builder.as_built(self.config)
        config.training.progressive.target_stacks = n_stacks
        spec = resolve_joint(config, index, n_stacks)
        for stack in spec.stacks:
            if spec.anatomy.trains_of(stack.index) == "adapters" and not stack.adapters:
                allowed = f"stack {stack.index} is quantised and has no adapter: nothing of it could train"
                raise ConfigError([Fault("precision", repr(stack.precision), allowed)])
        return self._train_stage(config, builder, spec, dataloader, None, hooks)

    def _train_stage(
        self,
        config: StackWiseConfig,
        builder: ProgressiveRackBuilder,
        spec: StageSpec,
        dataloader: Iterable[Any],
        store: RowSource | None,
        hooks: Hooks | None,
    ) -> StageResult:
        anatomy, device = spec.anatomy, use_hardware(config.hardware)
        builder.prepare_stage(spec)
        model = self._stage_model(config, builder, anatomy, device)
        n_rows, first = resolve_statistics_rows(config), list[Batch]()
        trunk = None
        if anatomy.boundary and (store is None or n_rows):
            below = [builder.stack(stack).to(device) for stack in anatomy.below]
            stream = Stream(resolve_stream_dtype(config), builder.channels)
            trunk = LiveTrunk(builder.build_rack().embedding.to(device), below, stream)
        batches = _endless(_loader(config, spec, dataloader, store or trunk))
        records = train_stack(model, remembering(batches, n_rows, first), spec.optim, hooks=hooks)
        builder.finish_stage(anatomy)
        if n_rows:
            entering = (model.entering(_on_trunk(batch, trunk)) for batch in first)
            builder.channels.update(output_statistics(model.live_stacks(), entering))
        builder.build_rack().to("cpu")  # what the next stage does not need is not on the device
        return StageResult(spec.index, records)

    def _stage_model(
        self, config: StackWiseConfig, builder: ProgressiveRackBuilder, anatomy: Anatomy, device: torch.device
    ) -> StageModel:
        rack = builder.build_rack()
        return StageModel(
            anatomy,
            [builder.stack(stack) for stack in anatomy.live],
            rack.head,
            None if anatomy.boundary else rack.embedding,
            loss_function=resolve_loss(config),
            checkpointing=config.training.activation_checkpointing,
        ).to(device)


def _check_arguments(
    rack_builder: Any,
    dataloader: Any,
    cache: Mapping[int, RowSource] | None = None,
    hooks: Hooks | None = None,
) -> None:
    check_type("rack_builder", rack_builder, ProgressiveRackBuilder, "a ProgressiveRackBuilder is expected")
    check_loader("dataloader", dataloader)
    check_type("hooks", hooks, (Hooks, NoneType), "a Hooks or None is expected")
    check_type("cache", cache, (Mapping, NoneType), "a mapping {boundary: object with rows()} is expected")
    for boundary, rows in (cache or {}).items():
        check_type(f"cache[{boundary!r}]", rows, RowSource, "an object with rows(sequence_ids, view) is expected")


def _loader(
    config: StackWiseConfig, spec: StageSpec, dataloader: Iterable[Any], boundary: RowSource | LiveTrunk | None
) -> Iterable[Batch]:
    objective = config.training.progressive.training_objective
    mask = resolve_mask(config, spec.anatomy.newest)
    times = resolve_joint_times(config) if spec.mode == "joint" else ()
    if mask and times:
        steps, ratios = zip(*times, strict=True)
        masks = [mask.at_ratio(ratio) for ratio in ratios]
        return JointDataLoader(dataloader, masks, steps, config.run.seed, resolve_views(config))
    return ProgressiveDataLoader(
        base_dataloader=dataloader,
        masking_strategy=mask,
        stack_idx=spec.anatomy.newest,
        trunk_activations=boundary,
        cache_activations=config.training.progressive.cache_activations,
        views=resolve_views(config),
        time_step=spec.time_step,
        objective=objective,
    )


def _on_trunk(batch: Batch, trunk: LiveTrunk | None) -> Batch:
    if trunk is None:
        return batch
    return {**batch, "trunk_activations": trunk(batch["input_ids"], input_time_step(batch))}


def _endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Pass over a loader again and again."""
    while True:
        yield from loader
