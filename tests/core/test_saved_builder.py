"""A builder that was saved and loaded goes on as if it had not been: the same bits, the same answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, SavedRackError
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.training.trainer import ProgressiveTrainer
from support.training import loader_of, tiny

pytestmark = pytest.mark.usefixtures("one_thread_per_module")

LOADER = loader_of()


def grow(builder: ProgressiveRackBuilder, config: StackWiseConfig, target: int) -> list[list[float]]:
    results = ProgressiveTrainer(config).train_progressively(builder, LOADER, target)
    return [result.losses for result in results]


def state_of(builder: ProgressiveRackBuilder) -> dict[str, Any]:
    channels = {index: [part.tolist() for part in found] for index, found in builder.channels.items()}
    rack = builder.build_rack()
    order = [stack.creation_index for stack in builder.stacks]
    told = builder.n_trained, builder.get_rack_info(), channels, rack.tied, order
    return {"digest": tensor_digest(rack), "told": told}


def small(**growth: Any) -> StackWiseConfig:
    """A configuration whose stages take three steps; a `joint` is the number of steps of the anneal."""
    training = {"steps_per_stack": 3, "joint_steps": growth.pop("joint", 0)}
    config = tiny(growth.pop("objective", "clm"), **training, progressive=growth)
    config.model.n_kv_heads = 0
    config.model.d_ff = 32
    return config


def mixed(config: StackWiseConfig) -> ProgressiveRackBuilder:
    builder = ProgressiveRackBuilder(config)
    builder.append_stack(precision="half")
    builder.prepend_stack(n_blocks=2, precision="qlora")
    builder.append_stack(precision="nvfp4")
    return builder


def by_dimensions(config: StackWiseConfig) -> ProgressiveRackBuilder:
    sizes: dict[str, Any] = {name: getattr(config.model, name) for name in ("d_model", "n_heads", "d_ff", "vocab_size")}
    return ProgressiveRackBuilder(building_mode="prepend", default_precision="bfloat16", **sizes)


def inserted(config: StackWiseConfig) -> ProgressiveRackBuilder:
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    builder.insert_stack()  # at the bottom, as a prepended one, but with a tail that trains
    return builder


CASES: dict[str, tuple[dict[str, Any], Callable[[StackWiseConfig], ProgressiveRackBuilder], int]] = {
    "first stage, tied": ({}, ProgressiveRackBuilder, 1),
    "adapters of the trunk": ({"trunk_strategy": "qlora", "progressive_qlora": True}, ProgressiveRackBuilder, 2),
    "mixed, by hand": ({"qlora_rank": 2, "objective": "mlm"}, mixed, 2),
    "inserted, by hand": ({"building_mode": "insert"}, inserted, 1),
    "by dimensions": ({}, by_dimensions, 2),
    "annealed": ({"joint": 3, "qlora_enabled": True}, ProgressiveRackBuilder, 2),
    "time": ({"time_interpretation": "input", "num_time_steps": 5, "objective": "mlm"}, ProgressiveRackBuilder, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_growing_on_has_the_same_bits(case: str, tmp_path: Path) -> None:
    growth, build, target = CASES[case]
    config = small(**growth)
    builder = build(config)
    grow(builder, config, target)
    builder.save(tmp_path / "rack")
    loaded = ProgressiveRackBuilder.load(tmp_path / "rack")
    assert state_of(loaded) == state_of(builder)
    if case == "annealed":
        assert grow(loaded, config, target) == []  # it is annealed already
    assert grow(loaded, config, target + 1) == grow(builder, config, target + 1)
    assert state_of(loaded) == state_of(builder)
    assert len(loaded.append_stack().blocks) == len(builder.append_stack().blocks)
    assert state_of(loaded) == state_of(builder)


def test_statistics_of_a_quantised_stream_are_kept(tmp_path: Path) -> None:
    config = small()
    config.cache.dtype = "int8"
    builder = ProgressiveRackBuilder(config)
    grow(builder, config, 1)
    assert builder.channels
    builder.save(tmp_path / "rack")
    loaded = ProgressiveRackBuilder.load(tmp_path / "rack")
    assert grow(loaded, config, 2) == grow(builder, config, 2)
    assert state_of(loaded) == state_of(builder)


def test_a_second_save_is_byte_for_byte_the_first(tmp_path: Path) -> None:
    config = small(joint=3, qlora_enabled=True)
    builder = mixed(config)
    grow(builder, config, 3)
    builder.save(tmp_path / "one")
    ProgressiveRackBuilder.load(tmp_path / "one").save(tmp_path / "two")
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two
    assert Path("before-joint/stack-1/adapter-stack.safetensors") in one


def test_what_was_left_at_its_default_still_says_nothing(tmp_path: Path) -> None:
    """The file holds every key, but the builder's own ways would contradict what only a default says."""
    builder = by_dimensions(small())
    builder.append_stack()
    builder.save(tmp_path / "rack")
    loaded = ProgressiveRackBuilder.load(tmp_path / "rack")
    assert loaded.add_stack().creation_index == 1
    assert [stack.creation_index for stack in loaded.stacks] == [1, 0]
    assert {stack.precision for stack in loaded.stacks} == {"bfloat16"}
    config = small(building_mode="append")
    with pytest.raises(ConfigError, match="the builder was given building_mode='prepend'"):
        grow(loaded, config, 3)


def test_a_configuration_with_function_objects_is_given_again(tmp_path: Path) -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)

    config = small(objective="custom")
    config.training.custom_loss = loss
    rows = [{"input_ids": batch, "targets": batch} for batch in LOADER]
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, rows, 1)
    builder.save(tmp_path / "rack")
    with pytest.raises(ConfigError, match=r"config: got None; none was saved \(training.custom_loss: got a callable"):
        ProgressiveRackBuilder.load(tmp_path / "rack")
    loaded = ProgressiveRackBuilder.load(tmp_path / "rack", config)
    assert state_of(loaded) == state_of(builder)


def test_nothing_that_the_folder_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange.py").write_text("def steps(stack, stacks, steps): return stack\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = small(
        objective="mlm", time_interpretation="depth", stack_time_mapping="custom", time_mapping="strange:steps"
    )
    ProgressiveRackBuilder(config).save(tmp_path / "rack")
    sys.modules.pop("strange")
    with pytest.raises(
        ConfigError, match=r"trust_functions: got False; .*rack names strange:steps: set it if you trust"
    ):
        ProgressiveRackBuilder.load(tmp_path / "rack")
    assert "strange" not in sys.modules
    ProgressiveRackBuilder.load(tmp_path / "rack", trust_functions=True)
    assert sys.modules.pop("strange")


def test_a_rack_without_its_builder_needs_a_configuration_that_fits(tmp_path: Path) -> None:
    config = small()
    builder = ProgressiveRackBuilder(config)
    grow(builder, config, 2)
    builder.build_rack().save(tmp_path / "rack")
    with pytest.raises(ConfigError, match=r"config: got None; none was saved \(the rack was saved without its builder"):
        ProgressiveRackBuilder.load(tmp_path / "rack")
    loaded = ProgressiveRackBuilder.load(tmp_path / "rack", config)
    assert loaded.n_trained == 2
    assert grow(loaded, config, 3) == grow(builder, config, 3)
    other = small()
    other.model.d_model = 32
    with pytest.raises(ConfigError, match=r"model.d_model: got 32; the rack is trained or edited with 16"):
        ProgressiveRackBuilder.load(tmp_path / "rack", other)


def test_a_damaged_builder_is_refused(tmp_path: Path) -> None:
    ProgressiveRackBuilder(small()).save(tmp_path / "rack")
    (tmp_path / "rack/builder.json").write_text("{}")
    with pytest.raises(SavedRackError, match=r"builder.json: is damaged"):
        ProgressiveRackBuilder.load(tmp_path / "rack")


def test_weights_that_a_custom_loop_trained_are_kept(tmp_path: Path) -> None:
    config = small()
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    builder.append_stack()
    builder.freeze_trunk()
    with torch.no_grad():
        for parameter in builder.stacks[1].parameters():
            parameter.mul_(1.5)
    builder.save(tmp_path / "rack")
    loaded = ProgressiveRackBuilder.load(tmp_path / "rack")
    assert state_of(loaded) == state_of(builder)  # also what is frozen
    assert grow(loaded, config, 2) == grow(builder, config, 2)
    assert state_of(loaded) == state_of(builder)
