"""Growing in memory: stacks added by hand, and a configuration edited between stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stackwise_core.model.adapters import adapter_state
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.training.trainer import ProgressiveTrainer
from support.modes import LORA, G
from support.runs import tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_stacks_added_by_hand_train_in_creation_order(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}target_stacks": 3})
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    builder.prepend_stack(n_blocks=2)
    builder.append_stack(precision="bfloat16")
    tokens = [torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    results = ProgressiveTrainer(config).train_progressively(builder, tokens, target_stacks=4)
    assert [result.index for result in results] == [0, 1, 2, 3]
    assert [stack.creation_index for stack in builder.stacks] == [1, 0, 2, 3]
    info = builder.get_rack_info()["stacks"]
    assert [entry["n_blocks"] for entry in info] == [2, 1, 1, 1]
    assert [entry["precision"] for entry in info] == ["full", "full", "bfloat16", "full"]
    assert all(result.loss < 6.0 for result in results)


def test_an_edit_of_the_configuration_holds_from_the_next_stage_on(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}qlora_enabled": True, **LORA})
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    tokens = [torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    trainer.train_progressively(builder, tokens, target_stacks=2)
    trunk = {c: adapter_state(builder.stack(c), "stack") for c in (0, 1)}
    frozen = {c: {key: value.clone() for key, value in state.items()} for c, state in trunk.items()}
    trainer.train_progressively(builder, tokens, target_stacks=3)
    assert all(frozen[c][key].equal(value) for c in (0, 1) for key, value in trunk[c].items())
    config.training.progressive.trunk_strategy = "qlora"
    trainer.train_progressively(builder, tokens, target_stacks=4)
    assert not any(frozen[c][key].equal(value) for c in (0, 1) for key, value in trunk[c].items() if "lora_B" in key)


def test_a_key_that_only_a_stack_added_by_hand_needs_is_no_fault(tmp_path: Path) -> None:
    config = tiny(tmp_path, {f"{G}new_stack_precision": "qlora", f"{G}qlora_rank": 4})
    builder = ProgressiveRackBuilder(config)
    builder.append_stack(precision="full")
    builder.append_stack()
    assert [entry["adapters"] for entry in builder.get_rack_info()["stacks"]] == [[], ["stack"]]
