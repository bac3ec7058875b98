"""`validation.cooldown_steps` in the library: the loss of a run whose clock ends there, and nothing else changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer, StackWiseConfig
from stackwise_core.errors import StageInterruptedError
from stackwise_core.training.results import StageResult
from stackwise_core.training.training import Hooks
from support.training import loader_of, same_bits, tiny, weights

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")

CLOCK: dict[str, Any] = {"schedule": "one_clock", "decay": "linear", "optimizer_state": "keep"}
MODES: dict[str, dict[str, Any]] = {
    "insert": {"building_mode": "insert"},
    "quantised": {"new_stack_precision": "qlora", "trunk_strategy": "qlora", "qlora_rank": 2},
}
STEPS, COOLED = 7, 4


def config_of(mode: str, cooldown: int = COOLED, target: int = 3, **training: Any) -> StackWiseConfig:
    config = tiny("clm", **{**CLOCK, **training, "progressive": {"target_stacks": target, **MODES[mode]}})
    config.validation.cooldown_steps = cooldown
    config.cache.dtype = "int8" if mode == "quantised" else "bfloat16"
    return config


def grown(config: StackWiseConfig, builder: Any = None, **how: Any) -> tuple[ProgressiveRackBuilder, list[StageResult]]:
    builder, trainer = builder or ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    return builder, trainer.train_progressively(builder, loader_of(5), validation=loader_of(2), **how)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_loss_of_a_run_whose_clock_ends_there(mode: str) -> None:
    builder, results = grown(config_of(mode))
    plain, others = grown(config_of(mode, cooldown=0))
    assert same_bits(weights(builder.build_rack()), weights(plain.build_rack()))
    assert builder.digests() == plain.digests()
    assert same_bits(builder.moments, plain.moments)
    assert [(each.losses, each.validation_loss) for each in results] == [
        (each.losses, each.validation_loss) for each in others
    ]
    assert [each.cooled_loss is None for each in results] == [False, False, True]  # the last stage decays by itself
    for stage, result in enumerate(results[:2]):
        steps = [{"steps": STEPS}] * stage + [{"steps": STEPS + COOLED}]
        ends_there = config_of(mode, cooldown=0, target=stage + 1, decay_steps=COOLED)
        ends_there.training.progressive.stacks = ends_there.training.progressive.model_validate(
            {"stacks": steps}
        ).stacks
        _, reached = grown(ends_there)
        assert result.cooled_loss == reached[-1].validation_loss != result.validation_loss
        assert f", cooled {result.cooled_loss:.4f}, " in result.summary()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stop_within_it_goes_on_after_the_last_step_of_its_stage(elsewhere: bool, tmp_path: Path) -> None:
    config, asked = config_of("insert"), itertools.count(1)
    straight, expected = grown(config)
    folder = tmp_path / "state" if elsewhere else None
    stopping = Hooks(should_stop=lambda: next(asked) == STEPS + COOLED + STEPS + 2, checkpoint_folder=folder)
    builder = ProgressiveRackBuilder(config)
    with pytest.raises(StageInterruptedError, match="stopped on request while stage 1 cooled down; the same call"):
        grown(config, builder, hooks=stopping)
    again = None if elsewhere else builder
    builder, results = grown(config, again, hooks=Hooks(checkpoint_folder=folder))
    assert builder.digests() == straight.digests()
    assert [each.cooled_loss for each in results] == [each.cooled_loss for each in expected][-len(results) :]
    assert [each.losses for each in results] == [each.losses for each in expected][-len(results) :]
