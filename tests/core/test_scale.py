"""What a plan of many stacks costs, in counts: each stack is resolved once, and each recipe hashed once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import ConfigSchema, StackSettings
from stackwise_core.stages import stages
from stackwise_core.stages.identity import Recipe
from stackwise_core.stages.plan import RunPlan, plan_run
from stackwise_core.stages.stages import settings_of

CORPUS = "00" * 32


def planned(n_stacks: int, **growth: Any) -> RunPlan:
    growth |= {"max_stacks": n_stacks, "target_stacks": n_stacks}
    return plan_run(StackWiseConfig.from_dict({"training": {"progressive": growth}}), CORPUS)


def test_each_recipe_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: Counter[int] = Counter()
    dump = Recipe.dump
    monkeypatch.setattr(Recipe, "dump", lambda recipe: (hashed.update([id(recipe)]), dump(recipe))[1])
    plan = planned(20, trunk_strategy="qlora", building_mode="prepend")
    assert len(plan.recipes) == len(hashed) == 1 + 20 * 4  # no store: gradients flow through the trunk
    assert set(hashed.values()) == {1}


def test_each_stack_is_resolved_as_often_in_any_rack(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[int] = Counter()

    def counted(config: ConfigSchema, stack: int) -> StackSettings:
        asked[stack] += 1
        return settings_of(config, stack)

    monkeypatch.setattr(stages, "settings_of", counted)
    planned(10, progressive_qlora=True)
    of_ten = dict(asked)
    asked.clear()
    planned(40, progressive_qlora=True)
    assert [asked[stack] for stack in (0, 5)] == [of_ten[stack] for stack in (0, 5)]
    assert max(asked.values()) == max(of_ten.values())
