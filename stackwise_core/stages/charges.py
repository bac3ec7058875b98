"""What a run costs [FLOP]: what trains, and what frozen stacks are passed for. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.costs import fill_flops, head_flops, n_adapter_parameters, stack_flops, stage_flops
from stackwise_core.stages.plan import RunPlan, StagePlan, plan_run, rows_read_again
from stackwise_core.stages.resolve import resolve_order


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


def charge(config: StackWiseConfig, plan: RunPlan, n_rows: int, taken: Mapping[int, int] | None = None) -> list[Charge]:
    """Return what every stage of a run costs, given the number of training sequences.

    A store is charged to the stage that reads it, with all rows that were planned. `taken` has the steps of stages
    that ended early.
    """
    return [_charge_of(config, plan, stage, n_rows, (taken or {}).get(stage.index)) for stage in plan.stages]


def _charge_of(config: StackWiseConfig, plan: RunPlan, stage: StagePlan, n_rows: int, taken: int | None) -> Charge:
    spec, seq_len = stage.spec, config.data.seq_len
    fraction = _loss_fraction(stage, seq_len)
    trained, recomputed = stage_flops(stage.shape, spec, seq_len, fraction)
    trained += _adapter_flops(stage, seq_len)
    if taken is not None:
        trained, recomputed = trained * taken / spec.optim.steps, recomputed * taken / spec.optim.steps
    before = plan.stages[stage.index - 1] if stage.index else None
    if before is None or before.activations is None:
        return Charge(trained, recomputed, recomputed)
    rows, advanced = resolve_order(config, n_rows).count_visited(spec.optim.steps), 0
    if plan.store_below(before):
        advanced = (
            rows if config.data.rows == "shared" else min(rows, rows_read_again(config, before.spec, spec, n_rows))
        )
    below = [spec.stacks[stack] for stack in spec.anatomy.below]
    return Charge(trained, fill_flops(stage.shape, below, seq_len, rows - advanced, advanced), recomputed)


def judging_flops(config: StackWiseConfig, stage: StagePlan, n_rows: int) -> float:
    """Return the FLOPs of one validation of the rack that a stage ends with, given the validation sequences there are.

    Where a boundary is cast, the rack is passed twice: with the stream as it is stored, and with the exact one.
    """
    spec, shape, seq_len = stage.spec, stage.shape, config.data.seq_len
    n_blocks = sum(spec.stacks[index].n_blocks for index in spec.anatomy.order)
    once = stack_flops(shape, n_blocks, seq_len) + head_flops(shape, seq_len, _loss_fraction(stage, seq_len))
    return min(n_rows, config.validation.max_sequences) * (2 if spec.anatomy.boundary else 1) * once


def _loss_fraction(stage: StagePlan, seq_len: int) -> float:
    """Return the share of the positions that have a loss."""
    return stage.mask.mean_ratio if stage.mask else (seq_len - 1) / seq_len


def _adapter_flops(stage: StagePlan, seq_len: int) -> float:
    """Return the FLOPs of the adapters of live stacks: three products of each, which matter where models are narrow."""
    spec = stage.spec
    n_parameters = sum(
        n_adapter_parameters(stage.shape, spec.stacks[index].n_blocks, adapter.rank)
        for index in spec.anatomy.live
        for adapter in spec.stacks[index].adapters.values()
    )
    return 3 * 2.0 * n_parameters * seq_len * spec.optim.batch_size * spec.optim.steps


def cost(config: StackWiseConfig, n_rows: int) -> float:
    """Return the FLOPs of a configuration as executed. What a store costs does not depend on what the corpus says."""
    return sum(each.total for each in charge(config, plan_run(config, "0" * 64), n_rows))
