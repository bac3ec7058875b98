"""The arms of a comparison: ways to spend the FLOPs of one configuration. Needs no torch.

Each arm is the configuration with other keys in `training` and, for flat models, another depth. Data, width, batch and
whatever else is not named here stay as they are, so that only the way to grow differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import GROWTH
from stackwise_core.config.sizes import residual_blocks_of
from stackwise_core.config.stacks import settings_of
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.charges import cost

CONFIGURED, END_TO_END = "configured", "end-to-end"
ANNEAL, JOINT_STEPS = "anneal", "training.joint_steps"
"""The share of an arm's FLOPs that joint training at the end gets, and the key that gives it steps instead."""
ANNEAL_SHARE = 0.2
"""That share in `frozen+anneal`."""
_JUMP_SHARE = 1 / 3
"""Of the steps of `jump`: those of its shallow first stage."""
_FEWEST = 2
"""Steps of the shortest stage that can still be balanced."""


Changes = dict[str, Any]
"""New values of dotted keys, and perhaps of `ANNEAL`."""


def _one_clock(config: StackWiseConfig) -> Changes:
    """Return the changes of every arm but the configured one: one clock, one rate, no anneal, one scale."""
    scale = residual_blocks_of(config)
    return {
        "training.schedule": "one_clock",
        JOINT_STEPS: 0,
        "training.joint_learning_rate": config.training.learning_rate,
        **({"model.residual_blocks": scale} if scale else {}),
    }


def _grown(config: StackWiseConfig, **growth: Any) -> Changes:
    """Return the changes of an arm that grows, by default by the stacks of the configuration, all in one way."""
    as_all = {"mode": "default", "tail_stacks": 0}
    stacks = [stack.model_dump() | as_all for stack in config.training.progressive.stacks]
    growth = {"enabled": True, "stacks": stacks, "tail_stacks": 1, **growth}
    return {**_one_clock(config), **{f"{GROWTH}.{key}": value for key, value in growth.items()}}


def _flat(config: StackWiseConfig, share: float) -> Changes:
    """Return the changes of an arm that trains a share of the blocks from scratch, all together.

    A smaller model has a residual scale of its own depth; the whole one is the same model as that which was grown.
    """
    n_blocks = max(1, round(share * sum(blocks_of(config))))
    changes = {**_one_clock(config), "model.blocks_per_stack": n_blocks}
    if share < 1 and residual_blocks_of(config):
        changes["model.residual_blocks"] = n_blocks
    return {**changes, f"{GROWTH}.stacks": [], f"{GROWTH}.target_stacks": 1, f"{GROWTH}.enabled": False}


def _jump(config: StackWiseConfig) -> Changes:
    """One hop from a third of the depth to all of it, everything training; raises ConfigError if there is one block."""
    n_blocks, steps = sum(blocks_of(config)), sum(_steps_of(config))
    if n_blocks < 2:
        raise ConfigError([Fault("--arms", "'jump'", "CONFIG has one block: there is no depth to jump to")])
    first = max(1, round(n_blocks / 3))
    stacks = [{"n_blocks": first, "steps": max(1, round(_JUMP_SHARE * steps))}]
    stacks.append({"n_blocks": n_blocks - first, "steps": max(1, steps - stacks[0]["steps"])})
    return _grown(config, stacks=stacks, target_stacks=2, building_mode="append", trunk_strategy="full")


def _frozen(config: StackWiseConfig) -> Changes:
    return _grown(config, building_mode="append", trunk_strategy="frozen")


ARMS: Mapping[str, Callable[[StackWiseConfig], Changes]] = {
    CONFIGURED: lambda config: {},
    END_TO_END: lambda config: _flat(config, 1),
    "flat-1/3": lambda config: _flat(config, 1 / 3),
    "flat-2/3": lambda config: _flat(config, 2 / 3),
    "jump": _jump,
    "full": lambda config: _grown(config, building_mode="append", trunk_strategy="full"),
    "insert": lambda config: _grown(config, building_mode="insert", trunk_strategy="frozen", tail_strategy="full"),
    "frozen": _frozen,
    "frozen+anneal": lambda config: {**_frozen(config), ANNEAL: ANNEAL_SHARE},
}
CONTROLS = (CONFIGURED, END_TO_END, "flat-1/3", "flat-2/3")
"""Arms of every comparison: what is asked about, and what a sceptic would do with the same FLOPs instead."""


def blocks_of(config: StackWiseConfig) -> list[int]:
    """Return the number of blocks of every stack of the last rack."""
    return [settings_of(config, stack).n_blocks for stack in range(config.training.progressive.target_stacks)]


def _steps_of(config: StackWiseConfig) -> list[int]:
    return [settings_of(config, stack).steps for stack in range(config.training.progressive.target_stacks)]


def arm(config: StackWiseConfig, changes: Changes, budget: float, n_rows: int) -> StackWiseConfig:
    """Return the configuration of an arm, its steps scaled so that it costs nearest to a budget.

    Args:
        config: what all arms share.
        changes: the keys of this arm, as `ARMS` gives them. With `ANNEAL` joint training at the end gets that share of
            the budget; all other stages keep the ratios of their steps.
        budget: of all stages, as executed [FLOP].
        n_rows: the number of training sequences.

    Raises:
        ConfigError: if the budget is less than two steps of each stage, or an arm that does not grow is to anneal.
    """
    base = changed(config, {key: value for key, value in changes.items() if key != ANNEAL})
    if not (share := changes.get(ANNEAL)):
        return _scaled(base, budget, n_rows)
    if not base.training.progressive.enabled:
        allowed = f"joint training at the end needs an arm that grows: {GROWTH}.enabled is false"
        raise ConfigError([Fault(ANNEAL, f"{share:g}", allowed)])
    one = cost(_with_steps(base, 1.0, 1), n_rows) - cost(_with_steps(base, 1.0, 0), n_rows)
    joint = max(_FEWEST, round(share * budget / one))
    balanced = _scaled(_with_steps(base, 1.0, 0), budget - joint * one, n_rows)
    return changed(balanced, {JOINT_STEPS: joint})


def _scaled(config: StackWiseConfig, budget: float, n_rows: int) -> StackWiseConfig:
    """Return a configuration with all its steps scaled to a budget."""
    factor = 1.0
    for _ in range(6):  # nearly linear: only rows that are read twice and rounding are not
        factor *= max(0.0, budget) / cost(_with_steps(config, factor), n_rows)
    if (fewest := round(factor * min(_all_steps(config)))) < _FEWEST:
        allowed = f"at least {_FEWEST} steps in every stage, from a larger budget or fewer stages"
        raise ConfigError([Fault("training.steps_per_stack", f"{fewest} in the shortest stage of an arm", allowed)])
    return _with_steps(config, factor)


def _all_steps(config: StackWiseConfig) -> list[int]:
    growth, joint = config.training.progressive, config.training.joint_steps
    if not growth.enabled:
        return [config.training.steps_per_stack]
    return [*_steps_of(config), *([joint] if joint else [])]


def _with_steps(config: StackWiseConfig, factor: float, joint_steps: int | None = None) -> StackWiseConfig:
    """Return a configuration with all its steps multiplied, and with another anneal if it is given."""
    training, growth = config.training, config.training.progressive
    stacks = [stack.model_dump() for stack in growth.stacks]
    stacks += [{} for _ in range(growth.target_stacks - len(stacks))]
    if growth.enabled:
        for index, stack in enumerate(stacks):
            stack["steps"] = max(1, round(factor * settings_of(config, index).steps))
    joint = max(1, round(factor * training.joint_steps)) if training.joint_steps else 0
    joint = joint if joint_steps is None else joint_steps
    return changed(
        config,
        {
            f"{GROWTH}.stacks": stacks if growth.enabled else [],
            "training.steps_per_stack": max(1, round(factor * training.steps_per_stack)),
            JOINT_STEPS: joint,
        },
    )


def changed(config: StackWiseConfig, changes: Changes) -> StackWiseConfig:
    """Return a configuration with other values of dotted keys."""
    values = config.model_dump()
    apply_overrides(values, changes)
    return StackWiseConfig.from_dict(values)
