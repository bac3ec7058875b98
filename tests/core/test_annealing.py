"""Joint training of a rack in memory: an anneal at the end, once, and growth from the rack before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import StageInterruptedError
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.training.trainer import ProgressiveTrainer
from stackwise_core.training.training import Hooks
from support.training import loader_of, tiny

pytestmark = pytest.mark.usefixtures("one_thread_per_module")

LOADER = loader_of()
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "half": {"new_stack_precision": "half"},
    "qlora": {"new_stack_precision": "qlora", "qlora_rank": 2, "progressive_qlora": True, "progressive_qlora_rank": 1},
    "prepend, time as depth": {"building_mode": "prepend", "time_interpretation": "depth"},
}


def annealing(kind: str = "full", joint_steps: int = 2, dtype: Any = "bfloat16") -> StackWiseConfig:
    config = tiny(steps_per_stack=2, joint_steps=joint_steps, progressive=KINDS[kind])
    config.cache.dtype = dtype
    return config


def grown(config: StackWiseConfig, *targets: int) -> ProgressiveRackBuilder:
    builder = ProgressiveRackBuilder(config)
    for target in targets:
        ProgressiveTrainer(config).train_progressively(builder, LOADER, target)
    return builder


def digest(builder: ProgressiveRackBuilder) -> str:
    return tensor_digest(builder.build_rack())


@pytest.mark.parametrize("kind", KINDS)
def test_growth_goes_on_from_the_rack_before_its_anneal(kind: str) -> None:
    """With anneals after the first and second stack, bit for bit what growing to three at once gives."""
    config = annealing(kind)
    builder = ProgressiveRackBuilder(config)
    rack, indices = builder.build_rack(), list[list[int]]()
    for target in (1, 2, 3):
        stacks = list(builder.stacks)
        results = ProgressiveTrainer(config).train_progressively(builder, LOADER, target)
        indices.append([result.index for result in results])
        assert set(stacks) < set(builder.stacks)
    assert indices == [[0, 1], [1, 2], [2, 3]]
    assert builder.build_rack() is rack
    assert digest(builder) == digest(grown(annealing(kind), 3))


def test_statistics_of_a_quantised_stream_go_back_too() -> None:
    builder, at_once = (grown(annealing("full", dtype="int8"), *targets) for targets in ((2, 3), (3,)))
    assert digest(builder) == digest(at_once)
    assert all(a.equal(b) for k in range(3) for a, b in zip(builder.channels[k], at_once.channels[k], strict=True))


def test_a_rack_is_annealed_once() -> None:
    config = annealing()
    builder = grown(config, 2)
    annealed = digest(builder)
    assert ProgressiveTrainer(config).train_progressively(builder, LOADER, 2) == []
    assert ProgressiveTrainer(annealing()).train_progressively(builder, LOADER, 2) == []
    assert digest(builder) == annealed


def test_another_anneal_takes_the_place_of_the_first() -> None:
    builder = grown(annealing(), 2)
    (result,) = ProgressiveTrainer(annealing(joint_steps=5)).train_progressively(builder, LOADER, 2)
    assert (result.index, result.steps) == (2, 5)
    assert digest(builder) == digest(grown(annealing(joint_steps=5), 2))


def test_growth_without_an_anneal_goes_on_from_the_rack_before_it() -> None:
    builder = grown(annealing(), 2)
    ProgressiveTrainer(annealing(joint_steps=0)).train_progressively(builder, LOADER, 3)
    assert digest(builder) == digest(grown(annealing(joint_steps=0), 3))


def test_a_stack_added_to_an_annealed_rack_grows_from_the_rack_before_it() -> None:
    builder = grown(annealing(), 2)
    annealed = digest(builder)
    builder.append_stack()
    del builder.build_rack().stacks[2:]  # it has changed nothing of the rest
    assert digest(builder) == annealed
    builder = grown(annealing(), 2)
    builder.append_stack()
    ProgressiveTrainer(annealing()).train_progressively(builder, LOADER, 3)
    assert digest(builder) == digest(grown(annealing(), 3))


@pytest.mark.parametrize("way", ["edited", "trained"])
def test_what_is_done_to_an_annealed_rack_is_kept(way: str) -> None:
    config = annealing()
    builder = grown(config, 2)
    if way == "edited":
        with torch.no_grad():
            next(builder.stack(0).parameters()).add_(1.0)
    else:
        ProgressiveTrainer(config).train_rack(builder, LOADER)
    kept = tensor_digest(builder.stack(0))
    config.training.joint_steps = 0
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 3)
    assert tensor_digest(builder.stack(0)) == kept


def test_an_interrupted_anneal_begins_again_from_the_rack_before_it() -> None:
    config, seen = annealing(), list[float]()
    hooks = Hooks(on_step=lambda record: seen.append(record["loss"]), should_stop=lambda: len(seen) == 5)
    builder = ProgressiveRackBuilder(config)
    with pytest.raises(StageInterruptedError):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 2, hooks=hooks)
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)
    assert digest(builder) == digest(grown(config, 2))


def test_joint_training_from_scratch_trains_once_and_an_explicit_call_each_time() -> None:
    config = tiny(steps_per_stack=2, progressive={"enabled": False})
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    (result,) = trainer.train_progressively(builder, LOADER, 2)
    assert (result.mode, result.steps) == ("joint", 2)
    trained = digest(builder)
    assert trainer.train_progressively(builder, LOADER, 2) == trainer.train_rack(builder, LOADER, 2) == []
    assert digest(builder) == trained
    assert len(trainer.train_rack(builder, LOADER)) == len(trainer.train_rack(builder, LOADER)) == 1
    assert len(trainer.train_progressively(builder, LOADER, 3)) == 1
    assert (builder.n_stacks, len(trainer.history)) == (3, 4)


def test_quantised_stacks_that_were_never_trained_train_whole_at_first() -> None:
    """NF4 of random numbers, of which only adapters train, would be no model."""
    config = tiny(steps_per_stack=2, progressive={"new_stack_precision": "qlora", "qlora_rank": 2})
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    builder.append_stack()
    builder.append_stack()
    norms = [stack.state_dict()["blocks.0.ffn_norm.weight"].clone() for stack in builder.stacks]
    (first,) = trainer.train_rack(builder, LOADER)
    assert not any(
        n.equal(s.state_dict()["blocks.0.ffn_norm.weight"]) for n, s in zip(norms, builder.stacks, strict=True)
    )
    assert {entry["precision"] for entry in builder.get_rack_info()["stacks"]} == {"qlora"}
    (second,) = trainer.train_rack(builder, LOADER)  # adapters alone, besides embedding and head
    assert second.parameters["trained"] < first.parameters["trained"]
