"""Small stages to train in memory, and their weights to compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import PackedBatches
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.objectives.losses import Batch
from stackwise_core.stages.resolve import resolve_mask, resolve_order
from stackwise_core.stages.stages import OptimSpec, resolve_stage
from stackwise_core.training.boundary import LiveTrunk
from stackwise_core.training.in_memory import stage_inputs
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.trainer import ProgressiveTrainer
from support.runs import stage_model

T, STEPS = 10, 7


def tiny(objective: str = "mlm", tie: bool = True, **training: Any) -> StackWiseConfig:
    growth = {"target_stacks": 2, "max_stacks": 4, "training_objective": objective, **training.pop("progressive", {})}
    values = {"batch_size": 4, "steps_per_stack": STEPS, "warmup_steps": 2, "progressive": growth}
    if growth["training_objective"] == "mlm" and "time_interpretation" not in growth:
        values["mask_ratio"] = 0.4
    model = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "blocks_per_stack": 1, "tie_embeddings": tie}
    sections = {"model": model, "data": {"seq_len": T}, "training": {**values, **training}, "hardware": {"threads": 1}}
    return StackWiseConfig.from_dict(sections)


def sequences(n: int = 18) -> PackedSequences:
    tokens = np.random.default_rng(3).integers(0, 256, (n, T)).astype(np.uint16)
    return PackedSequences(tokens, np.arange(n, dtype=np.int64))


def loader_of(n_batches: int = 4, batch_size: int = 4) -> list[Tensor]:
    return list(torch.from_numpy(sequences(n_batches * batch_size).tokens.astype(np.int64)).split(batch_size))


def stage_of(config: StackWiseConfig, index: int) -> tuple[StageModel, Callable[[int], Iterable[Batch]]]:
    """A stage as the flow has it: what trains, and its batches from any step on."""
    builder = ProgressiveRackBuilder(config)
    for n in range(index + 1):
        builder.append_stack()
        builder.prepare_stage(resolve_stage(config, n))
    rack, data = builder.build_rack(), sequences()
    trunk = LiveTrunk(rack.embedding, builder.stacks[:index], Stream("bfloat16")) if index else None

    def batches_from(step: int) -> Iterable[Batch]:
        order = resolve_order(config, len(data))
        base = PackedBatches(data, order, step, STEPS)
        return ProgressiveDataLoader(base, resolve_mask(config, index), index, trunk)

    return stage_model(rack, index), batches_from


def spec_of(**changes: Any) -> OptimSpec:
    return resolve_stage(tiny(), 0).optim.model_copy(update=changes)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def grown(config: StackWiseConfig, target: int, builder: Any = None, **how: Any) -> ProgressiveRackBuilder:
    builder = builder or ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, loader_of(), target, **how)
    return builder


def begins_with(builder: ProgressiveRackBuilder, config: StackWiseConfig) -> dict[str, Tensor]:
    """The moments with which the next growth stage of a rack begins."""
    builder = copy.deepcopy(builder)
    index = builder.n_stacks
    built = builder.as_built(config)
    built.training.progressive.target_stacks = index + 1
    spec = resolve_stage(built, index)
    builder.add_stack(config)
    builder.prepare_stage(spec)
    return dict(stage_inputs(builder, built, spec, loader_of()).moments)
