"""What trains in each stage, in which order, and who trained what last: against tables written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.stages import Anatomy, joint_anatomy, last_trained, stage_anatomy

E, A, N = "everything", "adapters", "nothing"
ADAPTED = {"qlora_enabled": True, "trunk_strategy": "qlora"}
INSERT: dict[str, Any] = {"building_mode": "insert"}
THEN_PREPEND: dict[str, Any] = {"stacks": [{}, {}, {"mode": "prepend"}]}


def config_of(growth: dict[str, Any]) -> StackWiseConfig:
    return StackWiseConfig.from_dict({"training": {"progressive": growth}})


@pytest.mark.parametrize(
    ("growth", "order", "trains", "embedding_trains", "head_trains", "boundary"),
    [  # of the third stage
        ({}, (0, 1, 2), (N, N, E), False, True, 2),
        ({"train_head": False}, (0, 1, 2), (N, N, E), False, False, 2),
        ({"train_head": False, "trunk_strategy": "full"}, (0, 1, 2), (E, E, E), True, True, 0),
        ({"building_mode": "prepend"}, (2, 1, 0), (E, N, N), False, False, 0),
        (THEN_PREPEND, (2, 0, 1), (E, N, N), False, False, 0),
        ({"stacks": [{}, {"mode": "prepend"}]}, (1, 0, 2), (N, N, E), False, True, 2),
        ({"trunk_strategy": "full"}, (0, 1, 2), (E, E, E), True, True, 0),
        ({"trunk_strategy": "full", "building_mode": "prepend"}, (2, 1, 0), (E, E, E), True, True, 0),
        (ADAPTED, (0, 1, 2), (A, A, E), False, True, 0),
        ({**ADAPTED, "building_mode": "prepend"}, (2, 1, 0), (E, A, A), False, False, 0),
        ({**ADAPTED, "trunk_trainable_top": 1}, (0, 1, 2), (N, A, E), False, True, 1),
        ({**ADAPTED, **THEN_PREPEND, "trunk_trainable_top": 1}, (2, 0, 1), (E, N, A), False, False, 0),
        ({"trunk_strategy": "qlora", "stacks": [{}, {"precision": "qlora"}]}, (0, 1, 2), (A, A, E), False, True, 0),
        ({"trunk_strategy": "qlora"}, (0, 1, 2), (A, A, E), False, True, 0),
        (INSERT, (1, 2, 0), (N, E, E), False, True, 1),
        ({**INSERT, "tail_strategy": "frozen"}, (1, 2, 0), (N, E, N), False, False, 1),
        ({**INSERT, "tail_strategy": "qlora"}, (1, 2, 0), (N, E, A), False, False, 1),
        ({**INSERT, "new_stack_precision": "qlora"}, (1, 2, 0), (N, A, A), False, True, 1),
        ({**INSERT, "tail_stacks": 7}, (2, 1, 0), (E, E, E), False, True, 0),
        ({**INSERT, "trunk_strategy": "full", "tail_strategy": "frozen"}, (1, 2, 0), (E, E, N), True, True, 0),
        ({**INSERT, "trunk_strategy": "qlora", "tail_strategy": "frozen"}, (1, 2, 0), (A, E, N), False, False, 0),
        ({"stacks": [{}, {}, {"mode": "insert"}]}, (0, 2, 1), (N, E, E), False, True, 1),
        ({"stacks": [{}, {}, {"mode": "insert", "tail_stacks": 2}]}, (2, 0, 1), (E, E, E), False, True, 0),
        ({"new_stack_precision": "qlora"}, (0, 1, 2), (N, N, A), False, True, 2),
        ({"new_stack_precision": "nvfp4"}, (0, 1, 2), (N, N, E), False, True, 2),
    ],
)
def test_the_third_stage(
    growth: dict[str, Any],
    order: tuple[int, ...],
    trains: tuple[str, ...],
    embedding_trains: bool,
    head_trains: bool,
    boundary: int,
) -> None:
    anatomy = stage_anatomy(config_of(growth), 2)
    assert (anatomy.order, anatomy.trains) == (order, trains)
    assert (anatomy.embedding_trains, anatomy.head_trains) == (embedding_trains, head_trains)
    assert (anatomy.boundary, anatomy.newest) == (boundary, 2)
    assert anatomy.below + anatomy.live == order
    assert len(anatomy.below) == boundary
    assert [anatomy.trains_of(stack) for stack in order] == list(trains)
    assert anatomy.trained == tuple(stack for stack in order if anatomy.trains_of(stack) != N)


@pytest.mark.parametrize(
    "growth", [{}, {"building_mode": "prepend"}, {"train_head": False}, {"new_stack_precision": "qlora"}, ADAPTED]
)
def test_the_first_stage_trains_everything_there_is(growth: dict[str, Any]) -> None:
    """Also a stack that is to be NF4: there is nothing yet to be a copy of."""
    whole = Anatomy(order=(0,), trains=(E,), embedding_trains=True, head_trains=True)
    assert stage_anatomy(config_of(growth), 0) == whole


@pytest.mark.parametrize(
    ("growth", "trains"),
    [
        ({"stacks": [{}, {"precision": "qlora"}, {"precision": "half"}]}, (E, A, E)),
        ({"qlora_enabled": True, "new_stack_precision": "nvfp4"}, (A, A, A)),
        ({"enabled": False, "new_stack_precision": "nvfp4"}, (E, E, E)),  # from scratch: nothing is quantised yet
    ],
)
def test_joint_training(growth: dict[str, Any], trains: tuple[str, ...]) -> None:
    anatomy = joint_anatomy(config_of(growth), 3)
    assert (anatomy.order, anatomy.trains) == ((0, 1, 2), trains)
    assert (anatomy.embedding_trains, anatomy.head_trains, anatomy.boundary) == (True, True, 0)


def test_a_part_is_from_the_last_stage_that_trained_it() -> None:
    """With the top stack adapting, stage n + 1 is the last to touch the adapters of stack n, and n its base."""
    config = config_of({**ADAPTED, "trunk_trainable_top": 1, "target_stacks": 4})
    anatomies = [stage_anatomy(config, stage) for stage in range(4)]
    assert [last_trained(anatomies, stack, "base") for stack in range(4)] == [0, 1, 2, 3]
    assert [last_trained(anatomies, stack, "adapters") for stack in range(4)] == [1, 2, 3, 3]
    # NF4 is made, and never trained: its base is from the stage that made it.
    nf4 = config_of({"new_stack_precision": "qlora"})
    assert last_trained([stage_anatomy(nf4, stage) for stage in range(3)], 1, "base") == 1
