"""The numbers of one tiny run, pinned, so that a change of them cannot pass unnoticed under an unchanged id."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.packing import Corpus, pack
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.data.sources import Document
from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import PackedBatches
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.stages.identity import NUMERICS, Kind
from stackwise_core.stages.resolve import resolve_mask, resolve_order
from stackwise_core.stages.stages import resolve_stage
from stackwise_core.training.boundary import InputsFromTokens, LiveTrunk, RowsFromTokens
from stackwise_core.training.evaluate import judge_rack
from stackwise_core.training.training import train_stack
from support.older_torch import older_torch
from support.runs import stage_model

CONFIG = {
    "run": {"seed": 1},
    "data": {"seq_len": 16, "validation_fraction": 0.2},
    "model": {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40, "blocks_per_stack": 1},
    "training": {"batch_size": 4, "steps_per_stack": 3, "warmup_steps": 1, "mask_ratio": 0.3},
}

GOLDEN: dict[str, tuple[int, dict[str, float]]] = {
    "data": (
        1,
        {"train": 326398.6290756, "validation": 81234.9489796},
    ),
    "build 0": (
        1,
        {"stack": 198.5415931, "embedding and head": 358.8788697},
    ),
    "stack 0": (
        1,
        {"loss 0": 5.5343475, "loss 1": 5.5212011, "loss 2": 5.4373479, "weights": 594.2792243},
    ),
    "build 1": (
        1,
        {"stack": 200.6670354, "embedding and head": 373.1379534},
    ),
    "stack 1": (
        1,
        {"loss 0": 5.3073397, "loss 1": 5.3478675, "loss 2": 5.2927146, "weights": 610.216104},
    ),
    "activations 0": (
        1,
        {"rows": 19.8302832},
    ),
    "validation 1": (
        1,
        {"validation_loss": 5.1810198, "validation_loss_exact": 5.1810468, "loss_positions": 35},
    ),
}


def checksum(values: Any) -> float:
    """A weighted sum that sees order and sign, and that does not cancel: rounding stays relative to it."""
    flat = torch.as_tensor(values).double().flatten()
    return ((flat.abs() + flat / 2) * torch.linspace(1, 2, len(flat), dtype=torch.float64)).sum().item()


def weights_of(*modules: nn.Module) -> float:
    return checksum(torch.cat([p.detach().flatten() for module in modules for p in module.parameters()]))


def text() -> Corpus:
    words = " ".join(str(n * n) for n in range(600)).encode()
    return Corpus("squares", (Document("squares", words, ""),), "")


@cache
def numbers_of_the_run() -> dict[str, dict[str, float]]:
    """Two stages as the flow makes them: float32 on a CPU, the stream in bfloat16."""
    config = StackWiseConfig.from_dict(CONFIG)
    data = config.data
    train, validation = pack(text(), ByteTokenizer(), data.seq_len, 0, data.validation_fraction)
    builder, found = ProgressiveRackBuilder(config), dict[str, dict[str, float]]()
    rack = builder.build_rack()
    found["data"] = {"train": checksum(train.tokens.astype(int)), "validation": checksum(validation.tokens.astype(int))}
    for index in range(2):
        new = builder.append_stack()
        builder.prepare_stage(resolve_stage(config, index))
        found[f"build {index}"] = {
            "stack": weights_of(new),
            "embedding and head": weights_of(rack.embedding, rack.head),
        }
        trunk = LiveTrunk(rack.embedding, builder.stacks[:index], Stream("bfloat16"))
        losses = train_stage(config, index, train, trunk, builder)
        found[f"stack {index}"] = {f"loss {n}": loss for n, loss in enumerate(losses)}
        found[f"stack {index}"] |= {"weights": weights_of(rack.embedding, new, rack.head)}
    mask = resolve_mask(config, 1)
    trunk = LiveTrunk(rack.embedding, builder.stacks[:1], Stream("bfloat16"))
    rows = RowsFromTokens(InputsFromTokens(train, validation, mask), trunk).rows(np.array([3, 0]), 2)
    found["activations 0"] = {"rows": checksum(rows.float())}
    assert mask is not None
    batch = validation_batch(validation.fields(np.arange(8)), mask)
    (found["validation 1"],) = judge_rack(
        rack.embedding, builder.stacks, rack.head, [batch], stream=Stream("bfloat16"), boundary=1
    )
    return found


def train_stage(
    config: StackWiseConfig, index: int, train: PackedSequences, trunk: LiveTrunk, builder: ProgressiveRackBuilder
) -> list[float]:
    spec = resolve_stage(config, index).optim
    base = PackedBatches(train, resolve_order(config, len(train)), 0, spec.steps)
    loader = ProgressiveDataLoader(base, resolve_mask(config, index), index, trunk if index else None)
    return [record["loss"] for record in train_stack(stage_model(builder.build_rack(), index), loader, spec)]


@pytest.mark.parametrize("name", GOLDEN)
def test_numbers_are_what_they_were(name: str) -> None:
    """To 1e-3 relative: three steps amplify what other kernels round otherwise, a change of meaning is far larger."""
    kind: Kind = name.split()[0]  # pyright: ignore[reportAssignmentType]
    version, golden = GOLDEN[name]
    found = numbers_of_the_run()[name]
    assert version == NUMERICS[kind], f"NUMERICS[{kind!r}] was bumped: pin the new numbers here, {found}"
    assert found == pytest.approx(golden, rel=1e-3), (
        f"The numbers of {name!r} changed under an unchanged id. If that is intended, bump NUMERICS[{kind!r}] in "
        f"stackwise_core/stages/identity.py and pin in this file: {found}. If not, this is the bug."
    )


def test_every_kind_with_numbers_is_pinned() -> None:
    """`trunk` is a list of stacks; `optimizer` and `cooldown` have the numbers of a stack and of a validation."""
    assert {name.split()[0] for name in GOLDEN} == NUMERICS.keys() - {"trunk", "optimizer", "cooldown"}


def test_torch_2_11_gives_the_same_bits() -> None:
    with older_torch():
        assert numbers_of_the_run.__wrapped__() == numbers_of_the_run()
