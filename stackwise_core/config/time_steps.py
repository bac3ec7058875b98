"""Diffusion time: how many steps there are, which one a stack has, and how much noise each one means.

Pure functions of the configuration; what they refuse, `time_faults` lists. Needs no torch, and the
configuration's own rules import it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from stackwise_core.config.functions import load_function, shown
from stackwise_core.data.masks import TimeInput
from stackwise_core.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stackwise_core.config.schema import StackWiseConfig

_GROWTH = "training.progressive"

# ---------------------------------------------------------------- what a step is


def n_time_steps(config: StackWiseConfig) -> int:
    """Return T, the number of time steps."""
    growth = config.training.progressive
    return growth.num_time_steps or growth.max_stacks * growth.time_per_stack


def mask_ratio_of(config: StackWiseConfig, t: int) -> float:
    """Return the probability that a position is masked at step `t`.

    Raises:
        ConfigError: `t` is not in [0, T).
    """
    n_steps = n_time_steps(config)
    if not 0 <= t < n_steps:
        raise ConfigError([Fault("time_step", str(t), f"there are {n_steps} time steps: 0 to {n_steps - 1}")])
    return float(_schedule(config).ratios(np.asarray([t], dtype=np.int64))[0])


def resolve_time_input(config: StackWiseConfig) -> TimeInput | None:
    """Return how steps are drawn and what they mean; None unless time is an input of the masked objective."""
    growth = config.training.progressive
    if growth.time_interpretation != "input" or growth.training_objective != "mlm":
        return None
    return _schedule(config)


def _schedule(config: StackWiseConfig) -> TimeInput:
    """Return the schedule with what it does not use left at 0, so that two spellings have one id."""
    training = config.training
    elbo = training.loss_weighting == "elbo"
    table = tuple(training.mask_ratio_table)
    interpolated = not (elbo or table)
    return TimeInput(
        n_steps=n_time_steps(config),
        sampling=training.time_sampling,
        ratio_min=training.mask_ratio_min if interpolated else 0.0,
        ratio_max=training.mask_ratio_max if interpolated else 0.0,
        table=table,
        elbo=elbo,
    )


# ---------------------------------------------------------------- time as depth


def stack_time_step(config: StackWiseConfig, c: int) -> int:
    """Return the time step of the c-th created stack.

    `linear` is c * time_per_stack. `exponential` is round((T - 1) (e^(c / (S - 1)) - 1) / (e - 1)) for
    S = max_stacks: 0 for the first stack, T - 1 for the last. `custom` asks `time_mapping`; in the
    library `stack_time_mapping` may also be the function itself.

    Raises:
        ConfigError: there is no such stack, its step is not in [0, T), or the mapping cannot be asked.
    """
    growth = config.training.progressive
    n_steps, n_stacks = n_time_steps(config), growth.max_stacks
    if not 0 <= c < n_stacks:
        allowed = f"{_GROWTH}.max_stacks allows stacks 0 to {n_stacks - 1}"
        raise ConfigError([Fault("stack_idx", str(c), allowed)])
    kind: Any = growth.stack_time_mapping
    if kind == "exponential":
        share = math.expm1(c / (n_stacks - 1)) / math.expm1(1.0) if n_stacks > 1 else 0.0
        return round((n_steps - 1) * share)
    if kind == "linear":  # past the last step only where num_time_steps is set: by default there are enough
        step, key = c * growth.time_per_stack, "num_time_steps"
        remedy = f"raise it, or lower {_GROWTH}.time_per_stack (now {growth.time_per_stack})"
    else:
        step, key = _mapped_step(config, c), "stack_time_mapping" if callable(kind) else "time_mapping"
        remedy = f"change it, or {_GROWTH}.num_time_steps"
    if not 0 <= step < n_steps:
        allowed = f"stack {c} gets the step {step}, outside 0 to {n_steps - 1}; {remedy}"
        raise ConfigError([Fault(f"{_GROWTH}.{key}", shown(getattr(growth, key)), allowed)])
    return step


def _mapped_step(config: StackWiseConfig, c: int) -> int:
    growth = config.training.progressive
    is_function = callable(growth.stack_time_mapping)
    key = f"{_GROWTH}.{'stack_time_mapping' if is_function else 'time_mapping'}"
    mapping: Any = growth.stack_time_mapping if is_function else growth.time_mapping
    if isinstance(mapping, list):
        steps: list[int] = mapping
        if c >= len(steps):
            allowed = f"has no step for stack {c}; give one for every stack in creation order"
            raise ConfigError([Fault(key, f"{len(steps)} steps", allowed)])
        return steps[c]
    function = load_function(mapping, key)
    try:
        step = function(c, growth.max_stacks, n_time_steps(config))
    except Exception as error:  # whatever a user's function raises is a fault of the configuration
        allowed = f"fails for stack {c} with {type(error).__name__}: {error}; correct the function"
        raise ConfigError([Fault(key, shown(mapping), allowed)]) from error
    try:
        return operator.index(step)
    except TypeError:
        allowed = f"returns {step!r} for stack {c}; an int is needed"
        raise ConfigError([Fault(key, shown(mapping), allowed)]) from None


# ---------------------------------------------------------------- what does not make sense


def time_faults(config: StackWiseConfig) -> Iterator[Fault]:
    """Yield every broken rule about time, each with what to change."""
    interpretation = config.training.progressive.time_interpretation
    if interpretation == "depth":
        yield from _depth_faults(config)
    if interpretation == "input":
        yield from _input_faults(config)
    yield from _schedule_faults(config)
    yield from _elbo_faults(config)


def _depth_faults(config: StackWiseConfig) -> Iterator[Fault]:
    growth = config.training.progressive
    steps: list[int] = []
    try:
        for c in range(min(growth.target_stacks, growth.max_stacks)):
            steps.append(stack_time_step(config, c))
    except ConfigError as error:
        yield from error.faults  # of the first stack that has one: the stacks after it have the same
    linear, exponential = growth.stack_time_mapping == "linear", growth.stack_time_mapping == "exponential"
    for c, (step, following) in enumerate(itertools.pairwise(steps)):
        pair = f"stacks {c} and {c + 1}"
        if exponential and step == following:
            allowed = f"gives {pair} the same step {step}; raise {_GROWTH}.num_time_steps (now {n_time_steps(config)})"
            yield Fault(f"{_GROWTH}.stack_time_mapping", "'exponential'", allowed)
            return
        if not (linear or exponential) and following < step:
            key = "stack_time_mapping" if callable(growth.stack_time_mapping) else "time_mapping"
            allowed = f"falls from {step} to {following} between {pair}; steps must not decrease"
            yield Fault(f"{_GROWTH}.{key}", shown(getattr(growth, key)), allowed)
            return


def _input_faults(config: StackWiseConfig) -> Iterator[Fault]:
    growth = config.training.progressive
    if growth.training_objective != "mlm":
        allowed = f"time as an input needs corrupted inputs: use {_GROWTH}.training_objective mlm, or depth or none"
        yield Fault(f"{_GROWTH}.time_interpretation", "'input'", allowed)
    if growth.time_encoding_type == "sinusoidal" and growth.time_embedding_dim % 2:
        allowed = "a sinusoidal encoding pairs a sine with a cosine and needs an even number"
        yield Fault(f"{_GROWTH}.time_embedding_dim", str(growth.time_embedding_dim), allowed)


def _schedule_faults(config: StackWiseConfig) -> Iterator[Fault]:
    table, n_steps = config.training.mask_ratio_table, n_time_steps(config)
    if not table or not corrupts_by_time(config):
        return
    if len(table) != n_steps:
        allowed = f"needs a ratio for each of the {n_steps} time steps; change it or {_GROWTH}.num_time_steps"
        yield Fault("training.mask_ratio_table", f"{len(table)} ratios", allowed)
    if config.training.progressive.time_interpretation == "depth" and sorted(table) != table:
        allowed = "must not decrease: the stack created first has the lightest noise"
        yield Fault("training.mask_ratio_table", repr(table), allowed)


def _elbo_faults(config: StackWiseConfig) -> Iterator[Fault]:
    training = config.training
    if training.loss_weighting != "elbo":
        return
    needed = {
        f"{_GROWTH}.time_interpretation": (training.progressive.time_interpretation, "input"),
        f"{_GROWTH}.training_objective": (training.progressive.training_objective, "mlm"),
        "training.corruption": (training.corruption, "mask"),
    }
    wrong = [f"{path}: {wanted} (now {value})" for path, (value, wanted) in needed.items() if value != wanted]
    if wrong:
        yield Fault("training.loss_weighting", "'elbo'", f"needs {', '.join(wrong)}; set what is missing, or use mean")


def corrupts_by_time(config: StackWiseConfig) -> bool:
    """Say whether the time step decides how much of the input is masked."""
    growth = config.training.progressive
    return growth.time_interpretation != "none" and growth.training_objective == "mlm"
