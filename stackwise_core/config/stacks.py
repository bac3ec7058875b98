"""The settings of each stack, and its time step and mask ratio where depth is diffusion time."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stackwise_core.config.functions import load_function, shown
from stackwise_core.config.schema import (
    GROWTH,
    AdapterSpec,
    ConfigSchema,
    GrowthOperator,
    ProgressiveConfig,
    StackOverride,
    StackSettings,
)
from stackwise_core.data.masks import RatioSpan, TimeInput
from stackwise_core.errors import ConfigError, Fault


def named(stacks: list[int]) -> str:
    """Return "stack 3", or "stacks 1, 2, 3, 4 and 9 more": a rack may have a thousand."""
    first, n_more = ", ".join(map(str, stacks[:4])), len(stacks) - 4
    return f"stack{'s' if len(stacks) > 1 else ''} {first}" + (f" and {n_more} more" if n_more > 0 else "")


_COMMON = StackOverride()


def settings_of(config: ConfigSchema, stack: int) -> StackSettings:
    """Return the settings of a stack, by creation index: the common ones, unless an override names others."""
    if stack < len(config.adopted):
        return config.adopted[stack]
    growth = config.training.progressive
    own = growth.stacks[stack] if stack < len(growth.stacks) else _COMMON
    precision = growth.new_stack_precision if own.precision == "default" else own.precision
    return StackSettings(
        n_blocks=own.n_blocks or config.model.blocks_per_stack,
        precision=precision,
        mode=growth.building_mode if own.mode == "default" else own.mode,
        tail_stacks=own.tail_stacks or growth.tail_stacks,
        steps=own.steps or config.training.steps_per_stack,
        adapter=_capped(config, given_adapter(growth, stack)) if growth.qlora_enabled or precision == "qlora" else None,
    )


def inserts(growth: ProgressiveConfig) -> bool:
    """Return whether a stack is added below others."""
    return "insert" in (growth.building_mode, *(own.mode for own in growth.stacks))


def _capped(config: ConfigSchema, adapter: AdapterSpec) -> AdapterSpec:
    return AdapterSpec(rank=min(adapter.rank, config.model.d_model), alpha=adapter.alpha)


def operator_of(config: ConfigSchema, new: StackSettings) -> GrowthOperator:
    """Return the growth operator of a stack: `auto` is `copy_zero` where what is above it stays as it was trained."""
    training = config.training
    given, scale = training.new_stack_init, training.new_stack_output_scale
    if given == "auto":
        frozen_above = new.mode == "prepend" or (new.mode == "insert" and training.progressive.tail_strategy != "full")
        as_identity = frozen_above or any(stack.imported for stack in config.adopted)
        given = "copy_zero" if as_identity and scale == 1.0 else "copy"
    if scale == 0.0:
        return "zero" if given in ("random", "zero") else "copy_zero"
    return given


@dataclass(frozen=True)
class Clock:
    """The one schedule of a run whose stages share a clock."""

    warmup_steps: int = 0
    """At the beginning of its first stage."""
    decay_steps: int = 0
    """At the end of its last stage."""
    last_steps: int = 0
    """All steps of that stage."""


def clock_of(config: ConfigSchema, *, grows: bool) -> Clock:
    """Return the schedule of a run with one clock: it decays in the joint anneal, or else in the last stage."""
    training, growth = config.training, config.training.progressive
    stages = [training.steps_per_stack]
    if grows:
        stages = [settings_of(config, n).steps for n in range(len(config.adopted), growth.target_stacks)]
    anneal = training.joint_steps if grows else 0
    stages += [anneal] if anneal else []
    if not stages:  # of an import nothing is left to train
        return Clock()
    warmup, last = min(training.warmup_steps, stages[0]), stages[-1]
    constant = warmup if len(stages) == 1 else 0
    usual = anneal or sum(stages) // 5
    return Clock(warmup, min(training.decay_steps or usual, last - constant), last)


def given_adapter(growth: ProgressiveConfig, stack: int) -> AdapterSpec:
    """Return the 'stack' adapter of a stack as its strategy gives it, however narrow the layers are."""
    own = growth.qlora_configs.get(stack)
    if growth.qlora_strategy == "variable" and own:  # a stack without an entry is rejected by the rules
        return AdapterSpec(rank=own.rank, alpha=own.alpha)
    if growth.qlora_strategy != "progressive":
        return AdapterSpec(rank=growth.qlora_rank, alpha=growth.qlora_alpha)
    rank = _by_pattern(growth.qlora_rank_pattern, growth.qlora_rank, stack)
    alpha = _by_pattern(growth.qlora_alpha_pattern, growth.qlora_alpha, stack)
    return AdapterSpec(rank=int(rank), alpha=float(alpha))


def progressive_adapter_of(config: ConfigSchema, stack: int) -> AdapterSpec | None:
    """Return the adapter that a stack gets when it becomes trunk: a trunk of adapters gives one to each without."""
    growth, settings = config.training.progressive, settings_of(config, stack)
    if settings.progressive:
        return settings.progressive
    adapts = growth.trunk_strategy == "qlora" or (growth.tail_strategy == "qlora" and inserts(growth))
    needed = adapts and settings.adapter is None
    return progressive_adapter(config) if growth.enabled and (growth.progressive_qlora or needed) else None


def progressive_adapter(config: ConfigSchema) -> AdapterSpec:
    """Return the 'progressive' adapter that stacks of the trunk get."""
    growth = config.training.progressive
    return _capped(config, AdapterSpec(rank=growth.progressive_qlora_rank, alpha=growth.progressive_qlora_alpha))


def _by_pattern(pattern: str, value: float, stack: int) -> float:
    if pattern == "increasing":
        return value * 2**stack
    if pattern == "decreasing":
        return max(1, value // 2**stack if isinstance(value, int) else value / 2**stack)
    return value * (stack + 1) if pattern == "linear" else value


_INPUT_STEPS = 1000


def n_time_steps(config: ConfigSchema) -> int:
    """Return T, the number of time steps.

    Where `num_time_steps` is 0, a table of ratios has one for each, time as an input 1,000, and depth `time_per_stack`
    for each of `max_stacks`, or more if exponential steps would coincide.
    """
    growth = config.training.progressive
    if growth.num_time_steps:
        return growth.num_time_steps
    if ratios := _table(config):
        return len(ratios)
    if growth.time_interpretation == "input":
        return _INPUT_STEPS
    n_steps = growth.max_stacks * growth.time_per_stack
    return n_distinct_steps(growth.max_stacks, n_steps) if growth.stack_time_mapping == "exponential" else n_steps


@functools.lru_cache
def n_distinct_steps(n_stacks: int, n_steps: int) -> int:
    """Return how many time steps give every stack another exponential one: `n_steps` if these do, or else more.

    Steps lie closest at the beginning, so that it is enough if the second stack has step 1 before rounding.
    """
    if len({_exponential_step(c, n_stacks, n_steps) for c in range(n_stacks)}) == n_stacks:
        return n_steps
    return 1 + math.ceil(math.expm1(1.0) / math.expm1(1 / (n_stacks - 1)))


def _exponential_step(c: int, n_stacks: int, n_steps: int) -> int:
    share = math.expm1(c / (n_stacks - 1)) / math.expm1(1.0) if n_stacks > 1 else 0.0
    return round((n_steps - 1) * share)


def _table(config: ConfigSchema) -> tuple[float, ...]:
    """Return the mask ratios that are given for each time step; () if they are interpolated, or set by the bound."""
    is_used = corrupts_by_time(config) and config.training.loss_weighting != "elbo"
    return tuple(config.training.mask_ratio_table) if is_used else ()


def corrupts_by_time(config: ConfigSchema) -> bool:
    """Return whether the time step decides how much of the input is masked."""
    growth = config.training.progressive
    return growth.time_interpretation != "none" and growth.training_objective == "mlm"


def mask_ratio_of(config: ConfigSchema, t: int) -> float:
    """Return the probability that a position is masked at step `t`; raises ConfigError unless 0 <= t < T."""
    n_steps = n_time_steps(config)
    if not 0 <= t < n_steps:
        raise ConfigError([Fault("time_step", str(t), f"there are {n_steps} time steps: 0 to {n_steps - 1}")])
    return float(time_schedule(config).ratios(np.asarray([t], dtype=np.int64))[0])


def resolve_time_input(config: ConfigSchema) -> TimeInput | None:
    """Return how steps are drawn and the mask ratio of each; None unless time is an input of the masked objective."""
    is_input = config.training.progressive.time_interpretation == "input"
    return time_schedule(config) if is_input and corrupts_by_time(config) else None


def time_schedule(config: ConfigSchema) -> TimeInput:
    """Return how steps are drawn and the mask ratio of each; values that are not used are zero, to enter no id."""
    training = config.training
    elbo = training.loss_weighting == "elbo"
    table = _table(config)
    interpolated = not (elbo or table)
    return TimeInput(
        n_steps=n_time_steps(config),
        sampling=training.time_sampling,
        ratio_min=training.mask_ratio_min if interpolated else 0.0,
        ratio_max=training.mask_ratio_max if interpolated else 0.0,
        table=table,
        elbo=elbo,
    )


def stack_time_step(config: ConfigSchema, c: int) -> int:
    """Return the time step of the c-th created stack, where depth is time.

    `linear` is c * time_per_stack. `exponential` is round((T - 1) (e^(c / (S - 1)) - 1) / (e - 1)) for S = max_stacks:
    0 for the first stack, T - 1 for the last. `custom` takes it from `time_mapping`; in the library
    `stack_time_mapping` may also be a function. Raises ConfigError if there is no such stack, its step is not in
    [0, T), or the mapping fails.
    """
    growth = config.training.progressive
    n_steps, n_stacks = n_time_steps(config), growth.max_stacks
    if not 0 <= c < n_stacks:
        raise ConfigError([Fault("stack_idx", str(c), f"{GROWTH}.max_stacks allows stacks 0 to {n_stacks - 1}")])
    kind: Any = growth.stack_time_mapping
    if kind == "exponential":
        return _exponential_step(c, n_stacks, n_steps)
    if kind == "linear":  # can only run past the last step if the number of steps is given
        step, key = c * growth.time_per_stack, "num_time_steps"
        remedy = f"raise it, or lower {GROWTH}.time_per_stack (now {growth.time_per_stack})"
    else:
        key = "stack_time_mapping" if callable(kind) else "time_mapping"
        step, remedy = _mapped_step(config, key, c), f"change it, or {GROWTH}.num_time_steps"
    if not 0 <= step < n_steps:
        allowed = f"stack {c} gets the step {step}, outside 0 to {n_steps - 1}; {remedy}"
        if key == "num_time_steps" and not growth.num_time_steps:
            allowed = allowed.replace("raise it", "give more ratios")
            raise ConfigError([Fault("training.mask_ratio_table", f"{n_steps} ratios", allowed)])
        raise ConfigError([Fault(f"{GROWTH}.{key}", shown(getattr(growth, key)), allowed)])
    return step


_OVERLAP = 0.2
"""The share of the way from one stack's mask ratio to the next in which both train."""


def ratio_span(config: ConfigSchema, c: int) -> RatioSpan | None:
    """Return the mask ratios that the c-th created stack trains at, where depth is time; None if there is only one.

    They reach half way to the ratios of its neighbours, those of the first stack down to the ratio of step 0 and those
    of the last one up to that of step T - 1. In the middle fifth of that way one stack gives over to the next, so that
    what all stacks take adds up to the same at every ratio. Raises what `stack_time_step` raises.
    """
    if config.training.progressive.stack_time_span == "point":
        return None
    own, above = mask_ratio_of(config, stack_time_step(config, c)), step_above(config, c)
    low = full_from = mask_ratio_of(config, 0)
    full_to = high = mask_ratio_of(config, n_time_steps(config) - 1)
    if c:
        low, full_from = _given_over(mask_ratio_of(config, stack_time_step(config, c - 1)), own)
    if above is not None:
        full_to, high = _given_over(own, mask_ratio_of(config, above))
    return RatioSpan(low=low, full_from=full_from, full_to=full_to, high=high) if low < high else None


def _given_over(below: float, above: float) -> tuple[float, float]:
    """Return between which ratios one stack gives over to the next."""
    middle, half = (below + above) / 2, _OVERLAP / 2 * (above - below)
    return middle - half, middle + half


def step_above(config: ConfigSchema, c: int) -> int | None:
    """Return the time step of the stack after the c-th, to be reached or not; None if there can be none."""
    growth = config.training.progressive
    if c + 1 >= growth.max_stacks:
        return None
    if growth.stack_time_mapping == "linear" and (c + 1) * growth.time_per_stack >= n_time_steps(config):
        return None
    return stack_time_step(config, c + 1)


def _mapped_step(config: ConfigSchema, key: str, c: int) -> int:
    growth, path = config.training.progressive, f"{GROWTH}.{key}"
    mapping: Any = growth.time_mapping if key == "time_mapping" else growth.stack_time_mapping
    if isinstance(mapping, list):
        steps: list[int] = mapping
        if c < len(steps):
            return steps[c]
        allowed = f"has no step for stack {c}; give one for every stack in creation order"
        raise ConfigError([Fault(path, f"{len(steps)} steps", allowed)])
    function = load_function(mapping, path)
    try:
        step = function(c, growth.max_stacks, n_time_steps(config))
    except Exception as error:  # a user's function may raise anything
        allowed = f"fails for stack {c} with {type(error).__name__}: {error}; correct the function"
        raise ConfigError([Fault(path, shown(mapping), allowed)]) from error
    try:
        return operator.index(step)
    except TypeError:
        raise ConfigError([Fault(path, shown(mapping), f"returns {step!r} for stack {c}; an int is needed")]) from None
