"""Time-as-depth by intervals: which mask ratios a stack trains at, how often, and at which it is judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stackwise_core.config.stacks import ratio_span
from stackwise_core.data.masks import RatioSpan
from stackwise_core.errors import ConfigError
from stackwise_core.objectives.batches import stage_masks
from stackwise_core.objectives.make_batch import make_batch, validation_batch
from stackwise_core.objectives.time_step_masking import TimeStepMasking
from stackwise_core.stages.identity import StackRecipe
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import resolve_mask
from stackwise_core.stages.stages import resolve_stages
from support.configurations import CORPUS, configuration, ids

G = "training.progressive."
DEPTH = {f"{G}time_interpretation": "depth", f"{G}max_stacks": 4, "training.corruption": "mask"}
SPANS = {**DEPTH, f"{G}stack_time_span": "interval"}
EDGES = [(0.15, 0.15, 0.25, 0.30), (0.25, 0.30, 0.50, 0.55), (0.50, 0.55, 0.75, 0.80), (0.75, 0.80, 0.90, 0.90)]
"""Of ratios 0.15, 0.40, 0.65, 0.90: half way, and a tenth of the way to both sides of that."""


def edges(span: RatioSpan | None) -> tuple[float, ...]:
    assert span is not None
    return span.low, span.full_from, span.full_to, span.high


def density(span: RatioSpan, ratio: float) -> float:
    """How much of a ratio a stack takes, 1 where it takes all: the trapezium written out."""
    knots = np.asarray(edges(span)) + np.asarray([-1e-12, 0, 0, 1e-12])
    return float(np.interp(ratio, knots, [0, 1, 1, 0], left=0, right=0))


def test_the_spans_of_all_stacks_take_every_ratio_equally() -> None:
    config = configuration(SPANS)
    spans = [ratio_span(config, c) for c in range(4)]
    assert [edges(span) for span in spans] == [pytest.approx(each) for each in EDGES]
    for ratio in np.linspace(0.1501, 0.8999, 997):
        taken = [density(span, ratio) for span in spans if span]
        assert sum(taken) == pytest.approx(1.0, abs=1e-6)
        assert sum(share > 0 for share in taken) <= 2
    assert [span.up_to for span in spans if span] == pytest.approx([0.275, 0.525, 0.775, 0.90])


@pytest.mark.parametrize(
    ("changes", "stack", "expected"),
    [
        ({f"{G}num_time_steps": 4, f"{G}max_stacks": 9}, 3, EDGES[3]),  # there can be no step 4
        ({f"{G}num_time_steps": 7, f"{G}time_per_stack": 2}, 3, EDGES[3]),
        ({"training.mask_ratio_table": [0.1, 0.2, 0.6, 0.7]}, 1, (0.14, 0.16, 0.36, 0.44)),
        (  # from step 0 on, and up to the last one
            {f"{G}stack_time_mapping": "custom", f"{G}time_mapping": [1, 1, 4], f"{G}num_time_steps": 6},
            0,
            (0.15, 0.15, 0.30, 0.30),
        ),
    ],
)
def test_what_an_interval_reaches_to(changes: dict[str, Any], stack: int, expected: tuple[float, ...]) -> None:
    config = configuration({**SPANS, f"{G}target_stacks": 1, **changes})
    assert edges(ratio_span(config, stack)) == pytest.approx(expected)
    alone = configuration({**SPANS, f"{G}target_stacks": 1, f"{G}max_stacks": 1})
    assert ratio_span(alone, 0) is None  # there is one ratio


@pytest.mark.parametrize("stack", range(4))
def test_each_sequence_draws_a_ratio_of_its_stack_with_its_weight(stack: int) -> None:
    mask = resolve_mask(configuration(SPANS), stack)
    assert mask is not None
    assert mask.span is not None
    low, _, _, high = edges(mask.span)
    u = (np.arange(20_000) + 0.5) / 20_000
    drawn = mask.span.ratios(u)
    assert low <= drawn.min() < drawn.max() <= high
    # Against the density, summed up: the share of draws below each ratio.
    grid = np.linspace(low, high, 2001)
    middles = (grid[1:] + grid[:-1]) / 2
    weights = np.asarray([density(mask.span, ratio) for ratio in middles])
    below = np.concatenate([[0.0], weights.cumsum()]) / weights.sum()
    assert np.abs(np.searchsorted(drawn, grid) / len(u) - below).max() < 2e-3
    assert mask.mean_ratio == pytest.approx(np.average(middles, weights=weights), abs=1e-5)
    # And as masks: long rows, so that the share of a row is its ratio.
    rows, tokens = np.arange(400), np.zeros((400, 4000), dtype=np.int64)
    shares = mask.masks(rows, 0, 4000).mean(1)
    assert low - 0.03 < shares.min() < shares.max() < high + 0.03
    assert np.abs(np.sort(shares) - mask.span.ratios((rows + 0.5) / 400)).max() < 0.05
    batch = make_batch({"input_ids": tokens[:3], "sequence_ids": rows[5:8]}, mask)
    assert (batch["masks"].numpy() == mask.masks(rows, 0, 4000)[5:8]).all()  # whatever the batch
    assert np.corrcoef(mask.masks(rows, 1, 4000).mean(1), shares)[0, 1] < 0.3  # another view, another draw


def test_a_stack_is_judged_at_its_own_ratio_as_one_that_trained_there_alone() -> None:
    tokens = np.random.default_rng(0).integers(0, 256, (8, 64))
    for stack, ratio in enumerate((0.15, 0.40, 0.65, 0.90)):
        spread, point = (resolve_mask(configuration(changes), stack) for changes in (SPANS, DEPTH))
        assert spread is not None
        assert point is not None
        assert spread.ratio == point.ratio == pytest.approx(ratio)
        ours, theirs = (validation_batch(tokens, mask) for mask in (spread, point))
        assert ours["input_ids"].equal(theirs["input_ids"])
        assert spread.at_ratio(0.3) == point.at_ratio(0.3)
        assert spread.for_validation() == point.for_validation()


def test_masking_by_stack_and_by_step_in_the_library() -> None:
    config, tokens = configuration(SPANS), np.zeros((6, 32), dtype=np.int64)
    masking = TimeStepMasking(config)
    spread, point = resolve_mask(config, 2), resolve_mask(configuration(DEPTH), 2)
    assert spread is not None
    assert point is not None
    import torch

    rows = torch.from_numpy(tokens)
    numbers = np.arange(6)
    found = masking.generate_masks_for_stack(rows, 2, sequence_ids=numbers)
    assert (found.numpy() == spread.masks(numbers, 0, 32)).all()
    found = masking.generate_masks_for_time_step(rows, 2, sequence_ids=numbers)
    assert (found.numpy() == point.masks(numbers, 0, 32)).all()


def test_what_an_interval_changes_in_ids() -> None:
    def planned(**growth: Any) -> dict[str, str]:
        changes = {f"{G}{key}": value for key, value in growth.items()}
        return ids(plan_run(configuration({**SPANS, **changes}), CORPUS, 10**6))

    two, three = planned(target_stacks=2), planned(target_stacks=3)
    assert {name for name in two if two[name] != three[name]} == {"validation-1"}  # which compares the store
    assert not set(planned(stack_time_span="point").values()) & {planned()[f"stack-{n}"] for n in range(3)}
    listed = {"stack_time_mapping": "custom", "num_time_steps": 4}
    assert planned(target_stacks=2, **listed, time_mapping=[0, 1, 2]) == two  # another spelling of the same steps
    clm = {f"{G}training_objective": "clm"}
    assert ids(plan_run(configuration({**SPANS, **clm}), CORPUS)) == ids(
        plan_run(configuration({**DEPTH, **clm}), CORPUS)
    )


def test_joint_training_draws_from_every_span() -> None:
    config = configuration({**SPANS, "training.joint_steps": 5})
    anneal = plan_run(config, CORPUS).stages[-1].stack
    assert isinstance(anneal, StackRecipe)
    assert [edges(span) for span in anneal.joint_spans] == [pytest.approx(each) for each in EDGES[:3]]
    masks = stage_masks(config, resolve_stages(config)[-1])
    assert masks == {stack: resolve_mask(config, stack) for stack in range(3)}


def test_an_interval_needs_the_step_of_the_stack_above() -> None:
    listed = {**SPANS, f"{G}target_stacks": 2, f"{G}stack_time_mapping": "custom", f"{G}num_time_steps": 4}
    with pytest.raises(ConfigError, match=r"time_mapping: got 2 steps; has no step for stack 2; give one for every"):
        configuration({**listed, f"{G}time_mapping": [0, 1]})
    with pytest.raises(ConfigError, match="falls from 1 to 0 between stacks 1 and 2"):
        configuration({**listed, f"{G}time_mapping": [0, 1, 0]})
    configuration({**listed, f"{G}time_mapping": [0, 1], f"{G}max_stacks": 2})
    configuration({**listed, f"{G}time_mapping": [0, 1], f"{G}stack_time_span": "point"})
