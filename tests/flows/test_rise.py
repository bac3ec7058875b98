"""A stage that validates worse than the one before it is said, in the log and in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.pages.report import report
from flows.pages.run import verdict_of
from flows.run.summary import StageSummary, rise, summarise
from stackwise_core.stages.plan import plan_config
from storage.artifacts import Artifacts
from support.runs import grown, tiny


def stage(number: int, loss: float | None, ratio: float | None = None, **at: float) -> StageSummary:
    return StageSummary(
        stage=number,
        name="append, frozen, full",
        states={"stack": "sealed", "validation": "sealed"},
        artifacts={},
        steps=1,
        stacks=number + 1,
        blocks=1,
        validation_loss=loss,
        mask_ratio=ratio,
        by_mask_ratio=at,
    )


def test_a_rise_is_of_the_last_stage_over_the_one_measured_before() -> None:
    worse = "stage 2 is worse than stage 0: validation loss 2.0000, then 2.1000; more steps"
    assert rise([stage(0, 2.0), stage(1, None), stage(2, 2.1)]).startswith(worse)  # stage 1 was adopted
    for losses in ([2.0], [2.0, 1.9], [2.0, 2.0], [2.0, 2.01], [2.0, 2.5, 2.4], [2.0, 2.5, None], [None, 2.0]):
        assert rise([stage(n, loss) for n, loss in enumerate(losses)]) == ""


def test_stages_of_different_ratios_are_compared_at_equal_ones() -> None:
    """More masks are harder: by its own ratio every stage here is worse than the one before."""
    first = stage(0, 1.0, 0.15, a=1.0, b=3.0)
    assert rise([first, stage(1, 2.0, 0.5, a=0.9, b=2.9)]) == ""
    text = rise([first, stage(1, 2.0, 0.5, a=1.5, b=2.9)])
    assert "mean validation loss at equal mask ratios 2.0000, then 2.2000" in text
    assert rise([first, stage(1, 2.0, 0.15, a=0.9, b=2.9)]).startswith("stage 1 is worse")
    assert rise([stage(0, 1.0, 0.15), stage(1, 2.0, 0.5)]) == ""  # nothing in common


def test_a_report_says_what_came_of_stages_at_equal_mask_ratios() -> None:
    first, last = stage(0, 1.0, 0.15, a=1.0, b=3.0), stage(2, 2.0, 0.5, a=0.8, b=2.7)
    said = verdict_of([first, stage(1, 3.0, 0.3, a=0.9, b=2.9), last])
    assert said == (
        "All 3 stages are done. Mean validation loss at equal mask ratios fell from 2.0000 with one stack to 1.7500 "
        "nats with 3 stacks; the last stack lowered it by 0.1500."
    )
    alike = verdict_of([first, stage(1, 0.75, 0.15, a=9.0, b=9.0)])
    assert "Validation loss fell from 1.0000 with one stack to 0.7500 nats at 15\u00a0% masked with 2 stacks" in alike
    apart = verdict_of([stage(0, 1.0, 0.15), stage(1, 2.0, 0.5)])  # nothing in common
    assert apart == "All 2 stages are done. Validation loss is 2.0000 nats at 50\u00a0% masked, with 2 stacks."


@pytest.mark.usefixtures("quick_disk")
def test_a_run_says_it_once_in_its_log_and_its_report(tmp_path: Path) -> None:
    growth = "training.progressive."
    changes = {f"{growth}target_stacks": 2, "training.new_stack_init": "random", "training.steps_per_stack": 30}
    config = tiny(
        tmp_path,
        {**changes, "training.warmup_steps": 1, "training.learning_rate": 0.2, f"{growth}stacks": [{}, {"steps": 1}]},
    )
    recorder = grown(config, tmp_path / "artifacts")
    stages = summarise(Artifacts(tmp_path / "artifacts"), plan_config(config))
    (said,) = [text for text in recorder.messages if "worse" in text]
    assert said == rise(stages)
    assert said.startswith("stage 1 is worse than stage 0: validation loss ")
    written = report("r", "/a", stages, {}, [], len(stages))
    assert written.count(said[1:]) == 1
    assert written.index("## Stage 1") < written.index(said[1:])
