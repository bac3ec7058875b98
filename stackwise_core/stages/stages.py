"""What a stage is: its stacks in data-flow order, what of each trains, and how it is optimised.

Everything that differs between append and prepend, and between frozen, qlora and full trunks, is decided here, from
the configuration alone. Stacks are named by creation index. Needs no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, Field

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import (
    QUANTISED,
    CopiedFrom,
    Decay,
    GrowthOperator,
    Mode,
    Precision,
    StackSettings,
    Strategy,
)
from stackwise_core.config.sizes import accumulation_steps_of, batch_size_of
from stackwise_core.config.stacks import (
    AdapterSpec,
    Clock,
    clock_of,
    corrupts_by_time,
    mask_ratio_of,
    operator_of,
    progressive_adapter_of,
    ratio_span,
    settings_of,
    stack_time_step,
)
from stackwise_core.data.masks import RatioSpan
from stackwise_core.errors import ConfigError
from stackwise_core.stages.resolve import Value, WhereAdopted, WhereSaid

AdapterName = Literal["stack", "progressive"]
Trains = Literal["everything", "adapters", "nothing"]
_TRAINS: dict[Strategy, Trains] = {"full": "everything", "qlora": "adapters", "frozen": "nothing"}
KeptState = Literal["nothing", "kept", "kept and copied"]
"""What a stage takes of the optimizer state that the stage before left: that of what trains in both, and also, for
a new stack, that of what it is a copy of."""


# ---------------------------------------------------------------- anatomy


class Anatomy(BaseModel, frozen=True):
    """In which order the stacks of a stage run, and what of each trains."""

    order: tuple[int, ...]
    """In data-flow order."""
    trains: tuple[Trains, ...]
    """What of each trains, in the same order."""
    embedding_trains: bool
    head_trains: bool

    @property
    def newest(self) -> int:
        """The stack that was created last: in a growth stage, the one that is added."""
        return max(self.order)

    @functools.cached_property
    def boundary(self) -> int:
        """The number of stacks below the first one that trains, whose output may be cached."""
        if self.embedding_trains:
            return 0
        return next((n for n, trains in enumerate(self.trains) if trains != "nothing"), len(self.trains))

    @property
    def below(self) -> tuple[int, ...]:
        """The frozen stacks below the boundary, in data-flow order."""
        return self.order[: self.boundary]

    @property
    def live(self) -> tuple[int, ...]:
        """The stacks from the boundary to the head, in data-flow order: gradients flow through them."""
        return self.order[self.boundary :]

    @functools.cached_property
    def trained(self) -> tuple[int, ...]:
        """The stacks that train in full or in part, in data-flow order."""
        return tuple(stack for stack, trains in zip(self.order, self.trains, strict=True) if trains != "nothing")

    @functools.cached_property
    def _by_stack(self) -> dict[int, Trains]:
        return dict(zip(self.order, self.trains, strict=True))

    def trains_of(self, stack: int) -> Trains:
        """Return what of a stack trains."""
        return self._by_stack[stack]


def stage_anatomy(
    config: StackWiseConfig, stage: int, settings: Callable[[int], StackSettings] | None = None
) -> Anatomy:
    """Return the anatomy of a growth stage.

    The first stage trains embedding, stack and head. Later, an appended stack trains together with the head, unless
    `train_head` is false, and a prepended one below a frozen head. An inserted one trains below a tail, of which
    `tail_strategy` decides what trains, and whether the head may; `trunk_strategy` decides it for all other stacks.
    Of adopted stages the last brings embedding and head, as if they had trained there. `settings` returns those of a
    stack, if they are known.
    """
    growth, settings = config.training.progressive, settings or functools.partial(settings_of, config)
    order, new = _data_flow(settings, stage + 1), settings(stage)
    if stage < (n_adopted := len(config.adopted)):
        last = stage == n_adopted - 1
        return Anatomy(order=order, trains=("nothing",) * len(order), embedding_trains=last, head_trains=last)
    tail = set(order[stage - new.above(stage) + 1 :]) if new.mode == "insert" else set[int]()
    trunk = [stack for stack in order if stack != stage and stack not in tail]
    top = set(trunk[-growth.trunk_trainable_top :] if growth.trunk_trainable_top else trunk)
    # The very first stack has nothing to copy: it trains in full and is quantised afterwards.
    newest: Trains = "adapters" if new.precision == "qlora" and stage > 0 else "everything"
    first_or_full = stage == 0 or growth.trunk_strategy == "full"

    def trains(stack: int) -> Trains:
        if stack == stage:
            return newest
        if stack in tail:
            quantised = settings(stack).precision in QUANTISED
            return "adapters" if quantised and growth.tail_strategy == "full" else _TRAINS[growth.tail_strategy]
        return _TRAINS[growth.trunk_strategy] if growth.trunk_strategy == "full" or stack in top else "nothing"

    with_head = new.mode == "append" or (new.mode == "insert" and growth.tail_strategy == "full")
    return Anatomy(
        order=order,
        trains=tuple(trains(stack) for stack in order),
        embedding_trains=first_or_full,
        head_trains=first_or_full or (with_head and growth.train_head),
    )


def joint_anatomy(config: StackWiseConfig, n_stacks: int) -> Anatomy:
    """Return the anatomy of joint training: everything trains, except that quantised stacks train only adapters."""
    settings, grown = functools.partial(settings_of, config), config.training.progressive.enabled
    order = _data_flow(settings, n_stacks)
    trains: tuple[Trains, ...] = tuple(
        "adapters" if grown and settings(stack).precision in QUANTISED else "everything" for stack in order
    )
    return Anatomy(order=order, trains=trains, embedding_trains=True, head_trains=True)


def _data_flow(settings: Callable[[int], StackSettings], n_stacks: int) -> tuple[int, ...]:
    order: list[int] = []
    for stack in range(n_stacks):
        order.insert(stack - settings(stack).above(stack), stack)
    return tuple(order)


def last_trained(anatomies: Sequence[Anatomy], stack: int, part: Literal["base", "adapters"]) -> int:
    """Return the last of successive stages that trained a part of a stack, or else the stage that created it."""
    wanted = ("everything",) if part == "base" else ("everything", "adapters")
    present = [stage for stage, anatomy in enumerate(anatomies) if stack in anatomy.order]
    return max([present[0], *(stage for stage in present if anatomies[stage].trains_of(stack) in wanted)])


# ---------------------------------------------------------------- stages


class WatchSpec(Value, frozen=True):
    """Validations inside a stage that decide when it ends, or which of its weights are kept."""

    every: int
    """Steps between them."""
    patience: int = 0
    """How many in a row may bring nothing better; 0 is any number."""
    keep: Literal["last", "best"] = "last"
    """Which weights are kept."""
    sequences: int = 0
    """On how many validation sequences, at most."""


class OptimSpec(Value, frozen=True):
    """The optimisation of one stage: AdamW or Muon, warm-up and decay, clipping."""

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
    decay: Decay = Field(default="cosine", exclude_if=lambda value: value == "cosine")
    decay_steps: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """The last steps, in which the rate decays; None stands for all after the warm-up."""
    residual_warmup_steps: WhereSaid[int] = 0
    """The first steps, in which what the new stack adds to the stream rises from nothing."""
    muon_learning_rate: WhereSaid[float] = 0.0
    """Peak rate of Muon for the matrices of stacks that train in full; 0 where AdamW trains them, or none does."""
    eight_bit: WhereSaid[bool] = False
    """Whether AdamW keeps the moments of large matrices in 8 bits."""
    watch: WhereSaid[WatchSpec | None] = None
    """None where validations inside the stage, if there are any, decide nothing."""


class InitSpec(Value, frozen=True):
    """What is done to a new stack beside its operator."""

    noise: float = 0.0
    """Share of random weights in a copy."""
    output_scale: float = 1.0
    """Multiplies what each half of a block ends with."""
    interleaved: bool = False
    """Whether a copy repeats each block of its source in a row, and not all of them in turn."""


class StackSpec(Value, frozen=True):
    """One stack of the rack, as it is while some stage trains."""

    index: int
    """Creation index."""
    n_blocks: int
    precision: Precision
    adapters: dict[AdapterName, AdapterSpec]


class StageSpec(Value, frozen=True):
    """One stage, resolved: which stack it adds (or joint training), what trains, and how."""

    index: int
    mode: Mode | Literal["joint"]
    operator: GrowthOperator
    strategy: Strategy
    anatomy: Anatomy
    stacks: tuple[StackSpec, ...]
    """All stacks of the rack, by creation index."""
    time_step: int | None
    """Time step of the new stack, where depth is time."""
    optim: OptimSpec
    init: InitSpec = Field(default=InitSpec(), exclude_if=lambda value: value == InitSpec())
    copied: CopiedFrom = Field(default="neighbour", exclude_if=lambda value: value == "neighbour")
    """What a copy is made of."""
    adopted: WhereAdopted[bool] = False
    """Whether the stack is taken from a saved rack: nothing trains."""
    order_step: WhereSaid[int] = 0
    """The step of the common order of rows with which the stage begins."""
    state: KeptState = Field(default="nothing", exclude_if=lambda value: value == "nothing")
    """What the optimizer goes on from."""

    @functools.cached_property
    def trunk(self) -> tuple[int, ...]:
        """The stacks that exist before this stage, in data-flow order."""
        if self.mode == "joint":
            return self.anatomy.order if self.index else ()
        return tuple(stack for stack in self.anatomy.order if stack != self.index)

    @property
    def tail(self) -> int:
        """How many stacks are above an inserted one."""
        return len(self.anatomy.order) - 1 - self.anatomy.order.index(self.index) if self.mode == "insert" else 0

    @property
    def sources(self) -> tuple[int, ...]:
        """The stacks that the new one is a copy of, or the mean of."""
        if self.operator not in ("copy", "copy_zero") or not self.trunk or self.mode == "joint":
            return ()
        return _sources(self.trunk, self.anatomy.order.index(self.index), self.copied)

    @property
    def source(self) -> int | None:
        """The stack that the new one is a copy of; of a mean the one below."""
        return self.sources[0] if self.sources else None

    @property
    def new(self) -> StackSpec:
        """The stack that was created last."""
        return self.stacks[-1]

    @property
    def n_blocks(self) -> int:
        """Blocks of the new stack; in joint training, of all stacks."""
        return sum(stack.n_blocks for stack in self.stacks) if self.mode == "joint" else self.new.n_blocks

    @property
    def name(self) -> str:
        """A readable name, such as 'append, frozen, full'; the first stack has no trunk: 'from scratch, full'."""
        if self.mode == "joint":
            return "joint"
        trunk = "adopted" if self.adopted else self.strategy if self.trunk else "from scratch"
        mode = f"insert below {self.tail}" if self.tail else self.mode
        return ", ".join([*([mode] if self.trunk else []), trunk, self.new.precision])


def resolve_stages(config: StackWiseConfig) -> list[StageSpec]:
    """Return the stages of a run: its additions and the joint anneal, or one stage that trains all stacks jointly."""
    growth = config.training.progressive
    if not growth.enabled:
        return [resolve_joint(config, 0, growth.target_stacks)]
    known = _Stacks(config)
    stages = [resolve_stage(config, stage, known) for stage in range(growth.target_stacks)]
    return [*stages, resolve_joint(config, len(stages), len(stages))] if config.training.joint_steps else stages


class _Stacks:
    """The stacks of a configuration, each worked out once: every stage has all of them, and there may be a thousand."""

    def __init__(self, config: StackWiseConfig) -> None:
        """Take a configuration that does not change meanwhile."""
        self.settings = functools.cache(functools.partial(settings_of, config))
        self._spec, self._n_adopted = functools.cache(functools.partial(_stack_spec, config)), len(config.adopted)

    def at(self, stage: int) -> tuple[StackSpec, ...]:
        """Return what the stacks are while a growth stage trains."""
        adopted = stage < self._n_adopted
        return tuple(self._spec(stack, stack < stage, adopted) for stack in range(stage + 1))


def resolve_stage(config: StackWiseConfig, stage: int, known: _Stacks | None = None) -> StageSpec:
    """Return the stage that adds the stack of creation index `stage`; `known` is what other stages found out."""
    known = known or _Stacks(config)
    training, settings, adopted = config.training, known.settings(stage), stage < len(config.adopted)
    operator = operator_of(config, settings) if stage > 0 else "random"
    by_depth = training.progressive.time_interpretation == "depth"
    anatomy, stacks = stage_anatomy(config, stage, known.settings), known.at(stage)
    spec = StageSpec(
        index=stage,
        mode=settings.mode,
        operator=operator,
        strategy=training.progressive.trunk_strategy,
        anatomy=anatomy,
        stacks=stacks,
        time_step=stack_time_step(config, stage) if by_depth else None,
        optim=_resolve_optim(config, anatomy, stacks, settings.steps, training.learning_rate, stage),
        adopted=adopted,
        order_step=_order_step(config, stage, known),
    )
    if stage == 0 or adopted:
        return spec
    spec = _with_init(config, spec)
    return spec.model_copy(update={"state": _kept_state(config, spec, known)})


def _kept_state(config: StackWiseConfig, spec: StageSpec, known: _Stacks) -> KeptState:
    """Return what a stage takes of the state that the growth stage right before it left."""
    before = spec.index - 1
    if config.training.optimizer_state == "reset" or before < len(config.adopted):
        return "nothing"
    anatomy = stage_anatomy(config, before, known.settings)
    of_new = spec.mode != "joint" and spec.anatomy.trains_of(spec.index) == "everything"
    copied = of_new and spec.sources and all(anatomy.trains_of(source) == "everything" for source in spec.sources)
    if copied and config.training.new_state == "copy":
        return "kept and copied"
    shared = _training_parts(anatomy, known.at(before)) & _training_parts(spec.anatomy, spec.stacks)
    return "kept" if shared else "nothing"


def _training_parts(anatomy: Anatomy, stacks: Sequence[StackSpec]) -> set[tuple[str, int]]:
    """Return what trains: embedding, head, and the base and the adapters of every stack."""
    parts = {("embedding", -1)} if anatomy.embedding_trains else set[tuple[str, int]]()
    parts |= {("head", -1)} if anatomy.head_trains else set()
    parts |= {("base", stack) for stack in anatomy.trained if anatomy.trains_of(stack) == "everything"}
    return parts | {(name, stack) for stack in anatomy.trained for name in stacks[stack].adapters}


def leaves_state(config: StackWiseConfig, spec: StageSpec, reader: StageSpec | None) -> bool:
    """Return whether the optimizer state of a stage is kept: the next one goes on from it, or may when it is added.

    Where the last stage decays on the run's one clock, raising the target trains it again, from the state before it.
    """
    training, growth = config.training, config.training.progressive
    if reader is not None or spec.adopted or spec.mode == "joint":
        return reader is not None and reader.state != "nothing"
    if training.optimizer_state == "reset" or training.schedule == "one_clock" or spec.index + 1 >= growth.max_stacks:
        return False
    try:
        return resolve_stage(config, spec.index + 1).state != "nothing"
    except ConfigError:  # such as one past the last time step
        return False


def _sources(trunk: Sequence[int], place: int, copied: CopiedFrom) -> tuple[int, ...]:
    """Return the stacks that a new one, which has `place` stacks of the trunk below it, is a copy or the mean of."""
    if copied == "top":
        return (trunk[-1],)
    if copied == "middle":
        return (trunk[(len(trunk) - 1) // 2],)
    neighbours = tuple(trunk[max(0, place - 1) : place + 1])
    return neighbours if copied == "blend" else neighbours[:1]


def _with_init(config: StackWiseConfig, spec: StageSpec) -> StageSpec:
    """Return a stage with how its stack starts and comes in; what makes no difference stays at its default."""
    training, n_blocks = config.training, spec.new.n_blocks
    copied = training.new_stack_source
    spec = spec.model_copy(update={"copied": "neighbour" if copied == "interleaved" else copied})
    repeated = spec.stacks[spec.sources[0]].n_blocks if spec.sources else 1
    in_turn = [n % repeated for n in range(n_blocks)]
    in_a_row = [n * repeated // n_blocks for n in range(n_blocks)]
    init = InitSpec(
        noise=training.new_stack_noise if spec.sources else 0.0,
        output_scale=training.new_stack_output_scale if spec.operator in ("copy", "random") else 1.0,
        interleaved=copied == "interleaved" and in_turn != in_a_row,
    )
    optim = spec.optim.model_copy(update={"residual_warmup_steps": training.residual_warmup_steps})
    return spec.model_copy(update={"init": init, "optim": optim})


def resolve_joint(config: StackWiseConfig, index: int, n_stacks: int) -> StageSpec:
    """Return the joint anneal after the last addition, or (stage 0) joint training from scratch."""
    training = config.training
    anatomy = joint_anatomy(config, n_stacks)
    stacks = tuple(resolve_stack(config, stack, index) for stack in range(n_stacks))
    steps, rate = training.joint_steps, training.joint_learning_rate
    if index == 0:
        steps = training.steps_per_stack
    if index == 0 or training.schedule == "one_clock":
        rate = training.learning_rate
    spec = StageSpec(
        index=index,
        mode="joint",
        operator="random",
        strategy="full",
        anatomy=anatomy,
        stacks=stacks,
        time_step=None,
        optim=_resolve_optim(config, anatomy, stacks, steps, rate, index, is_joint=True),
        order_step=_order_step(config, index),
    )
    return spec.model_copy(update={"state": _kept_state(config, spec, _Stacks(config))}) if index else spec


def ends_at_peak(config: StackWiseConfig, spec: StageSpec) -> bool:
    """Return whether a stage is to be judged by a cool-down: it ends before its rate has decayed."""
    return bool(config.validation.cooldown_steps) and not spec.adopted and spec.optim.decay_steps == 0


def cooled(spec: StageSpec, steps: int, decay: Decay, min_learning_rate: float) -> StageSpec:
    """Return a stage with further steps, in which the rate decays from its peak."""
    optim = spec.optim
    lowest = min(min_learning_rate, optim.learning_rate)
    falls = {"decay": decay, "decay_steps": steps, "min_learning_rate": lowest}
    return spec.model_copy(update={"optim": optim.model_copy(update={"steps": optim.steps + steps, **falls})})


def _order_step(config: StackWiseConfig, stage: int, known: _Stacks | None = None) -> int:
    """Return how many steps a run has taken before a stage, if each stage reads other rows."""
    if config.data.rows == "shared":
        return 0
    settings = known.settings if known else functools.partial(settings_of, config)
    return sum(settings(earlier).steps for earlier in range(len(config.adopted), stage))


def resolve_stack(config: StackWiseConfig, stack: int, stage: int) -> StackSpec:
    """Return what a stack is while stage `stage` trains."""
    return _stack_spec(config, stack, stack < stage, stage < len(config.adopted))


def _stack_spec(config: StackWiseConfig, stack: int, in_trunk: bool, adopted: bool) -> StackSpec:
    """Return what a stack is in an adopted stage, in which it has what it was adopted with, or in another."""
    settings, adapters = settings_of(config, stack), dict[AdapterName, AdapterSpec]()
    if settings.adapter:
        adapters["stack"] = settings.adapter
    progressive = settings.progressive if adopted else progressive_adapter_of(config, stack)
    if progressive and (adopted or in_trunk):
        adapters["progressive"] = progressive
    return StackSpec(index=stack, n_blocks=settings.n_blocks, precision=settings.precision, adapters=adapters)


def _resolve_optim(
    config: StackWiseConfig,
    anatomy: Anatomy,
    stacks: tuple[StackSpec, ...],
    steps: int,
    rate: float,
    stage: int,
    *,
    is_joint: bool = False,
) -> OptimSpec:
    training = config.training
    warmup, decay_steps = min(training.warmup_steps, steps), None
    if training.schedule == "one_clock":
        is_first = stage == len(config.adopted)
        is_last = is_joint or (stage == training.progressive.target_stacks - 1 and not training.joint_steps)
        clock = clock_of(config, grows=not is_joint or stage > 0) if is_first or is_last else Clock()
        warmup, decay_steps = clock.warmup_steps if is_first else 0, clock.decay_steps if is_last else 0
    adapters_train = any(stacks[stack].adapters for stack in anatomy.trained)
    by_muon = training.optimizer == "muon" and "everything" in anatomy.trains
    muon = (training.muon_learning_rate or training.learning_rate) if by_muon else 0.0
    return OptimSpec(
        steps=steps,
        batch_size=batch_size_of(config),
        learning_rate=rate,
        min_learning_rate=min(training.min_learning_rate, rate) if decay_steps != 0 else rate,
        warmup_steps=warmup,
        weight_decay=training.weight_decay,
        beta1=training.beta1,
        beta2=training.beta2,
        gradient_clip=training.gradient_clip,
        accumulation_steps=accumulation_steps_of(config),
        adapter_learning_rate=training.adapter_learning_rate * rate / training.learning_rate if adapters_train else 0.0,
        decay=training.decay if decay_steps != 0 else "cosine",  # not used where nothing decays
        decay_steps=decay_steps,
        muon_learning_rate=muon * rate / training.learning_rate,
        eight_bit=training.optimizer == "adamw8bit",
        watch=_watch(config, decays_by_clock=decay_steps is not None and decay_steps > 0),
    )


def _watch(config: StackWiseConfig, *, decays_by_clock: bool) -> WatchSpec | None:
    """Return what validations inside a stage decide; the stage in which the run's rate decays does so to the end."""
    validation = config.validation
    patience = 0 if decays_by_clock else validation.patience
    if not validation.every or not (patience or validation.keep == "best"):
        return None
    return WatchSpec(
        every=validation.every, patience=patience, keep=validation.keep, sequences=validation.max_sequences
    )


def resolve_joint_times(config: StackWiseConfig) -> tuple[tuple[int, float], ...]:
    """Return time step and mask ratio of every stack, where joint training draws one of them at each step."""
    growth = config.training.progressive
    if growth.time_interpretation != "depth" or not corrupts_by_time(config):
        return ()
    steps = [stack_time_step(config, stack) for stack in range(growth.target_stacks)]
    return tuple((step, mask_ratio_of(config, step)) for step in steps)


def resolve_joint_spans(config: StackWiseConfig) -> tuple[RatioSpan | None, ...]:
    """Return the mask ratios of every stack in such joint training; () where each has one."""
    spans = tuple(ratio_span(config, stack) for stack, _ in enumerate(resolve_joint_times(config)))
    return spans if any(spans) else ()
