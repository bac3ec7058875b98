"""Validation loss at equal compute for ways to grow: operators, trunk strategies, anneal, prepend, end to end.

Text of Python's standard library, bytes, causal objective. Compute is the forward and backward FLOPs of every stage,
including forward passes of the frozen trunk, as if nothing were cached. It is equal to within 2 % unless the case says
otherwise.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from benchmarks.harness import ROOT, Measure
from benchmarks.plot import line_chart
from flows.run.events import Event, StageDone, subscribed
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.stages.costs import n_adapter_parameters, stage_flops
from stackwise_core.stages.resolve import ModelShape, resolve_shape
from stackwise_core.stages.stages import StageSpec, resolve_stages

SEEDS = (0, 1, 2)
N_STACKS = 3
STEPS = 150
"""Of every stage of the case that sets the budget, and of every first stage, which cases share."""
WARMUP_STEPS = 20
ANNEAL_SHARE = 0.25
"""Of the budget; what the stages after the first have less."""

BUDGET_CASE = "append, frozen, copy"
REFERENCE = "end to end"
PROGRESSIVE = "training.progressive"
CASES: dict[str, dict[str, Any]] = {
    BUDGET_CASE: {"training.new_stack_init": "copy"},
    "append, frozen, copy_zero": {"training.new_stack_init": "copy_zero"},
    "append, frozen, random": {"training.new_stack_init": "random"},
    "append, frozen, zero": {"training.new_stack_init": "zero"},
    "append, qlora, copy": {f"{PROGRESSIVE}.trunk_strategy": "qlora", f"{PROGRESSIVE}.progressive_qlora": True},
    "append, full, copy": {f"{PROGRESSIVE}.trunk_strategy": "full"},
    "append, frozen, copy, anneal": {"training.joint_steps": 1},  # the budget decides the number
    "prepend, frozen, copy_zero": {f"{PROGRESSIVE}.building_mode": "prepend"},
    REFERENCE: {f"{PROGRESSIVE}.enabled": False},
    "end to end, equal block-steps only": {f"{PROGRESSIVE}.enabled": False},
    "end to end, three times the compute": {f"{PROGRESSIVE}.enabled": False},
}


def measure(quick: bool, artifacts: str = "") -> list[Measure]:
    """Grow every case with every seed; artifacts that the folder already has are reused."""
    steps, seeds = (30, SEEDS[:1]) if quick else (STEPS, SEEDS)
    configs = balanced_configs(steps)
    with tempfile.TemporaryDirectory() as scratch, subscribed(_print_stage):
        losses = {case: list[list[float]]() for case in CASES}
        for seed in seeds:
            for case, config in configs.items():
                print(f"{case}, seed {seed}", flush=True)
                losses[case].append(_grow(case, config, seed, artifacts or scratch))
    return [m for case in CASES for m in _measures(case, configs[case], losses[case], losses[REFERENCE])]


def _grow(case: str, config: StackWiseConfig, seed: int, artifacts: str) -> list[float]:
    """Return the validation loss after every stage [nats per byte]."""
    config = config.model_copy(deep=True)
    config.run.seed, config.run.name = seed, f"{re.sub('[^a-z_]+', '-', case)}-seed{seed}"
    losses = [stage.validation_loss for stage in grow(config, artifacts)]
    return [loss for loss in losses if loss is not None]


def _print_stage(event: Event) -> None:
    if isinstance(event, StageDone):
        done = event.summary
        print(f"  stage {done.stage}: loss {done.validation_loss:.4f}, {done.seconds} s", flush=True)


def _measures(
    case: str, config: StackWiseConfig, losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
) -> list[Measure]:
    compute = [Measure(case, "compute", "TFLOP", [sum(run_flops(config)) / 1e12])]
    compute.append(Measure(case, "block-steps", "blocks", [float(block_steps(config))]))
    by_stage = [
        Measure(case, f"loss after stage {stage}", "nats", list(of_seeds))
        for stage, of_seeds in enumerate(zip(*losses, strict=True))
    ]
    if case == REFERENCE:
        return [*compute, *by_stage]
    gap = [mine[-1] - theirs[-1] for mine, theirs in zip(losses, reference, strict=True)]
    return [*compute, *by_stage, Measure(case, f"last loss above {REFERENCE}", "nats", gap)]


# ---------------------------------------------------------------- equal compute


def balanced_configs(steps: int) -> dict[str, StackWiseConfig]:
    """Return the configuration of every case, with steps chosen so that all cost as much as the budget case.

    Args:
        steps: of every stage of the budget case.
    """
    budget = sum(run_flops(_config(CASES[BUDGET_CASE], steps, steps)))
    one_joint_step = sum(run_flops(_config(CASES[REFERENCE], steps, steps))) / steps
    configs: dict[str, StackWiseConfig] = {}
    for case, changes in CASES.items():
        changes = dict(changes)
        if "training.joint_steps" in changes:
            changes["training.joint_steps"] = round(ANNEAL_SHARE * budget / one_joint_step)
        later = _solve(lambda n, changes=changes: sum(run_flops(_config(changes, steps, n))), budget)
        later = steps if case.endswith("only") else 3 * later if "three times" in case else later
        configs[case] = _config(changes, steps, later)
    return configs


def _solve(cost: Callable[[int], float], budget: float) -> int:
    """Return the whole number at which a linear cost is nearest to a budget."""
    first, second = cost(WARMUP_STEPS), cost(WARMUP_STEPS + 1)
    return WARMUP_STEPS + max(0, round((budget - first) / (second - first)))


def _config(changes: Mapping[str, Any], first_steps: int, later_steps: int) -> StackWiseConfig:
    """Return a configuration with given numbers of steps for the first stage and for each later one.

    In all cases the first stack is appended, so that prepending shares it too. Joint training from scratch is one
    stage with the steps of a later one.
    """
    values: dict[str, Any] = {
        "data": {"source": "stdlib", "tokenizer": "byte", "seq_len": 128},
        "model": {"d_model": 128, "n_heads": 4, "blocks_per_stack": 2},
        "training": {
            "batch_size": 16,
            "steps_per_stack": later_steps,
            "warmup_steps": WARMUP_STEPS,
            "progressive": {"target_stacks": N_STACKS, "training_objective": "clm", "cache_activations": False},
        },
        "hardware": {"device": "cpu", "threads": 1},
    }
    apply_overrides(values, dict(changes))
    if values["training"]["progressive"].get("enabled", True):
        values["training"]["progressive"]["stacks"] = [{"mode": "append", "steps": first_steps}]
    return StackWiseConfig.from_dict(values)


def run_flops(config: StackWiseConfig) -> list[float]:
    """Return the FLOPs of every stage of a run: live stacks and head, frozen trunk forwards, adapters."""
    shape, seq_len = resolve_shape(config), config.data.seq_len
    loss_fraction = (seq_len - 1) / seq_len
    return [
        sum(stage_flops(shape, spec, seq_len, loss_fraction)) + _adapter_flops(shape, spec, seq_len)
        for spec in resolve_stages(config)
    ]


def _adapter_flops(shape: ModelShape, spec: StageSpec, seq_len: int) -> float:
    """Return the FLOPs that `stage_flops` leaves out: three products of every adapter, which matter at this width."""
    live = [spec.stacks[index] for index in spec.anatomy.live]
    parameters = sum(
        n_adapter_parameters(shape, stack.n_blocks, adapter.rank)
        for stack in live
        for adapter in stack.adapters.values()
    )
    return 3 * 2.0 * parameters * seq_len * spec.optim.batch_size * spec.optim.steps


def block_steps(config: StackWiseConfig) -> int:
    """Return the number of blocks that train, in full or through adapters, summed over all steps."""
    return sum(
        spec.optim.steps * spec.stacks[index].n_blocks
        for spec in resolve_stages(config)
        for index in spec.anatomy.trained
    )


# ---------------------------------------------------------------- the page


PAGE = ROOT / "docs" / "results.md"
CHART = ROOT / "docs" / "growth.svg"
_BEGIN, _END = "<!-- growth: begin, written by `python -m benchmarks growth` -->", "<!-- growth: end -->"


def publish(measures: Sequence[Measure]) -> None:
    """Write table, verdict and chart into docs/results.md."""
    configs = balanced_configs(STEPS)
    CHART.write_text(chart(measures, configs))
    text = PAGE.read_text() if PAGE.exists() else f"# Results\n\n{_BEGIN}\n{_END}\n"
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    PAGE.write_text(f"{before}{_BEGIN}\n{section(measures, configs)}\n{_END}{after}")


def chart(measures: Sequence[Measure], configs: Mapping[str, StackWiseConfig]) -> str:
    """Return an SVG of the mean loss against compute, with one point per stage."""
    series = {
        case: list(zip((f / 1e12 for f in accumulate(run_flops(config))), _mean_losses(measures, case), strict=True))
        for case, config in configs.items()
    }
    return line_chart(series, "compute [TFLOP]", "validation loss [nats per byte]")


def section(measures: Sequence[Measure], configs: Mapping[str, StackWiseConfig]) -> str:
    """Return the section on growth: the setup, a table, and the verdict."""
    gaps = {m.case: m.values for m in measures if m.what.startswith("last loss above")}
    n_seeds = len(next(iter(gaps.values())))
    lines = [
        "## Growing against training end to end",
        "",
        f"A rack of {N_STACKS} stacks of 2 blocks, d_model 128, sequences of 128 bytes, batches of 16, {n_seeds} "
        "seeds, text of Python's standard library; loss in nats per byte. Compute is forward and backward FLOPs, with "
        "frozen trunks recomputed at every step: with a cache growing costs less than is shown. Block-steps count "
        "blocks that train. Every stage reads the same rows from the first on, so that growing sees fewer different "
        "rows than training end to end. These are short runs: what holds here need not hold at a hundred times the "
        "compute.",
        "",
        "![validation loss against compute](growth.svg)",
        "",
        f"| case | steps per stage | block-steps | TFLOP | loss | range | above {REFERENCE} | worse in |",
        "|---|---|--:|--:|--:|---|--:|---|",
        *(_row(measures, case, config, gaps.get(case)) for case, config in configs.items()),
        "",
        _verdict(gaps),
    ]
    return "\n".join(lines)


def _row(measures: Sequence[Measure], case: str, config: StackWiseConfig, gap: Sequence[float] | None) -> str:
    steps = ", ".join(str(spec.optim.steps) for spec in resolve_stages(config))
    last = _losses(measures, case)[-1].values
    cells = [case, steps, f"{block_steps(config):,}", f"{sum(run_flops(config)) / 1e12:.2f}"]
    cells += [f"{statistics.mean(last):.3f}", f"{min(last):.3f} to {max(last):.3f}"]
    cells += ["", ""] if gap is None else [f"{statistics.mean(gap):+.3f}", f"{sum(g > 0 for g in gap)} of {len(gap)}"]
    return f"| {' | '.join(cells)} |"


def _verdict(gaps: Mapping[str, Sequence[float]]) -> str:
    """Name the cases that win or lose at equal compute, and those where seeds disagree."""
    grown = {case: gap for case, gap in gaps.items() if not case.startswith(REFERENCE)}

    def named(chosen: Callable[[Sequence[float]], bool]) -> str:
        return (
            "; ".join(f"{case} ({statistics.mean(gap):+.3f})" for case, gap in grown.items() if chosen(gap)) or "none"
        )

    longer = gaps["end to end, three times the compute"]
    better = [case for case, gap in grown.items() if statistics.mean(gap) > statistics.mean(longer)]
    return (
        f"**At equal compute growing loses to training end to end in every seed with:** "
        f"{named(lambda gap: min(gap) > 0)}. **It wins in every seed with:** {named(lambda gap: max(gap) < 0)}. "
        f"Seeds disagree on: {named(lambda gap: min(gap) <= 0 <= max(gap))}. With three times the compute training "
        f"end to end gains {-statistics.mean(longer):.3f} nats, and ends below: {'; '.join(better) or 'none of them'}."
    )


def _losses(measures: Sequence[Measure], case: str) -> list[Measure]:
    return [m for m in measures if m.case == case and m.what.startswith("loss after stage")]


def _mean_losses(measures: Sequence[Measure], case: str) -> list[float]:
    return [statistics.mean(m.values) for m in _losses(measures, case)]
