"""What is sharded how, and what of it comes together again; that ranks train as one process does is in test_ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from stackwise_core import ProgressiveRackBuilder
from stackwise_core.stages.stages import Anatomy, resolve_stage
from stackwise_core.training import distributed
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import Hooks, StageInputs, TrainingState, capture, train_stage
from support.runs import stage_model, tiny
from support.training import stage_of
from support.training import tiny as small


@pytest.mark.parametrize(
    ("precisions", "expected"),
    [
        (("full", "full"), None),
        (("half", "bfloat16"), None),
        (("full", "bfloat16"), None),
        (("bfloat16", "bfloat16"), torch.bfloat16),
        (("half", "half"), torch.float16),
    ],
)
def test_blocks_are_gathered_in_the_type_that_all_compute_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precisions: tuple[Any, Any], expected: torch.dtype | None
) -> None:
    seen: list[tuple[Any, MixedPrecisionPolicy]] = []

    def fully_shard(what: Any, *, mesh: Any, ignored_params: Any, mp_policy: MixedPrecisionPolicy | None = None) -> Any:
        assert not ignored_params
        seen.append((what, mp_policy or MixedPrecisionPolicy()))
        return what

    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(distributed, "fully_shard", fully_shard)
    builder = ProgressiveRackBuilder(tiny(tmp_path))
    stacks = [builder.append_stack(precision=precision) for precision in precisions]
    rack, shards = builder.build_rack(), object.__new__(distributed.Shards)
    shards.device, shards.count = torch.device("cuda"), 2
    anatomy = Anatomy(order=(0, 1), trains=("everything",) * 2, embedding_trains=True, head_trains=True)
    shards.wrap(StageModel(anatomy, stacks, rack.head, rack.embedding))
    blocks = [block for stack in stacks for block in stack.blocks]
    groups = blocks if expected is None else [[block.attention, block.ffn] for block in blocks]
    assert [what for what, _ in seen] == [*groups, shards.live]
    assert [policy.param_dtype for _, policy in seen] == [expected] * len(blocks) + [None]
    # The stream stays float32, and so does a sum over processes.
    assert expected is None or all(not policy.cast_forward_inputs for _, policy in seen[:-1])
    assert expected is None or all(policy.reduce_dtype is torch.float32 for _, policy in seen[:-1])


@pytest.mark.parametrize("rank", [0, 1])
def test_what_all_processes_have_is_in_the_checkpoint_of_the_first(rank: int, tmp_path: Path) -> None:
    builder = ProgressiveRackBuilder(tiny(tmp_path))
    builder.append_stack()
    model = stage_model(builder.build_rack(), 0)
    optimizer, ranks = torch.optim.SGD(model.parameters()), object.__new__(distributed.Replicas)
    ranks.rank = rank
    held = capture(model, optimizer, [], ranks).tensors
    assert held.keys() == ({f"model.{name}" for name, _ in model.named_parameters()} if rank == 0 else set())
    assert all(held[f"model.{name}"].data_ptr() == p.data_ptr() for name, p in model.named_parameters() if held)


def test_frozen_tensors_and_blocks_stay_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[Any, Any] = {}

    def fully_shard(what: Any, *, mesh: Any, ignored_params: Any, mp_policy: Any = None) -> Any:
        seen[what] = ignored_params
        return what

    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(distributed, "fully_shard", fully_shard)
    builder = ProgressiveRackBuilder(tiny(tmp_path))
    stacks = [builder.append_stack() for _ in range(2)]
    rack, shards = builder.build_rack(), object.__new__(distributed.Shards)
    shards.device, shards.count = torch.device("cpu"), 2
    anatomy = Anatomy(order=(0, 1), trains=("everything", "nothing"), embedding_trains=True, head_trains=False)
    model = StageModel(anatomy, stacks, rack.head, rack.embedding)
    shards.wrap(model)
    assert [*seen] == [*stacks[0].blocks, shards.live]
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen >= {*stacks[1].parameters()}
    assert all(ignored == frozen for ignored in seen.values())


def test_a_stage_that_is_over_makes_no_moments_and_hands_its_state_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What several processes trained need not fit one device with them."""
    model, batches_from = stage_of(small(), 0)
    spec, ended = resolve_stage(small(), 0), list[TrainingState]()
    train_stage(StageInputs(spec, model, batches_from(0)), Hooks(on_end=ended.append))
    state, expected = ended[0].copy(), [p.detach().clone() for p in model.parameters()]
    again, _ = stage_of(small(), 0)
    monkeypatch.delattr("stackwise_core.training.training.make_optimizer")
    trained = train_stage(StageInputs(spec, again, [], state), Hooks(on_end=ended.append))
    assert trained.records == state.records
    assert (ended[1].step, ended[1].tensors) == (state.step, state.tensors)
    assert all(here.equal(there) for here, there in zip(again.parameters(), expected, strict=True))
