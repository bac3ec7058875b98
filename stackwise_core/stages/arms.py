"""The arms of a comparison: ways to spend the FLOPs of one configuration. Needs no torch.

Each arm is the configuration with other keys in `training` and, for flat models, another depth. Data, width, batch and
whatever else is not named here stay as they are, so that only the way to grow differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import GROWTH
from stackwise_core.config.stacks import settings_of
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.costs import n_adapter_parameters, stack_flops, stage_flops
from stackwise_core.stages.plan import RunPlan, StagePlan, advances, plan_run
from stackwise_core.stages.resolve import resolve_order

CONFIGURED, END_TO_END = "configured", "end-to-end"
ANNEAL_SHARE = 0.2
"""Of the FLOPs of `frozen+anneal`: what joint training at the end may cost."""
_JUMP_SHARE = 1 / 3
"""Of the steps of `jump`: those of its shallow first stage."""
_FEWEST = 2
"""Steps of the shortest stage that can still be balanced."""


class Charge(NamedTuple):
    """FLOPs of a run or a stage. Validation is left out: all arms are judged alike."""

    trained: float
    """Of the live stacks and the head, forward and backward."""
    frozen: float
    """Of forward passes of frozen stacks, as they are executed: once to fill a store, or at every step without one."""
    recomputed: float
    """Of the same passes, if every step made them."""

    @property
    def total(self) -> float:
        """What was executed."""
        return self.trained + self.frozen


def charge(config: StackWiseConfig, plan: RunPlan, n_rows: int) -> list[Charge]:
    """Return what every stage of a run costs, given the number of training sequences.

    A store is charged to the stage that reads it.
    """
    pairs = zip([None, *plan.stages[:-1]], plan.stages, strict=True)
    return [_charge_of(config, before, stage, n_rows) for before, stage in pairs]


def _charge_of(config: StackWiseConfig, before: StagePlan | None, stage: StagePlan, n_rows: int) -> Charge:
    shape, spec, seq_len = stage.shape, stage.spec, config.data.seq_len
    fraction = stage.mask.mean_ratio if stage.mask else (seq_len - 1) / seq_len
    trained, recomputed = stage_flops(shape, spec, seq_len, fraction)
    trained += _adapter_flops(stage, seq_len)
    if before is None or before.activations is None:
        return Charge(trained, recomputed, recomputed)
    filled = spec.anatomy.below[-1:] if advances(config, before.spec, spec) else spec.anatomy.below
    a_row = stack_flops(shape, sum(spec.stacks[stack].n_blocks for stack in filled), seq_len)
    return Charge(trained, resolve_order(config, n_rows).count_visited(spec.optim.steps) * a_row, recomputed)


def _adapter_flops(stage: StagePlan, seq_len: int) -> float:
    """Return the FLOPs of the adapters of live stacks: three products of each, which matter where models are narrow."""
    spec = stage.spec
    n_parameters = sum(
        n_adapter_parameters(stage.shape, spec.stacks[index].n_blocks, adapter.rank)
        for index in spec.anatomy.live
        for adapter in spec.stacks[index].adapters.values()
    )
    return 3 * 2.0 * n_parameters * seq_len * spec.optim.batch_size * spec.optim.steps


# ---------------------------------------------------------------- arms

Changes = dict[str, Any]
_ONE_CLOCK = {"training.schedule": "one_clock"}


def _grown(config: StackWiseConfig, **changes: Any) -> Changes:
    """Return the changes of an arm that grows by the stacks of the configuration, with one clock."""
    return {**_ONE_CLOCK, "training.joint_steps": 0, **{f"{GROWTH}.{key}": value for key, value in changes.items()}}


def _flat(n_blocks: int) -> Changes:
    return {
        **_ONE_CLOCK,
        "training.joint_steps": 0,
        "model.blocks_per_stack": n_blocks,
        f"{GROWTH}.stacks": [],
        f"{GROWTH}.target_stacks": 1,
        f"{GROWTH}.enabled": False,
    }


def _jump(config: StackWiseConfig) -> Changes:
    """One hop from a third of the depth to all of it, everything training."""
    n_blocks, steps = sum(blocks_of(config)), sum(_steps_of(config))
    first = max(1, round(n_blocks / 3))
    stacks = [{"n_blocks": first, "steps": max(1, round(_JUMP_SHARE * steps))}]
    stacks.append({"n_blocks": n_blocks - first, "steps": max(1, steps - stacks[0]["steps"])})
    return _grown(config, stacks=stacks, target_stacks=2, building_mode="append", trunk_strategy="full")


_APPEND = {"building_mode": "append"}
ARMS: Mapping[str, Callable[[StackWiseConfig], Changes]] = {
    CONFIGURED: lambda config: {},
    END_TO_END: lambda config: _flat(sum(blocks_of(config))),
    "flat-1/3": lambda config: _flat(max(1, round(sum(blocks_of(config)) / 3))),
    "flat-2/3": lambda config: _flat(max(1, round(2 * sum(blocks_of(config)) / 3))),
    "jump": _jump,
    "full": lambda config: _grown(config, **_APPEND, trunk_strategy="full"),
    "insert": lambda config: _grown(config, building_mode="insert", trunk_strategy="frozen", tail_strategy="full"),
    "frozen": lambda config: _grown(config, **_APPEND, trunk_strategy="frozen"),
    "frozen+anneal": lambda config: {**_grown(config, **_APPEND, trunk_strategy="frozen"), "training.joint_steps": 1},
}


def blocks_of(config: StackWiseConfig) -> list[int]:
    """Return the number of blocks of every stack of the last rack."""
    return [settings_of(config, stack).n_blocks for stack in range(config.training.progressive.target_stacks)]


def _steps_of(config: StackWiseConfig) -> list[int]:
    return [settings_of(config, stack).steps for stack in range(config.training.progressive.target_stacks)]


def arm(config: StackWiseConfig, changes: Changes, budget: float, n_rows: int) -> StackWiseConfig:
    """Return the configuration of an arm, its steps scaled so that it costs nearest to a budget.

    Args:
        config: what all arms share.
        changes: the keys of this arm, as `ARMS` gives them. `training.joint_steps` above 0 asks for an anneal, which
            gets `ANNEAL_SHARE` of the budget.
        budget: of all stages, as executed [FLOP].
        n_rows: the number of training sequences.

    Raises:
        ConfigError: if the budget is less than two steps of each stage.
    """
    base = changed(config, changes)
    joint = base.training.joint_steps
    if changes.get("training.joint_steps"):
        one = cost(_with_steps(base, 1.0, 1), n_rows) - cost(_with_steps(base, 1.0, 0), n_rows)
        joint = max(_FEWEST, round(ANNEAL_SHARE * budget / one))
        budget -= joint * one
        balanced = _scaled(_with_steps(base, 1.0, 0), budget, n_rows)
        return changed(balanced, {"training.joint_steps": joint})
    return _scaled(base, budget, n_rows)


def _scaled(config: StackWiseConfig, budget: float, n_rows: int) -> StackWiseConfig:
    """Return a configuration with all its steps scaled to a budget."""
    factor = 1.0
    for _ in range(6):  # nearly linear: only rows that are read twice and rounding are not
        factor *= budget / cost(_with_steps(config, factor), n_rows)
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
    joint = round(factor * training.joint_steps) if joint_steps is None else joint_steps
    return changed(
        config,
        {
            f"{GROWTH}.stacks": stacks if growth.enabled else [],
            "training.steps_per_stack": max(1, round(factor * training.steps_per_stack)),
            "training.joint_steps": joint,
        },
    )


def cost(config: StackWiseConfig, n_rows: int) -> float:
    """Return the FLOPs of a configuration as executed. What a store costs does not depend on what the corpus says."""
    return sum(each.total for each in charge(config, plan_run(config, "0" * 64), n_rows))


def changed(config: StackWiseConfig, changes: Changes) -> StackWiseConfig:
    """Return a configuration with other values of dotted keys."""
    values = config.model_dump()
    apply_overrides(values, changes)
    return StackWiseConfig.from_dict(values)
