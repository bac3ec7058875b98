"""The stages of a run: which stack each adds, what of the rack trains, and how. Needs no torch."""

from __future__ import annotations

from typing import Literal

from stackwise_core.config.schema import Precision, StackWiseConfig
from stackwise_core.config.stacks import (
    adapter_size,
    has_adapter,
    stage_blocks,
    stage_mode,
    stage_precision,
    stage_steps,
)
from stackwise_core.config.time_steps import mask_ratio_of, stack_time_step
from stackwise_core.stages.anatomy import AdapterName, Anatomy, joint_anatomy, stage_anatomy
from stackwise_core.stages.resolve import Value

GrowthOperator = Literal["copy", "copy_zero", "random", "zero"]


class OptimSpec(Value, frozen=True):
    """The optimisation of one stage: AdamW, warm-up and cosine, clipping."""

    steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    gradient_clip: float
    accumulation_steps: int = 1
    adapter_learning_rate: float = 0.0
    """Peak rate of adapters; 0 where none trains."""


class AdapterSpec(Value, frozen=True):
    """A LoRA adapter: its output is multiplied by alpha / rank."""

    rank: int
    alpha: float


class StackSpec(Value, frozen=True):
    """One stack of the rack, as it is while some stage trains."""

    index: int
    """Creation index."""
    n_blocks: int
    precision: Precision
    adapters: dict[AdapterName, AdapterSpec]


class StageSpec(Value, frozen=True):
    """One stage, resolved: an addition, or joint training; what trains, and how."""

    index: int
    mode: Literal["append", "prepend", "joint"]
    operator: GrowthOperator
    strategy: Literal["frozen", "qlora", "full"]
    anatomy: Anatomy
    stacks: tuple[StackSpec, ...]
    """All of the rack, by creation index."""
    time_step: int | None
    """Of time-as-depth."""
    optim: OptimSpec

    @property
    def trunk(self) -> tuple[int, ...]:
        """The stacks that this stage finds, in data-flow order."""
        if self.mode == "joint":
            return self.anatomy.order if self.index else ()
        return tuple(stack for stack in self.anatomy.order if stack != self.index)

    @property
    def source(self) -> int | None:
        """The neighbour that the new stack is a copy of."""
        if self.operator not in ("copy", "copy_zero") or not self.trunk or self.mode == "joint":
            return None
        return self.trunk[-1] if self.mode == "append" else self.trunk[0]

    @property
    def new(self) -> StackSpec:
        """The stack that was created last."""
        return self.stacks[-1]

    @property
    def n_blocks(self) -> int:
        """Blocks of the new stack; in joint training, of all."""
        return sum(stack.n_blocks for stack in self.stacks) if self.mode == "joint" else self.new.n_blocks

    @property
    def name(self) -> str:
        """How a person would call the stage."""
        return "joint" if self.mode == "joint" else f"{self.mode}, {self.strategy}, {self.new.precision}"


def resolve_time_step(config: StackWiseConfig, stage: int) -> int | None:
    """Return the time step of a stack where depth is time."""
    if config.training.progressive.time_interpretation != "depth":
        return None
    return stack_time_step(config, stage)


def resolve_stages(config: StackWiseConfig) -> list[StageSpec]:
    """Return the stages of a run: an addition each, and the joint anneal; or joint training alone."""
    growth = config.training.progressive
    if not growth.enabled:
        return [resolve_joint(config, 0, growth.target_stacks)]
    stages = [resolve_stage(config, stage) for stage in range(growth.target_stacks)]
    return [*stages, resolve_joint(config, len(stages), len(stages))] if config.training.joint_steps else stages


def resolve_stage(config: StackWiseConfig, stage: int) -> StageSpec:
    """Return the stage that adds stack `stage` (0-based, in creation order)."""
    training = config.training
    mode = stage_mode(config, stage)
    automatic: GrowthOperator = "copy_zero" if mode == "prepend" else "copy"
    operator: GrowthOperator = automatic if training.new_stack_init == "auto" else training.new_stack_init
    anatomy = stage_anatomy(config, stage)
    stacks = tuple(resolve_stack(config, stack, stage) for stack in range(stage + 1))
    return StageSpec(
        index=stage,
        mode=mode,
        operator="random" if stage == 0 else operator,
        strategy=training.progressive.trunk_strategy,
        anatomy=anatomy,
        stacks=stacks,
        time_step=resolve_time_step(config, stage),
        optim=_resolve_optim(config, anatomy, stacks, stage_steps(config, stage), training.learning_rate),
    )


def resolve_joint(config: StackWiseConfig, index: int, n_stacks: int) -> StageSpec:
    """Return the joint anneal after the last addition, or (stage 0) joint training from scratch."""
    training = config.training
    anatomy = joint_anatomy(config, n_stacks)
    stacks = tuple(resolve_stack(config, stack, index) for stack in range(n_stacks))
    steps, rate = training.joint_steps, training.joint_learning_rate
    if index == 0:
        steps, rate = training.steps_per_stack, training.learning_rate
    return StageSpec(
        index=index,
        mode="joint",
        operator="random",
        strategy="full",
        anatomy=anatomy,
        stacks=stacks,
        time_step=None,
        optim=_resolve_optim(config, anatomy, stacks, steps, rate),
    )


def resolve_stack(config: StackWiseConfig, stack: int, stage: int) -> StackSpec:
    """Return what a stack is while stage `stage` trains."""
    growth = config.training.progressive
    adapters: dict[AdapterName, AdapterSpec] = {}
    if has_adapter(config, stack):
        rank, alpha = adapter_size(config, stack)
        adapters["stack"] = AdapterSpec(rank=rank, alpha=alpha)
    if growth.progressive_qlora and stack < stage:
        progressive = AdapterSpec(rank=growth.progressive_qlora_rank, alpha=growth.progressive_qlora_alpha)
        adapters["progressive"] = progressive
    return StackSpec(
        index=stack,
        n_blocks=stage_blocks(config, stack),
        precision=stage_precision(config, stack),
        adapters=adapters,
    )


def _resolve_optim(
    config: StackWiseConfig, anatomy: Anatomy, stacks: tuple[StackSpec, ...], steps: int, rate: float
) -> OptimSpec:
    training = config.training
    adapters_train = any(stacks[stack].adapters for stack in anatomy.trained)
    return OptimSpec(
        steps=steps,
        batch_size=training.batch_size,
        learning_rate=rate,
        min_learning_rate=min(training.min_learning_rate, rate),
        warmup_steps=min(training.warmup_steps, steps),
        weight_decay=training.weight_decay,
        beta1=training.beta1,
        beta2=training.beta2,
        gradient_clip=training.gradient_clip,
        accumulation_steps=training.accumulation_steps,
        adapter_learning_rate=training.adapter_learning_rate * rate / training.learning_rate if adapters_train else 0.0,
    )


def resolve_joint_times(config: StackWiseConfig) -> tuple[tuple[int, float], ...]:
    """Return time step and mask ratio of every stack, where joint training draws one of them at each step."""
    growth = config.training.progressive
    if growth.time_interpretation != "depth" or growth.training_objective != "mlm":
        return ()
    steps = [stack_time_step(config, stack) for stack in range(growth.target_stacks)]
    return tuple((step, mask_ratio_of(config, step)) for step in steps)
