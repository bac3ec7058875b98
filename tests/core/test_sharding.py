"""What is sharded how, and what of it comes together again; that ranks train as one process does is in test_ranks."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from stackwise_core import ProgressiveRackBuilder
from stackwise_core.stages.stages import Anatomy
from stackwise_core.training import distributed
from stackwise_core.training.stage_model import Ranks, StageModel
from stackwise_core.training.training import capture
from support.runs import stage_model, tiny


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

    def fully_shard(what: Any, *, mesh: Any, mp_policy: MixedPrecisionPolicy | None = None) -> Any:
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


class Sharded(Ranks):
    """Gathers a tensor into a new one, and looks whether the one before is still there."""

    count = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.gathered: list[weakref.ref[torch.Tensor]] = []
        self.kept = 0

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept += bool(self.gathered and self.gathered[-1]() is not None)
        whole = tensor.clone()
        self.gathered.append(weakref.ref(whole))
        return whole


def test_only_the_first_process_keeps_what_is_gathered(tmp_path: Path) -> None:
    builder = ProgressiveRackBuilder(tiny(tmp_path))
    builder.append_stack()
    model = stage_model(builder.build_rack(), 0)
    optimizer, n = torch.optim.SGD(model.parameters()), len(list(model.parameters()))
    first, other = Sharded(0), Sharded(1)
    assert len(capture(model, optimizer, [], first).tensors) == n
    assert capture(model, optimizer, [], other).tensors == {}
    # All take part in every gathering.
    assert len(first.gathered) == len(other.gathered) == n
    assert (first.kept, other.kept) == (n - 1, 0)
