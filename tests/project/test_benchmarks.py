"""The parts of benchmarks that have a right answer: counts, equal compute, bytes, charts. Nothing is timed here."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import growth
from benchmarks.growth import BUDGET_CASE, CASES, REFERENCE, STEPS, balanced_configs, block_steps, run_flops
from benchmarks.harness import Measure
from benchmarks.memory import peak_bytes, peak_of
from benchmarks.plot import line_chart, ticks
from stackwise_core.config import StackWiseConfig
from stackwise_core.model.adapters import adapter_parameters
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.stages.costs import stage_flops
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.stages.stages import resolve_stages


@pytest.fixture(scope="module")
def configs() -> dict[str, StackWiseConfig]:
    return balanced_configs(STEPS)


def test_all_cases_cost_the_same_compute(configs: dict[str, StackWiseConfig]) -> None:
    budget = sum(run_flops(configs[BUDGET_CASE]))
    for case in CASES:
        if not case.endswith("only") and "three times" not in case:
            assert sum(run_flops(configs[case])) == pytest.approx(budget, rel=0.02), case


def test_block_steps_count_the_blocks_that_train(configs: dict[str, StackWiseConfig]) -> None:
    joint = configs[REFERENCE].training.steps_per_stack
    assert block_steps(configs[BUDGET_CASE]) == 3 * 2 * STEPS
    assert block_steps(configs[REFERENCE]) == 6 * joint
    assert block_steps(configs["end to end, equal block-steps only"]) == 3 * 2 * STEPS
    # Gradients flow through the trunk of a prepended stack, but it does not train.
    prepend = configs["prepend, frozen, copy_zero"]
    assert block_steps(prepend) == 2 * (STEPS + 2 * prepend.training.steps_per_stack)


def test_cases_share_what_does_not_differ(configs: dict[str, StackWiseConfig]) -> None:
    """A first stage that several cases have in common is trained once, because it is one artifact."""
    first = {case: plan_run(config, "0" * 64).stages[0].ref("stack") for case, config in configs.items()}
    sharing = [case for case in CASES if "end to end" not in case]
    assert len(sharing) == 8
    assert len({first[case] for case in sharing}) == 1
    assert len(set(first.values())) == 4  # and three joint runs


def test_adapters_are_counted_in_the_flops() -> None:
    config = balanced_configs(STEPS)["append, qlora, copy"]
    builder = ProgressiveRackBuilder(config)
    for _ in range(3):
        builder.add_stack()
    spec = resolve_stages(config)[2]
    parameters = sum(p.numel() for stack in builder.stacks for p in adapter_parameters(stack))
    tokens = spec.optim.steps * config.training.batch_size * config.data.seq_len
    bare = sum(stage_flops(resolve_shape(config), spec, config.data.seq_len, 127 / 128))
    # A multiply-add is two FLOPs; forward, gradient of the input, gradient of the weight.
    assert run_flops(config)[2] - bare == pytest.approx(6 * parameters * tokens)


def _measures(gaps: dict[str, list[float]]) -> list[Measure]:
    found: list[Measure] = []
    for case, config in balanced_configs(STEPS).items():
        found += [Measure(case, f"loss after stage {n}", "nats", [2.0 - n] * 2) for n in range(len(run_flops(config)))]
        if case != REFERENCE:
            found.append(Measure(case, f"last loss above {REFERENCE}", "nats", gaps.get(case, [0.1, -0.1])))
    return found


def test_the_page_says_where_growing_loses(configs: dict[str, StackWiseConfig]) -> None:
    gaps = {"append, frozen, zero": [0.2, 0.4], "append, full, copy": [-0.5, -0.3]}
    text = growth.section(_measures(gaps), configs)
    loses, wins, disagree = re.findall(r"(?:loses|wins|disagree)[^:]*:(?:\*\*)? ([^.]*\.[^.]*)\.", text)
    assert loses == "append, frozen, zero (+0.300)"
    assert wins == "append, full, copy (-0.400)"
    assert "append, frozen, copy (+0.000)" in text
    assert disagree.startswith("append, frozen, copy")
    assert REFERENCE not in loses + wins


def test_publishing_replaces_its_own_section_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, svg = tmp_path / "results.md", tmp_path / "growth.svg"
    monkeypatch.setattr(growth, "PAGE", page)
    monkeypatch.setattr(growth, "CHART", svg)
    growth.publish(_measures({}))
    page.write_text(f"before\n{page.read_text()}after\n")
    once = page.read_text()
    growth.publish(_measures({}))
    assert page.read_text() == once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert svg.read_text().count("<polyline") == len(CASES)


# ---------------------------------------------------------------- bytes


def test_the_peak_is_what_was_held_at_once() -> None:
    with peak_bytes(torch.device("cpu")) as peak:
        first = torch.empty(1000, 1000)
        del first
        second, third = torch.empty(500, 500), torch.empty(250_000, dtype=torch.uint8)
        del second, third
    assert peak == [4_000_000]


def test_the_peak_holds_what_a_backward_pass_keeps() -> None:
    with peak_bytes(torch.device("cpu")) as peak:
        x = torch.zeros(1_000_000, requires_grad=True)
        y = x.exp().exp()  # each result is kept for the backward pass, the last is the output
        del y
    assert peak == [3 * 4_000_000]


@pytest.mark.parametrize(
    ("allocations", "peak"),
    [
        ([(1, 10), (2, 5), (1, -10), (3, 7)], 15),
        ([(9, -100), (1, 10)], 10),  # given back here, taken before: counts neither way
        ([(1, 10), (1, 30)], 30),  # an address that was given back unheard
        ([], 0),
    ],
)
def test_the_peak_of_allocations(allocations: list[Any], peak: int) -> None:
    assert peak_of(allocations) == peak


# ---------------------------------------------------------------- charts


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.71, 1.93), (3.0, 3.0), (-7.0, 4_211.0), (0.0, 0.00037)])
def test_ticks_are_round_and_reach_around(low: float, high: float) -> None:
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 2 <= len(marks) <= 11
    assert all(b - a == pytest.approx(step) for a, b in pairwise(marks))
    assert f"{step:.0e}"[0] in "125"


def test_a_chart_puts_points_in_proportion() -> None:
    svg = line_chart({"a < b": [(0.0, 0.0), (5.0, 2.5), (10.0, 10.0)]}, "x", "y")
    places = re.search(r'points="([^"]*)"', svg)
    assert places is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in places[1].split())
    assert x1 - x0 == pytest.approx((x2 - x0) / 2, abs=0.1)
    assert y0 - y1 == pytest.approx((y0 - y2) / 4, abs=0.1)  # larger is higher up
    assert y2 < y0
    assert "a &lt; b" in svg
