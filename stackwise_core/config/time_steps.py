"""Diffusion time: how many steps there are, which one a stack has, and what mask ratio each one means."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from stackwise_core.config.functions import load_function, shown
from stackwise_core.config.schema import GROWTH, ConfigSchema
from stackwise_core.data.masks import TimeInput
from stackwise_core.errors import ConfigError, Fault


def n_time_steps(config: ConfigSchema) -> int:
    """Return T, the number of time steps."""
    growth = config.training.progressive
    return growth.num_time_steps or growth.max_stacks * growth.time_per_stack


def corrupts_by_time(config: ConfigSchema) -> bool:
    """Return whether the time step decides how much of the input is masked."""
    growth = config.training.progressive
    return growth.time_interpretation != "none" and growth.training_objective == "mlm"


def mask_ratio_of(config: ConfigSchema, t: int) -> float:
    """Return the probability that a position is masked at step `t`.

    Raises:
        ConfigError: `t` is not in [0, T).
    """
    n_steps = n_time_steps(config)
    if not 0 <= t < n_steps:
        raise ConfigError([Fault("time_step", str(t), f"there are {n_steps} time steps: 0 to {n_steps - 1}")])
    return float(_schedule(config).ratios(np.asarray([t], dtype=np.int64))[0])


def resolve_time_input(config: ConfigSchema) -> TimeInput | None:
    """Return how steps are drawn and what they mean; None unless time is an input of the masked objective."""
    is_input = config.training.progressive.time_interpretation == "input"
    return _schedule(config) if is_input and corrupts_by_time(config) else None


def _schedule(config: ConfigSchema) -> TimeInput:
    """Return the schedule. What it does not use stays at its zero, so that it enters no id."""
    training = config.training
    elbo = training.loss_weighting == "elbo"
    table = () if elbo else tuple(training.mask_ratio_table)
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

    `linear` is c * time_per_stack. `exponential` is round((T - 1) (e^(c / (S - 1)) - 1) / (e - 1)) for
    S = max_stacks: 0 for the first stack, T - 1 for the last. `custom` takes it from `time_mapping`; in the
    library `stack_time_mapping` may also be a function.

    Raises:
        ConfigError: there is no such stack, its step is not in [0, T), or the mapping fails.
    """
    growth = config.training.progressive
    n_steps, n_stacks = n_time_steps(config), growth.max_stacks
    if not 0 <= c < n_stacks:
        allowed = f"{GROWTH}.max_stacks allows stacks 0 to {n_stacks - 1}"
        raise ConfigError([Fault("stack_idx", str(c), allowed)])
    kind: Any = growth.stack_time_mapping
    if kind == "exponential":
        share = math.expm1(c / (n_stacks - 1)) / math.expm1(1.0) if n_stacks > 1 else 0.0
        return round((n_steps - 1) * share)
    if kind == "linear":  # can only run past the last step if num_time_steps is set
        step, key = c * growth.time_per_stack, "num_time_steps"
        remedy = f"raise it, or lower {GROWTH}.time_per_stack (now {growth.time_per_stack})"
    else:
        key = "stack_time_mapping" if callable(kind) else "time_mapping"
        step, remedy = _mapped_step(config, key, c), f"change it, or {GROWTH}.num_time_steps"
    if not 0 <= step < n_steps:
        allowed = f"stack {c} gets the step {step}, outside 0 to {n_steps - 1}; {remedy}"
        raise ConfigError([Fault(f"{GROWTH}.{key}", shown(getattr(growth, key)), allowed)])
    return step


def _mapped_step(config: ConfigSchema, key: str, c: int) -> int:
    growth, path = config.training.progressive, f"{GROWTH}.{key}"
    mapping: Any = growth.time_mapping if key == "time_mapping" else growth.stack_time_mapping
    if isinstance(mapping, list):
        steps: list[int] = mapping
        if c >= len(steps):
            allowed = f"has no step for stack {c}; give one for every stack in creation order"
            raise ConfigError([Fault(path, f"{len(steps)} steps", allowed)])
        return steps[c]
    function = load_function(mapping, path)
    try:
        step = function(c, growth.max_stacks, n_time_steps(config))
    except Exception as error:  # a user's function may raise anything
        allowed = f"fails for stack {c} with {type(error).__name__}: {error}; correct the function"
        raise ConfigError([Fault(path, shown(mapping), allowed)]) from error
    try:
        return operator.index(step)
    except TypeError:
        allowed = f"returns {step!r} for stack {c}; an int is needed"
        raise ConfigError([Fault(path, shown(mapping), allowed)]) from None
