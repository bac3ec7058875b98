"""Untrained racks at a stage of their growth, with batches, and their loss written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.config import StackWiseConfig
from stackwise_core.model.rack import Rack
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.stages.resolve import resolve_mask
from stackwise_core.stages.stages import resolve_stages
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import end_stage

Reference = Callable[..., Path]


def built(config: StackWiseConfig, n_stacks: int) -> ProgressiveRackBuilder:
    """Return an untrained rack, every parameter moved a little so that nothing is zero by construction."""
    builder = ProgressiveRackBuilder(config)
    for _ in range(n_stacks):
        builder.add_stack()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in builder.build_rack().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return builder


def model_of(builder: ProgressiveRackBuilder, config: StackWiseConfig, stage: int) -> StageModel:
    spec = resolve_stages(config)[stage]
    builder.prepare_stage(spec)
    rack, stacks = builder.build_rack(), {stack.creation_index: stack for stack in builder.stacks}
    return StageModel.assemble(config, spec.anatomy, stacks, rack.head, rack.embedding, torch.device("cpu"))


def finish(builder: ProgressiveRackBuilder, config: StackWiseConfig, stage: int) -> None:
    """End a stage as if it had trained."""
    end_stage(model_of(builder, config, stage))
    builder.finish_stage(resolve_stages(config)[stage].anatomy)


def batch_of(config: StackWiseConfig, stage: int, trunk: Any = None) -> dict[str, Any]:
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))
    objective = config.training.progressive.training_objective
    loader = ProgressiveDataLoader([tokens], resolve_mask(config, stage), stage, trunk, objective=objective)
    return next(iter(loader))


def residual_stream() -> Tensor:
    """Return the same input of a stack in every test, whatever ran before."""
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def dense_loss(rack: Rack, batch: dict[str, Any]) -> Tensor:
    """The mean cross-entropy of a whole rack, written out: no stage model, no head at loss positions only."""
    x = rack.embedding(batch["input_ids"])
    for stack in rack.stacks:
        x = stack(x)
    logits = rack.head.projection(rack.head.norm(x))
    positions = batch.get("combined_masks", batch["masks"])
    losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return losses[positions.flatten()].mean()


def gradients(module: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
