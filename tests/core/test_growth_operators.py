"""Copies that are noisy, damped, interleaved, blended, or of another stack: against the formula, weight by weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise_core.config.unused import notes
from stackwise_core.errors import ConfigError
from stackwise_core.model.blocks import Stack
from stackwise_core.model.growth_operators import grow_stack
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.stages import GrowthOperator, InitSpec, resolve_stages
from support.configurations import CORPUS, configuration, ids
from support.training import tiny

G = "training.progressive."
SHAPE = ModelShape(vocab_size=32, d_model=16, n_heads=2, n_kv_heads=2, d_ff=32, causal=True)
LAST = ("o_proj.weight", "down_proj.weight")


def grown(n_blocks: int, operator: GrowthOperator, init: dict[str, Any], *sources: Stack) -> Stack:
    return grow_stack(SHAPE, n_blocks, 2, operator, 0, sources, InitSpec(**init))


def made(index: int, n_blocks: int = 2) -> Stack:
    return grow_stack(SHAPE, n_blocks, index, "random", 7)


def named(stack: Stack) -> dict[str, Tensor]:
    return dict(stack.named_parameters())


def test_noise_mixes_a_copy_with_a_random_stack() -> None:
    source, drawn = named(made(0)), named(grown(2, "random", {}))
    for name, found in named(grown(2, "copy", {"noise": 0.25}, made(0))).items():
        torch.testing.assert_close(found, 0.75 * source[name] + 0.25 * drawn[name])
    zeroed = named(grown(2, "copy_zero", {"noise": 0.25}, made(0)))
    assert not any(zeroed[name].any() for name in zeroed if name.endswith(LAST))


@pytest.mark.parametrize(("operator", "sources"), [("copy", [made(0)]), ("random", [])])
def test_a_scale_damps_what_each_half_of_a_block_ends_with(operator: GrowthOperator, sources: list[Stack]) -> None:
    plain = named(grown(2, operator, {}, *sources))
    for name, found in named(grown(2, operator, {"output_scale": 0.25}, *sources)).items():
        assert found.equal(plain[name] * (0.25 if name.endswith(LAST) else 1.0)), name


@pytest.mark.parametrize(
    ("n_source", "n_new", "rows", "turns"),
    [(2, 4, [0, 0, 1, 1], [0, 1, 0, 1]), (2, 5, [0, 0, 0, 1, 1], [0, 1, 0, 1, 0]), (4, 2, [0, 2], [0, 1])],
)
def test_blocks_are_repeated_in_a_row_or_in_turn(n_source: int, n_new: int, rows: list[int], turns: list[int]) -> None:
    source = made(0, n_source)
    for interleaved, expected in ((True, rows), (False, turns)):
        found = grown(n_new, "copy", {"interleaved": interleaved}, source)
        for block, of in zip(found.blocks, expected, strict=True):
            other = source.blocks[of]
            assert all(a.equal(b) for a, b in zip(block.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("source", "append", "insert", "prepend"),
    [  # of the fifth stack, on the trunk 0 1 2 3, 1 2 3 0 or 3 2 1 0
        ("neighbour", (3,), (3,), (3,)),
        ("interleaved", (3,), (3,), (3,)),
        ("top", (3,), (0,), (0,)),
        ("middle", (1,), (2,), (2,)),
        ("blend", (3,), (3, 0), (3,)),
    ],
)
def test_where_a_copy_comes_from(source: str, append: Any, insert: Any, prepend: Any) -> None:
    for mode, expected in {"append": append, "insert": insert, "prepend": prepend}.items():
        changes = {f"{G}building_mode": mode, f"{G}target_stacks": 5, "training.new_stack_source": source}
        assert resolve_stages(configuration(changes))[4].sources == expected, mode


def test_a_blend_is_half_of_each_neighbour() -> None:
    builder = ProgressiveRackBuilder(tiny("clm", new_stack_source="blend", progressive={"building_mode": "insert"}))
    below, above = builder.append_stack(), builder.append_stack(n_blocks=1)
    found = builder.insert_stack()
    assert [stack.creation_index for stack in builder.stacks] == [0, 2, 1]
    for n, block in enumerate(found.blocks):
        halves = zip(block.parameters(), below.blocks[n].parameters(), above.blocks[0].parameters(), strict=True)
        for mean, one, other in halves:
            torch.testing.assert_close(mean, (one + other) / 2)


def ids_of(**training: Any) -> dict[str, str]:
    return ids(plan_run(configuration({f"training.{key}": value for key, value in training.items()}), CORPUS, 10**6))


def test_another_spelling_of_the_same_start_has_the_same_ids() -> None:
    plain = ids_of()
    assert ids_of(new_stack_init="copy", new_stack_output_scale=0.0) == ids_of(new_stack_init="copy_zero")
    assert ids_of(new_stack_init="random", new_stack_output_scale=0.0) == ids_of(new_stack_init="zero")
    assert ids_of(new_stack_source="top") == ids_of(new_stack_source="interleaved") == plain  # as many blocks
    assert ids_of(new_stack_init="random", new_stack_source="middle", new_stack_noise=0.5) == ids_of(
        new_stack_init="random"
    )
    changed = [{"new_stack_noise": 0.5}, {"new_stack_output_scale": 0.5}, {"new_stack_source": "middle"}]
    every = [plain, *(ids_of(**each) for each in changed)]
    assert len({found["stack-2"] for found in every}) == 4
    assert {found["stack-0"] for found in every} == {plain["stack-0"]}  # the first has nothing to start from


def test_a_scale_makes_auto_a_copy() -> None:
    changes = {f"{G}building_mode": "prepend", "training.new_stack_output_scale": 0.5}
    assert [stage.operator for stage in resolve_stages(configuration(changes))] == ["random", "copy", "copy"]


def test_what_makes_no_sense_is_refused_and_what_is_not_used_is_said() -> None:
    with pytest.raises(ConfigError, match=r"training\.new_stack_noise: got 0\.2; stacks 1, 2 are NF4"):
        configuration({f"{G}new_stack_precision": "qlora", "training.new_stack_noise": 0.2})
    said = {"training.new_stack_init": "zero", "training.new_stack_noise": 0.2, "training.new_stack_output_scale": 0.5}
    assert notes(configuration(said)) == ["not used: new_stack_noise, new_stack_output_scale (new_stack_init: zero)"]
