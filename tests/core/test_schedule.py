"""The learning rate at every step of a run: each stage by itself, or all of them by one clock."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import notes
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.stages.identity import AdoptedRecipe, StackRecipe
from stackwise_core.stages.plan import RunPlan, plan_run
from stackwise_core.stages.stages import OptimSpec, StackSpec, resolve_stages
from stackwise_core.training.optimizer import learning_rate
from stackwise_core.training.trainer import ProgressiveTrainer
from support.configurations import CORPUS, configuration, ids
from support.training import loader_of, tiny

G = "training.progressive."
CLOCK: dict[str, Any] = {
    "training.schedule": "one_clock",
    "training.decay": "linear",
    "training.steps_per_stack": 5,
    "training.warmup_steps": 2,
    "training.learning_rate": 1.0,
    "training.min_learning_rate": 0.0,
}


def rates_of(changes: dict[str, Any]) -> list[list[float]]:
    optims = [stage.optim for stage in resolve_stages(configuration(changes))]
    return [[learning_rate(optim, step) for step in range(optim.steps)] for optim in optims]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training.decay_steps": 4}, [[0.5, 1, 1, 1, 1], [1] * 5, [1, 1, 0.75, 0.5, 0.25]]),
        ({}, [[0.5, 1, 1, 1, 1], [1] * 5, [1, 1, 1, 2 / 3, 1 / 3]]),  # a fifth of 15 steps
        ({f"{G}stacks": [{}, {}, {"steps": 2}]}, [[0.5, 1, 1, 1, 1], [1] * 5, [1, 0.5]]),
        ({"training.decay_steps": 99}, [[0.5, 1, 1, 1, 1], [1] * 5, [1, 0.8, 0.6, 0.4, 0.2]]),
        ({"training.joint_steps": 4}, [[0.5, 1, 1, 1, 1], [1] * 5, [1] * 5, [1, 0.75, 0.5, 0.25]]),
        ({"training.joint_steps": 4, "training.decay_steps": 2}, [[0.5, 1, 1, 1, 1], [1] * 5, [1] * 5, [1, 1, 1, 0.5]]),
        ({f"{G}enabled": False, "training.decay_steps": 2}, [[0.5, 1, 1, 1, 0.5]]),
        ({f"{G}enabled": False, "training.decay_steps": 9}, [[0.5, 1, 1, 2 / 3, 1 / 3]]),
        ({f"{G}target_stacks": 1, "training.decay_steps": 9}, [[0.5, 1, 1, 2 / 3, 1 / 3]]),
    ],
)
def test_one_clock_warms_up_once_and_decays_at_the_end(changes: dict[str, Any], expected: list[list[float]]) -> None:
    found = rates_of({**CLOCK, **changes})
    assert found == [pytest.approx(stage) for stage in expected]


def test_the_shapes_of_the_decay() -> None:
    def rate(decay: Any, step: int) -> float:
        values = {"steps": 10, "batch_size": 1, "learning_rate": 3.0, "min_learning_rate": 1.0, "warmup_steps": 2}
        others = {"weight_decay": 0.0, "beta1": 0.9, "beta2": 0.9, "gradient_clip": 0.0}
        return learning_rate(OptimSpec(**values, **others, decay=decay), step)  # pyright: ignore

    assert [rate(decay, 2) for decay in ("cosine", "linear", "sqrt")] == [3.0] * 3
    assert [rate(decay, 6) for decay in ("linear", "sqrt")] == pytest.approx([2.0, 3 - 2 * math.sqrt(0.5)])
    assert rate("cosine", 4) == pytest.approx(1 + 2 * (0.5 + math.sqrt(0.125)))
    assert rate("linear", 0) == 1.5


def plan(target: int, **more: Any) -> RunPlan:
    return plan_run(configuration({**CLOCK, f"{G}target_stacks": target, **more}), CORPUS, 10**6)


def test_raising_the_target_leaves_every_stage_that_did_not_decay() -> None:
    three, four = ids(plan(3)), ids(plan(4))
    assert {key for key in three if three[key] != four[key]} == {"stack-2", "validation-2"}
    more = {"training.joint_steps": 5}
    three, four = ids(plan(3, **more)), ids(plan(4, **more))
    assert {key.rsplit("-", 1)[-1] for key in three if three[key] != four[key]} == {"2", "3"}
    assert three["stack-2"] == four["stack-2"]  # only its store is new, and what is compared with it


def test_what_only_the_decay_reads_changes_no_stage_before_it() -> None:
    before = ids(plan(3))
    for key, value in {"decay": "sqrt", "decay_steps": 2, "min_learning_rate": 0.5}.items():
        after = ids(plan(3, **{f"training.{key}": value}))
        assert {name for name in before if before[name] != after[name]} == {"stack-2", "validation-2"}, key


def test_a_clock_begins_with_the_first_stage_that_trains() -> None:
    """The stages of an adopted rack take no step."""
    config = configuration({**CLOCK, f"{G}target_stacks": 2})
    whole = plan_run(config, CORPUS).stages[0]
    stack = StackSpec(index=0, n_blocks=2, precision="full", adapters={})
    adopted = AdoptedRecipe(shape=whole.shape, mode="append", stack=stack, files={}, rack="")
    from stackwise_core.stages.adopt import adopting

    grown = plan_run(adopting(config, [adopted]), CORPUS, adopted=[adopted]).stages[1].stack
    assert isinstance(grown, StackRecipe)
    assert (grown.optim.warmup_steps, grown.optim.decay_steps) == (2, 1)


def test_the_library_decays_where_its_last_call_ends() -> None:
    training = {key.removeprefix("training."): value for key, value in CLOCK.items()}
    config: StackWiseConfig = tiny("clm", **{**training, "learning_rate": 0.01}, progressive={"target_stacks": 3})
    by_call, at_once = ProgressiveTrainer(config), ProgressiveTrainer(config)
    builder = ProgressiveRackBuilder(config)
    for target in (1, 2, 3):
        by_call.train_progressively(builder, loader_of(), target)
    at_once.train_progressively(ProgressiveRackBuilder(config), loader_of())
    assert [result.losses for result in by_call.history] == [result.losses for result in at_once.history]
    rates = [record["learning_rate"] for result in at_once.history for record in result.records]
    assert rates == pytest.approx([0.005, *[0.01] * 12, 0.02 / 3, 0.01 / 3])
    beyond = ProgressiveTrainer(config)
    beyond.train_progressively(ProgressiveRackBuilder(config), loader_of(), 4)
    assert [result.records[-1]["learning_rate"] < 0.01 for result in beyond.history] == [False] * 3 + [True]


def test_what_a_clock_takes_and_does_not_use_is_said() -> None:
    said = {"training.decay_steps": 9, "training.warmup_steps": 7}
    assert notes(configuration({**CLOCK, **said})) == [
        "taken: warmup_steps 5 instead of 7 (steps of the first stage: 5)",
        "taken: decay_steps 5 instead of 9 (steps of the last stage: 5)",
    ]
    annealed = {**CLOCK, "training.joint_steps": 5, "training.joint_learning_rate": 0.5}
    assert notes(configuration(annealed)) == ["not used: joint_learning_rate (schedule: one_clock)"]
    assert notes(configuration({"training.decay_steps": 9})) == ["not used: decay_steps (schedule: per_stage)"]
