"""From configuration to what the core functions receive: small frozen values, defaults filled in.

Ids are made of these values, never of raw configuration keys, so that two spellings of the same
stage share its artifacts. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

from stackwise_core.anatomy import AdapterName, Anatomy, joint_anatomy, stage_anatomy
from stackwise_core.config import Precision, StackWiseConfig, StreamDtype
from stackwise_core.functions import load_function, source_digest
from stackwise_core.growth_rules import (
    adapter_alpha,
    adapter_rank,
    has_adapter,
    stage_blocks,
    stage_mode,
    stage_precision,
    stage_steps,
)
from stackwise_core.masking import MaskSpec
from stackwise_core.order import RowOrder
from stackwise_core.timesteps import mask_ratio_of, n_time_steps, resolve_time_input, stack_time_step
from stackwise_core.tokenizer import Tokenizer, load_tokenizer

GrowthOperator = Literal["copy", "copy_zero", "random", "zero"]


class Value(BaseModel, frozen=True, extra="forbid"):
    """A frozen value that enters ids as it stands."""


class TimeShape(Value, frozen=True):
    """The time embedding of a rack whose time is an input."""

    n_steps: int
    """Steps are 0 .. n_steps - 1."""
    dim: int
    """Width of the embedding; projected if it differs from d_model."""
    encoding: Literal["sinusoidal", "learned"]


class ModelShape(Value, frozen=True):
    """What every block of a rack has in common."""

    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    causal: bool
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    time: TimeShape | None = None
    """None has no time embedding."""

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.d_model // self.n_heads


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


def tokenizer_of(config: StackWiseConfig) -> Tokenizer:
    """Return the tokenizer the configuration names.

    Raises:
        ConfigError: its file is gone, or is not what it was when `validate()` read it.
    """
    return load_tokenizer(config.data.tokenizer)


def resolve_shape(config: StackWiseConfig) -> ModelShape:
    """Return the model shape with every 0 and 'auto' replaced by what it stands for."""
    model = config.model
    objective = config.training.progressive.training_objective
    return ModelShape(
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        d_ff=model.d_ff or -(-model.d_model * 8 // 3 // 32) * 32,
        causal=model.attention == "causal" or (model.attention == "auto" and objective != "mlm"),
        tie_embeddings=model.tie_embeddings,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        time=_resolve_time_shape(config),
    )


def _resolve_time_shape(config: StackWiseConfig) -> TimeShape | None:
    growth = config.training.progressive
    if growth.time_interpretation != "input":
        return None
    return TimeShape(n_steps=n_time_steps(config), dim=growth.time_embedding_dim, encoding=growth.time_encoding_type)


def resolve_mask(config: StackWiseConfig, stage: int) -> MaskSpec | None:
    """Return how a stage corrupts its inputs; None with clm and custom, which corrupt nothing."""
    if config.training.progressive.training_objective != "mlm":
        return None
    tokenizer = tokenizer_of(config)
    assert tokenizer.mask_token is not None  # validate() refuses a tokenizer without one
    return MaskSpec(
        seed=config.run.seed,
        ratio=_stage_ratio(config, stage),
        corruption=config.training.corruption,
        mask_token=tokenizer.mask_token,
        n_regular_tokens=tokenizer.n_regular_tokens,
        special_tokens=tokenizer.special_tokens,
        time=resolve_time_input(config),
    )


def _stage_ratio(config: StackWiseConfig, stage: int) -> float:
    interpretation = config.training.progressive.time_interpretation
    if interpretation == "depth":
        return mask_ratio_of(config, stack_time_step(config, stage))
    return config.training.mask_ratio if interpretation == "none" else 0.0


def resolve_time_step(config: StackWiseConfig, stage: int) -> int | None:
    """Return the time step of a stack where depth is time."""
    if config.training.progressive.time_interpretation != "depth":
        return None
    return stack_time_step(config, stage)


def resolve_views(config: StackWiseConfig) -> int:
    """Return the mask draws per sequence: as configured, else 8 for mlm and 1 where nothing is masked."""
    return config.cache.views or (8 if config.training.progressive.training_objective == "mlm" else 1)


def resolve_order(config: StackWiseConfig, n_rows: int) -> RowOrder:
    """Return the order in which every stage visits the `n_rows` training sequences."""
    by_batch = config.training.time_sampling != "per_sequence"
    return RowOrder(
        seed=config.run.seed,
        n_rows=n_rows,
        batch_size=config.training.batch_size,
        views=resolve_views(config),
        fixed_batches=by_batch and config.training.progressive.time_interpretation == "input",
    )


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
        adapters["stack"] = AdapterSpec(rank=adapter_rank(config, stack), alpha=adapter_alpha(config, stack))
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


def resolve_objective(config: StackWiseConfig) -> str:
    """Return what enters ids of a custom objective: the name of its loss, and the hash of its source."""
    if config.training.progressive.training_objective != "custom":
        return ""
    key, name = "training.custom_loss", config.training.custom_loss
    return f"{name}@{source_digest(load_function(name, key), key)}" if name else "cross-entropy"


def resolve_loss(config: StackWiseConfig) -> Callable[..., Any] | None:
    """Return the loss function of a custom objective; None is cross-entropy."""
    name = config.training.custom_loss
    return load_function(name, "training.custom_loss") if name else None


GRID = (0.15, 0.3, 0.5, 0.7, 0.9)
"""Mask ratios at which stages of different ratios are compared."""


def resolve_grid(config: StackWiseConfig) -> tuple[float, ...]:
    """Return the mask ratios all stages are judged at: none where they share one anyway."""
    growth = config.training.progressive
    return GRID if growth.training_objective == "mlm" and growth.time_interpretation != "none" else ()


def resolve_stream_dtype(config: StackWiseConfig) -> StreamDtype:
    """Return the type of the frozen trunk's stream, cached or live."""
    return config.cache.dtype
