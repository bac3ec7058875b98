"""The state of the optimizer across growth: moments bit for bit, and each parameter's own clock."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.config.unused import notes
from stackwise_core.errors import StageInterruptedError
from stackwise_core.stages.identity import NUMERICS
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.stages import resolve_stage
from stackwise_core.training.training import Hooks, TrainingState
from support.configurations import CORPUS, configuration, ids
from support.training import begins_with, grown, loader_of, same_bits, tiny, weights

G = "training.progressive."
FLAT: dict[str, Any] = {"warmup_steps": 0, "min_learning_rate": 2e-3, "learning_rate": 2e-3}
KEPT: dict[str, Any] = {"optimizer_state": "keep", **FLAT}
FULL = {"trunk_strategy": "full"}


def parameters_of(moments: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(part): value for name, value in moments.items() if name.startswith(part)}


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_two_stages_of_the_same_parameters_are_one_stage_of_all_steps(state: str) -> None:
    batches, results = loader_of(8), list[dict[str, Tensor]]()
    for calls in ([batches], [batches[:3], batches[3:]]):
        config = tiny("clm", **{**KEPT, "optimizer_state": state})
        builder = ProgressiveRackBuilder(config)
        builder.append_stack()
        for part in calls:
            config.training.steps_per_stack = len(part)
            ProgressiveTrainer(config).train_rack(builder, part, None)
        results.append(weights(builder.build_rack()))
    assert same_bits(*results) == (state == "keep")


@pytest.mark.parametrize("new_state", ["zero", "copy"])
def test_the_first_step_after_growth_is_adamw_of_each_parameters_own_step(new_state: str) -> None:
    """Against the formula of Loshchilov and Hutter 2019, from gradients of the whole rack."""
    config = tiny("clm", **KEPT, gradient_clip=0.0, weight_decay=0.1, new_state=new_state, progressive=FULL)
    builder = grown(config, 1)
    builder.append_stack()
    builder.prepare_stage(resolve_stage(config, 1))
    left, rack = builder.moments, copy.deepcopy(builder.build_rack().requires_grad_(True))
    tokens = loader_of()[0]
    logits = rack(tokens)[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    config.training.steps_per_stack = 1
    states: list[TrainingState] = []
    hooks = Hooks(on_end=lambda state: states.append(state.copy()))
    grown(config, 2, builder, hooks=hooks)
    found = states[0].tensors
    beta1, beta2, rate = config.training.beta1, config.training.beta2, config.training.learning_rate
    of_rack = {f"stacks.{s.creation_index}.{n}": p for s in rack.stacks for n, p in s.named_parameters()}  # pyright: ignore
    of_rack |= {f"head.{n}": p for n, p in rack.head.named_parameters()}
    of_rack["embedding.weight"] = rack.embedding.weight
    for name, before in of_rack.items():
        source = "embedding.weight" if name == "head.projection.weight" else name  # they were tied
        if new_state == "copy":
            source = source.replace("stacks.1", "stacks.0")
        m, v, t = (left.get(f"{source}.{moment}", torch.zeros(())) for moment in ("exp_avg", "exp_avg_sq", "step"))
        assert t == (0 if name.startswith("stacks.1") and new_state == "zero" else 7)
        assert before.grad is not None
        m, v, t = beta1 * m + (1 - beta1) * before.grad, beta2 * v + (1 - beta2) * before.grad**2, t + 1
        decay = 0.1 if before.dim() > 1 and name != "embedding.weight" else 0.0
        step = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        expected = before * (1 - rate * decay) - rate * step
        torch.testing.assert_close(found[f"model.{name}"], expected.detach(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("source", "blocks"), [("neighbour", [0, 1, 0]), ("interleaved", [0, 0, 1])])
def test_moments_are_those_of_the_source_bit_for_bit(source: str, blocks: list[int]) -> None:
    growth = {**FULL, "stacks": [{"n_blocks": 2}, {"n_blocks": 3}], "qlora_enabled": True, "progressive_qlora": True}
    config = tiny("clm", **KEPT, new_state="copy", new_stack_source=source, progressive=growth)
    builder = grown(config, 1)
    found, left = begins_with(builder, config), builder.moments
    for part in ("stacks.0.", "head.norm."):
        kept = {name.replace(".base_layer", ""): value for name, value in parameters_of(left, part).items()}
        now = {name.replace(".base_layer", ""): value for name, value in parameters_of(found, part).items()}
        assert same_bits(now, kept)
    assert same_bits(parameters_of(found, "head.projection.weight."), parameters_of(left, "embedding.weight."))
    assert not any("lora" in name for name in parameters_of(found, "stacks.1."))
    for new, old in enumerate(blocks):
        kept = parameters_of(left, f"stacks.0.blocks.{old}.")
        kept = {name: value for name, value in kept.items() if "lora" not in name}
        assert same_bits(parameters_of(found, f"stacks.1.blocks.{new}."), kept)


def test_only_the_state_of_the_stage_right_before_is_kept() -> None:
    """A frozen trunk: the head goes on; the first stack, frozen since, begins anew in the joint anneal."""
    config = tiny("clm", **KEPT, joint_steps=3)
    states: list[TrainingState] = []
    grown(config, 2, hooks=Hooks(on_end=lambda state: states.append(state.copy())))
    steps = [{name: int(v) for name, v in state.tensors.items() if name.endswith(".step")} for state in states]
    assert steps[1]["optimizer.head.norm.weight.step"] == 14
    assert steps[1]["optimizer.stacks.1.blocks.0.ffn.down_proj.weight.step"] == 7
    assert steps[2]["optimizer.head.norm.weight.step"] == 17
    assert steps[2]["optimizer.stacks.1.blocks.0.ffn.down_proj.weight.step"] == 10
    assert steps[2]["optimizer.stacks.0.blocks.0.ffn.down_proj.weight.step"] == 3


def test_growth_goes_on_from_the_state_before_the_anneal() -> None:
    annealed = tiny("clm", **KEPT, joint_steps=3, progressive=FULL)
    builder = grown(annealed, 1)
    annealed.training.joint_steps = 0
    straight = tiny("clm", **KEPT, progressive=FULL)
    assert same_bits(weights(grown(annealed, 2, builder).build_rack()), weights(grown(straight, 2).build_rack()))


def test_a_rack_that_was_saved_or_stopped_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    config = tiny("clm", **KEPT, progressive=FULL)
    expected = weights(grown(config, 2).build_rack())
    grown(config, 1).save(tmp_path / "rack")
    assert same_bits(weights(grown(config, 2, ProgressiveRackBuilder.load(tmp_path / "rack")).build_rack()), expected)
    asked = itertools.count()
    stopping = Hooks(checkpoint_folder=tmp_path / "kept", should_stop=lambda: next(asked) == 9)  # in the second stage
    with pytest.raises(StageInterruptedError):
        grown(config, 2, hooks=stopping)
    assert same_bits(weights(grown(config, 2, hooks=Hooks(checkpoint_folder=tmp_path / "kept")).build_rack()), expected)


# ---------------------------------------------------------------- ids

KEEP = {"training.optimizer_state": "keep"}


def renamed(changes: dict[str, Any], base: dict[str, Any]) -> set[str]:
    before, after = (ids(plan_run(configuration(each), CORPUS)) for each in (base, {**base, **changes}))
    return {name for name in before if before[name] != after.get(name)}


def test_a_stage_has_the_state_it_goes_on_from_in_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {"build-2", "trunk-2", "stack-1", "stack-2", "activations-1", "validation-1", "validation-2"}
    assert renamed(KEEP, {}) == trained
    assert "stack-1" in renamed({"training.new_state": "copy"}, KEEP)
    before = ids(plan_run(configuration(KEEP), CORPUS))
    assert {"optimizer-0", "optimizer-1", "optimizer-2"} <= before.keys()
    monkeypatch.setitem(NUMERICS, "optimizer", 2)
    after = ids(plan_run(configuration(KEEP), CORPUS))
    assert {name for name in before if before[name] != after[name]} >= {"optimizer-0", "stack-1", "stack-2"}


@pytest.mark.parametrize(
    "base",
    [
        {f"{G}building_mode": "prepend"},
        {f"{G}building_mode": "insert", f"{G}tail_strategy": "frozen"},
        {f"{G}train_head": False},
        {f"{G}enabled": False},
    ],
)
def test_where_nothing_trains_twice_nothing_is_renamed(base: dict[str, Any]) -> None:
    assert not renamed(KEEP, base)
    assert "optimizer-0" not in ids(plan_run(configuration({**base, **KEEP}), CORPUS))


def test_a_copied_state_alone_is_read_too() -> None:
    prepended = {f"{G}building_mode": "prepend", **KEEP}
    assert "optimizer_state" in notes(configuration(prepended))[0]
    assert not notes(configuration({**prepended, "training.new_state": "copy"}))
    assert "stack-1" in renamed({"training.new_state": "copy"}, prepended)


def test_the_last_state_is_left_where_a_later_stage_may_read_it() -> None:
    def left(changes: dict[str, Any]) -> list[int]:
        run = plan_run(configuration({**KEEP, **changes}), CORPUS)
        return [stage.index for stage in run.stages if stage.optimizer]

    assert left({}) == left({"training.joint_steps": 5}) == [0, 1, 2]
    assert left({"training.schedule": "one_clock"}) == [0, 1]  # raising the target trains the last stage again
    assert left({f"{G}max_stacks": 3}) == [0, 1]
