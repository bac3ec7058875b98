"""Arms of a comparison: what a run is charged, in a closed form, and arms of equal FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError
from stackwise_core.model.adapters import adapter_parameters
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.stages.arms import ANNEAL, ANNEAL_SHARE, ARMS, END_TO_END, arm, changed
from stackwise_core.stages.charges import charge, cost, judging_flops
from stackwise_core.stages.costs import stage_flops
from stackwise_core.stages.plan import plan_run
from support.runs import tiny

N_ROWS = 1000
WIDTH, FF, VOCAB, LENGTH, BATCH = 16, 32, 264, 16, 4
BLOCK = LENGTH * 2 * (4 * WIDTH**2 + 3 * WIDTH * FF + LENGTH * WIDTH)
"""A block's forward pass of a sequence [FLOP]: four square matrices, three of the SwiGLU, half of the scores."""
HEAD = 2 * (LENGTH - 1) * WIDTH * VOCAB
G = "training.progressive"


@pytest.fixture
def config(tmp_path: Path) -> StackWiseConfig:
    return tiny(tmp_path, {"data.max_sequences": 0, "training.steps_per_stack": 100})


def total(config: StackWiseConfig, n_rows: int = N_ROWS) -> float:
    return cost(config, n_rows)


def steps(config: StackWiseConfig) -> list[int]:
    return [stage.spec.optim.steps for stage in plan_run(config, "0" * 64).stages]


def test_a_frozen_run_is_charged_for_what_trains_and_for_filling_each_store_once(config: StackWiseConfig) -> None:
    found = charge(config, plan_run(config, "0" * 64), N_ROWS)
    trained = 100 * BATCH * 3 * (BLOCK + HEAD)
    rows = 100 * BATCH  # fewer than there are: each is read once
    assert [each.trained for each in found] == [trained] * 3
    assert [each.frozen for each in found] == [0, rows * BLOCK, rows * BLOCK]  # the second store from the first
    assert [each.recomputed for each in found] == [0, rows * BLOCK, 2 * rows * BLOCK]


def test_a_validation_passes_the_whole_rack_twice_where_a_boundary_is_cast(config: StackWiseConfig) -> None:
    stages, n_rows = plan_run(config, "0" * 64).stages, 5
    assert config.validation.max_sequences > n_rows
    judged = [judging_flops(config, stage, n_rows) for stage in stages]
    assert judged == [n_rows * (BLOCK + HEAD), n_rows * 2 * (2 * BLOCK + HEAD), n_rows * 2 * (3 * BLOCK + HEAD)]


def test_rows_that_are_read_again_are_stored_once(config: StackWiseConfig) -> None:
    found = charge(config, plan_run(config, "0" * 64), n_rows=50)
    assert [each.frozen for each in found] == [0, 50 * BLOCK, 50 * BLOCK]
    assert found[2].recomputed == 2 * 400 * BLOCK


def test_without_a_cache_frozen_stacks_are_passed_at_every_step(config: StackWiseConfig) -> None:
    config = changed(config, {f"{G}.cache_activations": False})
    found = charge(config, plan_run(config, "0" * 64), N_ROWS)
    assert [each.frozen for each in found] == [each.recomputed for each in found] == [0, 400 * BLOCK, 800 * BLOCK]


def test_adapters_are_charged_three_products_of_each(config: StackWiseConfig) -> None:
    config = changed(config, {f"{G}.trunk_strategy": "qlora", f"{G}.progressive_qlora": True})
    builder = ProgressiveRackBuilder(config)
    for _ in range(3):
        builder.add_stack()
    plan = plan_run(config, "0" * 64)
    bare = sum(stage_flops(plan.stages[2].shape, plan.stages[2].spec, LENGTH, (LENGTH - 1) / LENGTH))
    parameters = sum(each.numel() for stack in builder.stacks for each in adapter_parameters(stack))
    assert charge(config, plan, N_ROWS)[2].trained - bare == pytest.approx(6 * parameters * 100 * BATCH * LENGTH)


def test_where_every_stage_reads_on_new_rows_are_filled_from_tokens(config: StackWiseConfig) -> None:
    found = charge(
        changed(config, {"data.rows": "fresh"}), plan_run(changed(config, {"data.rows": "fresh"}), "0" * 64), 10**6
    )
    assert [each.frozen for each in found] == [0, 400 * BLOCK, 2 * 400 * BLOCK]


def test_a_scale_by_depth_is_that_of_the_configuration_and_of_smaller_models_their_own(config: StackWiseConfig) -> None:
    config = changed(config, {"model.residual_scale": "depth"})
    arms = {name: arm(config, ARMS[name](config), total(config), N_ROWS) for name in ARMS}
    found = {name: plan_run(each, "0" * 64).stages[-1].shape.residual_blocks for name, each in arms.items()}
    assert found == dict.fromkeys(ARMS, 12) | {"flat-1/3": 1, "flat-2/3": 2}


MIXED = [{}, {"mode": "prepend", "steps": 50}, {"mode": "insert", "tail_stacks": 2}]
WAYS = {"full": "append", "frozen": "append", "insert": "insert", "frozen+anneal": "append"}


@pytest.mark.parametrize("base", [{f"{G}.stacks": MIXED, f"{G}.tail_stacks": 2}, {f"{G}.enabled": False}], ids=str)
@pytest.mark.parametrize(("name", "mode"), WAYS.items())
def test_an_arm_grows_as_its_name_says_whatever_single_stacks_do(
    name: str, mode: str, base: dict[str, Any], config: StackWiseConfig
) -> None:
    config = changed(config, base)
    found = arm(config, ARMS[name](config), total(config), N_ROWS)
    stages = plan_run(found, "0" * 64).stages
    assert [stage.spec.mode for stage in stages[1:3]] == [mode] * 2
    assert [stage.spec.tail for stage in stages[1:3]] == [int(mode == "insert")] * 2
    assert all(stage.spec.anatomy.boundary == 0 for stage in stages) == (name == "full")
    if base.get(f"{G}.stacks"):
        assert found.training.progressive.stacks[1].steps == pytest.approx(steps(found)[0] / 2, abs=1)


def test_the_share_of_an_anneal_is_a_key_of_an_arm(config: StackWiseConfig) -> None:
    found = arm(config, {**ARMS["full"](config), ANNEAL: 0.4}, total(config), N_ROWS)
    assert charge(found, plan_run(found, "0" * 64), N_ROWS)[-1].total / total(found) == pytest.approx(0.4, abs=0.01)
    with pytest.raises(ConfigError, match=r"anneal: got 0\.4; joint training at the end needs an arm that grows"):
        arm(config, {**ARMS[END_TO_END](config), ANNEAL: 0.4}, total(config), N_ROWS)


@pytest.mark.parametrize("share", [1e-2, 1e-6])
def test_what_an_anneal_leaves_of_too_small_a_budget_is_refused(share: float, config: StackWiseConfig) -> None:
    with pytest.raises(ConfigError, match="in the shortest stage of an arm"):
        arm(config, ARMS["frozen+anneal"](config), share * total(config), N_ROWS)


def test_a_single_block_has_no_depth_to_jump_to(config: StackWiseConfig) -> None:
    with pytest.raises(ConfigError, match="'jump'; CONFIG has one block"):
        ARMS["jump"](changed(config, {f"{G}.target_stacks": 1}))


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("times", [1, 3])
def test_every_arm_costs_the_budget_to_half_a_step_of_each_stage(
    name: str, times: int, config: StackWiseConfig
) -> None:
    budget = times * total(config)
    found = arm(config, ARMS[name](config), budget, N_ROWS)
    a_step = BATCH * 3 * (3 * BLOCK + HEAD)
    assert abs(total(found) - budget) <= 0.5 * len(steps(found)) * a_step


def test_the_end_to_end_arm_has_the_steps_of_the_closed_form(config: StackWiseConfig) -> None:
    budget = 1e10
    found = arm(config, ARMS[END_TO_END](config), budget, N_ROWS)
    assert steps(found) == [round(budget / (BATCH * 3 * (3 * BLOCK + HEAD)))]
    assert found.training.schedule == "one_clock"


def test_arms_have_the_depth_and_the_seed_of_the_configuration(config: StackWiseConfig) -> None:
    blocks: dict[str, int] = {}
    for name, changes in ARMS.items():
        found = arm(config, changes(config), total(config), N_ROWS)
        assert (found.run.seed, found.data, found.training.batch_size) == (0, config.data, BATCH)
        blocks[name] = sum(stack.n_blocks for stack in plan_run(found, "0" * 64).stages[-1].spec.stacks)
    assert blocks == dict.fromkeys(ARMS, 3) | {"flat-1/3": 1, "flat-2/3": 2}


def test_the_anneal_has_its_share_and_everything_trains_in_it(config: StackWiseConfig) -> None:
    found = arm(config, ARMS["frozen+anneal"](config), total(config), N_ROWS)
    charges = charge(found, plan_run(found, "0" * 64), N_ROWS)
    assert charges[-1].total / total(found) == pytest.approx(ANNEAL_SHARE, abs=0.01)
    assert charges[-1].trained == found.training.joint_steps * BATCH * 3 * (3 * BLOCK + HEAD)


def test_stages_of_ones_own_keep_the_ratio_of_their_steps(config: StackWiseConfig) -> None:
    own: dict[str, Any] = {f"{G}.stacks": [{"steps": 50}, {}, {"steps": 200}], "training.joint_steps": 25}
    many = 10**6  # so that none is read twice
    found = arm(config, own, 3 * total(changed(config, own), many), many)
    assert steps(found) == [150, 300, 600, 75]


def test_too_small_a_budget_is_refused_with_what_it_gives(config: StackWiseConfig) -> None:
    with pytest.raises(ConfigError, match=r"1 in the shortest stage of an arm; at least 2 steps in every stage"):
        arm(config, {}, total(config) / 100, N_ROWS)
